"""Scales that are themselves quantised, of all groups of a tensor; formulas in formats.py.

They are few, and need sums and maxima over tensors: computed on the CPU for every backend, so that
the bits are the same everywhere.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from zo_kernels.backends.reference_quantize import nearest_float
from zo_kernels.formats import DYNAMIC_8BIT, FORMATS

_RUN = 256  # scales of nf4 that share a scale
_MANTISSA = 1 << 24


def scales_of_scales(scheme: str, ends: Tensor) -> Tensor:
    """The scales of groups from their ends, of nf4 with double quantisation or of nvfp4.

    Args:
        ends: (2, groups) float32 on the CPU: least and greatest elements, 0 included.

    Returns:
        (groups,) float32.
    """
    extents = torch.maximum(-ends[0], ends[1]).abs()  # zeros are +0
    return _nf4(extents) if scheme == "nf4" else _nvfp4(extents)


def _nvfp4(extents: Tensor) -> Tensor:
    unit = extents.max() / 2688.0
    if unit == 0:
        unit = torch.ones_like(unit)
    return nearest_float(extents / (6.0 * unit), FORMATS["fp8_e4m3"]) * unit


def _nf4(scales: Tensor) -> Tensor:
    offset = torch.tensor(mean(scales), dtype=torch.float32)
    centred = scales - offset
    runs = torch.zeros(-(-len(scales) // _RUN), _RUN)
    runs.view(-1)[: len(scales)] = centred
    extent = runs.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(DYNAMIC_8BIT)
    midpoints = (values[1:] + values[:-1]) / 2
    # bucketize counts the midpoints below.
    places = torch.bucketize(runs / torch.where(extent > 0, extent, 1.0), midpoints)
    return (values[places] * extent + offset).view(-1)[: len(scales)].contiguous()


def mean(values: Tensor) -> float:
    """The exact sum of float32 values over their number, rounded to binary64.

    NaN if not all values are finite.
    """
    if not values.isfinite().all():
        return float("nan")
    fractions, exponents = torch.frexp(values)
    integers = (fractions * _MANTISSA).long()  # exact, and so are sums of up to 2^39 of them
    lowest = int(exponents.min())
    sums = torch.zeros(int(exponents.max()) - lowest + 1, dtype=torch.int64)
    sums.index_add_(0, (exponents - lowest).long(), integers)
    total = sum(value << place for place, value in enumerate(sums.tolist()))
    return float(Fraction(total, len(values) * _MANTISSA) * Fraction(2) ** lowest)
