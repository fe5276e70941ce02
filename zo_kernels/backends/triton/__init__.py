"""The Triton backend: GPUs, or the CPU where TRITON_INTERPRET=1 was set before triton's import."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from zo_kernels.backends.reference_quantize import group_ends  # torch's own reduction is exact
from zo_kernels.backends.triton import launch as _launch
from zo_kernels.backends.triton import perturb as _perturb
from zo_kernels.backends.triton.combine import combine_
from zo_kernels.backends.triton.held import swap_
from zo_kernels.backends.triton.interpreter import mend
from zo_kernels.backends.triton.launch import interpreting
from zo_kernels.backends.triton.perturb_quantize import perturb_quant
from zo_kernels.backends.triton.quantize import fake_quant
from zo_kernels.backends.triton.updates import advance_, pair_

if knobs.runtime.interpret:
    mend()

__all__ = [
    "DEVICE_SCALES", "FAKE_QUANT_FINDS_ENDS", "advance_", "combine_", "fake_quant", "group_ends",
    "interpreting", "normal", "pair_", "perturb_quant", "rademacher", "random_words", "swap_",
    "unavailable_reason",
]  # fmt: skip

#: combine_ reads ``scales`` and ``directions`` that are tensors when its kernel runs.
DEVICE_SCALES = True
#: fake_quant returns nothing.
FAKE_QUANT_FINDS_ENDS = False


def unavailable_reason() -> str | None:
    """Why this backend cannot be used, or None if it can."""
    if interpreting() or torch.cuda.is_available():
        return None
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return None
    return "no GPU is visible to torch, and TRITON_INTERPRET=1 is not set"


def _emit(what: str, count: int, dtype: torch.dtype, address: dict, device: torch.device) -> Tensor:
    out = torch.empty(count, dtype=dtype, device=device)
    seed, begin = address["seed"], address["offset"]
    end = begin + count
    lanes = _perturb.LANES
    programs = -(-end // (4 * lanes)) - begin // (4 * lanes)
    with _launch.on(device):
        _perturb.emit_kernel[(programs,)](
            out,
            begin,
            end,
            _launch.signed(seed & 0xFFFFFFFF),
            _launch.signed(seed >> 32),
            _launch.signed(address["stream"]),
            _launch.signed(address["direction"]),
            WHAT=what,
            LANES=lanes,
            **_launch.options(device),
        )
    return out


def normal(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z: (count,) float32."""
    address = {"seed": seed, "direction": direction, "stream": stream, "offset": offset}
    return _emit("normal", count, torch.float32, address, device)


def rademacher(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z, +1 or -1: (count,) float32."""
    address = {"seed": seed, "direction": direction, "stream": stream, "offset": offset}
    return _emit("rademacher", count, torch.float32, address, device)


def random_words(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Words of elements [offset, offset + count): (count,) int64 with values below 2^32."""
    address = {"seed": seed, "direction": direction, "stream": stream, "offset": offset}
    return _emit("random_words", count, torch.int32, address, device).long() & 0xFFFFFFFF
