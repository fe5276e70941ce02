"""doctor --verify: how calls are timed, what they are compared with, and what the speeds mean."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from twin_gpu import Twin

from zo_kernels.pipeline import measure, rivals, timing, verify
from zo_kernels.pipeline.verify import Settings


def test_event_timer(monkeypatch):
    """Clear, event, call, event, synchronise, in that order on that device; milliseconds to s."""
    monkeypatch.setattr(timing, "_CLEARED", 1 << 16)
    twin, now = Twin(), [10.0]
    twin.clock = lambda: now[0]
    timer = timing.EventTimer(torch.device("cpu"), twin)
    twin.cleared = timer._cleared.fill_(1)
    now[0] = 11.0

    def call():
        twin.log.append(("call", None))
        now[0] += 2.5

    assert timer(call) == 2.5
    assert [what for what, _ in twin.log] == [
        *("enter", "record", "call", "record", "synchronize", "leave")
    ]
    assert {place for _, place in twin.log if place} == {torch.device("cpu")}


def test_turns_rounds_and_budget():
    """Every case once per round in order; after the budget no round begins beyond the third."""
    log = []
    calls = {name: (lambda name=name: log.append(name)) for name in "ab"}
    times = timing.interleave(calls, 4, warmup=2)
    assert log == ["a", "b"] * 6 and [len(times[name]) for name in "ab"] == [4, 4]
    slow = {"a": lambda: time.sleep(0.01)}
    times = timing.interleave(slow, 50, warmup=0, budget=0.005)
    assert len(times["a"]) == timing.LEAST_ROUNDS and min(times["a"]) >= 0.01


def test_speeds_are_per_element_and_from_one_round():
    """Different sizes are normalised; ratios are medians of rounds' ratios, not of medians."""

    def entry(elements, traffic, passes=0):
        return measure.Timed(lambda: None, elements, traffic, {}, passes)

    timed = {
        "ours": entry(1000, 4, passes=3),
        measure.COPY: entry(1000, 4),
        measure.MEZO: entry(1000, 8),
        measure.COMPILED: entry(100, 4),
    }
    times = {
        "ours": [1.0, 2.0, 4.0],
        measure.COPY: [0.5, 0.2, 1.0],
        measure.MEZO: [7.0, 4.0, 4.0],
        measure.COMPILED: [2.0, 2.0, 2.0],
    }
    speed = measure.speed("ours", timed, times)
    assert speed["elements_per_second"] == 500 and speed["gigabytes_per_second"] == 2e-6
    assert speed["share_of_copy"] == statistics.median([0.5, 0.1, 0.25]) == 0.25
    assert speed["times_mezo"] == 3 * 2 and speed["times_compiled"] == 3 * 10
    assert speed["seconds"]["range"] == [1, 4] and speed["seconds"]["median"] == 2
    assert measure.speed(measure.MEZO, timed, times)["times_mezo"] is None


def test_why_the_rival_does_not_compile(tmp_path, monkeypatch):
    """No compiler, or no end of compiling: that is the reason, and nothing hangs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    arguments = ("cpu", 4096, [torch.float32])
    assert rivals.compile_reason(*arguments, seconds=0.05) == "compiling took longer than 0.05 s"
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))
    reason = rivals.compile_reason(*arguments)
    assert reason is not None and "no compiler" in reason


def test_the_compiled_rival_works_on_fewer_elements_of_a_cpu(monkeypatch):
    """It is timed on a 16th of the elements, per element; here it runs without a compiler."""
    sizes = []

    def eager(scale):
        return lambda p: (sizes.append(p.numel()), p.add_(torch.randn_like(p), alpha=scale))

    monkeypatch.setattr(rivals, "compiled_perturb", eager)
    monkeypatch.setattr(rivals, "compile_reason", lambda *arguments: None)
    settings = Settings(elements=1 << 16, rounds=3, cases=("perturb_ fp32",))
    records = list(verify.verify_device("cpu", settings, print))
    compiled = records[-1]
    assert (compiled["case"], compiled["reason"]) == (measure.COMPILED, None)
    assert compiled["elements"] == 4096 and sizes == [4096] * 4  # one before the rounds
    kernel = next(r for r in records if r["kind"] == "kernel")
    assert kernel["speed"]["times_compiled"] > 0


def test_mezo_is_seeded_and_leaves_the_global_generator():
    """The rival's loop draws the same for a seed, in the parameter's dtype, once per parameter."""
    state = torch.get_rng_state()
    a, b = ([torch.zeros(50_000, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2))
    rivals.mezo_perturb_(a, 0.5, seed=3)
    rivals.mezo_perturb_(b, 0.5, seed=3)
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], a[1])
    assert a[0].float().std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(torch.get_rng_state(), state)
