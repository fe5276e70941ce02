"""Held weights on a GPU: perturbed in place, with what it takes to have them back.

Let v = round(w + c z) be in memory and p = round(v - c z). An element is flagged where numbers
around v may be further apart than around w: its exponent is larger in v than in the number below
|p|. Flags need v and z alone, so no places are kept, only a byte for each flagged element: the
difference of the patterns of w and p, in units of the dtype's last place. What flags and bytes do
not give back is kept whole, with its place. The encoder sees w, so nothing that is said here of
flags decides what comes back, only how much is kept.

A tile of perturb.py has a region of bytes: differences from its beginning, in the order of steps
and of lanes, and 8-byte records of whole elements from its end. A step that does not fit is not
done, and the tile ends there.
"""

import triton
import triton.language as tl

from zo_kernels.backends.triton.directions import (
    bits_step,
    bits_step_anywhere,
    draw_step,
    draw_step_anywhere,
)
from zo_kernels.backends.triton.memory import load_masked, load_wide, store_masked, store_wide
from zo_kernels.backends.triton.regions import (
    RECORD,
    WHOLE_TILE,
    decode,
    encode,
    places_of,
    record,
    with_records,
    write,
)
from zo_kernels.backends.triton.tiles import (
    add_changes,
    counters,
    rounded,
    store_changes,
    tile_of,
)

# Rows of the int32 states, one column per tile: elements done, bytes and records so far.
AT, BYTES, RECORDS = range(3)
_RECORD = tl.constexpr(RECORD)
_WHOLE_TILE = tl.constexpr(WHOLE_TILE)


