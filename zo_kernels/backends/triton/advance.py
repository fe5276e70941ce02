"""Logged updates on a GPU: all of them in one read and one write of the weights.

The value of an element stays in registers between updates and is rounded after each, in float32
arithmetic on values that the tensor's dtype has, or, with residuals, on those with eight bits more
(zo_kernels.ops.advance_). Tiles, lanes and the two loops are those of perturb.py.

Bytes moved per element: twice its size, and two more with residuals.
"""

import triton
import triton.language as tl

from zo_kernels.backends.triton.directions import add_anywhere, add_unit, draw, draw_anywhere
from zo_kernels.backends.triton.memory import (
    load_bytes,
    load_masked,
    load_wide,
    store_bytes,
    store_masked,
    store_wide,
)
from zo_kernels.backends.triton.tiles import (
    add_changes,
    counters,
    direction_word,
    hot_steps,
    rounded,
    store_changes,
    tile_of,
)


@triton.jit
def _is_plain(pattern, DTYPE: tl.constexpr):
    """Where there is no residual: too small in float16, rounded to infinity, NaN."""
    magnitude = pattern & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        return magnitude >= 0x7F7F8000
    else:
        return (magnitude < 0x38800000) | (magnitude >= 0x477FF000)


@triton.jit
def join_residual(weight, rest, DTYPE: tl.constexpr):
    """The float32 values of weights (as float32) and int8 residuals."""
    SHIFT: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 5
    pattern = weight.to(tl.int32, bitcast=True)
    pattern = tl.add(pattern, rest.to(tl.int32) << SHIFT, sanitize_overflow=False)
    finite = tl.abs(weight) < float("inf")
    return tl.where(finite, pattern.to(tl.float32, bitcast=True), weight)


@triton.jit
def round_joined(value, DTYPE: tl.constexpr):
    """float32 values rounded to those that a weight of DTYPE with a residual can have."""
    SHIFT: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 5
    pattern = value.to(tl.uint32, bitcast=True)
    half = (1 << (SHIFT - 1)) - 1 + (pattern >> SHIFT & 1)
    fine = tl.add(pattern, half, sanitize_overflow=False) >> SHIFT << SHIFT
    plain = value.to(DTYPE).to(tl.float32)
    return tl.where(_is_plain(pattern, DTYPE), plain, fine.to(tl.float32, bitcast=True))


@triton.jit
def split_joined(value, DTYPE: tl.constexpr):
    """The weights, as DTYPE, and the int8 residuals of values that round_joined gave."""
    SHIFT: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 5
    DROPPED: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13
    pattern = value.to(tl.uint32, bitcast=True)
    plain = _is_plain(pattern, DTYPE)
    near = tl.add(pattern, 1 << (DROPPED - 1), sanitize_overflow=False) >> DROPPED << DROPPED
    rest = tl.sub(pattern, near, sanitize_overflow=False).to(tl.int32, bitcast=True) >> SHIFT
    weight = tl.where(plain, value, near.to(tl.float32, bitcast=True)).to(DTYPE)
    return weight, tl.where(plain, 0, rest).to(tl.int8)


@triton.jit
def _value(acc, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, JOINED: tl.constexpr):
    """What an element has after an update, as float32."""
    if JOINED:
        return round_joined(acc, DTYPE)
    else:
        return rounded(acc, bits, DTYPE, STOCHASTIC).to(tl.float32)


