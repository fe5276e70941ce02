"""A perturbed 4096 x 4096 matrix through a quantizer: one pass against two, and against a copy.

Run: python -m pytest benchmarks/bench_perturb_quant.py
"""

from __future__ import annotations

import pytest
import torch
from bench_fake_quant import DTYPES, SIZE, matrix, name_of

import zo_kernels as zk
from zo_kernels.ops import perturb_quant
from zo_kernels.pipeline.timing import interleave, median_ratio, medians

SCHEMES = [("int4", {"group_size": 128}), ("nf4", {}), ("nf4", {"double_quant": True})]
NOISE = {"seed": 1, "streams": [2]}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme, options", SCHEMES, ids=[name_of(*s) for s in SCHEMES])
def test_perturb_quant(benchmark, report, rounds, scheme, options, dtype, distribution, threads):
    """combine_ and fake_quant, that with a look at what it reads as perturb_quant has it, one."""
    tensor = matrix(dtype)
    buffer = torch.empty_like(tensor)
    noise = {**NOISE, "distribution": distribution}

    def combine() -> None:
        zk.combine_([buffer], [tensor], [1e-3], directions=[3], **noise)

    def two(check: bool) -> None:
        combine()
        zk.fake_quant(buffer, scheme, out=buffer, check_finite=check, **options)

    cases = {
        "copy_": lambda: buffer.copy_(tensor),
        "combine_": combine,
        "two passes": lambda: two(False),
        "two passes and a look": lambda: two(True),
        "perturb_quant": lambda: perturb_quant(
            [buffer], [tensor], [1e-3], scheme, direction=3, **noise, **options
        ),
    }
    times = interleave(cases, rounds(9))
    ratios = {
        f"perturb_quant / {name}": median_ratio(times, "perturb_quant", name)
        for name in cases
        if name != "perturb_quant"
    }
    rates = {f"{name} (G/s)": SIZE**2 / t / 1e9 for name, t in medians(times).items()}
    report(f"{name_of(scheme, options)}, {dtype}, {distribution}", rates, ratios)
    benchmark.pedantic(cases["perturb_quant"], rounds=3)
