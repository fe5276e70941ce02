"""Fake quantisation on a GPU: out = the nearest values of a scaled grid, one scale per group.

Three kernels by the length of a group. Up to FITS elements a program holds some groups, or one, in
registers: one read, one write. Up to STREAMED it walks over its group twice, and the second read
comes from the cache. Longer ones (a whole tensor) are spread over many programs, and get their
least and greatest elements from a reduction before. In place or into other memory. Accesses are 16
bytes per lane where pointers and group length are multiples of 16 bytes, and narrower elsewhere.

Exact on every target: divisions are ``div_rn`` (``/`` is not correctly rounded on NVIDIA), and
rounding to a step of 2^k adds and subtracts 1.5 * 2^(k + 23): the sum lies where floats are 2^k
apart, so its one rounding is the wanted one, ties to even, and the difference is exact. That holds
for magnitudes below 2^(k + 22). It comes after the clamping, whose bounds are values of the grid:
so integers (k = 0) are at most 255, the step of floats follows the magnitude, and the zeros of
minimum and maximum, whose sign Triton leaves open, come out as +0. NaN and infinity are the
caller's to exclude.
"""

import math
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.backends.triton import launch
from zo_kernels.backends.triton.compile import Variant
from zo_kernels.formats import FORMATS, NF4_LEVELS, NF4_MIDPOINTS

LANES = 128  # per program, one per thread
TILE = 2048  # elements per program and step: two or four 16-byte accesses a lane
FITS = 4096  # longest group that is held in registers, 32 elements a lane
STREAMED = 1 << 16  # longest group that one program walks over

_LEVELS = tl.constexpr(NF4_LEVELS)
_MIDPOINTS = tl.constexpr(NF4_MIDPOINTS)


@triton.jit
def _round(x, anchor):
    """x to the nearest multiple of anchor / (1.5 * 2^23), ties to even; a zero is +0."""
    return (x + anchor) - anchor


@triton.jit
def grid_of(
    low, high, SYMMETRIC: tl.constexpr, TOP: tl.constexpr, BINADE: tl.constexpr
):  # fmt: skip
    """scale, s (zo_kernels/formats.py) and the ends of the integer grid, of groups.

    SYMMETRIC: high is max|w|, and low is not looked at. BINADE: that of TOP, where scales are
    powers of two; else -1.
    """
    if SYMMETRIC:
        extent = tl.abs(high)
    else:
        low = tl.minimum(low, 0.0)
        extent = tl.abs(tl.maximum(high, 0.0) - low)
    if BINADE >= 0:
        # The extent's binade over that of TOP; at least 2^-127, whose pattern is 0x400000.
        exponent = extent.to(tl.int32, bitcast=True) & 0x7F800000
        exponent -= BINADE << 23
        exponent = tl.where(exponent < 0x800000, 0x400000, exponent)
        scale = exponent.to(tl.float32, bitcast=True)
    else:
        scale = tl.math.div_rn(extent, tl.full(extent.shape, TOP, tl.float32))
    safe = tl.where(scale > 0.0, scale, 1.0)
    lowest = tl.full(extent.shape, -TOP, tl.float32)
    if not SYMMETRIC:
        zero = tl.minimum(tl.maximum(tl.math.div_rn(-low, safe), 0.0), TOP)
        lowest = -_round(zero, 12582912.0)
    return scale, safe, lowest


@triton.jit
def _given(scale, safe, scales, row, mask, KIND: tl.constexpr, GIVEN: tl.constexpr):
    """scale and s, of given scales where there are any; of nf4, levels only."""
    if GIVEN:
        scale = tl.load(scales + row, mask=mask, other=0.0)
        if KIND != "nf4":
            safe = tl.where(scale > 0.0, scale, 1.0)
    return scale, safe


