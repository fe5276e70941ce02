"""The primitive on a GPU: dst = round(src_scale * src + sum_k scales[k] * z_k).

One launch covers a list of tensors. A program owns TILE elements, aligned in the index of the full
parameter, so Philox blocks never straddle lanes; a lane owns 8 contiguous elements (4 where both
dtypes are float32), one or two Philox blocks, and reads and writes them as 16 bytes where
the tensor's memory allows it. Ragged ends and misaligned views take one scalar access per element,
of the same arithmetic. Bytes moved per element: its size in src plus its size in dst.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.noise import normals, normals_and_bits, philox, round_stochastic

LANES = 128  # per inner step, one per thread
STEPS = 16  # inner steps per program: the table look-ups are shared by 16 * 128 * 8 elements
# Rows of the int64 table, one column per tensor.
FIRST_TILE, DST, SRC, BEGIN, END, STREAM, ROWS = range(7)
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


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
def _split4(x, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x0, x1, x2, x3, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES, 4])


@triton.jit
def _split8(x, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
    x0, x2, x4, x6 = _split4(even, LANES)
    x1, x3, x5, x7 = _split4(odd, LANES)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join8(x0, x1, x2, x3, x4, x5, x6, x7, LANES: tl.constexpr):
    even = _join4(x0, x2, x4, x6, LANES)
    odd = _join4(x1, x3, x5, x7, LANES)
    return tl.reshape(tl.join(even, odd), [LANES, 8])


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    """A 64-bit address, known to be a multiple of 16, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _load_wide(address, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, LANES: tl.constexpr):
    """Eight contiguous elements per lane as float32 columns, in 16-byte accesses."""
    lane = tl.arange(0, LANES)[:, None]
    if ITEMSIZE == 2:
        p = _pointer(address, DTYPE) + (lane * 8 + tl.arange(0, 8)[None, :])
        return _split8(tl.load(p).to(tl.float32), LANES)
    else:
        p = _pointer(address, DTYPE) + (lane * 8 + tl.arange(0, 4)[None, :])
        x0, x1, x2, x3 = _split4(tl.load(p), LANES)
        x4, x5, x6, x7 = _split4(tl.load(p + 4), LANES)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _store_wide(
    address, x0, x1, x2, x3, x4, x5, x6, x7,
    DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Counterpart of _load_wide; the columns already have DTYPE."""
    lane = tl.arange(0, LANES)[:, None]
    if ITEMSIZE == 2:
        p = _pointer(address, DTYPE) + (lane * 8 + tl.arange(0, 8)[None, :])
        tl.store(p, _join8(x0, x1, x2, x3, x4, x5, x6, x7, LANES))
    else:
        p = _pointer(address, DTYPE) + (lane * 8 + tl.arange(0, 4)[None, :])
        tl.store(p, _join4(x0, x1, x2, x3, LANES))
        tl.store(p + 4, _join4(x4, x5, x6, x7, LANES))


@triton.jit
def _load_one(base, index, begin, end, DTYPE: tl.constexpr):
    """One element per lane, zero outside [begin, end)."""
    mask = (index >= begin) & (index < end)
    return tl.load(base.to(tl.pointer_type(DTYPE)) + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_one(base, index, begin, end, value, DTYPE: tl.constexpr):
    mask = (index >= begin) & (index < end)
    tl.store(base.to(tl.pointer_type(DTYPE)) + index, value, mask=mask)


@triton.jit
def _round(value, bits, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        return round_stochastic(value, bits, DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit(do_not_specialize=["tensors", "directions_count", "seed_lo", "seed_hi", "src_scale"])
def combine_kernel(
    table,  # (ROWS, tensors) int64
    scales,  # (tensors, directions_count) float32
    directions,  # (directions_count,) int32 bit patterns
    tensors,
    directions_count,
    seed_lo,  # int32 bit patterns of the seed's halves
    seed_hi,
    src_scale,
    SRC_DTYPE: tl.constexpr,
    DST_DTYPE: tl.constexpr,
    SRC_ITEMSIZE: tl.constexpr,
    DST_ITEMSIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALE_SRC: tl.constexpr,
    SINGLE: tl.constexpr,  # directions_count == 1
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See the module; table rows are FIRST_TILE, DST, SRC, BEGIN, END, STREAM of this file.

    DST and SRC are the addresses that element 0 of the full parameter would have.
    """
    WIDTH: tl.constexpr = LANES * 8
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
    first = (begin // (WIDTH * STEPS) + tile) * (WIDTH * STEPS)
    aligned = ((dst | src) & 15) == 0
    row = scales + column.to(tl.int64) * directions_count
    last_scale = tl.load(row + directions_count - 1)
    last_direction = tl.load(directions + directions_count - 1).to(tl.uint32, bitcast=True)

    lane = tl.arange(0, LANES)
    for step in range(STEPS):
        at = first + step * WIDTH
        if (at < end) & (at + WIDTH > begin):
            wide = aligned & (at >= begin) & (at + WIDTH <= end)
            i = at + lane * 8
            if wide:
                a0, a1, a2, a3, a4, a5, a6, a7 = _load_wide(
                    src + at * SRC_ITEMSIZE, SRC_DTYPE, SRC_ITEMSIZE, LANES
                )
            else:
                a0 = _load_one(src, i, begin, end, SRC_DTYPE)
                a1 = _load_one(src, i + 1, begin, end, SRC_DTYPE)
                a2 = _load_one(src, i + 2, begin, end, SRC_DTYPE)
                a3 = _load_one(src, i + 3, begin, end, SRC_DTYPE)
                a4 = _load_one(src, i + 4, begin, end, SRC_DTYPE)
                a5 = _load_one(src, i + 5, begin, end, SRC_DTYPE)
                a6 = _load_one(src, i + 6, begin, end, SRC_DTYPE)
                a7 = _load_one(src, i + 7, begin, end, SRC_DTYPE)
            if SCALE_SRC:
                a0, a1, a2, a3 = a0 * src_scale, a1 * src_scale, a2 * src_scale, a3 * src_scale
                a4, a5, a6, a7 = a4 * src_scale, a5 * src_scale, a6 * src_scale, a7 * src_scale

            # A step never crosses a multiple of 2^34 elements: the high counter word is uniform.
            hi = ((at // 4) >> 32).to(tl.uint32)
            lo = (at // 4).to(tl.uint32) + lane.to(tl.uint32) * 2
            if not SINGLE:
                for k in range(directions_count - 1):
                    c = tl.load(row + k)
                    direction = tl.load(directions + k).to(tl.uint32, bitcast=True)
                    z0, z1, z2, z3 = normals(lo, hi, k0, k1, stream, direction)
                    z4, z5, z6, z7 = normals(lo + 1, hi, k0, k1, stream, direction)
                    a0, a1, a2, a3 = (
                        tl.fma(z0, c, a0),
                        tl.fma(z1, c, a1),
                        tl.fma(z2, c, a2),
                        tl.fma(z3, c, a3),
                    )
                    a4, a5, a6, a7 = (
                        tl.fma(z4, c, a4),
                        tl.fma(z5, c, a5),
                        tl.fma(z6, c, a6),
                        tl.fma(z7, c, a7),
                    )
            z0, z1, z2, z3, r0, r1, r2, r3 = normals_and_bits(
                lo, hi, k0, k1, stream, last_direction
            )
            z4, z5, z6, z7, r4, r5, r6, r7 = normals_and_bits(
                lo + 1, hi, k0, k1, stream, last_direction
            )
            o0 = _round(tl.fma(z0, last_scale, a0), r0, DST_DTYPE, STOCHASTIC)
            o1 = _round(tl.fma(z1, last_scale, a1), r1, DST_DTYPE, STOCHASTIC)
            o2 = _round(tl.fma(z2, last_scale, a2), r2, DST_DTYPE, STOCHASTIC)
            o3 = _round(tl.fma(z3, last_scale, a3), r3, DST_DTYPE, STOCHASTIC)
            o4 = _round(tl.fma(z4, last_scale, a4), r4, DST_DTYPE, STOCHASTIC)
            o5 = _round(tl.fma(z5, last_scale, a5), r5, DST_DTYPE, STOCHASTIC)
            o6 = _round(tl.fma(z6, last_scale, a6), r6, DST_DTYPE, STOCHASTIC)
            o7 = _round(tl.fma(z7, last_scale, a7), r7, DST_DTYPE, STOCHASTIC)

            if wide:
                _store_wide(
                    dst + at * DST_ITEMSIZE, o0, o1, o2, o3, o4, o5, o6, o7,
                    DST_DTYPE, DST_ITEMSIZE, LANES,
                )  # fmt: skip
            else:
                _store_one(dst, i, begin, end, o0, DST_DTYPE)
                _store_one(dst, i + 1, begin, end, o1, DST_DTYPE)
                _store_one(dst, i + 2, begin, end, o2, DST_DTYPE)
                _store_one(dst, i + 3, begin, end, o3, DST_DTYPE)
                _store_one(dst, i + 4, begin, end, o4, DST_DTYPE)
                _store_one(dst, i + 5, begin, end, o5, DST_DTYPE)
                _store_one(dst, i + 6, begin, end, o6, DST_DTYPE)
                _store_one(dst, i + 7, begin, end, o7, DST_DTYPE)


@triton.jit(do_not_specialize=["begin", "end", "seed_lo", "seed_hi", "stream", "direction"])
def emit_kernel(
    out,  # address of element `begin`, float32 or int32
    begin,
    end,
    seed_lo,
    seed_hi,
    stream,
    direction,
    NORMAL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes normals or words of [begin, end), one Philox block per lane; for looking and tests."""
    first = (begin // 4 // LANES + tl.program_id(0).to(tl.int64)) * LANES
    hi = (first >> 32).to(tl.uint32)
    lane = tl.arange(0, LANES)
    lo = first.to(tl.uint32) + lane.to(tl.uint32)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    c2 = stream.to(tl.uint32, bitcast=True)
    c3 = direction.to(tl.uint32, bitcast=True)
    if NORMAL:
        x0, x1, x2, x3 = normals(lo, hi, k0, k1, c2, c3)
    else:
        x0, x1, x2, x3 = philox(lo, hi, k0, k1, c2, c3)
        x0, x1 = x0.to(tl.int32, bitcast=True), x1.to(tl.int32, bitcast=True)
        x2, x3 = x2.to(tl.int32, bitcast=True), x3.to(tl.int32, bitcast=True)
    i = (first + lane) * 4 - begin
    count = end - begin
    tl.store(out + i, x0, mask=(i >= 0) & (i < count))
    tl.store(out + i + 1, x1, mask=(i + 1 >= 0) & (i + 1 < count))
    tl.store(out + i + 2, x2, mask=(i + 2 >= 0) & (i + 2 < count))
    tl.store(out + i + 3, x3, mask=(i + 3 >= 0) & (i + 3 < count))


def signed(word: int) -> int:
    """The int32 with the bit pattern of a u32 (Triton types integers by their value)."""
    return word - (1 << 32) if word >> 31 else word


def _address(tensor: Tensor, offset: int) -> int:
    """Where element 0 of the full parameter would lie, modulo 2^64 as pointer arithmetic is."""
    address = tensor.data_ptr() - offset * tensor.element_size()
    return (address + (1 << 63)) % (1 << 64) - (1 << 63)


def tile_table(
    dst: list[Tensor], src: list[Tensor], streams: list[int], offsets: list[int]
) -> tuple[Tensor, int]:
    """The int64 table (ROWS, tensors) on the CPU, and the number of programs."""
    tile = LANES * 8 * STEPS
    columns, programs = [], 0
    for d, s, stream, offset in zip(dst, src, streams, offsets, strict=True):
        if d.numel() == 0:
            continue
        end = offset + d.numel()
        columns.append((programs, _address(d, offset), _address(s, offset), offset, end, stream))
        programs += -(-end // tile) - offset // tile
    return torch.tensor(columns, dtype=torch.int64).t().contiguous(), programs


_SIGNATURE = {
    "table": "*i64",
    "scales": "*fp32",
    "directions": "*i32",
    "tensors": "i32",
    "directions_count": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "src_scale": "fp32",
}
_SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def variants() -> list[Variant]:
    """What ZOSGD launches: in place on each dtype, one or several directions, both roundings."""
    result = []
    for dtype, single, stochastic in product(TRITON_DTYPES, (True, False), (False, True)):
        if stochastic and dtype == torch.float32:
            continue
        name = f"combine {_SHORT_NAMES[dtype]}"
        name += ("" if single else " directions") + (" stochastic" if stochastic else "")
        constants = {
            "SRC_DTYPE": TRITON_DTYPES[dtype],
            "DST_DTYPE": TRITON_DTYPES[dtype],
            "SRC_ITEMSIZE": dtype.itemsize,
            "DST_ITEMSIZE": dtype.itemsize,
            "STOCHASTIC": stochastic,
            "SCALE_SRC": False,
            "SINGLE": single,
            "LANES": LANES,
            "STEPS": STEPS,
        }
        result.append(
            Variant(
                name=name,
                kernel=combine_kernel,
                signature=_SIGNATURE,
                constants=constants,
                aligned=("table", "scales", "directions"),
                lanes=LANES,
                bytes_per_element=2.0 * dtype.itemsize,
                dst_itemsize=dtype.itemsize,
            )
        )
    return result
