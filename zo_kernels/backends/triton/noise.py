"""The noise contract as Triton device functions: values in, values out, no pointers.

Only integer operations and correctly rounded binary32 ones, each written out: kernels that call
these must be compiled with ``enable_fp_fusion=False``, so that nothing else is contracted.
"""

import triton
import triton.language as tl

from zo_kernels import noise

_M0 = tl.constexpr(noise.PHILOX_M0)
_M1 = tl.constexpr(noise.PHILOX_M1)
_W0 = tl.constexpr(noise.PHILOX_W0)
_W1 = tl.constexpr(noise.PHILOX_W1)
_ROUNDS = tl.constexpr(noise.PHILOX_ROUNDS)
_R0, _R1, _R2, _R3, _R4 = (tl.constexpr(c) for c in noise.RADIUS)
_Q0, _Q1, _Q2, _Q3 = (tl.constexpr(c) for c in noise.SQRT)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in noise.SINE)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in noise.COSINE)
_RSQRT_SEED = tl.constexpr(noise.RSQRT_SEED)
_ANGLE_SCALE = tl.constexpr(noise.ANGLE_SCALE)
_ANGLE_SHIFT = tl.constexpr(noise.ANGLE_SHIFT)
_RADEMACHER_DOMAIN = tl.constexpr(noise.RADEMACHER_DOMAIN)


@triton.jit
def philox(block_lo, block_hi, seed_lo, seed_hi, stream, direction):
    """Four words per block; all arguments uint32.

    block_lo: (LANES,), the others scalars wherever they can be, so that the half of rounds 1 and 2
    that is the same in all lanes is computed once. One 32x32->64 multiply gives both halves of each
    product.
    """
    c0, c1, c2, c3 = block_lo, block_hi, stream, direction
    k0, k1 = seed_lo, seed_hi
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):
    """Two float32 normals from two uint32 words; the steps of zo_kernels/noise.py in order."""
    u = ((a & 0xFFFFFF00) | 0x80).to(tl.float32).to(tl.int32, bitcast=True)
    d = (0x4F800000 - u).to(tl.float32)
    h = ((u & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    p = tl.fma(h, _R4, _R3)
    p = tl.fma(p, h, _R2)
    p = tl.fma(p, h, _R1)
    p = tl.fma(p, h, _R0)
    y = tl.fma(tl.fma(h, h, -0.25), p, d)
    half = y.to(tl.int32, bitcast=True) >> 1
    s = tl.sub(_RSQRT_SEED, half, sanitize_overflow=False).to(tl.float32, bitcast=True)
    g = y * s
    w = g * s
    p = tl.fma(w, _Q3, _Q2)
    p = tl.fma(p, w, _Q1)
    p = tl.fma(p, w, _Q0)
    r = g * p
    t = tl.fma(
        (b & 0x7FFFFF00).to(tl.int32, bitcast=True).to(tl.float32), _ANGLE_SCALE, _ANGLE_SHIFT
    )
    x = t * t
    c = tl.fma(x, _C3, _C2)
    c = tl.fma(c, x, _C1)
    c = tl.fma(c, x, _C0)
    c = (c.to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    v = tl.fma(x, _S3, _S2)
    v = tl.fma(v, x, _S1)
    v = tl.fma(v, x, _S0)
    return r * c, r * (v * t)


@triton.jit
def normals(a, b, c, d):
    """The four float32 normals of a block's words."""
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    return z0, z1, z2, z3


@triton.jit
def rounding_bits(a, b, c, d):
    """The rounding bits, uint32 below 2^16, of the four elements of a block's words."""
    la, lb, lc, ld = a & 0xFF, b & 0xFF, c & 0xFF, d & 0xFF
    return la << 8 | lb, lb << 8 | la, lc << 8 | ld, ld << 8 | lc


@triton.jit
def sign_byte(group, seed_lo, seed_hi, stream, direction):
    """The signs of groups of 8 contiguous elements: bit e of the result belongs to element e.

    group: (LANES,) int64, element index // 8.
    """
    block = (group >> 9) * 32 + (group & 31)
    byte = (group >> 5) & 15
    hi = (block >> 32).to(tl.uint32) | _RADEMACHER_DOMAIN
    a, b, c, d = philox(block.to(tl.uint32), hi, seed_lo, seed_hi, stream, direction)
    low = tl.where((byte & 4) != 0, b, a)
    high = tl.where((byte & 4) != 0, d, c)
    word = tl.where((byte & 8) != 0, high, low)
    return (word >> ((byte & 3) * 8).to(tl.uint32)) & 0xFF


@triton.jit
def round_stochastic(value, bits, DTYPE: tl.constexpr):
    """float32 to DTYPE by 16 random bits each; rules in backends/reference.py round_stochastic."""
    pattern = value.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        pattern = tl.add(pattern, bits, sanitize_overflow=False) & 0xFFFF0000
        dithered = pattern.to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        pattern = tl.add(pattern, bits >> 3, sanitize_overflow=False) & 0xFFFFE000
        dithered = tl.where(
            tl.abs(value) < 6.103515625e-05, value, pattern.to(tl.float32, bitcast=True)
        )
    else:
        dithered = value
    return tl.where(value != value, value, dithered).to(DTYPE)
