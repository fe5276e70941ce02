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
    fp8_e4m3, fp8_e5m2:         scale = max|w| / TOP;  w' = float(w / s) * scale
    mxfp4:                      scale = max(2^(floor(log2 max|w|) - 2), 2^-127)
                                w' = float(w / s) * scale
    nvfp4:                      scale = e4m3(max|w| / (6 t)) * t;  w' = float(w / s) * scale
                                t = max|w| over the tensor / 2688, or 1 where that is 0
    nf4, double quantisation:   as nf4 but for w' = level * scale', where over runs of 256 scales
                                scale' = DYNAMIC_8BIT[k] * a + o;  a = max|scale - o| over the run
                                k = number of midpoints of DYNAMIC_8BIT below (scale - o) / a (0 / 0
                                counts as 0);  o = the mean of all scales of the tensor: the exact
                                sum over the number, rounded to binary64 and that to binary32

and w' is rounded once, to nearest even, to the tensor's dtype.

Integers: the asymmetric range includes 0, so the zero point is a storable unsigned integer and 0
is represented exactly. NF4: the 16 levels of QLoRA (Dettmers et al., arXiv 2305.14314) as in
bitsandbytes; a tie goes to the lower level. Double quantisation: of the scales, also QLoRA's and
bitsandbytes', whose codes of the weights come from the scales before; DYNAMIC_8BIT is its signed
dynamic type (Dettmers, arXiv 1511.04561), and a tie between two of its values goes to the lower.
Floats: float(x) is the format's value nearest to x, ties to even, subnormals kept, magnitudes
beyond TOP taken to TOP; no infinity and no NaN. FP8 is that of Micikevicius et al. (arXiv
2209.05433), TOP 448 and 57344. MXFP4 and NVFP4 have E2M1 values (0, 0.5, 1, 1.5, 2, 3, 4, 6), in
groups of 32 and 16. MXFP4: the OCP Microscaling Formats specification v1.0, whose conversion takes
values between 6 and 8 times the scale to 6. NVFP4: scales of scales as in NVIDIA's ModelOpt.

Zeros: of integers and NF4 there is one, and w' is +0 whatever the sign of w. Floats have two: w'
has the sign of w, also in a group of zeros. (A w' that underflows in the tensor's dtype keeps its
sign, as IEEE conversions do; so does NF4's zero times a scale' below 0.)

This module states constants and formulas. The arithmetic is in csrc/fake_quant.h,
backends/reference_quantize.py and backends/triton/quantize.py, and that of scales of scales, which
needs whole tensors, in scales.py; it gives the same bits in all of them.
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

