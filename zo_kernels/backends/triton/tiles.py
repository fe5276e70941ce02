"""What kernels over a list of tensors share: the table, a program's tile, and its counter words.

One launch covers a list of tensors. A program owns a tile of STEPS steps; in a step each of LANES
lanes owns 16 contiguous, 16-byte aligned bytes of dst (twice, where dst is float32), whatever the
element's index there: chunks begin where the memory of dst is aligned, not where a Philox block
begins.
"""

import triton
import triton.language as tl

from zo_kernels import noise
from zo_kernels.backends.triton.noise import round_stochastic

LANES = 128  # one per thread
STEPS = 16  # steps per program: the table look-ups are shared by 16 * 128 * 8 elements
# Rows of the int64 table, one column per tensor; OTHER is in some tables only.
FIRST_TILE, DST, SRC, BEGIN, END, STREAM, ROW, OTHER = range(8)
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
def tile_of(table, tensors, program, ITEMSIZE: tl.constexpr, VEC: tl.constexpr, TILE: tl.constexpr):
    """The tile of a program: its column, where its chunks begin, and what the tensor has of it.

    Returns column, dst and begin and end (table rows), stream, shift, start, low and high. Chunks
    begin at elements x + shift, x a multiple of VEC, -VEC < shift <= 0: there dst is aligned. The
    tile's first element is start + shift, and [low, high), counted from there, is what the tensor
    has: from here on offsets fit in 32 bits.
    """
    column = _find(table, tensors, program)
    tile = program - tl.load(table + column)
    dst = tl.load(table + tensors + column)
    begin = tl.load(table + 3 * tensors + column)
    end = tl.load(table + 4 * tensors + column)
    stream = tl.load(table + 5 * tensors + column).to(tl.uint32)
    shift = (((-dst) & 15) // ITEMSIZE).to(tl.int32)
    shift = tl.where(shift > 0, shift - VEC, 0)
    start = ((begin - shift) // TILE + tile) * TILE
    low = tl.maximum(begin - shift - start, 0).to(tl.int32)
    high = tl.minimum(end - shift - start, TILE).to(tl.int32)
    return column, dst, stream, shift, start, low, high


@triton.jit
def hot_steps(hot, shift, start, low, high, STEP: tl.constexpr, UNIT: tl.constexpr):
    """The steps [first, last) of [low, high), and the units that the hot loop takes of them.

    hot: whether chunks begin where a block does, and all memory is aligned.
    """
    first = low // STEP
    last = (high + STEP - 1) // STEP
    hot_first = (low + STEP * UNIT - 1) // (STEP * UNIT)
    # The high counter word must be the same in all lanes: it changes within this step.
    wraps = (shift != 0) & ((start & 0x3FFFFFFFF) == 0)
    hot_first = tl.where(wraps, tl.maximum(hot_first, 1), hot_first)
    hot_last = high // (STEP * UNIT)
    hot_last = tl.where(hot, tl.maximum(hot_last, hot_first), hot_first)
    return first, last, hot_first, hot_last


@triton.jit
def counters(start, shift, VEC: tl.constexpr, LANES: tl.constexpr):
    """Counter words of a tile's first block in each lane: lo and hi, and call and call_hi of signs.

    The high words are the same in the whole tile.
    """
    lane = tl.arange(0, LANES).to(tl.uint32)
    lo = ((start + shift) >> 2).to(tl.uint32) + lane * (VEC // 4)
    hi = (start >> 34).to(tl.uint32)
    # A unit of signs is the span of 32 Philox calls; a lane needs one of them.
    call = (start >> 7).to(tl.uint32) + (lane * VEC // 8) % 32
    call_hi = (start >> 39).to(tl.uint32) | _RADEMACHER_DOMAIN
    return lo, hi, call, call_hi


@triton.jit
def direction_word(directions, k):
    """The k-th direction as the uint32 that a counter takes."""
    return tl.load(directions + k).to(tl.uint32)


@triton.jit
def rounded(value, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 to DTYPE, to nearest even or by random bits."""
    if STOCHASTIC:
        return round_stochastic(value, bits, DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def add_changes(moved, wanted, lost, old, acc, new, at, low, high):
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


@triton.jit
def store_changes(partials, program, moved, wanted, lost):
    """The sums of a program's lanes, into (3, programs, LANES)."""
    LANES: tl.constexpr = moved.shape[0]
    p = partials + program * LANES + tl.arange(0, LANES)
    plane = tl.num_programs(0).to(tl.int64) * LANES
    tl.store(p, moved)
    tl.store(p + plane, wanted)
    tl.store(p + 2 * plane, lost)
