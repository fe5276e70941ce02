"""The Triton backend: GPUs, or the CPU where TRITON_INTERPRET=1 was set before triton's import."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

from zo_kernels.backends.triton import launch as _launch
from zo_kernels.backends.triton import perturb as _perturb
from zo_kernels.backends.triton import quantize as _quantize
from zo_kernels.backends.triton.interpreter import mend
from zo_kernels.backends.triton.launch import interpreting
from zo_kernels.backends.triton.updates import advance_, pair_

if knobs.runtime.interpret:
    mend()

__all__ = [
    "DEVICE_SCALES", "advance_", "combine_", "fake_quant", "interpreting", "normal", "pair_",
    "rademacher", "random_words", "unavailable_reason",
]  # fmt: skip

#: combine_ reads ``scales`` and ``directions`` that are tensors when its kernel runs.
DEVICE_SCALES = True


def unavailable_reason() -> str | None:
    """Why this backend cannot be used, or None if it can."""
    if interpreting() or torch.cuda.is_available():
        return None
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return None
    return "no GPU is visible to torch, and TRITON_INTERPRET=1 is not set"


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[Sequence[float]] | Tensor,
    *,
    seed: int,
    directions: Sequence[int] | Tensor,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> None:
    """dst = round(src_scale * src + sum_k scales[.][k] z_k); see zo_kernels.ops.combine_.

    One launch per pair of dtypes. scales, float32 (K,) or (tensors, K), and directions, int64
    (K,), may be tensors on the device.
    """
    device = dst[0].device
    count = len(directions)
    if not isinstance(scales, Tensor):
        scales, directions = _launch.device_arguments(scales, directions, device)
    elif scales.dim() == 1:
        scales = scales.expand(len(dst), -1).contiguous()
    if changes is not None:
        changes.zero_()
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (d, s) in enumerate(zip(dst, src, strict=True)):
        groups.setdefault((s.dtype, d.dtype), []).append(i)
    for (src_dtype, dst_dtype), members in groups.items():
        table, grid = _launch.device_table(
            [dst[i] for i in members],
            [src[i] for i in members],
            [streams[i] for i in members],
            [offsets[i] for i in members],
            members,
            device,
        )
        if grid == 0:
            continue
        partials = _launch.partial_sums(grid, changes is not None, device)
        with _launch.on(device):
            _launch.combine(
                table,
                grid,
                scales,
                directions,
                partials,
                seed,
                src_scale,
                _launch.options(device),
                _launch.constants(
                    src_dtype,
                    dst_dtype,
                    stochastic=stochastic,
                    rademacher=distribution == "rademacher",
                    single=count == 1,
                    scale_src=src_scale != 1.0,
                    changes=changes is not None,
                ),
            )
        if changes is not None:
            _launch.sum_changes(partials, table, changes)


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


def fake_quant(out: Tensor, tensor: Tensor, scheme: str, *, group: int, symmetric: bool) -> None:
    """out = tensor on the scheme's grid, a scale per group; see zo_kernels.quantize.fake_quant."""
    options = _launch.options(tensor.device, _quantize.LANES)
    with _launch.on(tensor.device):
        _quantize.launch(out, tensor, scheme, group, symmetric, options)
