"""Writes zo_kernels/data/noise_vectors.txt, the test vectors, from the reference backend.

Run it only when NOISE_SPEC changes: `python python_tests/make_noise_vectors.py`. Other
implementations of the contract can be checked against the table without this package.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch

import zo_kernels as zk
from zo_kernels.vectors import DTYPES, from_pattern, hexadecimal

PATH = Path(zk.__file__).with_name("data") / "noise_vectors.txt"
HEADER = f"""\
# Test vectors of the noise contract, NOISE_SPEC {zk.NOISE_SPEC}. Written by make_noise_vectors.py.
# All fields but `index` (decimal) are bit patterns in hexadecimal. Three kinds of lines:
# normal  seed direction stream index  word normal
#     the element's Philox word and its normal (binary32).
# rademacher  seed direction stream index  sign
#     the element's sign, 1 or -1 in binary32.
# update  seed direction[,direction] stream index  src-type src  src-scale scale[,scale]  rounding
#         dst-type dst
#     dst = round(src_scale * src + sum_k scale_k normal_k), scales binary32; types fp32, bf16,
#     fp16; rounding nearest or stochastic. Any NaN is an equal to any NaN.
"""
SEEDS = (0, 1, 2**63, 2**64 - 1)
PLACES = (  # direction, stream
    (0, 0),
    (2**31 - 1, zk.stream_id("model.embed_tokens.weight")),
    (2**31, 2**31),
    (2**32 - 1, 2**32 - 1),
)
INDICES = (0, 1, 2, 3, 4, 65539, 2**32 + 5, 2**34 - 1, 2**34, 2**40 + 3, 2**62 - 1)
SOURCES = {  # bit patterns: one, minus zero, a subnormal, the largest, minus infinity, NaN, -0.037
    "fp32": (0x3F800000, 0x80000000, 0x00000007, 0x7F7FFFFF, 0xFF800000, 0x7FC00000, 0xBD178D50),
    "bf16": (0x3F80, 0x8000, 0x0007, 0x7F7F, 0xFF80, 0x7FC0, 0xBD18),
    "fp16": (0x3C00, 0x8000, 0x0007, 0x7BFF, 0xFC00, 0x7E00, 0xA8BC),
}
SCALES = (  # src scale, scales: an update, an evaluation, a decaying update, below every subnormal
    (1.0, (1e-5,)),
    (1.0, (1e-3,)),
    (0.999, (-2e-4, 3e-4)),
    (0.0, (1e-7,)),
    (1.0, (1e-42,)),
)


def float_pattern(value: float) -> str:
    """The binary32 pattern of a number."""
    return hexadecimal(torch.tensor([value], dtype=torch.float32))


def normal_lines() -> list[str]:
    """Every seed at every place, the indices in turn."""
    lines = []
    for i, (seed, (direction, stream)) in enumerate(product(SEEDS, PLACES)):
        for index in (*INDICES[i % 3 :: 3], INDICES[-1 - i % 4]):
            address = {"seed": seed, "direction": direction, "stream": stream, "offset": index}
            word = zk.random_words(1, **address, backend="reference").item()
            z = hexadecimal(zk.normal(1, **address, backend="reference"))
            lines.append(f"normal {seed:016x} {direction:08x} {stream:08x} {index} {word:08x} {z}")
    return lines


def rademacher_lines() -> list[str]:
    """As normal_lines, at indices that visit all bytes and bits of a Philox call and its domain."""
    lines = []
    for i, (seed, (direction, stream)) in enumerate(product(SEEDS, PLACES)):
        for index in (i * 257, i * 4097 + 8, 31 * i + 4000, INDICES[i % 10] + 2**39 - i):
            address = {"seed": seed, "direction": direction, "stream": stream, "offset": index}
            sign = hexadecimal(zk.rademacher(1, **address, backend="reference"))
            lines.append(f"rademacher {seed:016x} {direction:08x} {stream:08x} {index} {sign}")
    return lines


def update_lines() -> list[str]:
    """All type pairs, all sources, both roundings; addresses and scales in turn."""
    lines = []
    cases = product(DTYPES, DTYPES, range(7), ("nearest", "stochastic"))
    for i, (src_name, dst_name, which, rounding) in enumerate(cases):
        seed, (direction, stream) = SEEDS[i % 4], PLACES[i // 4 % 4]
        index = INDICES[i % len(INDICES)]
        source = from_pattern(SOURCES[src_name][which], src_name)
        src_scale, scales = SCALES[i // 2 % len(SCALES)]
        directions = [(direction + k) % 2**32 for k in range(len(scales))]
        dst = torch.empty(1, dtype=DTYPES[dst_name])
        zk.combine_(
            [dst],
            [source],
            scales,
            seed=seed,
            directions=directions,
            streams=[stream],
            offsets=[index],
            rounding=rounding,
            src_scale=src_scale,
            backend="reference",
        )
        fields = [
            f"update {seed:016x} {','.join(f'{d:08x}' for d in directions)} {stream:08x} {index}",
            f"{src_name} {hexadecimal(source)} {float_pattern(src_scale)}",
            f"{','.join(float_pattern(c) for c in scales)} {rounding}",
            f"{dst_name} {hexadecimal(dst)}",
        ]
        lines.append(" ".join(fields))
    return lines


def table() -> str:
    """The whole file."""
    return HEADER + "\n".join([*normal_lines(), *rademacher_lines(), *update_lines()]) + "\n"


if __name__ == "__main__":
    PATH.write_text(table())
