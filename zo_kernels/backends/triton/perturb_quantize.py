"""Perturbed weights through a quantizer on a GPU: noise, rounding and grid in registers.

The kernels of quantize.py with z in front: each lane owns VEC contiguous elements of a group, 16
bytes, which are whole Philox blocks. Up to FITS elements a program holds some groups, or one, in
registers: one read, one write. Up to STREAMED it walks over its group twice, and keeps the
perturbed weights in ``out`` in between: z is drawn once, and the second read comes from the cache.

Elsewhere (``fits``) the two operations come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.backends import composed
from zo_kernels.backends.triton import launch
from zo_kernels.backends.triton.combine import combine_
from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.directions import add_aligned
from zo_kernels.backends.triton.quantize import (
    LANES,
    SHORT_NAMES,
    STREAMED,
    fake_quant,
    format_constants,
    geometry,
    grid_of,
    groups_kernel,
    on_grid,
)

_HIGH_WORD = 1 << 34  # elements between changes of the counter's high word
_WORDS = ("seed_lo", "seed_hi", "stream", "direction", "block_lo", "block_hi")


@triton.jit
def _perturbed(
    src, first, inside, scale, seed_lo, seed_hi, stream, direction, block_lo, block_hi,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """round(src + scale * z) as float32 (lanes, VEC), whose lanes begin at elements `first`.

    Elements of lanes that are not inside are 0, which no end of a group can tell.
    """
    LANES: tl.constexpr = first.shape[0]
    at = first[:, None] + tl.arange(0, VEC)[None, :]
    w = tl.load(src + at, mask=inside[:, None], other=0.0)
    lo = block_lo.to(tl.uint32, bitcast=True) + (first >> 2).to(tl.uint32)
    acc = add_aligned(
        w.to(tl.float32), tl.full([], scale, tl.float32), lo,
        block_hi.to(tl.uint32, bitcast=True),
        seed_lo.to(tl.uint32, bitcast=True),
        seed_hi.to(tl.uint32, bitcast=True),
        stream.to(tl.uint32, bitcast=True),
        direction.to(tl.uint32, bitcast=True),
        RADEMACHER, VEC, LANES,
    )  # fmt: skip
    rounded = acc.to(src.dtype.element_ty).to(tl.float32)
    return at, tl.where(inside[:, None], rounded, 0.0)


@triton.jit(do_not_specialize=["groups", "scale", *_WORDS])
def perturb_groups_kernel(
    out,
    src,
    groups,
    scale,
    seed_lo,  # int32 bit patterns, as all words
    seed_hi,
    stream,
    direction,
    block_lo,  # of the counter of src's first element
    block_hi,
    GROUP: tl.constexpr,  # elements per group, a multiple of VEC
    PADDED: tl.constexpr,  # the power of two from GROUP up
    ROWS: tl.constexpr,  # groups per program
    VEC: tl.constexpr,
    RADEMACHER: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOP: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    BINADE: tl.constexpr,
):
    """Groups that fit in registers; program i has groups ROWS i and on."""
    PARTS: tl.constexpr = PADDED // VEC  # lanes of a group
    lane = tl.arange(0, ROWS * PARTS)
    row = tl.program_id(0).to(tl.int64) * ROWS + lane // PARTS
    column = lane % PARTS * VEC
    inside = (row < groups) & (column < GROUP)
    at, w = _perturbed(
        src, row * GROUP + column, inside, scale, seed_lo, seed_hi, stream, direction,
        block_lo, block_hi, RADEMACHER, VEC,
    )  # fmt: skip
    grouped = tl.reshape(w, [ROWS, PADDED])
    if SYMMETRIC:
        high = tl.max(tl.abs(grouped), axis=1, keep_dims=True)
        low = high
    else:
        low = tl.min(grouped, axis=1, keep_dims=True)
        high = tl.max(grouped, axis=1, keep_dims=True)
    step, safe, lowest = grid_of(low, high, SYMMETRIC, TOP, BINADE)
    grouped = on_grid(grouped, step, safe, lowest, KIND, SYMMETRIC, TOP, MANTISSA, MIN_EXPONENT)
    w = tl.reshape(grouped, [ROWS * PARTS, VEC])
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["scale", *_WORDS])
def perturb_streamed_kernel(
    out,
    src,
    scale,
    seed_lo,
    seed_hi,
    stream,
    direction,
    block_lo,
    block_hi,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
    RADEMACHER: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOP: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    BINADE: tl.constexpr,
):
    """One group per program, in two walks."""
    PARTS: tl.constexpr = TILE // VEC
    group = tl.program_id(0).to(tl.int64) * GROUP
    lane = tl.arange(0, PARTS)
    low = tl.zeros([PARTS, VEC], tl.float32)
    high = tl.zeros([PARTS, VEC], tl.float32)
    for start in range(0, GROUP, TILE):
        column = start + lane * VEC
        inside = column < GROUP
        at, w = _perturbed(
            src, group + column, inside, scale, seed_lo, seed_hi, stream, direction,
            block_lo, block_hi, RADEMACHER, VEC,
        )  # fmt: skip
        tl.store(out + at, w.to(out.dtype.element_ty), mask=inside[:, None])
        if SYMMETRIC:
            high = tl.maximum(high, tl.abs(w))
        else:
            low = tl.minimum(low, w)
            high = tl.maximum(high, w)
    # What another lane of the program wrote may be what this one reads.
    tl.debug_barrier()
    step, safe, lowest = grid_of(
        tl.min(tl.reshape(low, [1, TILE]), axis=1, keep_dims=True),
        tl.max(tl.reshape(high, [1, TILE]), axis=1, keep_dims=True),
        SYMMETRIC,
        TOP,
        BINADE,
    )
    for start in range(0, GROUP, TILE):
        column = start + lane * VEC
        mask = (column < GROUP)[:, None]
        at = (group + column)[:, None] + tl.arange(0, VEC)[None, :]
        w = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
        w = on_grid(w, step, safe, lowest, KIND, SYMMETRIC, TOP, MANTISSA, MIN_EXPONENT)
        tl.store(out + at, w.to(out.dtype.element_ty), mask=mask)


def _vec(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def fits(dtype: torch.dtype, numel: int, group: int, offset: int) -> bool:
    """Whether a fused kernel can have groups of this length from element `offset` on."""
    whole = group % _vec(dtype) == 0 and offset % _vec(dtype) == 0
    same_word = offset // _HIGH_WORD == (offset + numel - 1) // _HIGH_WORD
    return group <= STREAMED and whole and same_word


def perturb_quant(
    out: Tensor,
    src: Tensor,
    scale: float,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales_of: Callable[[Tensor], Tensor] | None,
    look: Callable[[tuple[float, float]], None] | None,
    seed: int,
    direction: int,
    stream: int,
    offset: int,
    distribution: str,
) -> None:
    """out = round(src + scale * z) on the scheme's grid; see composed.py and ops.perturb_quant."""
    if scales_of or look or not fits(src.dtype, src.numel(), group, offset):
        composed.perturb_quant(
            combine_, fake_quant, out, src, scale, scheme,
            group=group, symmetric=symmetric, scales_of=scales_of, look=look, seed=seed,
            direction=direction, stream=stream, offset=offset, distribution=distribution,
        )  # fmt: skip
        return
    kernel, constants = _geometry(src.dtype, group)
    constants |= _format_constants(scheme, symmetric, distribution == "rademacher")
    block = offset // 4
    words = (seed & 0xFFFFFFFF, seed >> 32, stream, direction, block & 0xFFFFFFFF, block >> 32)
    arguments = (float(scale), *(launch.signed(word) for word in words))
    options = launch.options(src.device, LANES)
    groups = src.numel() // group
    with launch.on(src.device):
        if kernel is perturb_groups_kernel:
            grid = (triton.cdiv(groups, constants["ROWS"]),)
            kernel[grid](out, src, groups, *arguments, **constants, **options)
        else:
            kernel[(groups,)](out, src, *arguments, **constants, **options)


