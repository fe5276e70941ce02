"""Moments of large tensors, piece by piece in float64."""

from __future__ import annotations

import math

from torch import Tensor

_PIECE = 1 << 22  # elements converted to float64 at a time: 32 MiB of scratch


def standard_deviation(tensor: Tensor, *, centred: bool = True) -> float:
    """sqrt(mean((x - mean(x))^2)), or the root mean square without ``centred``; 0 if empty.

    NaN if the tensor holds NaN or infinities. Orders of summation differ between devices, by so
    little that the value rounded to float32 is the same all but always.
    """
    flat = tensor.detach().reshape(-1)
    count = flat.numel()
    if count == 0:
        return 0.0
    mean = 0.0
    if centred:
        mean = sum(piece.double().sum().item() for piece in flat.split(_PIECE)) / count
    total = sum((piece.double() - mean).square().sum().item() for piece in flat.split(_PIECE))
    return math.sqrt(total / count) if math.isfinite(total) else math.nan
