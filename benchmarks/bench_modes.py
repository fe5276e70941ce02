"""What exact modes cost beside plain passes, and replay beside a loop that applies its steps.

Run: python -m pytest benchmarks/bench_modes.py
"""

from __future__ import annotations

import pytest
import torch

import zo_kernels as zk
from zo_kernels.ops import Held, Update, advance_, pair_
from zo_kernels.pipeline.rivals import mezo_perturb_
from zo_kernels.pipeline.timing import interleave, median_ratio, medians

SIZE = 1 << 24
EPS = 1e-3
OPTIONS = {"seed": 1, "streams": [2]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace(benchmark, report, rounds, threads, dtype):
    """+eps, -2 eps, update: exactly in place against three plain passes; seconds of all three."""
    w = (0.02 * torch.randn(SIZE)).to(DTYPES[dtype])
    x, plus, minus, copy = (w.clone() for _ in range(4))
    kept = []

    def plain():
        zk.perturb_([x], EPS, direction=1, **OPTIONS)
        zk.perturb_([x], -2 * EPS, direction=1, **OPTIONS)
        zk.combine_([x], [x], [EPS], directions=[1], rounding="stochastic", **OPTIONS)

    def exact():
        held = Held([w], [EPS], direction=1, **OPTIONS)
        kept.append(held.nbytes / SIZE)
        held.swap_([-EPS])
        kept.append(held.nbytes / SIZE)
        held.release_([1e-9], rounding="stochastic")

    def two_copies():
        zk.combine_([plus], [w], [EPS], directions=[1], **OPTIONS)
        zk.combine_([minus], [w], [-EPS], directions=[1], **OPTIONS)

    cases = {
        "three plain passes": plain,
        "inplace, exact": exact,
        "two copies": two_copies,
        "pair": lambda: pair_([plus], [minus], [w], [EPS], direction=1, **OPTIONS),
        "floor: three copies": lambda: [copy.copy_(w) for _ in range(3)],
    }
    times = interleave(cases, rounds(7))
    report(
        f"exact in place, {dtype}, {SIZE} weights, {threads} threads",
        medians(times),
        {
            "inplace / plain": median_ratio(times, "inplace, exact", "three plain passes"),
            "pair / two copies": median_ratio(times, "pair", "two copies"),
            "bytes kept per weight": max(kept),
        },
    )
    benchmark.pedantic(exact, rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replay(benchmark, report, rounds, threads, dtype):
    """64 logged steps: in one pass, one pass each, and as a torch loop replays MeZO's; seconds."""
    w = (0.02 * torch.randn(SIZE)).to(DTYPES[dtype])
    updates = [Update([n], [1e-6]) for n in range(64)]

    def one_by_one():
        for update in updates:
            advance_([w], [update], rounding="stochastic", **OPTIONS)

    cases = {
        "one pass": lambda: advance_([w], updates, rounding="stochastic", **OPTIONS),
        "a pass per step": one_by_one,
        # an eighth of the steps is enough of it
        "torch loop": lambda: [mezo_perturb_([w], 1e-6, n) for n in range(8)],
    }
    times = interleave(cases, rounds(3))
    times["torch loop"] = [8 * seconds for seconds in times["torch loop"]]
    report(
        f"replay of 64 steps, {dtype}, {SIZE} weights, {threads} threads",
        medians(times),
        {
            "torch loop / one pass": median_ratio(times, "torch loop", "one pass"),
            "a pass per step / one pass": median_ratio(times, "a pass per step", "one pass"),
        },
    )
    benchmark.pedantic(cases["one pass"], rounds=1)
