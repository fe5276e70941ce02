"""The noise contract and its roundings in plain torch integer and float64 arithmetic.

Unsigned 32-bit values are kept in int64 tensors. ``address`` is a dictionary of seed, stream and
direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels import noise

_MASK = 0xFFFFFFFF
CHUNK = 1 << 20  # elements at a time, to bound the temporaries
_SIGN_BIT_CLEARED = 0x7FFFFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of u32 values with a u32 constant."""
    upper, lower = a * (m >> 16), a * (m & 0xFFFF)  # below 2^48
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _MASK


def philox(
    block: Tensor, *, seed: int, stream: int, direction: int, domain: int = 0
) -> tuple[Tensor, ...]:
    """The four Philox4x32-10 words of each block.

    Args:
        block: any shape, int64, block numbers (element index // 4).
        domain: set in the second counter word.

    Returns:
        Four int64 tensors of block's shape with values below 2^32.
    """
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1 = block & _MASK, ((block >> 32) & _MASK) | domain
    c2, c3 = torch.full_like(block, stream), torch.full_like(block, direction)
    for _ in range(noise.PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, noise.PHILOX_M0)
        high1, low1 = _multiply(c2, noise.PHILOX_M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + noise.PHILOX_W0) & _MASK, (k1 + noise.PHILOX_W1) & _MASK
    return c0, c1, c2, c3


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Correctly rounded binary32 a * b + c of float32 values.

    The product is exact in float64; the sum is rounded to odd there (Boldo and Melquiond, 2008),
    so the final rounding to float32 is the only one that counts.
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    # Knuth's two-sum: the exact rounding error of the addition.
    back = total - product
    error = (product - (total - back)) + (addend - back)
    pattern = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    nudge = torch.where(away, 1, -1)
    even_and_inexact = (error != 0) & torch.isfinite(total) & (pattern & 1 == 0)
    return torch.where(even_and_inexact, pattern + nudge, pattern).view(torch.float64).float()


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    result = fma(x, coefficients[-1], coefficients[-2])
    for c in coefficients[-3::-1]:
        result = fma(result, x, c)
    return result


def bits_of(x: Tensor) -> Tensor:
    """The binary32 patterns of float32 values: int64, below 2^32."""
    return x.view(torch.int32).long() & _MASK


def from_bits(x: Tensor) -> Tensor:
    """The float32 values of such patterns."""
    return torch.where(x > _SIGN_BIT_CLEARED, x - (1 << 32), x).int().view(torch.float32)


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 normals from two words (int64 below 2^32), as zo_kernels/noise.py states."""
    u = bits_of(((a & 0xFFFFFF00) | 0x80).float())
    d = (0x4F800000 - u).float()
    h = from_bits((u & 0x7FFFFF) | 0x3F800000) - 1.5
    y = fma(fma(h, h, -0.25), _horner(h, noise.RADIUS), d)
    s = from_bits(noise.RSQRT_SEED - (bits_of(y) >> 1))
    g = y * s
    r = g * _horner(g * s, noise.SQRT)
    t = fma((b & 0x7FFFFF00).float(), noise.ANGLE_SCALE, noise.ANGLE_SHIFT)
    x = t * t
    cosine = _horner(x, noise.COSINE)
    cosine = from_bits(bits_of(cosine) ^ (b & 0x80000000))
    return r * cosine, r * (_horner(x, noise.SINE) * t)


def words(start: int, count: int, address: dict, device: torch.device) -> Tensor:
    """The words (int64) of elements [start, start + count)."""
    blocks = torch.arange(start // 4, (start + count + 3) // 4, device=device)
    return torch.stack(philox(blocks, **address), dim=1).flatten()[start % 4 : start % 4 + count]


def _normal(start: int, count: int, address: dict, device: torch.device) -> Tensor:
    first, end = start // 4 * 4, (start + count + 3) // 4 * 4
    drawn = words(first, end - first, address, device)
    pairs = box_muller(drawn[0::2], drawn[1::2])
    return torch.stack(pairs, dim=1).flatten()[start - first : start - first + count]


def _rademacher(start: int, count: int, address: dict, device: torch.device) -> Tensor:
    index = torch.arange(start, start + count, device=device)
    block = index // noise.RADEMACHER_SPAN * 32 + index % 256 // noise.RADEMACHER_GROUP
    four = torch.stack(philox(block, **address, domain=noise.RADEMACHER_DOMAIN))
    byte = index % noise.RADEMACHER_SPAN // 256
    word = four.gather(0, (byte // 4).unsqueeze(0)).squeeze(0)
    bit = (word >> (byte % 4 * 8 + index % 8)) & 1
    return (1 - 2 * bit).float()


#: z of elements [start, start + count): float32, by distribution.
DRAW = {"normal": _normal, "rademacher": _rademacher}


def rounding_bits(start: int, count: int, address: dict, device: torch.device) -> Tensor:
    """16 bits (int64) of each element: the low bytes of its pair, its own word's first."""
    first, end = start // 2 * 2, (start + count + 1) // 2 * 2
    low = (words(first, end - first, address, device) & 0xFF).view(-1, 2)
    bits = (low << 8 | low.flip(1)).flatten()
    return bits[start - first : start - first + count]


def round_stochastic(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to dtype by 16 random bits each (DESIGN: numerics, rule 3).

    bfloat16: the bits are added below the kept 16 and the sum is truncated, so a value is rounded
    up with probability equal to the fraction dropped. float16: the top 13 bits over the 13 that
    are dropped in its normal range; to nearest below 2^-14. float32: unchanged. NaN stays NaN.
    """
    pattern = bits_of(value)
    if dtype == torch.bfloat16:
        dithered = from_bits(((pattern + bits) & _MASK) & 0xFFFF0000)
    elif dtype == torch.float16:
        dithered = from_bits(((pattern + (bits >> 3)) & _MASK) & 0xFFFFE000)
        dithered = torch.where(value.abs() < 2.0**-14, value, dithered)
    else:
        return value
    return torch.where(value.isnan(), value, dithered).to(dtype)
