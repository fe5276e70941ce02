"""The primitive on a GPU: dst = round(src_scale * src + sum_k scales[k] * z_k).

One launch covers a list of tensors. A program owns a tile of STEPS steps; in a step each of LANES
lanes owns 16 contiguous, 16-byte aligned bytes of dst (twice, where dst is float32), whatever the
element's index there: chunks begin where the memory of dst is aligned, not where a Philox block
begins. Two loops share the arithmetic:

- the hot one, for steps inside the tensor whose chunks begin at a block and whose src is aligned
  like dst: 16-byte accesses, nothing computed twice;
- the general one, for ragged ends and misaligned views: it draws one block more per chunk and picks
  the elements it needs, keeps 16-byte stores (and loads, where src is aligned like dst) inside the
  tensor, and has one masked access per element at the ends.

Bytes moved per element: its size in src plus its size in dst.
"""

import triton
import triton.language as tl

from zo_kernels.backends.triton.directions import add_anywhere, add_unit, draw, draw_anywhere
from zo_kernels.backends.triton.memory import load_masked, load_wide, store_masked, store_wide
from zo_kernels.backends.triton.noise import normals, philox, sign_byte
from zo_kernels.backends.triton.tiles import (
    LANES,
    STEPS,
    add_changes,
    counters,
    direction_word,
    hot_steps,
    rounded,
    store_changes,
    tile_of,
)

__all__ = ["LANES", "STEPS", "combine_kernel", "emit_kernel"]


