"""Fake quantisation in plain torch: slow, exact, obvious; zo_kernels/formats.py line by line."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.formats import FORMATS, NF4_LEVELS, NF4_MIDPOINTS, Format

_CHUNK = 1 << 20  # elements at a time, to bound the temporaries


def fake_quant(out: Tensor, tensor: Tensor, scheme: str, *, group: int, symmetric: bool) -> None:
    """out = tensor on the scheme's grid, one scale per group; see zo_kernels.quantize.fake_quant.

    Args:
        out, tensor: contiguous, of one shape and dtype, apart or the same memory.
        group: elements per group, a divisor of the number of elements, at least 1.
    """
    form = FORMATS[scheme]
    source, result = tensor.view(-1, group), out.view(-1, group)
    count = max(1, _CHUNK // group)
    for first in range(0, len(source), count):
        rows = slice(first, first + count)
        low, high = source[rows].aminmax(dim=1, keepdim=True)
        grid = _grid(low.float(), high.float(), form, symmetric)
        for start in range(0, group, _CHUNK):
            here = rows, slice(start, start + _CHUNK)
            result[here] = _on_grid(source[here].float(), *grid, form, symmetric).to(out.dtype)


def _grid(low: Tensor, high: Tensor, form: Format, symmetric: bool) -> tuple[Tensor, ...]:
    """scale, s and zero of groups from their least and greatest elements, all float32."""
    top = form.top(symmetric)
    if symmetric:
        extent = torch.maximum(low.abs(), high.abs())
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        extent = (high - low).abs()
    # CUDA turns tensor / number into a product with the rounded reciprocal.
    scale = extent / torch.full_like(extent, top)
    safe = torch.where(scale > 0, scale, 1.0)
    zero = torch.zeros_like(scale) if symmetric else _rhe(-low / safe).clamp(0, top)
    return scale, safe, zero


def _on_grid(
    w: Tensor, scale: Tensor, safe: Tensor, zero: Tensor, form: Format, symmetric: bool
) -> Tensor:
    x = w / safe
    if form.kind == "nf4":
        midpoints = torch.tensor(NF4_MIDPOINTS, device=w.device)
        # bucketize counts the midpoints below x.
        return torch.tensor(NF4_LEVELS, device=w.device)[torch.bucketize(x, midpoints)] * scale
    if form.kind == "fp8":
        return _fp8(x, form) * scale
    top = form.top(symmetric)
    if symmetric:
        return _rhe(x).clamp(-top, top) * scale
    return ((_rhe(x) + zero).clamp(0, top) - zero) * scale


def _rhe(x: Tensor) -> Tensor:
    return x.round() + 0.0  # -0 + 0 is +0


def _fp8(x: Tensor, form: Format) -> Tensor:
    """The nearest values of the format, ties to even; every step but round() is exact."""
    exponent = torch.frexp(x).exponent - 1  # 2^exponent <= |x| < 2^(exponent + 1)
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=form.min_exponent) - form.mantissa)
    magnitude = (x.abs() / step).round() * step
    return magnitude.clamp(max=form.largest).copysign(x)