#: The positive values of bitsandbytes' signed dynamic 8-bit type; the others are 0 and, but for -1,
#: these with a minus.
_DYNAMIC_8BIT_POSITIVE = _floats(
    "0x1.27476ep-21", "0x1.b43528p-19", "0x1.040bfep-17", "0x1.64840cp-16", "0x1.6f0068p-15",
    "0x1.15df66p-14", "0x1.743e96p-14", "0x1.47ae16p-13", "0x1.19ce0ap-12", "0x1.8fc506p-12",
    "0x1.02de02p-11", "0x1.3dd982p-11", "0x1.78d5p-11", "0x1.b3d07cp-11", "0x1.eecbfep-11",
    "0x1.4fdf3ap-10", "0x1.e353f8p-10", "0x1.3b645ap-9", "0x1.851eb8p-9", "0x1.ced914p-9",
    "0x1.0c49bap-8", "0x1.3126e8p-8", "0x1.56041ap-8", "0x1.7ae148p-8", "0x1.9fbe76p-8",
    "0x1.c49ba6p-8", "0x1.e978d4p-8", "0x1.072b02p-7", "0x1.19999ap-7", "0x1.2c083p-7",
    "0x1.3e76c8p-7", "0x1.75c29p-7", "0x1.d1eb86p-7", "0x1.170a3ep-6", "0x1.451ebap-6",
    "0x1.733334p-6", "0x1.a147aep-6", "0x1.cf5c2ap-6", "0x1.fd70a4p-6", "0x1.15c29p-5",
    "0x1.2ccccep-5", "0x1.43d70ap-5", "0x1.5ae146p-5", "0x1.71eb86p-5", "0x1.88f5c2p-5",
    "0x1.ap-5", "0x1.b70a3ep-5", "0x1.ce147ap-5", "0x1.e51ebap-5", "0x1.fc28f6p-5",
    "0x1.09999ap-4", "0x1.151ebap-4", "0x1.20a3d6p-4", "0x1.2c28f6p-4", "0x1.37ae14p-4",
    "0x1.433334p-4", "0x1.4eb854p-4", "0x1.5a3d7p-4", "0x1.65c29p-4", "0x1.7147aep-4",
    "0x1.7ccccep-4", "0x1.8851eep-4", "0x1.93d70ap-4", "0x1.b66668p-4", "0x1.fp-4",
    "0x1.14ccccp-3", "0x1.31999ap-3", "0x1.4e6666p-3", "0x1.6b3334p-3", "0x1.88p-3",
    "0x1.a4ccccp-3", "0x1.c1999ap-3", "0x1.de6666p-3", "0x1.fb3332p-3", "0x1.0cp-2",
    "0x1.1a6668p-2", "0x1.28ccccp-2", "0x1.373334p-2", "0x1.459998p-2", "0x1.54p-2",
    "0x1.626666p-2", "0x1.70ccccp-2", "0x1.7f3334p-2", "0x1.8d9998p-2", "0x1.9cp-2",
    "0x1.aa6666p-2", "0x1.b8ccccp-2", "0x1.c73334p-2", "0x1.d59998p-2", "0x1.e4p-2",
    "0x1.f26664p-2", "0x1.006666p-1", "0x1.079998p-1", "0x1.0eccccp-1", "0x1.16p-1",
    "0x1.1d3334p-1", "0x1.246668p-1", "0x1.2b999ap-1", "0x1.32ccccp-1", "0x1.3ap-1",
    "0x1.413334p-1", "0x1.486668p-1", "0x1.4f999ap-1", "0x1.56ccccp-1", "0x1.5ep-1",
    "0x1.653334p-1", "0x1.6c6668p-1", "0x1.73999ap-1", "0x1.7accccp-1", "0x1.82p-1",
    "0x1.893334p-1", "0x1.906666p-1", "0x1.97999ap-1", "0x1.9eccccp-1", "0x1.a6p-1",
    "0x1.ad3334p-1", "0x1.b46666p-1", "0x1.bb999ap-1", "0x1.c2ccccp-1", "0x1.cap-1",
    "0x1.d13334p-1", "0x1.d86666p-1", "0x1.df999ap-1", "0x1.e6ccccp-1", "0x1.eep-1",
    "0x1.f53334p-1", "0x1.fc6666p-1", "0x1p+0",
)  # fmt: skip
#: Lowest first.
DYNAMIC_8BIT = (
    *(-value for value in reversed(_DYNAMIC_8BIT_POSITIVE[:-1])),
    0.0,
    *_DYNAMIC_8BIT_POSITIVE,
)


@dataclass(frozen=True)
class Format:
    """One scheme's grid.

    Attributes:
        kind: "int", "nf4" or "float".
        bits: per element, without scales.
        mantissa, min_exponent: of floats: stored mantissa bits; exponent of the least normal value.
        largest: of floats and nf4: the largest value of the grid before scaling.
        default_group: elements per group where none is asked for; None for a row.
        scale: "ratio" to the largest value, "power_of_two", or "e4m3" in units of the tensor's.
    """

    kind: str
    bits: int
    mantissa: int = 0
    min_exponent: int = 0
    largest: float = 0.0
    default_group: int | None = None
    scale: str = "ratio"

    def top(self, symmetric: bool) -> float:
        """Q, TOP or 1: what the extent of a group is divided by to give its scale."""
        if self.kind != "int":
            return self.largest
        return float(2 ** (self.bits - 1) - 1 if symmetric else 2**self.bits - 1)


FORMATS = {
    **{f"int{bits}": Format("int", bits) for bits in range(2, 9)},
    "nf4": Format("nf4", 4, largest=1.0, default_group=64),
    "fp8_e4m3": Format("float", 8, mantissa=3, min_exponent=-6, largest=448.0),
    "fp8_e5m2": Format("float", 8, mantissa=2, min_exponent=-14, largest=57344.0),
    "mxfp4": Format("float", 4, 1, 0, largest=6.0, default_group=32, scale="power_of_two"),
    "nvfp4": Format("float", 4, 1, 0, largest=6.0, default_group=16, scale="e4m3"),
}
