"""z and the words behind it, as tensors: for looking at and testing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_kernels.checks import INDEX_LIMIT, check_offset, expect_int, expect_range
from zo_kernels.ops.dispatch import backend_for


def random_words(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Philox words of elements [offset, offset + count): (count,) int64 with values below 2^32.

    Args:
        count: number of words, at least 0.
        seed: 64-bit key, in [0, 2^64).
        direction: in [0, 2^32); training uses those below 2^31.
        stream: in [0, 2^32); ``stream_id(name)`` of a parameter.
        offset: first element's index in the full parameter.
        backend: None (by device), "reference", "native" or "triton".
        device: where the result lives.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _emit("random_words", count, seed, direction, stream, offset, backend, device)


def normal(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [offset, offset + count) of z: (count,) float32, for looking at and testing.

    Arguments and errors as for ``random_words``. Nothing in training calls it: z is never stored.
    """
    return _emit("normal", count, seed, direction, stream, offset, backend, device)


def rademacher(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [offset, offset + count) of a Rademacher z, +1 or -1: (count,) float32.

    Arguments and errors as for ``random_words``; nothing in training calls it.
    """
    return _emit("rademacher", count, seed, direction, stream, offset, backend, device)


def _emit(
    what: str,
    count: int,
    seed: int,
    direction: int,
    stream: int,
    offset: int,
    backend: str | None,
    device: torch.device | str,
) -> Tensor:
    device = torch.device(device)
    count = expect_range("count", count, INDEX_LIMIT)
    address = {
        "seed": expect_range("seed", seed, 1 << 64),
        "direction": expect_range("direction", direction, 1 << 32),
        "stream": expect_range("stream", stream, 1 << 32),
        "offset": expect_int("offset", offset),
    }
    check_offset("offset", offset, count)
    room = backend_for(device, backend)
    if count == 0:
        dtype = torch.int64 if what == "random_words" else torch.float32
        return torch.empty(0, dtype=dtype, device=device)
    function: Callable[..., Tensor] = getattr(room, what)
    return function(count, **address, device=device)
