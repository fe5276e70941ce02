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

from zo_kernels import noise
from zo_kernels.backends.triton.directions import add_anywhere, add_unit, draw, draw_anywhere
from zo_kernels.backends.triton.memory import load_masked, load_wide, store_masked, store_wide
from zo_kernels.backends.triton.noise import normals, philox, round_stochastic, sign_byte

LANES = 128  # one per thread
STEPS = 16  # steps per program: the table look-ups are shared by 16 * 128 * 8 elements
# Rows of the int64 table, one column per tensor.
FIRST_TILE, DST, SRC, BEGIN, END, STREAM, ROW, ROWS = range(8)
_RADEMACHER_DOMAIN = tl.constexpr(noise.RADEMACHER_DOMAIN)


@triton.jit
def _find(table, tensors, program):
    """The last column whose FIRST_TILE is at most program (binary search)."""
    low = 0
    high = tensors - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(table + middle) <= program:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _direction(directions, k):
    return tl.load(directions + k).to(tl.uint32)


@triton.jit
def _round(value, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        return round_stochastic(value, bits, DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def _add_changes(moved, wanted, lost, old, acc, new, at, low, high):
    """Per lane: sums of (new - old)^2 and (acc - old)^2, and how many elements did not move.

    Elements outside [low, high) of the tile do not count; the block begins at `at` of it.
    """
    VEC: tl.constexpr = old.shape[1]
    i = at + (tl.arange(0, old.shape[0])[:, None] * VEC + tl.arange(0, VEC)[None, :])
    inside = (i >= low) & (i < high)
    m = tl.where(inside, new.to(tl.float32) - old, 0.0)
    w = tl.where(inside, acc - old, 0.0)
    moved += tl.sum(m * m, axis=1)
    wanted += tl.sum(w * w, axis=1)
    lost += tl.sum(((m == 0.0) & (w != 0.0)).to(tl.float32), axis=1)
    return moved, wanted, lost


@triton.jit(
    do_not_specialize=["tensors", "directions_count", "seed_lo", "seed_hi", "src_scale"],
    do_not_specialize_on_alignment=["table", "scales", "directions", "partials"],
)
def combine_kernel(
    table,  # (ROWS, tensors) int64
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
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See the module; table rows are FIRST_TILE .. ROW of this file.

    DST and SRC are the addresses that element 0 of the full parameter would have.
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

    column = _find(table, tensors, program)
    tile = program - tl.load(table + column)
    dst = tl.load(table + tensors + column)
    src = tl.load(table + 2 * tensors + column)
    begin = tl.load(table + 3 * tensors + column)
    end = tl.load(table + 4 * tensors + column)
    stream = tl.load(table + 5 * tensors + column).to(tl.uint32)
    row = scales + tl.load(table + 6 * tensors + column) * directions_count
    last_scale = tl.load(row + directions_count - 1)
    last_direction = _direction(directions, directions_count - 1)

    # Chunks begin at elements x + shift, x a multiple of VEC, -VEC < shift <= 0: there dst is
    # aligned.
    shift = (((-dst) & 15) // DST_ITEMSIZE).to(tl.int32)
    shift = tl.where(shift > 0, shift - VEC, 0)
    r = shift & 3
    start = ((begin - shift) // TILE + tile) * TILE
    src_aligned = ((src + shift * SRC_ITEMSIZE) & (SRC_ALIGNMENT - 1)) == 0
    if RADEMACHER:
        hot = src_aligned & (shift == 0)
    else:
        hot = src_aligned & (r == 0)
    # The part of this tile that the tensor has, counted from the tile's first element: from here
    # on offsets fit in 32 bits.
    low = tl.maximum(begin - shift - start, 0).to(tl.int32)
    high = tl.minimum(end - shift - start, TILE).to(tl.int32)
    # Steps that touch it, and those among them that the hot loop takes.
    first = low // STEP
    last = (high + STEP - 1) // STEP
    hot_first = (low + STEP * UNIT - 1) // (STEP * UNIT)
    # The high counter word must be the same in all lanes: it changes within this step.
    wraps = (shift != 0) & ((start & 0x3FFFFFFFF) == 0)
    hot_first = tl.where(wraps, tl.maximum(hot_first, 1), hot_first)
    hot_last = high // (STEP * UNIT)
    hot_last = tl.where(hot, tl.maximum(hot_last, hot_first), hot_first)

    lane = tl.arange(0, LANES)
    moved = tl.zeros([LANES], tl.float32)
    wanted = tl.zeros([LANES], tl.float32)
    lost = tl.zeros([LANES], tl.float32)

    # The high counter words are the same in the whole tile.
    tile_src = src + (start + shift) * SRC_ITEMSIZE
    tile_dst = dst + (start + shift) * DST_ITEMSIZE
    tile_lo = ((start + shift) >> 2).to(tl.uint32) + lane.to(tl.uint32) * (VEC // 4)
    hi = (start >> 34).to(tl.uint32)
    # A unit of signs is the span of 32 Philox calls; a lane needs one of them.
    tile_call = (start >> 7).to(tl.uint32) + (lane.to(tl.uint32) * VEC // 8) % 32
    call_hi = (start >> 39).to(tl.uint32) | _RADEMACHER_DOMAIN
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
                    _direction(directions, k), RADEMACHER, VEC, LANES,
                )  # fmt: skip
        accs = add_unit(
            accs, last_scale, lo, call, hi, call_hi, k0, k1, stream, last_direction,
            RADEMACHER, VEC, LANES,
        )  # fmt: skip
        for part in tl.static_range(UNIT * PARTS_PER_STEP):
            if STOCHASTIC:
                block = lo + part * (WIDTH // 4)
                bits = draw(block, hi, k0, k1, stream, last_direction, True, VEC, LANES)
            else:
                bits = 0
            new = _round(accs[part], bits, DST_DTYPE, STOCHASTIC)
            store_wide(tile_dst, ahead + part * WIDTH, new, DST_DTYPE, VEC, LANES)
            if CHANGES:
                at = ahead + part * WIDTH
                moved, wanted, lost = _add_changes(
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
                    acc, tl.load(row + k), i, r, k0, k1, stream, _direction(directions, k),
                    RADEMACHER, VEC, LANES,
                )  # fmt: skip
        acc = add_anywhere(
            acc, last_scale, i, r, k0, k1, stream, last_direction, RADEMACHER, VEC, LANES
        )
        if STOCHASTIC:
            bits = draw_anywhere(i, r, k0, k1, stream, last_direction, True, VEC, LANES)
        else:
            bits = 0
        new = _round(acc, bits, DST_DTYPE, STOCHASTIC)
        if inside:
            store_wide(tile_dst, at, new, DST_DTYPE, VEC, LANES)
        else:
            store_masked(tile_dst, at, low, high, new, DST_DTYPE, VEC, LANES)
        if CHANGES:
            moved, wanted, lost = _add_changes(moved, wanted, lost, old, acc, new, at, low, high)

    if CHANGES:
        p = partials + program * LANES + lane
        plane = tl.num_programs(0).to(tl.int64) * LANES
        tl.store(p, moved)
        tl.store(p + plane, wanted)
        tl.store(p + 2 * plane, lost)


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
