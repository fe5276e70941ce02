"""The primitive against MeZO's loop, torch.compile of the same, and the memory floor.

Run: python -m pytest benchmarks/bench_perturb.py
"""

from __future__ import annotations

import os

import pytest
import torch

import zo_kernels as zk
from zo_kernels.backends import native
from zo_kernels.pipeline.rivals import compiled_perturb, mezo_perturb_
from zo_kernels.pipeline.timing import interleave, median_ratio, medians

NUMEL = 1 << 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(dtype: torch.dtype) -> torch.Tensor:
    """NUMEL weights of a trained linear layer's size."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUMEL, generator=generator) * 0.02).to(dtype)


def perturb(tensor: torch.Tensor, isa: str | None = None, **options: object) -> None:
    """Ours, in place, optionally on a named instruction set."""
    if isa:
        os.environ["ZO_KERNELS_ISA"] = isa
    try:
        zk.perturb_([tensor], 1e-3, seed=1, direction=2, streams=[3], **options)
    finally:
        if isa:
            del os.environ["ZO_KERNELS_ISA"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb(benchmark, report, rounds, threads, dtype):
    """One in-place pass; the rivals in the same rounds. Rates are elements per second."""
    tensor = weights(dtype)
    copy = torch.empty_like(tensor)
    isas = [isa for isa in native.available_isas() if isa != "scalar"]
    cases = {
        "MeZO normal + add_": lambda: mezo_perturb_([tensor], 1e-3, 1),
        "zk.perturb_": lambda: perturb(tensor),
        "zk.perturb_ stochastic": lambda: perturb(tensor, rounding="stochastic"),
        "zk.perturb_ rademacher": lambda: perturb(tensor, distribution="rademacher"),
        "mul_": lambda: tensor.mul_(1.0),
        "torch.clone": tensor.clone,
        "copy_": lambda: copy.copy_(tensor),
        **{f"zk.perturb_ {isa}": lambda isa=isa: perturb(tensor, isa) for isa in isas[1:]},
    }
    times = interleave(cases, rounds(9))
    rates = {f"{name} (G/s)": NUMEL / t / 1e9 for name, t in medians(times).items()}
    ratios = {
        f"{name} against MeZO": median_ratio(times, "MeZO normal + add_", name)
        for name in cases
        if name.startswith("zk.")
    }
    ratios["zk.perturb_ time / clone"] = median_ratio(times, "zk.perturb_", "torch.clone")
    ratios["rademacher time / mul_"] = median_ratio(times, "zk.perturb_ rademacher", "mul_")
    report(f"perturb_ {dtype}, {threads} thread(s), {NUMEL} elements", rates, ratios)
    benchmark.pedantic(lambda: perturb(tensor), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(benchmark, report, rounds, dtype):
    """Two threads against one, in the same rounds."""
    tensor = weights(dtype)
    before = torch.get_num_threads()

    def run(count: int) -> None:
        torch.set_num_threads(count)
        perturb(tensor)

    times = interleave({"1 thread": lambda: run(1), "2 threads": lambda: run(2)}, rounds(15))
    torch.set_num_threads(before)
    rates = {f"{name} (G/s)": NUMEL / t / 1e9 for name, t in medians(times).items()}
    ratio = {"2 threads against 1": median_ratio(times, "1 thread", "2 threads")}
    report(f"perturb_ threads, {dtype}", rates, ratio)
    benchmark.pedantic(lambda: perturb(tensor), rounds=3)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changes(benchmark, report, rounds, dtype, distribution):
    """What the change statistics cost a pass (one thread, stochastic rounding)."""
    tensor = weights(dtype)
    rows = torch.empty(1, 3, dtype=torch.float64)
    options = {"seed": 1, "directions": [2], "streams": [3], "rounding": "stochastic"}
    options["distribution"] = distribution
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {
        "without": lambda: zk.combine_([tensor], [tensor], [1e-3], **options),
        "with changes": lambda: zk.combine_([tensor], [tensor], [1e-3], **options, changes=rows),
    }
    times = interleave(cases, rounds(9))
    torch.set_num_threads(before)
    rates = {f"{name} (G/s)": NUMEL / t / 1e9 for name, t in medians(times).items()}
    ratio = {"time with / without": median_ratio(times, "with changes", "without")}
    report(f"changes, {distribution}, {dtype}", rates, ratio)
    benchmark.pedantic(cases["with changes"], rounds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_rival(benchmark, report, rounds, dtype):
    """torch.compile of randn_like + add_, one thread; a 16th of the elements, for it is slow."""
    tensor = weights(dtype)[: NUMEL // 16].clone()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    compiled = compiled_perturb(1e-3)
    cases = {"torch.compile": lambda: compiled(tensor), "zk.perturb_": lambda: perturb(tensor)}
    times = interleave(cases, rounds(3))
    torch.set_num_threads(before)
    rates = {f"{name} (G/s)": tensor.numel() / t / 1e9 for name, t in medians(times).items()}
    ratio = {"zk.perturb_ against it": median_ratio(times, "torch.compile", "zk.perturb_")}
    report(f"torch.compile {dtype}, 1 thread", rates, ratio)
    benchmark.pedantic(lambda: perturb(tensor), rounds=3)


@pytest.mark.parametrize("directions", [1, 2, 4, 8])
def test_directions_in_one_pass(benchmark, report, rounds, directions):
    """K directions in one pass against K passes (bfloat16, one thread)."""
    tensor = weights(torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    scales, streams = [1e-3] * directions, [3]

    def one_pass() -> None:
        numbers = list(range(directions))
        zk.combine_([tensor], [tensor], scales, seed=1, directions=numbers, streams=streams)

    def passes() -> None:
        for k in range(directions):
            zk.perturb_([tensor], 1e-3, seed=1, direction=k, streams=streams)

    times = interleave({"K passes": passes, "one pass": one_pass}, rounds(5))
    torch.set_num_threads(before)
    per = {f"{name} (ms)": t * 1e3 for name, t in medians(times).items()}
    report(f"{directions} directions", per, {"gain": median_ratio(times, "K passes", "one pass")})
    benchmark.pedantic(one_pass, rounds=3)