@triton.jit(
    do_not_specialize=["tensors", "directions_count", "seed_lo", "seed_hi", "src_scale"],
    do_not_specialize_on_alignment=["table", "scales", "directions", "partials"],
)
def combine_kernel(
    table,  # (7 or 8, tensors) int64
    scales,  # (rows, directions_count) float32
    directions,  # (directions_count,) int64
    partials,  # (3, programs, LANES) float32, if CHANGES
    tensors,
    directions_count,
    seed_lo,  # int32 bit patterns of the seed's halves
    seed_hi,
    src_scale,
    SRC_DTYPE: tl.constexpr,
    DST_DTYPE: tl.constexpr,
    SRC_ITEMSIZE: tl.constexpr,
    DST_ITEMSIZE: tl.constexpr,
    RADEMACHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALE_SRC: tl.constexpr,
    SINGLE: tl.constexpr,  # directions_count == 1
    CHANGES: tl.constexpr,
    PAIR: tl.constexpr,  # src - scale * z goes to a second output; SINGLE, to nearest
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See the module; table rows are FIRST_TILE .. ROW of tiles.py, and OTHER if PAIR.

    DST, SRC and OTHER are the addresses that element 0 of the full parameter would have.
    """
    VEC: tl.constexpr = 16 // DST_ITEMSIZE  # elements of a chunk
    WIDTH: tl.constexpr = LANES * VEC  # elements of a part: one chunk per lane
    STEP: tl.constexpr = LANES * 8
    PARTS_PER_STEP: tl.constexpr = 8 // VEC
    TILE: tl.constexpr = STEP * STEPS
    UNIT: tl.constexpr = 4 if RADEMACHER else 1  # steps that the hot loop takes together
    SRC_ALIGNMENT: tl.constexpr = 16 if VEC * SRC_ITEMSIZE > 16 else VEC * SRC_ITEMSIZE
    program = tl.program_id(0).to(tl.int64)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)

    column, dst, stream, shift, start, low, high = tile_of(
        table, tensors, program, DST_ITEMSIZE, VEC, TILE
    )
    src = tl.load(table + 2 * tensors + column)
    row = scales + tl.load(table + 6 * tensors + column) * directions_count
    last_scale = tl.load(row + directions_count - 1)
    last_direction = direction_word(directions, directions_count - 1)
    tile_src = src + (start + shift) * SRC_ITEMSIZE
    tile_dst = dst + (start + shift) * DST_ITEMSIZE
    src_aligned = ((src + shift * SRC_ITEMSIZE) & (SRC_ALIGNMENT - 1)) == 0
    r = shift & 3
    hot = src_aligned & ((shift if RADEMACHER else r) == 0)
    if PAIR:
        minus = tl.load(table + 7 * tensors + column)
        tile_minus = minus + (start + shift) * DST_ITEMSIZE
        minus_aligned = ((minus + shift * DST_ITEMSIZE) & 15) == 0
        hot &= minus_aligned
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
        olds, accs = (), ()
        for part in tl.static_range(UNIT * PARTS_PER_STEP):
            old = load_wide(tile_src, ahead + part * WIDTH, SRC_DTYPE, SRC_ITEMSIZE, VEC, LANES)
            olds = olds + (old,)
            accs = accs + ((old * src_scale if SCALE_SRC else old),)
        if not SINGLE:
            for k in range(directions_count - 1):
                accs = add_unit(
                    accs, tl.load(row + k), lo, call, hi, call_hi, k0, k1, stream,
                    direction_word(directions, k), RADEMACHER, VEC, LANES,
                )  # fmt: skip
        accs = add_unit(
            accs, last_scale, lo, call, hi, call_hi, k0, k1, stream, last_direction,
            RADEMACHER, VEC, LANES,
        )  # fmt: skip
        if PAIR:
            others = add_unit(
                olds, -last_scale, lo, call, hi, call_hi, k0, k1, stream, last_direction,
                RADEMACHER, VEC, LANES,
            )  # fmt: skip
        for part in tl.static_range(UNIT * PARTS_PER_STEP):
            if STOCHASTIC:
                block = lo + part * (WIDTH // 4)
                bits = draw(block, hi, k0, k1, stream, last_direction, True, VEC, LANES)
            else:
                bits = 0
            new = rounded(accs[part], bits, DST_DTYPE, STOCHASTIC)
            store_wide(tile_dst, ahead + part * WIDTH, new, DST_DTYPE, VEC, LANES)
            if PAIR:
                other = others[part].to(DST_DTYPE)
                store_wide(tile_minus, ahead + part * WIDTH, other, DST_DTYPE, VEC, LANES)
            if CHANGES:
                at = ahead + part * WIDTH
                moved, wanted, lost = add_changes(
                    moved, wanted, lost, olds[part], accs[part], new, at, low, high
                )

    taken = (hot_last - hot_first) * UNIT
    before = (hot_first * UNIT - first) * PARTS_PER_STEP
    for n in range((last - first - taken) * PARTS_PER_STEP):
        part = n + tl.where(n < before, first, first + taken) * PARTS_PER_STEP
        at = part * WIDTH
        i = start + shift + (at + lane * VEC)
        inside = (at >= low) & (at + WIDTH <= high)
        if inside & src_aligned:
            old = load_wide(tile_src, at, SRC_DTYPE, SRC_ITEMSIZE, VEC, LANES)
        else:
            old = load_masked(tile_src, at, low, high, SRC_DTYPE, VEC, LANES)
        acc = old * src_scale if SCALE_SRC else old
        if not SINGLE:
            for k in range(directions_count - 1):
                acc = add_anywhere(
                    acc, tl.load(row + k), i, r, k0, k1, stream, direction_word(directions, k),
                    RADEMACHER, VEC, LANES,
                )  # fmt: skip
        acc = add_anywhere(
            acc, last_scale, i, r, k0, k1, stream, last_direction, RADEMACHER, VEC, LANES
        )
        if STOCHASTIC:
            bits = draw_anywhere(i, r, k0, k1, stream, last_direction, True, VEC, LANES)
        else:
            bits = 0
        new = rounded(acc, bits, DST_DTYPE, STOCHASTIC)
        if inside:
            store_wide(tile_dst, at, new, DST_DTYPE, VEC, LANES)
        else:
            store_masked(tile_dst, at, low, high, new, DST_DTYPE, VEC, LANES)
        if PAIR:
            other = add_anywhere(
                old, -last_scale, i, r, k0, k1, stream, last_direction, RADEMACHER, VEC, LANES
            ).to(DST_DTYPE)
            if inside & minus_aligned:
                store_wide(tile_minus, at, other, DST_DTYPE, VEC, LANES)
            else:
                store_masked(tile_minus, at, low, high, other, DST_DTYPE, VEC, LANES)
        if CHANGES:
            moved, wanted, lost = add_changes(moved, wanted, lost, old, acc, new, at, low, high)

    if CHANGES:
        store_changes(partials, program, moved, wanted, lost)


@triton.jit(do_not_specialize=["begin", "end", "seed_lo", "seed_hi", "stream", "direction"])
def emit_kernel(
    out,  # address of element `begin`, float32 or int32
    begin,
    end,
    seed_lo,
    seed_hi,
    stream,
    direction,
    WHAT: tl.constexpr,  # "normal", "rademacher" or "random_words"
    LANES: tl.constexpr,
):
    """Writes normals, signs or words of [begin, end), four elements per lane; for tests."""
    first = (begin // 4 // LANES + tl.program_id(0).to(tl.int64)) * LANES
    block = first + tl.arange(0, LANES)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    c2 = stream.to(tl.uint32, bitcast=True)
    c3 = direction.to(tl.uint32, bitcast=True)
    if WHAT == "rademacher":
        byte = sign_byte(block >> 1, k0, k1, c2, c3) >> ((block & 1) * 4).to(tl.uint32)
        x0, x1 = 1.0 - 2.0 * (byte & 1), 1.0 - 2.0 * (byte >> 1 & 1)
        x2, x3 = 1.0 - 2.0 * (byte >> 2 & 1), 1.0 - 2.0 * (byte >> 3 & 1)
    else:
        hi = (first >> 32).to(tl.uint32)
        a, b, c, d = philox(block.to(tl.uint32), hi, k0, k1, c2, c3)
        if WHAT == "normal":
            x0, x1, x2, x3 = normals(a, b, c, d)
        else:
            x0, x1 = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
            x2, x3 = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    i = block * 4 - begin
    count = end - begin
    tl.store(out + i, x0, mask=(i >= 0) & (i < count))
    tl.store(out + i + 1, x1, mask=(i + 1 >= 0) & (i + 1 < count))
    tl.store(out + i + 2, x2, mask=(i + 2 >= 0) & (i + 2 < count))
    tl.store(out + i + 3, x3, mask=(i + 3 >= 0) & (i + 3 < count))
