"""Memory accesses of kernels in which each lane owns VEC contiguous elements, VEC 2, 4 or 8.

Blocks are (LANES, VEC); columns are tuples of (LANES,), one per element of a lane. Splitting and
joining renames registers and moves nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _split4(x, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x0, x1, x2, x3, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES, 4])


@triton.jit
def split(x, LANES: tl.constexpr):
    """The columns of a block."""
    if x.shape[1] == 2:
        return tl.split(x)
    elif x.shape[1] == 4:
        return _split4(x, LANES)
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
        x0, x2, x4, x6 = _split4(even, LANES)
        x1, x3, x5, x7 = _split4(odd, LANES)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def join(x, LANES: tl.constexpr):
    """The block of columns."""
    if len(x) == 2:
        return tl.join(x[0], x[1])
    elif len(x) == 4:
        return _join4(x[0], x[1], x[2], x[3], LANES)
    else:
        even = _join4(x[0], x[2], x[4], x[6], LANES)
        odd = _join4(x[1], x[3], x[5], x[7], LANES)
        return tl.reshape(tl.join(even, odd), [LANES, 8])


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A 64-bit address, known to be a multiple of ALIGNMENT bytes, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def load_wide(
    address, ahead, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A block as float32, in accesses of up to 16 bytes.

    It begins `ahead` elements after the address; both are aligned to the access.
    """
    lane = tl.arange(0, LANES)[:, None]
    if DTYPE == tl.bfloat16:
        # As pairs in 32-bit words: one shift or one mask makes a bfloat16 a float32.
        PAIRS: tl.constexpr = VEC // 2
        p = _pointer(address, tl.uint32, VEC * ITEMSIZE) + ahead // 2
        words = split(tl.load(p + (lane * PAIRS + tl.arange(0, PAIRS)[None, :])), LANES)
        columns = ()
        for i in tl.static_range(PAIRS):
            low = (words[i] << 16).to(tl.float32, bitcast=True)
            high = (words[i] & 0xFFFF0000).to(tl.float32, bitcast=True)
            columns = columns + (low, high)
        return join(columns, LANES)
    elif VEC * ITEMSIZE <= 16:
        p = _pointer(address, DTYPE, VEC * ITEMSIZE) + ahead
        return tl.load(p + (lane * VEC + tl.arange(0, VEC)[None, :])).to(tl.float32)
    else:
        p = _pointer(address, DTYPE, 16) + ahead + (lane * VEC + tl.arange(0, 4)[None, :])
        return join(split(tl.load(p), LANES) + split(tl.load(p + 4), LANES), LANES)


@triton.jit
def store_wide(address, ahead, x, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr):
    """16 bytes per lane; counterpart of load_wide."""
    lane = tl.arange(0, LANES)[:, None] * VEC
    tl.store(_pointer(address, DTYPE, 16) + ahead + (lane + tl.arange(0, VEC)[None, :]), x)


@triton.jit
def load_masked(
    address, ahead, low, high, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr
):
    """As load_wide, without alignment, and zero outside of elements [low, high) of the address.

    One access per column: as one block they would be spread over the lanes for coalescing and come
    back through shared memory.
    """
    columns = ()
    for e in tl.static_range(VEC):
        i = ahead + tl.arange(0, LANES) * VEC + e
        p = address.to(tl.pointer_type(DTYPE)) + i
        x = tl.load(p, mask=(i >= low) & (i < high), other=0.0)
        columns = columns + (x.to(tl.float32),)
    return join(columns, LANES)


@triton.jit
def store_masked(
    address, ahead, low, high, x, DTYPE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr
):
    """Counterpart of load_masked."""
    columns = split(x, LANES)
    for e in tl.static_range(VEC):
        i = ahead + tl.arange(0, LANES) * VEC + e
        p = address.to(tl.pointer_type(DTYPE)) + i
        tl.store(p, columns[e], mask=(i >= low) & (i < high))


@triton.jit
def load_bytes(address, ahead, VEC: tl.constexpr, LANES: tl.constexpr):
    """A block of int8 in accesses of VEC bytes; `ahead` and the address are multiples of VEC."""
    lane = tl.arange(0, LANES)[:, None] * VEC
    return tl.load(_pointer(address, tl.int8, VEC) + ahead + (lane + tl.arange(0, VEC)[None, :]))


@triton.jit
def store_bytes(address, ahead, x, VEC: tl.constexpr, LANES: tl.constexpr):
    """Counterpart of load_bytes."""
    lane = tl.arange(0, LANES)[:, None] * VEC
    tl.store(_pointer(address, tl.int8, VEC) + ahead + (lane + tl.arange(0, VEC)[None, :]), x)