@triton.jit
def _load(
    address, at, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, PARTS: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A step that is inside the tensor."""
    vs = ()
    for part in tl.static_range(PARTS):
        there = at + part * (LANES * VEC)
        vs = vs + (load_wide(address, there, DTYPE, ITEMSIZE, VEC, LANES),)
    return vs


@triton.jit
def _load_masked(
    address, at, low, high, DTYPE: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A step at an end of the tensor."""
    vs = ()
    for part in tl.static_range(PARTS):
        there = at + part * (LANES * VEC)
        vs = vs + (load_masked(address, there, low, high, DTYPE, VEC, LANES),)
    return vs


@triton.jit
def _sums(accs, c, zs):
    """accs + c * z of a step."""
    result = ()
    for part in tl.static_range(len(accs)):
        result = result + (tl.fma(zs[part], c, accs[part]),)
    return result


@triton.jit
def _predictions(vs, c, zs, DTYPE: tl.constexpr):
    """round(v - c z) of a step."""
    result = ()
    for part in tl.static_range(len(vs)):
        result = result + (tl.fma(zs[part], -c, vs[part]).to(DTYPE).to(tl.float32),)
    return result


@triton.jit(
    do_not_specialize=["tensors", "direction", "seed_lo", "seed_hi", "src_scale"],
    do_not_specialize_on_alignment=[
        "table", "scales", "old_data", "old_places", "begin", "end", "new_data", "new_places",
        "reached", "stopped", "partials",
    ],
)  # fmt: skip
def swap_kernel(
    table,  # (7, tensors) int64
    scales,  # (rows, 2) float32: of what the tensors hold, and of what they shall hold
    old_data,  # int8, if DECODE: the regions of old_places
    old_places,  # (2, tiles) int64: where a tile's region begins, and its bytes
    begin,  # (3, tiles) int32: the state to begin with
    end,  # (3, tiles) int32: the state that the encoder left
    new_data,  # the same of what is written, if ENCODE
    new_places,
    reached,  # (3, tiles) int32: the state of the new regions
    stopped,  # (3, tiles) int32: that of the old ones, where a step did not fit
    partials,  # (3, programs, LANES) float32, if CHANGES
    tensors,
    direction,  # int32 bit patterns
    seed_lo,
    seed_hi,
    src_scale,
    DTYPE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    RADEMACHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALE_SRC: tl.constexpr,
    DECODE: tl.constexpr,  # the tensors are held
    PERTURB: tl.constexpr,  # and they get w + scale * z, not w
    ENCODE: tl.constexpr,
    COUNT: tl.constexpr,  # write nothing but what regions would have
    CHANGES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See the module."""
    VEC: tl.constexpr = 16 // ITEMSIZE
    WIDTH: tl.constexpr = LANES * VEC
    STEP: tl.constexpr = LANES * 8
    TILE: tl.constexpr = STEP * STEPS
    PARTS: tl.constexpr = STEP // WIDTH
    tl.static_assert(STEPS % 4 == 0)  # a tile begins with a unit of signs
    SHIFT: tl.constexpr = 16 if DTYPE == tl.bfloat16 else (13 if DTYPE == tl.float16 else 0)
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    word = direction.to(tl.uint32, bitcast=True)
    column, dst, stream, shift, start, low, high = tile_of(
        table, tensors, program, ITEMSIZE, VEC, TILE
    )
    pair = scales + tl.load(table + 6 * tensors + column) * 2
    held, scale = tl.load(pair), tl.load(pair + 1)
    tile = dst + (start + shift) * ITEMSIZE
    r = shift & 3
    hot = (shift if RADEMACHER else r) == 0
    # The high counter word must be the same in all lanes: it changes within this step.
    hot_low = tl.where((shift != 0) & ((start & 0x3FFFFFFFF) == 0), tl.maximum(low, 1), low)
    tile_lo, hi, tile_call, call_hi = counters(start, shift, VEC, LANES)

    lane = tl.arange(0, LANES)
    moved = tl.zeros([LANES], tl.float32)
    wanted = tl.zeros([LANES], tl.float32)
    lost = tl.zeros([LANES], tl.float32)
    step = low // STEP
    until = high
    used = 0
    n = 0
    place = _WHOLE_TILE
    pattern = 0
    old_address = tl.zeros([], tl.int64)
    old_end = old_address
    old_records = 0
    new_used = 0
    new_records = 0
    new_address = old_address
    capacity = old_address
    if DECODE:
        old_address = old_data.to(tl.int64) + tl.load(old_places + program)
        old_end = old_address + tl.load(old_places + programs + program)
        step = tl.maximum(step, tl.load(begin + program) // STEP)
        used = tl.load(begin + programs + program)
        n = tl.load(begin + 2 * programs + program)
        until = tl.minimum(until, tl.load(end + program))
        old_records = tl.load(end + 2 * programs + program)
        place, pattern = record(old_end, n, old_records)
    if ENCODE and not COUNT:
        new_address = new_data.to(tl.int64) + tl.load(new_places + program)
        capacity = tl.load(new_places + programs + program)

    fits = high == high
    while fits & (step * STEP < until):
        at = step * STEP
        inside = (at >= low) & (at + STEP <= high)
        i = start + shift + (at + lane * VEC)
        if inside:
            vs = _load(tile, at, DTYPE, ITEMSIZE, PARTS, VEC, LANES)
        else:
            vs = _load_masked(tile, at, low, high, DTYPE, PARTS, VEC, LANES)
        if hot & inside & (at >= hot_low):
            lo = tile_lo + (at // 4).to(tl.uint32)
            call = tile_call + (step // 4 * 32).to(tl.uint32)
            zs = draw_step(
                step, lo, call, hi, call_hi, k0, k1, stream, word, RADEMACHER, VEC, LANES
            )
            if STOCHASTIC:
                bits = bits_step(lo, hi, k0, k1, stream, word, VEC, LANES)
        else:
            zs = draw_step_anywhere(i, r, k0, k1, stream, word, RADEMACHER, VEC, LANES)
            if STOCHASTIC:
                bits = bits_step_anywhere(i, r, k0, k1, stream, word, VEC, LANES)

        ws = vs
        next_used, next_n, next_place, next_pattern = used, n, place, pattern
        if DECODE:
            ps = _predictions(vs, held, zs, DTYPE)
            ws, next_used = decode(vs, ps, at, low, high, old_address, used, SHIFT)
            ws, next_place, next_pattern, next_n = with_records(
                ws, at, STEP, place, pattern, n, old_end, old_records
            )
        accs = ws
        if PERTURB:
            if SCALE_SRC:
                accs = ()
                for part in tl.static_range(PARTS):
                    accs = accs + (ws[part] * src_scale,)
            accs = _sums(accs, scale, zs)
        news = ()
        for part in tl.static_range(PARTS):
            dither = bits[part] if STOCHASTIC else 0
            news = news + (rounded(accs[part], dither, DTYPE, STOCHASTIC),)
        if ENCODE:
            points = ()
            for part in tl.static_range(PARTS):
                points = points + (news[part].to(tl.float32),)
            ps = _predictions(points, scale, zs, DTYPE)
            flags, codes, wholes, counts = encode(ws, points, ps, at, low, high, SHIFT)
            rank, total = places_of(counts)
            coded, whole = total & 0xFFFF, total >> 16
            if not COUNT:
                needed = new_used + coded + _RECORD * (new_records + whole)
                fits = needed <= capacity
                if fits:
                    write(
                        ws, flags, codes, wholes, rank, at, new_address, new_used,
                        new_address + capacity, new_records, whole > 0,
                    )  # fmt: skip
            new_used += tl.where(fits, coded, 0)
            new_records += tl.where(fits, whole, 0)
        if not COUNT:
            if fits & inside:
                for part in tl.static_range(PARTS):
                    store_wide(tile, at + part * WIDTH, news[part], DTYPE, VEC, LANES)
            elif fits:
                for part in tl.static_range(PARTS):
                    there = at + part * WIDTH
                    store_masked(tile, there, low, high, news[part], DTYPE, VEC, LANES)
        if CHANGES:
            for part in tl.static_range(PARTS):
                moved, wanted, lost = add_changes(
                    moved, wanted, lost, ws[part], accs[part], news[part], at + part * WIDTH, low,
                    high,
                )  # fmt: skip
        if DECODE:
            used = tl.where(fits, next_used, used)
            n = tl.where(fits, next_n, n)
            place = tl.where(fits, next_place, place)
            pattern = tl.where(fits, next_pattern, pattern)
        step += tl.where(fits, 1, 0)

    if ENCODE:
        tl.store(reached + program, tl.where(step * STEP < high, step * STEP, _WHOLE_TILE))
        tl.store(reached + programs + program, new_used)
        tl.store(reached + 2 * programs + program, new_records)
        if DECODE and not COUNT:
            tl.store(stopped + program, step * STEP)
            tl.store(stopped + programs + program, used)
            tl.store(stopped + 2 * programs + program, n)
    if CHANGES:
        store_changes(partials, program, moved, wanted, lost)