@triton.jit
def _float(x, TOP: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """The nearest values of a float format; the step comes from the exponent bits of x."""
    magnitude = tl.minimum(tl.abs(x), TOP)
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.maximum(exponent, (MIN_EXPONENT + 127) << 23)
    anchor = (exponent + (((23 - MANTISSA) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    rounded = _round(magnitude, anchor).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded | sign).to(tl.float32, bitcast=True)


@triton.jit
def on_grid(
    w, scale, safe, lowest,
    KIND: tl.constexpr, SYMMETRIC: tl.constexpr, TOP: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr,
):  # fmt: skip
    """w' of zo_kernels/formats.py, before its rounding to the tensor's dtype."""
    x = tl.math.div_rn(w, tl.broadcast_to(safe, w.shape))
    if KIND == "nf4":
        level = tl.full(w.shape, _LEVELS[0], tl.float32)
        for i in tl.static_range(15):
            level = tl.where(x > _MIDPOINTS[i], _LEVELS[i + 1], level)
    elif KIND == "float":
        level = _float(x, TOP, MANTISSA, MIN_EXPONENT)
    else:
        # With the zero point taken off: clamp(rhe(x) + zero, 0, Q) - zero, all integers.
        highest = TOP if SYMMETRIC else lowest + TOP
        level = _round(tl.minimum(tl.maximum(x, lowest), highest), 12582912.0)
    return level * scale


@triton.jit(do_not_specialize=["groups"])
def groups_kernel(
    out,
    src,
    scales,  # (groups,) float32, or not looked at
    groups,
    GROUP: tl.constexpr,  # elements per group
    PADDED: tl.constexpr,  # the power of two from GROUP up
    ROWS: tl.constexpr,  # groups per program
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOP: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    BINADE: tl.constexpr,
    GIVEN: tl.constexpr,  # whether scales are
):
    """Groups that fit in registers; program i has groups ROWS i and on."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    offset = row * GROUP + column
    mask = (row < groups) & (column < GROUP)
    w = tl.load(src + offset, mask=mask, other=0.0).to(tl.float32)
    if SYMMETRIC:
        high = tl.max(tl.abs(w), axis=1, keep_dims=True)
        low = high
    else:
        low = tl.min(w, axis=1, keep_dims=True)
        high = tl.max(w, axis=1, keep_dims=True)
    scale, safe, lowest = grid_of(low, high, SYMMETRIC, TOP, BINADE)
    scale, safe = _given(scale, safe, scales, row, row < groups, KIND, GIVEN)
    w = on_grid(w, scale, safe, lowest, KIND, SYMMETRIC, TOP, MANTISSA, MIN_EXPONENT)
    tl.store(out + offset, w.to(out.dtype.element_ty), mask=mask)


@triton.jit
def streamed_kernel(
    out,
    src,
    scales,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOP: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    BINADE: tl.constexpr,
    GIVEN: tl.constexpr,  # whether scales are
):
    """One group per program, in two walks."""
    first = tl.program_id(0).to(tl.int64) * GROUP
    low = tl.zeros([TILE], tl.float32)
    high = tl.zeros([TILE], tl.float32)
    # Absent elements count as 0, which neither max|w| nor a range that includes 0 can tell.
    for start in range(0, GROUP, TILE):
        column = start + tl.arange(0, TILE)
        w = tl.load(src + first + column, mask=column < GROUP, other=0.0).to(tl.float32)
        if SYMMETRIC:
            high = tl.maximum(high, tl.abs(w))
        else:
            low = tl.minimum(low, w)
            high = tl.maximum(high, w)
    scale, safe, lowest = grid_of(
        tl.min(low, axis=0, keep_dims=True),
        tl.max(high, axis=0, keep_dims=True),
        SYMMETRIC,
        TOP,
        BINADE,
    )
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    scale, safe = _given(scale, safe, scales, row, row >= 0, KIND, GIVEN)
    for start in range(0, GROUP, TILE):
        column = start + tl.arange(0, TILE)
        w = tl.load(src + first + column, mask=column < GROUP, other=0.0).to(tl.float32)
        w = on_grid(w, scale, safe, lowest, KIND, SYMMETRIC, TOP, MANTISSA, MIN_EXPONENT)
        tl.store(out + first + column, w.to(out.dtype.element_ty), mask=column < GROUP)


@triton.jit(do_not_specialize=["tiles"])
def spread_kernel(
    out,
    src,
    scales,
    lows,  # (groups,) float32: least elements
    highs,  # (groups,) float32: greatest elements
    group,  # elements per group
    tiles,  # programs per group
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOP: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    BINADE: tl.constexpr,
    GIVEN: tl.constexpr,  # whether scales are
):
    """One tile of one group, whose least and greatest elements are known."""
    j = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    offset = j * group + column
    w = tl.load(src + offset, mask=column < group, other=0.0).to(tl.float32)
    low = tl.load(lows + j)
    high = tl.load(highs + j)
    if SYMMETRIC:
        high = tl.maximum(tl.abs(low), tl.abs(high))
    scale, safe, lowest = grid_of(
        tl.full([1], low, tl.float32), tl.full([1], high, tl.float32), SYMMETRIC, TOP, BINADE
    )
    row = j + tl.arange(0, 1)
    scale, safe = _given(scale, safe, scales, row, row >= 0, KIND, GIVEN)
    w = on_grid(w, scale, safe, lowest, KIND, SYMMETRIC, TOP, MANTISSA, MIN_EXPONENT)
    tl.store(out + offset, w.to(out.dtype.element_ty), mask=column < group)


def format_constants(scheme: str, symmetric: bool, given: bool = False) -> dict[str, Any]:
    """The constants of a kernel that rounds to a format (see zo_kernels/formats.py).

    Args:
        scheme, symmetric: as for ``zk.fake_quant``.
        given: the scales are handed in.
    """
    form = FORMATS[scheme]
    power_of_two = form.scale == "power_of_two"
    return {
        "KIND": form.kind,
        "SYMMETRIC": symmetric,
        "TOP": form.top(symmetric),
        "MANTISSA": form.mantissa,
        "MIN_EXPONENT": form.min_exponent,
        "BINADE": math.frexp(form.largest)[1] - 1 if power_of_two else -1,
        "GIVEN": given,
    }


def geometry(group: int) -> tuple[Any, dict[str, int]]:
    """The kernel for groups of this length, and its constants."""
    if group <= FITS:
        padded = triton.next_power_of_2(group)
        rows = max(1, TILE // padded)
        return groups_kernel, {"GROUP": group, "PADDED": padded, "ROWS": rows}
    if group <= STREAMED:
        return streamed_kernel, {"GROUP": group, "TILE": TILE}
    return spread_kernel, {"TILE": TILE}


def fake_quant(
    out: Tensor,
    tensor: Tensor,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales: Tensor | None = None,
) -> None:
    """out = tensor on the scheme's grid, a scale per group; see zo_kernels.quantize.fake_quant."""
    kernel, constants = geometry(group)
    constants |= format_constants(scheme, symmetric, scales is not None)
    constants |= launch.options(tensor.device, LANES)
    # Not looked at where there are none, but a pointer of the right type.
    first = (out, tensor, tensor.new_empty(1, dtype=torch.float32) if scales is None else scales)
    groups = tensor.numel() // group
    with launch.on(tensor.device):
        if kernel is groups_kernel:
            kernel[(triton.cdiv(groups, constants["ROWS"]),)](*first, groups, **constants)
        elif kernel is streamed_kernel:
            kernel[(groups,)](*first, **constants)
        else:
            low, high = (end.float() for end in tensor.view(groups, group).aminmax(dim=1))
            tiles = triton.cdiv(group, TILE)
            kernel[(groups * tiles,)](*first, low, high, group, tiles, **constants)


SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Scheme, symmetric, group size, and what the variant is called.
VARIANTS = [
    ("int8", True, 4096, "int8 row 4096"),
    ("int4", True, 128, "int4 g128"),
    ("int4", True, 32, "int4 g32"),
    ("int4", False, 64, "int4 asymmetric g64"),
    ("int4", True, 11008, "int4 row 11008"),
    ("int4", False, 11008, "int4 asymmetric row 11008"),
    ("int8", True, 1 << 24, "int8 tensor"),
    ("nf4", True, 64, "nf4 g64"),
    ("fp8_e4m3", True, 4096, "fp8_e4m3 row 4096"),
    ("fp8_e4m3", True, 11008, "fp8_e4m3 row 11008"),
    ("fp8_e5m2", True, 128, "fp8_e5m2 g128"),
    ("mxfp4", True, 32, "mxfp4 g32"),
    ("nvfp4", True, 16, "nvfp4 g16"),
    ("nf4", True, 64, "nf4 double g64"),
]


def variants() -> list[Variant]:
    """What fake_quant launches: all kernels and kinds of formats, on each dtype."""
    result = []
    for (scheme, symmetric, group, name), dtype in product(VARIANTS, SHORT_NAMES):
        kernel, constants = geometry(group)
        short = SHORT_NAMES[dtype]
        signature = {"out": f"*{short}", "src": f"*{short}", "scales": "*fp32"}
        if kernel is groups_kernel:
            signature |= {"groups": "i32"}
        elif kernel is spread_kernel:
            signature |= {"lows": "*fp32", "highs": "*fp32", "group": "i32", "tiles": "i32"}
        result.append(
            Variant(
                name=f"fake_quant {short} {name}",
                kernel=kernel,
                signature=signature,
                constants=constants
                | format_constants(scheme, symmetric, scheme == "nvfp4" or "double" in name),
                # group is no pointer, but a multiple of 16 too, as in most matrices.
                aligned=("out", "src", "scales", *(["group"] if kernel is spread_kernel else [])),
                lanes=LANES,
                bytes_per_element=2.0 * dtype.itemsize,
                dst_itemsize=dtype.itemsize,
            )
        )
    return result
