"""The fake-quantisation contract: which values a weight may take, and which of them it takes.

A group is a run of consecutive elements of a row that share a scale. Each operation below is one
correctly rounded binary32 operation; ``/`` is a division and not a product with a reciprocal;
``rhe`` rounds to an integer, ties to even, and its zero is +0; max|w|, min and max are over the
group; s is scale, or 1 where scale is 0 (a group of zeros, or one so small that scale underflows):

    int2 ... int8, symmetric:   Q = 2^(bits-1) - 1;  scale = max|w| / Q
                                w' = clamp(rhe(w / s), -Q, Q) * scale
    int2 ... int8, asymmetric:  Q = 2^bits - 1;  lo = min(min w, 0);  hi = max(max w, 0)
                                scale = |hi - lo| / Q;  zero = clamp(rhe(-lo / s), 0, Q)
                                w' = (clamp(rhe(w / s) + zero, 0, Q) - zero) * scale
    nf4:                        scale = max|w|
                                w' = NF4_LEVELS[number of NF4_MIDPOINTS below w / s] * scale
    fp8_e4m3, fp8_e5m2:         scale = max|w| / TOP;  w' = fp8(w / s) * scale

and w' is rounded once, to nearest even, to the tensor's dtype.

Integers: the asymmetric range includes 0, so the zero point is a storable unsigned integer and 0
is represented exactly. NF4: the 16 levels of QLoRA (Dettmers et al., arXiv 2305.14314) as in
bitsandbytes, without its second quantisation of the scales; a tie goes to the lower level. FP8
(Micikevicius et al., arXiv 2209.05433): fp8(x) is the nearest value of the format, ties to even,
subnormals kept, magnitudes beyond TOP (448 and 57344) taken to TOP; no infinity and no NaN.

Zeros: of integers and NF4 there is one, and w' is +0 whatever the sign of w. FP8 has two: w' has
the sign of w, also in a group of zeros. (A w' that underflows in the tensor's dtype keeps its
sign, as IEEE conversions do.)

This module states constants and formulas; the arithmetic is in backends/reference_quantize.py
and backends/triton/quantize.py, and gives the same bits in both.
"""

from __future__ import annotations

from dataclasses import dataclass


def _floats(*hexadecimal: str) -> tuple[float, ...]:
    return tuple(float.fromhex(text) for text in hexadecimal)


#: NF4, lowest first; every value is exact in binary32.
NF4_LEVELS = _floats(
    "-0x1p+0", "-0x1.647362p-1", "-0x1.0cd66p-1", "-0x1.946540p-2",
    "-0x1.23449ap-2", "-0x1.7a6a7ep-3", "-0x1.74f0e2p-4", "0x0p+0",
    "0x1.45f5fep-4", "0x1.4995c6p-3", "0x1.f809bap-3", "0x1.5a0674p-2",
    "0x1.c3497p-2", "0x1.200f56p-1", "0x1.722766p-1", "0x1p+0",
)  # fmt: skip
#: Halfway between neighbours, rounded to binary32: above one lies the next level.
NF4_MIDPOINTS = _floats(
    "-0x1.b239bp-1", "-0x1.38a4ep-1", "-0x1.d709p-2", "-0x1.5bd4ecp-2", "-0x1.e079d8p-3",
    "-0x1.1a7178p-3", "-0x1.74f0e2p-5", "0x1.45f5fep-5", "0x1.ec90c4p-4", "0x1.a0cfcp-3",
    "0x1.2b05a8p-2", "0x1.8ea7f2p-2", "0x1.00da08p-1", "0x1.491b5ep-1", "0x1.b913b4p-1",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One scheme's grid.

    Attributes:
        kind: "int", "nf4" or "fp8".
        bits: per element, without scales.
        mantissa, min_exponent: of fp8: stored mantissa bits; exponent of the least normal value.
        largest: of fp8 and nf4: the largest value of the grid before scaling.
        default_group: elements per group where none is asked for; None for a row.
    """

    kind: str
    bits: int
    mantissa: int = 0
    min_exponent: int = 0
    largest: float = 0.0
    default_group: int | None = None

    def top(self, symmetric: bool) -> float:
        """Q, TOP or 1: what the extent of a group is divided by to give its scale."""
        if self.kind != "int":
            return self.largest
        return float(2 ** (self.bits - 1) - 1 if symmetric else 2**self.bits - 1)


FORMATS = {
    **{f"int{bits}": Format("int", bits) for bits in range(2, 9)},
    "nf4": Format("nf4", 4, largest=1.0, default_group=64),
    "fp8_e4m3": Format("fp8", 8, mantissa=3, min_exponent=-6, largest=448.0),
    "fp8_e5m2": Format("fp8", 8, mantissa=2, min_exponent=-14, largest=57344.0),
}