def _geometry(dtype: torch.dtype, group: int) -> tuple[Any, dict[str, int]]:
    kernel, constants = geometry(group)
    fused = perturb_groups_kernel if kernel is groups_kernel else perturb_streamed_kernel
    return fused, constants | {"VEC": _vec(dtype)}


def _format_constants(scheme: str, symmetric: bool, rademacher: bool) -> dict[str, Any]:
    constants = format_constants(scheme, symmetric)
    constants.pop("GIVEN")
    return constants | {"RADEMACHER": rademacher}


#: Scheme, symmetric, group size, whether signs, and what the variant is called.
_VARIANTS = [
    ("int4", True, 128, False, "int4 g128"),
    ("int4", True, 128, True, "int4 g128 rademacher"),
    ("int4", False, 64, False, "int4 asymmetric g64"),
    ("int8", True, 4096, False, "int8 row 4096"),
    ("int8", True, 11008, False, "int8 row 11008"),
    ("int4", False, 11008, True, "int4 asymmetric row 11008 rademacher"),
    ("nf4", True, 64, False, "nf4 g64"),
    ("fp8_e4m3", True, 4096, False, "fp8_e4m3 row 4096"),
    ("mxfp4", True, 32, False, "mxfp4 g32"),
]


def variants() -> list[Variant]:
    """What perturb_quant launches: both kernels and all kinds of formats, on each dtype."""
    result = []
    for (scheme, symmetric, group, signs, name), dtype in product(_VARIANTS, SHORT_NAMES):
        kernel, constants = _geometry(dtype, group)
        short = SHORT_NAMES[dtype]
        signature = {"out": f"*{short}", "src": f"*{short}"}
        if kernel is perturb_groups_kernel:
            signature["groups"] = "i32"
        signature |= {"scale": "fp32"} | dict.fromkeys(_WORDS, "i32")
        result.append(
            Variant(
                name=f"perturb_quant {short} {name}",
                kernel=kernel,
                signature=signature,
                constants=constants | _format_constants(scheme, symmetric, signs),
                aligned=("out", "src"),
                lanes=LANES,
                # The second walk reads and writes out again, in the cache.
                bytes_per_element=2.0 * dtype.itemsize,
                dst_itemsize=dtype.itemsize,
            )
        )
    return result
