"""Memory accesses of kernels in which each lane owns VEC contiguous elements.

Blocks are (LANES, VEC); columns are (LANES,), one per element of a lane. Splitting and joining
renames registers and moves nothing.
"""

import triton
import triton.language as tl


@triton.jit
def split4(x, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES, 4])


@triton.jit
def split8(x, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
    x0, x2, x4, x6 = split4(even, LANES)
    x1, x3, x5, x7 = split4(odd, LANES)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join8(x0, x1, x2, x3, x4, x5, x6, x7, LANES: tl.constexpr):
    even = join4(x0, x2, x4, x6, LANES)
    odd = join4(x1, x3, x5, x7, LANES)
    return tl.reshape(tl.join(even, odd), [LANES, 8])


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A 64-bit address, known to be a multiple of ALIGNMENT bytes, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def _low(pair):
    """The bfloat16 in the low half of a 32-bit word as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def load_wide(
    address, ahead, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """VEC contiguous elements per lane as float32 (LANES, VEC), in accesses of up to 16 bytes.

    They begin `ahead` elements after the address, ahead and the address aligned to the access.
    """
    lane = tl.arange(0, LANES)[:, None]
    if DTYPE == tl.bfloat16:
        # As pairs in 32-bit words: one shift or one mask makes a bfloat16 a float32.
        p = _pointer(address, tl.uint32, VEC * ITEMSIZE) + ahead // 2
        words = tl.load(p + (lane * (VEC // 2) + tl.arange(0, VEC // 2)[None, :]))
        if VEC == 8:
            w0, w1, w2, w3 = split4(words, LANES)
            return join8(
                _low(w0), _high(w0), _low(w1), _high(w1), _low(w2), _high(w2), _low(w3), _high(w3),
                LANES,
            )  # fmt: skip
        else:
            w0, w1 = tl.split(words)
            return join4(_low(w0), _high(w0), _low(w1), _high(w1), LANES)
    elif VEC * ITEMSIZE <= 16:
        p = _pointer(address, DTYPE, VEC * ITEMSIZE) + ahead
        return tl.load(p + (lane * VEC + tl.arange(0, VEC)[None, :])).to(tl.float32)
    else:
        p = _pointer(address, DTYPE, 16) + ahead + (lane * VEC + tl.arange(0, 4)[None, :])
        x0, x1, x2, x3 = split4(tl.load(p), LANES)
        x4, x5, x6, x7 = split4(tl.load(p + 4), LANES)
        return join8(x0, x1, x2, x3, x4, x5, x6, x7, LANES)


@triton.jit
def store_wide(address, ahead, x, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr):
    """16 bytes per lane; counterpart of load_wide."""
    lane = tl.arange(0, LANES)[:, None] * VEC
    tl.store(_pointer(address, DTYPE, 16) + ahead + (lane + tl.arange(0, VEC)[None, :]), x)


@triton.jit
def _load_one(base, index, begin, end, DTYPE: tl.constexpr):
    """One element per lane, zero outside [begin, end)."""
    mask = (index >= begin) & (index < end)
    return tl.load(base.to(tl.pointer_type(DTYPE)) + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_masked(base, i, begin, end, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr):
    """Elements i .. i + VEC - 1 of each lane as float32 (LANES, VEC), one access per element.

    Separate columns: as one block they would be spread over the lanes for coalescing and come back
    through shared memory.
    """
    x0 = _load_one(base, i, begin, end, DTYPE)
    x1 = _load_one(base, i + 1, begin, end, DTYPE)
    x2 = _load_one(base, i + 2, begin, end, DTYPE)
    x3 = _load_one(base, i + 3, begin, end, DTYPE)
    if VEC == 4:
        return join4(x0, x1, x2, x3, LANES)
    else:
        x4 = _load_one(base, i + 4, begin, end, DTYPE)
        x5 = _load_one(base, i + 5, begin, end, DTYPE)
        x6 = _load_one(base, i + 6, begin, end, DTYPE)
        x7 = _load_one(base, i + 7, begin, end, DTYPE)
        return join8(x0, x1, x2, x3, x4, x5, x6, x7, LANES)


@triton.jit
def _store_one(base, index, begin, end, value, DTYPE: tl.constexpr):
    mask = (index >= begin) & (index < end)
    tl.store(base.to(tl.pointer_type(DTYPE)) + index, value, mask=mask)


@triton.jit
def store_masked(
    base, i, begin, end, x, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr
):
    """Counterpart of _load_masked."""
    if VEC == 4:
        x0, x1, x2, x3 = split4(x, LANES)
    else:
        x0, x1, x2, x3, x4, x5, x6, x7 = split8(x, LANES)
        _store_one(base, i + 4, begin, end, x4, DTYPE)
        _store_one(base, i + 5, begin, end, x5, DTYPE)
        _store_one(base, i + 6, begin, end, x6, DTYPE)
        _store_one(base, i + 7, begin, end, x7, DTYPE)
    _store_one(base, i, begin, end, x0, DTYPE)
    _store_one(base, i + 1, begin, end, x1, DTYPE)
    _store_one(base, i + 2, begin, end, x2, DTYPE)
    _store_one(base, i + 3, begin, end, x3, DTYPE)
