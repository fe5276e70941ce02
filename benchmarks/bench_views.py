"""An evaluation under eight formats against copying the model for each.

Run: python -m pytest benchmarks/bench_views.py     (needs the demo extra: it prepares the model)
"""

from __future__ import annotations

import copy

import torch

import zo_kernels as zk
from zo_kernels.blocks import linear_weights
from zo_kernels.pipeline.timing import interleave, median_ratio, medians
from zo_kernels.refine.checkpoint import load

SCHEMES = [
    ("int8", {}),
    ("int4", {"group_size": 64}),
    ("int4", {"group_size": 64, "symmetric": False}),
    ("int3", {"group_size": 64}),
    ("nf4", {}),
    ("nf4", {"double_quant": True}),
    ("fp8_e4m3", {}),
    ("mxfp4", {}),
]


def test_eight_formats(benchmark, report, rounds, directory):
    """SmolLM2-135M, float32, 4 x 128 tokens, one forward for each format; seconds."""
    model, _ = load(directory, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 128), generator=generator)

    @torch.no_grad()
    def loss(of: torch.nn.Module) -> None:
        of(input_ids=ids, labels=ids, use_cache=False)

    def bare() -> None:
        for _ in SCHEMES:
            loss(model)

    def views() -> None:
        for scheme, options in SCHEMES:
            with zk.quantized(model, scheme, **options):
                loss(model)

    def copies() -> None:
        for scheme, options in SCHEMES:
            other = copy.deepcopy(model)
            for weight in linear_weights(other).values():
                zk.fake_quant(weight, scheme, out=weight, **options)
            loss(other)

    cases = {"bare forwards": bare, "zk.quantized": views, "a deep copy each": copies}
    times = interleave(cases, rounds(3))
    report(
        "eight formats, SmolLM2-135M, float32, 4 x 128",
        medians(times),
        {f"{n} / bare forwards": median_ratio(times, n, "bare forwards") for n in list(cases)[1:]},
    )
    benchmark.pedantic(views, rounds=1)
