"""Blocks of z, and of rounding bits, for kernels in which each lane owns VEC contiguous elements.

Two forms: for chunks that begin where a Philox block does, and for chunks that begin anywhere.
"""

import triton
import triton.language as tl

from zo_kernels.backends.triton.memory import join
from zo_kernels.backends.triton.noise import normals, philox, rounding_bits, sign_byte


@triton.jit
def _draw_block(lo, hi, k0, k1, stream, direction, BITS: tl.constexpr):
    """Four columns of normals, or of rounding bits."""
    a, b, c, d = philox(lo, hi, k0, k1, stream, direction)
    if BITS:
        return rounding_bits(a, b, c, d)
    else:
        return normals(a, b, c, d)


@triton.jit
def draw(
    lo, hi, k0, k1, stream, direction, BITS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr
):
    """Normals, or rounding bits, of chunks that begin at block (hi, lo)."""
    columns = _draw_block(lo, hi, k0, k1, stream, direction, BITS)
    if VEC == 8:
        columns = columns + _draw_block(lo + 1, hi, k0, k1, stream, direction, BITS)
    return join(columns, LANES)


@triton.jit
def draw_anywhere(
    i, r, k0, k1, stream, direction, BITS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr
):
    """As draw, for chunks that begin at element i (LANES, int64), i % 4 = r in all lanes."""
    columns = ()
    for j in tl.static_range(VEC // 4 + 1):
        block = (i >> 2) + j
        hi = (block >> 32).to(tl.uint32)
        columns = columns + _draw_block(block.to(tl.uint32), hi, k0, k1, stream, direction, BITS)
    odd, two = (r & 1) != 0, (r & 2) != 0
    picked = ()
    for e in tl.static_range(VEC):
        near = tl.where(odd, columns[e + 1], columns[e])
        far = tl.where(odd, columns[e + 3], columns[e + 2])
        picked = picked + (tl.where(two, far, near),)
    return join(picked, LANES)


@triton.jit
def _signed(c, byte, VEC: tl.constexpr, LANES: tl.constexpr):
    """c times the Rademacher signs in bits 0 .. VEC - 1 of each lane's byte; c: float32 scalar."""
    pattern = c.to(tl.uint32, bitcast=True)
    columns = ()
    for e in tl.static_range(VEC):
        sign = (byte << (31 - e)) & 0x80000000
        columns = columns + ((sign ^ pattern).to(tl.float32, bitcast=True),)
    return join(columns, LANES)


@triton.jit
def add_unit(
    accs, c, lo, call, hi, call_hi, k0, k1, stream, direction,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """accs + c * z for the parts of a unit of the hot loop; a part is one block."""
    PARTS_PER_STEP: tl.constexpr = 8 // VEC
    sums = ()
    if RADEMACHER:
        words = philox(call, call_hi, k0, k1, stream, direction)
        lane = tl.arange(0, LANES).to(tl.uint32)
        bit = lane * VEC // 256 * 8 + lane * VEC % 8
    for part in tl.static_range(len(accs)):
        if RADEMACHER:
            # A step takes a word; two parts of it that are half as wide take two bytes each.
            byte = words[part // PARTS_PER_STEP] >> (bit + part % PARTS_PER_STEP * 16)
            sums = sums + (accs[part] + _signed(c, byte, VEC, LANES),)
        else:
            block = lo + part * (LANES * VEC // 4)
            z = draw(block, hi, k0, k1, stream, direction, False, VEC, LANES)
            sums = sums + (tl.fma(z, c, accs[part]),)
    return sums


@triton.jit
def draw_step(
    step, lo, call, hi, call_hi, k0, k1, stream, direction,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """z of the parts of one step of the hot loop; call: of the unit of four that step is in."""
    zs = ()
    if RADEMACHER:
        a, b, c, d = philox(call, call_hi, k0, k1, stream, direction)
        odd = (step & 1) != 0
        word = tl.where((step & 2) != 0, tl.where(odd, d, c), tl.where(odd, b, a))
        lane = tl.arange(0, LANES).to(tl.uint32)
        word = word >> (lane * VEC // 256 * 8 + lane * VEC % 8)
    for part in tl.static_range(8 // VEC):
        if RADEMACHER:
            one = tl.full([], 1.0, tl.float32)
            zs = zs + (_signed(one, word >> (part * 16), VEC, LANES),)
        else:
            block = lo + part * (LANES * VEC // 4)
            zs = zs + (draw(block, hi, k0, k1, stream, direction, False, VEC, LANES),)
    return zs


@triton.jit
def _sign_byte_anywhere(i, k0, k1, stream, direction, VEC: tl.constexpr):
    """Bits 0 .. VEC - 1: the signs of chunks that begin at element i."""
    first = sign_byte(i >> 3, k0, k1, stream, direction)
    last = sign_byte((i + VEC - 1) >> 3, k0, k1, stream, direction)
    return (first | last << 8) >> (i & 7).to(tl.uint32)


@triton.jit
def draw_step_anywhere(
    i, r, k0, k1, stream, direction,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """z of the parts of a step whose chunks begin at elements i, in the first part; r = i % 4."""
    zs = ()
    for part in tl.static_range(8 // VEC):
        j = i + part * (LANES * VEC)
        if RADEMACHER:
            byte = _sign_byte_anywhere(j, k0, k1, stream, direction, VEC)
            one = tl.full([], 1.0, tl.float32)
            zs = zs + (_signed(one, byte, VEC, LANES),)
        else:
            zs = zs + (draw_anywhere(j, r, k0, k1, stream, direction, False, VEC, LANES),)
    return zs


@triton.jit
def bits_step(lo, hi, k0, k1, stream, direction, VEC: tl.constexpr, LANES: tl.constexpr):
    """Rounding bits of the parts of one step of the hot loop."""
    bits = ()
    for part in tl.static_range(8 // VEC):
        block = lo + part * (LANES * VEC // 4)
        bits = bits + (draw(block, hi, k0, k1, stream, direction, True, VEC, LANES),)
    return bits


@triton.jit
def bits_step_anywhere(i, r, k0, k1, stream, direction, VEC: tl.constexpr, LANES: tl.constexpr):
    """As bits_step, for a step as draw_step_anywhere has it."""
    bits = ()
    for part in tl.static_range(8 // VEC):
        j = i + part * (LANES * VEC)
        bits = bits + (draw_anywhere(j, r, k0, k1, stream, direction, True, VEC, LANES),)
    return bits


@triton.jit
def add_anywhere(
    acc, c, i, r, k0, k1, stream, direction,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """acc + c * z of chunks that begin at element i, r = i % 4."""
    if RADEMACHER:
        byte = _sign_byte_anywhere(i, k0, k1, stream, direction, VEC)
        return acc + _signed(c, byte, VEC, LANES)
    else:
        z = draw_anywhere(i, r, k0, k1, stream, direction, False, VEC, LANES)
        return tl.fma(z, c, acc)


@triton.jit
def add_aligned(
    acc, c, lo, hi, k0, k1, stream, direction,
    RADEMACHER: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """acc + c * z of chunks that begin at block (hi, lo), VEC elements each and at a multiple."""
    if RADEMACHER:
        i = ((hi.to(tl.int64) << 32) + lo.to(tl.int64)) << 2
        byte = sign_byte(i >> 3, k0, k1, stream, direction) >> (i & 7).to(tl.uint32)
        return acc + _signed(c, byte, VEC, LANES)
    else:
        z = draw(lo, hi, k0, k1, stream, direction, False, VEC, LANES)
        return tl.fma(z, c, acc)