@triton.jit
def _values(
    accs, lo, hi, k0, k1, stream, direction,
    DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, JOINED: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """_value of the parts of a unit of the hot loop."""
    values = ()
    for part in tl.static_range(len(accs)):
        if STOCHASTIC:
            block = lo + part * (LANES * VEC // 4)
            bits = draw(block, hi, k0, k1, stream, direction, True, VEC, LANES)
        else:
            bits = 0
        values = values + (_value(accs[part], bits, DTYPE, STOCHASTIC, JOINED),)
    return values


@triton.jit
def _scaled(accs, factor):
    result = ()
    for part in tl.static_range(len(accs)):
        result = result + (accs[part] * factor,)
    return result


@triton.jit(
    do_not_specialize=["tensors", "directions_count", "seed_lo", "seed_hi"],
    do_not_specialize_on_alignment=[
        "table", "scales", "directions", "factors", "ends", "partials"
    ],
)  # fmt: skip
def advance_kernel(
    table,  # (7 or 8, tensors) int64
    scales,  # (rows, directions_count) float32
    directions,  # (directions_count,) int64
    factors,  # (directions_count,) float32: src_scale where an update begins, 1 elsewhere
    ends,  # (directions_count,) int32: whether an update ends
    partials,  # (3, programs, LANES) float32, if CHANGES
    tensors,
    directions_count,
    seed_lo,  # int32 bit patterns of the seed's halves
    seed_hi,
    DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    RADEMACHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    JOINED: tl.constexpr,  # the weights have residuals, to which the row OTHER points
    SCALE_SRC: tl.constexpr,  # factors has others than 1
    SINGLE: tl.constexpr,  # every update has one direction
    CHANGES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See the module; table rows are those of tiles.py."""
    VEC: tl.constexpr = 16 // ITEMSIZE
    WIDTH: tl.constexpr = LANES * VEC
    STEP: tl.constexpr = LANES * 8
    PARTS_PER_STEP: tl.constexpr = 8 // VEC
    UNIT: tl.constexpr = 4 if RADEMACHER else 1
    program = tl.program_id(0).to(tl.int64)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)

    column, dst, stream, shift, start, low, high = tile_of(
        table, tensors, program, ITEMSIZE, VEC, STEP * STEPS
    )
    row = scales + tl.load(table + 6 * tensors + column) * directions_count
    tile = dst + (start + shift) * ITEMSIZE
    r = shift & 3
    hot = (shift if RADEMACHER else r) == 0
    if JOINED:
        rest = tl.load(table + 7 * tensors + column) + (start + shift)
        rest_aligned = (rest & (VEC - 1)) == 0
        hot &= rest_aligned
    first, last, hot_first, hot_last = hot_steps(hot, shift, start, low, high, STEP, UNIT)

    lane = tl.arange(0, LANES)
    moved = tl.zeros([LANES], tl.float32)
    wanted = tl.zeros([LANES], tl.float32)
    lost = tl.zeros([LANES], tl.float32)

    tile_lo, hi, tile_call, call_hi = counters(start, shift, VEC, LANES)
    for unit in range(hot_first, hot_last):
        ahead = unit * (STEP * UNIT)
        lo = tile_lo + (ahead // 4).to(tl.uint32)
        call = tile_call + (ahead // 128).to(tl.uint32)
        olds = ()
        for part in tl.static_range(UNIT * PARTS_PER_STEP):
            old = load_wide(tile, ahead + part * WIDTH, DTYPE, ITEMSIZE, VEC, LANES)
            if JOINED:
                low_bits = load_bytes(rest, ahead + part * WIDTH, VEC, LANES)
                old = join_residual(old, low_bits, DTYPE)
            olds = olds + (old,)
        accs = olds
        lasts = olds
        for k in range(directions_count):
            direction = direction_word(directions, k)
            if SCALE_SRC:
                accs = _scaled(accs, tl.load(factors + k))
            accs = add_unit(
                accs, tl.load(row + k), lo, call, hi, call_hi, k0, k1, stream, direction,
                RADEMACHER, VEC, LANES,
            )  # fmt: skip
            if CHANGES:
                lasts = accs
            if SINGLE:
                accs = _values(
                    accs, lo, hi, k0, k1, stream, direction, DTYPE, STOCHASTIC, JOINED, VEC, LANES
                )
            elif tl.load(ends + k) != 0:
                accs = _values(
                    accs, lo, hi, k0, k1, stream, direction, DTYPE, STOCHASTIC, JOINED, VEC, LANES
                )
        for part in tl.static_range(UNIT * PARTS_PER_STEP):
            at = ahead + part * WIDTH
            if JOINED:
                new, low_bits = split_joined(accs[part], DTYPE)
                store_bytes(rest, at, low_bits, VEC, LANES)
            else:
                new = accs[part].to(DTYPE)
            store_wide(tile, at, new, DTYPE, VEC, LANES)
            if CHANGES:
                moved, wanted, lost = add_changes(
                    moved, wanted, lost, olds[part], lasts[part], accs[part], at, low, high
                )

    taken = (hot_last - hot_first) * UNIT
    before = (hot_first * UNIT - first) * PARTS_PER_STEP
    for n in range((last - first - taken) * PARTS_PER_STEP):
        part = n + tl.where(n < before, first, first + taken) * PARTS_PER_STEP
        at = part * WIDTH
        i = start + shift + (at + lane * VEC)
        inside = (at >= low) & (at + WIDTH <= high)
        if inside:
            old = load_wide(tile, at, DTYPE, ITEMSIZE, VEC, LANES)
        else:
            old = load_masked(tile, at, low, high, DTYPE, VEC, LANES)
        if JOINED:
            if inside & rest_aligned:
                low_bits = load_bytes(rest, at, VEC, LANES)
            else:
                low_bits = load_masked(rest, at, low, high, tl.int8, VEC, LANES).to(tl.int8)
            old = join_residual(old, low_bits, DTYPE)
        acc = old
        last_acc = old
        for k in range(directions_count):
            direction = direction_word(directions, k)
            if SCALE_SRC:
                acc = acc * tl.load(factors + k)
            acc = add_anywhere(
                acc, tl.load(row + k), i, r, k0, k1, stream, direction, RADEMACHER, VEC, LANES
            )
            if CHANGES:
                last_acc = acc
            if SINGLE or tl.load(ends + k) != 0:
                if STOCHASTIC:
                    bits = draw_anywhere(i, r, k0, k1, stream, direction, True, VEC, LANES)
                else:
                    bits = 0
                acc = _value(acc, bits, DTYPE, STOCHASTIC, JOINED)
        if JOINED:
            new, low_bits = split_joined(acc, DTYPE)
            if inside & rest_aligned:
                store_bytes(rest, at, low_bits, VEC, LANES)
            else:
                store_masked(rest, at, low, high, low_bits, tl.int8, VEC, LANES)
        else:
            new = acc.to(DTYPE)
        if inside:
            store_wide(tile, at, new, DTYPE, VEC, LANES)
        else:
            store_masked(tile, at, low, high, new, DTYPE, VEC, LANES)
        if CHANGES:
            moved, wanted, lost = add_changes(
                moved, wanted, lost, old, last_acc, acc, at, low, high
            )

    if CHANGES:
        store_changes(partials, program, moved, wanted, lost)
