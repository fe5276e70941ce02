"""What a tile keeps of held weights: codes of flagged elements, and whole elements.

A step is a tuple of blocks (LANES, VEC), its parts of LANES * VEC contiguous elements; its first
element is `at` of the tile, and [low, high) is what the tensor has of the tile. ws are weights, vs
what is in memory, ps the predictions of ws from vs, all float32 values that the dtype has.
"""

import triton
import triton.language as tl

from zo_kernels.backends.triton.memory import join, split

RECORD = 8  # bytes of a whole element with its place
WHOLE_TILE = 1 << 30  # a place after all others
_RECORD = tl.constexpr(RECORD)
_WHOLE_TILE = tl.constexpr(WHOLE_TILE)


@triton.jit
def _flags(vs, ps, at, low, high):
    """1 where p may not be w, as int32; and how many each lane has."""
    LANES: tl.constexpr = vs[0].shape[0]
    VEC: tl.constexpr = vs[0].shape[1]
    flags = ()
    count = tl.zeros([LANES], tl.int32)
    for part in tl.static_range(len(vs)):
        magnitude = ps[part].to(tl.int32, bitcast=True) & 0x7FFFFFFF
        below = (magnitude - 1) & -0x800000  # the exponent's bits; less than any at zero
        wider = below < (vs[part].to(tl.int32, bitcast=True) & 0x7F800000)
        i = _index(at, part, VEC, LANES)
        flag = (wider & (i >= low) & (i < high)).to(tl.int32)
        flags = flags + (flag,)
        count += tl.sum(flag, axis=1)
    return flags, count


@triton.jit
def _index(at, part, VEC: tl.constexpr, LANES: tl.constexpr):
    """Elements of a part of a step, counted from the tile's first."""
    i = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    return at + part * (LANES * VEC) + i


@triton.jit
def record(end, n, count):
    """Place and pattern of the n-th record before the end of a region that has count of them."""
    p = (end - _RECORD * (n + 1)).to(tl.pointer_type(tl.int64))
    record = tl.load(p, mask=n < count, other=_WHOLE_TILE << 32)
    return (record >> 32).to(tl.int32), record.to(tl.int32)


@triton.jit
def decode(vs, ps, at, low, high, address, used, SHIFT: tl.constexpr):
    """w of a step, but for what is kept whole, and the bytes read by its end."""
    LANES: tl.constexpr = vs[0].shape[0]
    VEC: tl.constexpr = vs[0].shape[1]
    flags, count = _flags(vs, ps, at, low, high)
    rank, total = places_of(count)
    p = (address + used).to(tl.pointer_type(tl.int8))
    result = ()
    for part in tl.static_range(len(vs)):
        columns = split(flags[part], LANES)
        predictions = split(ps[part].to(tl.int32, bitcast=True), LANES)
        found = ()
        for e in tl.static_range(VEC):
            # One access per column, as in load_masked.
            code = tl.load(p + rank, mask=columns[e] != 0, other=0).to(tl.int32)
            w = tl.add(predictions[e], code << SHIFT, sanitize_overflow=False)
            found = found + (w.to(tl.float32, bitcast=True),)
            rank += columns[e]
        result = result + (join(found, LANES),)
    return result, used + total


@triton.jit
def places_of(counts):
    """The sum of counts before each lane's, and of all."""
    return tl.cumsum(counts, 0) - counts, tl.sum(counts, axis=0)


@triton.jit
def with_records(ws, at, size, place, pattern, n, end, count):
    """ws with the elements of this step that are kept whole, and what is next after it."""
    LANES: tl.constexpr = ws[0].shape[0]
    VEC: tl.constexpr = ws[0].shape[1]
    while place < at + size:
        found = ()
        for part in tl.static_range(len(ws)):
            here = _index(at, part, VEC, LANES) == place
            found = found + (tl.where(here, pattern.to(tl.float32, bitcast=True), ws[part]),)
        ws = found
        n += 1
        place, pattern = record(end, n, count)
    return ws, place, pattern, n


@triton.jit
def encode(ws, vs, ps, at, low, high, SHIFT: tl.constexpr):
    """Flags, codes (int8), what is kept whole, and how many of both each lane has, in one word."""
    LANES: tl.constexpr = vs[0].shape[0]
    VEC: tl.constexpr = vs[0].shape[1]
    flags, count = _flags(vs, ps, at, low, high)
    codes, wholes = (), ()
    kept = tl.zeros([LANES], tl.int32)
    for part in tl.static_range(len(vs)):
        w = ws[part].to(tl.int32, bitcast=True)
        p = ps[part].to(tl.int32, bitcast=True)
        code = (tl.sub(w, p, sanitize_overflow=False) >> SHIFT).to(tl.int8)
        coded = tl.where(flags[part] != 0, code.to(tl.int32) << SHIFT, 0)
        back = tl.add(p, coded, sanitize_overflow=False)
        both_nan = (ws[part] != ws[part]) & (ps[part] != ps[part])
        i = _index(at, part, VEC, LANES)
        whole = ((back != w) & ~both_nan & (i >= low) & (i < high)).to(tl.int32)
        codes = codes + (code,)
        wholes = wholes + (whole,)
        kept += tl.sum(whole, axis=1)
    return flags, codes, wholes, count | kept << 16


@triton.jit
def write(ws, flags, codes, wholes, rank, at, address, used, end, records, any_whole):
    """The bytes and records of a step into a region; rank: of each lane, as _encode's counts."""
    LANES: tl.constexpr = ws[0].shape[0]
    VEC: tl.constexpr = ws[0].shape[1]
    p = (address + used).to(tl.pointer_type(tl.int8))
    place = rank & 0xFFFF
    for part in tl.static_range(len(ws)):
        columns, bytes_ = split(flags[part], LANES), split(codes[part], LANES)
        for e in tl.static_range(VEC):
            tl.store(p + place, bytes_[e], mask=columns[e] != 0)
            place += columns[e]
    if any_whole:
        place = rank >> 16
        for part in tl.static_range(len(ws)):
            columns = split(wholes[part], LANES)
            patterns = split(ws[part].to(tl.uint32, bitcast=True), LANES)
            for e in tl.static_range(VEC):
                i = at + part * (LANES * VEC) + tl.arange(0, LANES) * VEC + e
                record = (i.to(tl.int64) << 32) | patterns[e].to(tl.int64)
                q = (end - _RECORD * (records + place + 1)).to(tl.pointer_type(tl.int64))
                tl.store(q, record, mask=columns[e] != 0)
                place += columns[e]
