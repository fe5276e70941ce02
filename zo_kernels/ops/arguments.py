"""Checks that the operations share."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zo_kernels.checks import (
    check_offset,
    check_tensor,
    expect_int,
    expect_length,
    expect_range,
    expect_words,
)
from zo_kernels.noise import DISTRIBUTIONS
from zo_kernels.ops.dispatch import backend_for
from zo_kernels.places import places


def check_lists(
    name: str,
    tensors: Sequence[Tensor],
    streams: object,
    offsets: object,
) -> tuple[list[int], list[int]]:
    """streams and offsets as lists, one of each per tensor; each tensor as ``combine_`` takes it.

    Raises:
        TypeError, ValueError: naming the tensor or option, what was expected and what came.
    """
    words = expect_words("streams", streams)
    expect_length("streams", words, len(tensors), name)
    if offsets is None:
        offsets = [0] * len(tensors)
    if not isinstance(offsets, (list, tuple)):
        raise TypeError(f"offsets: expected None or a list of ints, got {type(offsets).__name__}")
    starts = [expect_int(f"offsets[{i}]", offset) for i, offset in enumerate(offsets)]
    expect_length("offsets", starts, len(tensors), name)
    for i, (tensor, start) in enumerate(zip(tensors, starts, strict=True)):
        check_tensor(f"{name}[{i}]", tensor)
        check_offset(f"offsets[{i}]", start, tensor.numel())
    return words, starts


def check_noise(seed: object, distribution: object) -> dict[str, Any]:
    """seed and distribution as every backend takes them; TypeError or ValueError otherwise."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {DISTRIBUTIONS}, got {distribution!r}")
    return {"seed": expect_range("seed", seed, 1 << 64), "distribution": distribution}


def stochastic(rounding: object) -> bool:
    """Whether rounding is "stochastic"; ValueError unless it is that or "nearest"."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    return rounding == "stochastic"


def rooms_of(
    tensors: Sequence[Tensor], backend: str | None
) -> list[tuple[ModuleType, torch.device, list[int]]]:
    """Each device's backend and the places of its tensors; refuses before any is used."""
    members = places(tensor.device for tensor in tensors)
    return [(backend_for(device, backend), device, found) for device, found in members.items()]
