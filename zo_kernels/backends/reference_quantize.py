"""Fake quantisation in plain torch: slow, exact, obvious; zo_kernels/formats.py line by line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zo_kernels.formats import FORMATS, NF4_LEVELS, NF4_MIDPOINTS, Format

_CHUNK = 1 << 20  # elements at a time, to bound the temporaries


def group_ends(tensor: Tensor, *, group: int) -> Tensor:
    """The least and the greatest element of each group, or 0; NaN wins: (2, groups) float32."""
    low, high = tensor.view(-1, group).aminmax(dim=1)
    return torch.stack([low.float().clamp(max=0), high.float().clamp(min=0)])


def fake_quant(
    out: Tensor,
    tensor: Tensor,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales: Tensor | None = None,
) -> None:
    """out = tensor on the scheme's grid, one scale per group; see zo_kernels.quantize.fake_quant.

    Args:
        out, tensor: contiguous, of one shape and dtype, apart or the same memory.
        group: elements per group, a divisor of the number of elements, at least 1.
        scales: (groups,) float32 instead of the groups' own; of nf4, only of its levels.
    """
    form = FORMATS[scheme]
    source, result = tensor.view(-1, group), out.view(-1, group)
    count = max(1, _CHUNK // group)
    for first in range(0, len(source), count):
        rows = slice(first, first + count)
        low, high = source[rows].aminmax(dim=1, keepdim=True)
        scale, safe, zero = _grid(low.float(), high.float(), form, symmetric)
        if scales is not None:
            scale = scales[rows].view(-1, 1)
            if form.kind != "nf4":
                safe = _safe(scale)
        for start in range(0, group, _CHUNK):
            here = rows, slice(start, start + _CHUNK)
            level = _on_grid(source[here].float(), safe, zero, form, symmetric)
            result[here] = (level * scale).to(out.dtype)


def _grid(low: Tensor, high: Tensor, form: Format, symmetric: bool) -> tuple[Tensor, ...]:
    """scale, s and zero of groups from their least and greatest elements, all float32."""
    top = form.top(symmetric)
    if symmetric:
        extent = torch.maximum(low.abs(), high.abs())
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        extent = (high - low).abs()
    if form.scale == "power_of_two":
        scale = _power_of_two(extent, top)
    else:
        # CUDA turns tensor / number into a product with the rounded reciprocal.
        scale = extent / torch.full_like(extent, top)
    safe = _safe(scale)
    zero = torch.zeros_like(scale) if symmetric else _rhe(-low / safe).clamp(0, top)
    return scale, safe, zero


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _power_of_two(extent: Tensor, top: float) -> Tensor:
    """The power of two that takes the extent into the binade of top; at least 2^-127."""
    exponent = torch.frexp(extent).exponent - math.frexp(top)[1]
    least = torch.full_like(exponent, -127)
    exponent = torch.where(extent > 0, torch.maximum(exponent, least), least)
    # Of 2^-127, which torch.exp2 and ldexp may take for 0, the half in two steps.
    half = exponent.div(2, rounding_mode="floor")
    one = torch.ones_like(extent)
    return torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def _on_grid(w: Tensor, safe: Tensor, zero: Tensor, form: Format, symmetric: bool) -> Tensor:
    """The levels of weights: w' before the scale."""
    x = w / safe
    if form.kind == "nf4":
        midpoints = torch.tensor(NF4_MIDPOINTS, device=w.device)
        # bucketize counts the midpoints below x.
        return torch.tensor(NF4_LEVELS, device=w.device)[torch.bucketize(x, midpoints)]
    if form.kind == "float":
        return nearest_float(x, form)
    top = form.top(symmetric)
    if symmetric:
        return _rhe(x).clamp(-top, top)
    return (_rhe(x) + zero).clamp(0, top) - zero


def _rhe(x: Tensor) -> Tensor:
    return x.round() + 0.0  # -0 + 0 is +0


def nearest_float(x: Tensor, form: Format) -> Tensor:
    """The nearest values of a float format, ties to even; every step but round() is exact."""
    exponent = torch.frexp(x).exponent - 1  # 2^exponent <= |x| < 2^(exponent + 1)
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=form.min_exponent) - form.mantissa)
    magnitude = (x.abs() / step).round() * step
    return magnitude.clamp(max=form.largest).copysign(x)
