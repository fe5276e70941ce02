"""Checks that the operations that quantise share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zo_kernels.checks import expect_int
from zo_kernels.formats import FORMATS


def check_format(
    scheme: object, symmetric: object, double_quant: object, check_finite: object
) -> None:
    """TypeError or ValueError unless there is such a format."""
    switches = {"symmetric": symmetric, "double_quant": double_quant, "check_finite": check_finite}
    for option, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{option}: expected a bool, got {type(value).__name__} ({value!r})")
    if scheme not in FORMATS:
        raise ValueError(f"scheme: expected one of {tuple(FORMATS)}, got {scheme!r}")
    if not symmetric and FORMATS[scheme].kind != "int":
        raise ValueError(f"symmetric: expected True for scheme {scheme!r}, got False")
    if double_quant and scheme != "nf4":
        raise ValueError(f"double_quant: expected False for scheme {scheme!r}, got True")


def has_scales_of_scales(scheme: str, double_quant: bool) -> bool:
    """Whether a format's scales need the ends of all groups of the tensor (scales.py)."""
    return double_quant or FORMATS[scheme].scale == "e4m3"


def group_of(tensor: Tensor, scheme: str, group_size: int | str | None, name: str) -> int:
    """Elements per group, at least 1; ValueError or TypeError if group_size makes no sense."""
    columns = tensor.shape[1]
    if group_size is None:
        group_size = FORMATS[scheme].default_group or "row"
    if group_size == "row":
        return max(columns, 1)
    if group_size == "tensor":
        return max(tensor.numel(), 1)
    if isinstance(group_size, str):
        raise ValueError(f"group_size: expected an int, 'row' or 'tensor', got {group_size!r}")
    size = expect_int("group_size", group_size)
    if size < 1 or columns % size:
        raise ValueError(
            f"group_size: expected a divisor of {columns}, the in dimension of {name}, got {size}"
        )
    return size


def check_scales(name: str, scales: Tensor, dtype: torch.dtype, scheme: str) -> None:
    """ValueError unless the grids of scales of scales are finite: rounding may have raised them."""
    top = torch.tensor(FORMATS[scheme].top(True))
    width = scales.abs().max() * top
    if not math.isfinite(width.to(dtype)):
        raise ValueError(
            f"{name}: expected magnitudes that {scheme} with quantised scales can scale within "
            f"{dtype}, got a grid up to {width.item()}"
        )


def check_ends(
    name: str, ends: tuple[float, float], dtype: torch.dtype, scheme: str, symmetric: bool
) -> None:
    """ValueError unless all values are finite and so is every value their grids can have.

    Args:
        ends: the least and the greatest element, NaN if there is one; or 0 and the greatest
            magnitude, if symmetric.
    """
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    extent = max(-low, high) if symmetric else max(high, 0.0) - min(low, 0.0)
    top = torch.tensor(FORMATS[scheme].top(symmetric))
    # The grid is as wide as the extent but for roundings: that of the scale and the dtype's.
    width = (torch.tensor(extent, dtype=torch.float32) / top * top).to(dtype)
    if not math.isfinite(width):
        what = "magnitudes" if symmetric else "max - min"
        raise ValueError(
            f"{name}: expected {what} that {scheme} can scale within {dtype}, got {extent}"
        )
