"""Shared by the tests: comparing bits, hard weights, an independent Philox, the command line."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels import cli
from zo_kernels.ops import backend_reasons

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Elements and offsets of tensors: ragged, misaligned, over where a counter word changes.
PLACES = [(1, 0), (7, 3), (1500, 0), (4099, 4093), (9000, 2**34 - 4097), (300, 2**35 + 1)]
#: Streams for them.
STREAMS = [2**32 - 1, 0, 5, 6, 7, 8]
#: The same for Triton's interpreter, which takes a second for what others do in a millisecond.
FEW = [(7, 3), (1100, 0), (520, 2**34 - 259), (300, 2**35 + 1)]
_MASK = 0xFFFFFFFF


def interpreted(backend: str, device: str) -> bool:
    """Whether a backend's kernels run in Triton's interpreter."""
    return backend == "triton" and device == "cpu"


def runnable(backend: str) -> str:
    """The name of a backend; the test is skipped where this machine cannot run it."""
    reason = backend_reasons()[backend]
    if reason:
        pytest.skip(reason)
    return backend


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor of 2, 4 or 8 bytes per element, as integers on the CPU."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Equal bit for bit, the sign of zero included; only the payload of a NaN may differ."""
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    a, e = actual.detach().cpu(), expected.detach().cpu()
    assert torch.equal(a.isnan(), e.isnan()), f"{what}: NaN at different places"
    wrong = ((bits(a) != bits(e)) & ~e.isnan()).flatten().nonzero().flatten()
    assert len(wrong) == 0, (
        f"{what}: {len(wrong)} of {a.numel()} elements differ, first at {wrong[0].item()}: "
        f"{a.flatten()[wrong[0]].item()!r} instead of {e.flatten()[wrong[0]].item()!r}"
    )


def special_values(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, subnormals, the normal limit, ones, the largest, infinities, NaN."""
    info = torch.finfo(dtype)
    step = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    values = [0.0, step, 3 * step, info.tiny - step, info.tiny, 1.0, info.max, torch.inf]
    numbers = torch.tensor([x for v in values for x in (v, -v)] + [torch.nan], dtype=dtype)
    # The NaN with all bits set (GPUs make it): adding rounding bits to its pattern would wrap.
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    full = torch.tensor([torch.iinfo(integer).max, -1], dtype=integer).view(dtype)
    return torch.cat([numbers, full])


def weights(shape: int | Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights of many magnitudes; from 19 elements on every third one is a special value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = int(np.prod(shape))
    exponent = torch.randint(-16, 3, (count,), generator=generator).double()
    values = (torch.randn(count, generator=generator).double() * 2.0**exponent).to(dtype)
    special = special_values(dtype)
    if count >= len(special):
        places = torch.arange(0, count, 3)
        values[places] = special[torch.arange(len(places)) % len(special)]
    return values.view(shape)


def bordered(values: Tensor, device: str = "cpu", shift: int = 1) -> tuple[Tensor, Tensor]:
    """A buffer of sentinels, and a view of it that holds values, `shift` elements misaligned."""
    border = 64
    buffer = torch.full((values.numel() + 2 * border + shift,), 123.0, dtype=values.dtype)
    view = buffer[border + shift :][: values.numel()]
    view.copy_(values.flatten())
    buffer = buffer.to(device)
    return buffer, buffer[border + shift :][: values.numel()].view(values.shape)


def assert_borders_intact(buffer: Tensor, view: Tensor) -> None:
    """No sentinel around the view was written."""
    start = view.storage_offset()
    outside = torch.cat([buffer[:start], buffer[start + view.numel() :]])
    assert (outside == 123.0).all(), "written outside the tensor"


def combined(
    backend: str,
    device: str,
    src: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    scales: Sequence,
    **options: object,
) -> list[Tensor]:
    """combine_ out of place on the device; the results on the CPU."""
    dst = [torch.empty_like(s, dtype=d, device=device) for s, d in zip(src, dtypes, strict=True)]
    zk.combine_(dst, [s.to(device) for s in src], scales, backend=backend, **options)
    return [d.cpu() for d in dst]


def philox_words(block: int, *, seed: int, stream: int, direction: int) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, written from the paper and not from this package.

    test_noise.py proves it by the known answers of the authors' Random123.
    """
    k0, k1 = seed & _MASK, seed >> 32
    c = [block & _MASK, block >> 32, stream, direction]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k0, right & _MASK, (left >> 32) ^ c[3] ^ k1, left & _MASK]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return tuple(c)


def rounding_bits(words: Tensor) -> Tensor:
    """The 16 rounding bits of each element, from the words of whole blocks (int64, 4 n)."""
    low = (words & 0xFF).view(-1, 2)
    return torch.stack([low[:, 0] << 8 | low[:, 1], low[:, 1] << 8 | low[:, 0]], 1).flatten()


def run(*arguments: object) -> int:
    """The exit status of a command."""
    return cli.main([str(a) for a in arguments])


def left_behind() -> list[threading.Thread]:
    """Threads of the mode "dual" that still run."""
    return [thread for thread in threading.enumerate() if thread.name == "zo_kernels-dual"]
