"""The three stages on SmolLM2-135M: scoring, focused steps, and what they take beside first order.

Run: python -m pytest benchmarks/bench_refine.py    (needs the demo extra: it prepares the model)
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from refine_memory import FIRST_ORDER, FOCUSED, FORWARD, LR, ZEROTH_ORDER, random_examples

import zo_kernels as zk
from zo_kernels import chat
from zo_kernels.pipeline.timing import interleave, median_ratio, medians
from zo_kernels.refine.checkpoint import fast_dtype, load
from zo_kernels.refine.config import first_block
from zo_kernels.refine.first_order import FirstOrder
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.prefix import PrefixCache

MODES = ("streamed", "dual", "inplace", "snapshot", "master")
PAPER_MEMORY, PAPER_TIME = 0.32, 0.133  # arXiv 2605.29396, Table 3: zeroth over first order
PAPER_STEPS = {"zeroth": 10, "first": 100}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def few(dtype: str, count: int) -> int:
    """Default rounds; a bfloat16 forward takes a CPU without products of it many times as long."""
    fast = getattr(torch, dtype) in (torch.float32, fast_dtype())
    return count if fast else max(1, count // 3)


@DTYPES
def test_scoring(benchmark, request, report, rounds, directory, dtype):
    """All blocks with reused prefixes and with whole forwards; target at most 0.6."""
    model, tokenizer = load(directory, dtype=dtype)
    count = request.config.getoption("--examples")
    harmful = chat.select(chat.builtin_examples(), kind=chat.HARMFUL)[:count]
    encoded = chat.encode(tokenizer, harmful)
    found: dict[str, tuple[Any, list[dict[str, Any]]]] = {}

    def run(name: str, reuse: bool) -> None:
        losses: list[dict[str, Any]] = []
        config = zk.ScoreConfig(draws=1, max_draws=1, reuse_prefix=reuse)
        scores = zk.score(model, tokenizer, encoded, config, on_result=losses.append)
        found[name] = (scores, [{**row, "seconds": None} for row in losses])

    cases = {"reused prefixes": True, "whole forwards": False}
    with torch.no_grad():
        chat.completion_loss(model, fixed_batches(model, tokenizer, encoded, 8)[0])
    calls = {name: partial(run, name, reuse) for name, reuse in cases.items()}
    times = interleave(calls, rounds(few(dtype, 3)), warmup=0)
    (scores, losses), (_, whole) = (found[name] for name in cases)
    assert len(losses) == scores.naive_forwards and losses == whole, "reused prefixes change a loss"
    ratios = {
        "reused / whole, seconds": median_ratio(times, *cases),
        "reused / whole, forwards": scores.forwards / scores.naive_forwards,
    }
    counted = {"forwards, reused": scores.forwards, "forwards, whole": scores.naive_forwards}
    report(
        f"scoring {len(scores.blocks)} blocks, antithetic draw + int4, {len(encoded)} examples, "
        f"SmolLM2-135M, {dtype}, {torch.get_num_threads()} threads (target 0.6)",
        {**medians(times), **counted},
        ratios,
    )
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("layers", FOCUSED, ids=lambda chosen: "-".join(map(str, chosen)))
@DTYPES
def test_focused_step(benchmark, request, report, rounds, directory, dtype, layers):
    """4 of 30 blocks, 8 x 128 tokens, against the forwards alone; target at most 1.02."""
    model, tokenizer = load(directory, dtype=dtype)
    data = random_examples(model)
    modes = request.config.getoption("--modes") or MODES

    def refiner(**options: Any) -> zk.ZORefiner:
        config = {"steps": 1, "batch_size": len(data), "lr": LR, "layers": layers} | options
        # Masters and residuals refuse weights that another mode has written.
        alone = config.get("mode") in ("master", "master8")
        its = copy.deepcopy(model) if alone else model
        return zk.ZORefiner(its, tokenizer, zk.RefineConfig(**config))

    _check_losses(refiner, data, modes)
    first = first_block(model, list(refiner().parameters))
    batches = fixed_batches(model, tokenizer, data, len(data))
    cases: dict[str, Callable[[], Any]] = {
        "two whole forwards": _forwards(Objective(model, batches)),
        "two partial forwards": _partial_forwards(model, batches, first),
        "two partial forwards, int4": _partial_forwards(
            model, batches, first, view=zk.quantized(model, "int4")
        ),
        **{f"ZO {mode}": _step(refiner(mode=mode), batches) for mode in modes},
        f"ZO {modes[0]}, int4": _step(
            refiner(mode=modes[0]), batches, view=zk.quantized(model, "int4")
        ),
    }
    times = interleave(cases, rounds(few(dtype, 9)))
    ratios = {}
    for name in cases:
        if name.startswith("ZO"):
            alone = "two partial forwards" + ", int4" * name.endswith("int4")
            ratios[f"{name} / {alone}"] = median_ratio(times, name, alone)
    for name in ("two partial forwards", f"ZO {modes[0]}"):
        ratios[f"{name} / two whole forwards"] = median_ratio(times, name, "two whole forwards")
    report(
        f"focused step, blocks {', '.join(map(str, layers))}, 8 x 128, SmolLM2-135M, {dtype}, "
        f"{torch.get_num_threads()} threads (target 1.02)",
        medians(times),
        ratios,
    )
    benchmark.pedantic(cases[f"ZO {modes[0]}"], rounds=1)


def _check_losses(refiner: Callable[..., Any], data: list[chat.Encoded], modes: Any) -> None:
    """Each mode's losses are those of whole forwards, with the quantizer and without."""
    options = {"batch_size": 1, "lr": 0.0}
    for quantized in (None, "int4"):
        wanted = refiner(**options, quantized=quantized, reuse_prefix=False).run(data[:1])[0]
        assert wanted["losses_plus"] != wanted["losses_minus"], "nothing was perturbed"
        for mode in modes:
            found = refiner(**options, quantized=quantized, mode=mode).run(data[:1])[0]
            for name in ("losses_plus", "losses_minus"):
                assert found[name] == wanted[name], (mode, quantized, name)


def _forwards(objective: Objective) -> Callable[[], None]:
    """Two evaluations."""

    def run() -> None:
        objective()
        objective()

    return run


def _step(refiner: zk.ZORefiner, batches: Any, view: Any = None) -> Callable[[], None]:
    """The step of a refinement, which ``run`` takes on other batches each time."""
    first = first_block(refiner.model, list(refiner.parameters))
    prefix = PrefixCache(refiner.model, record=first - 1) if first else None
    objective = Objective(refiner.model, batches, prefix=prefix, view=view)

    def run() -> None:
        with prefix or nullcontext():
            refiner.optimizer.step(objective)

    return run


def _partial_forwards(model: Any, batches: Any, first: int, view: Any = None) -> Callable[[], None]:
    """What lies before a block once, and what lies behind it twice."""
    prefix = PrefixCache(model, record=first - 1)
    twice = _forwards(Objective(model, batches, prefix=prefix, view=view))

    def run() -> None:
        with prefix:  # which lets go of what is kept at its end
            twice()

    return run


@DTYPES
def test_extra_memory(benchmark, report, rounds, directory, dtype):
    """Peaks over the loaded model, medians of some processes; first order trains in float32."""
    script = Path(__file__).with_name("refine_memory.py")
    rows: dict[str, float] = {}
    totals: dict[str, float] = {}
    for case in (*FIRST_ORDER, FORWARD, *ZEROTH_ORDER):
        own = "float32" if case in FIRST_ORDER else dtype
        command = [sys.executable, str(script), str(directory), own, case]
        found = []
        for _ in range(rounds(3)):  # what is resident before varies by tens of MB
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found.append(json.loads(done.stdout))
        extra = statistics.median(one["extra"] for one in found)
        rows[f"model, {own}"] = found[0]["model"]
        rows[f"{case}, over the model"] = extra
        totals[case] = found[0]["model"] + extra
    adamw, sgd = (rows[f"{case}, over the model"] for case in FIRST_ORDER)
    assert adamw - sgd > 1.5 * rows["model, float32"], "AdamW keeps two moments of each weight"
    ratios = {
        f"{case} / {fo}": totals[case] / totals[fo] for fo in FIRST_ORDER for case in ZEROTH_ORDER
    }
    report(
        f"peak memory, 8 x 128, SmolLM2-135M, first order in float32, others in {dtype} (MB; "
        "ratios with the model)",
        rows,
        {**ratios, "the paper's, Llama-3-8B": PAPER_MEMORY},
    )
    benchmark.pedantic(lambda: None, rounds=1)


@DTYPES
def test_time_beside_first_order(benchmark, report, rounds, directory, dtype):
    """10 zeroth-order steps of 8 samples against 100 first-order ones, extrapolated from a few."""
    trained, _ = load(directory, dtype="float32")
    model, tokenizer = load(directory, dtype=dtype)
    data = random_examples(model)
    batches = fixed_batches(trained, tokenizer, data, len(data))
    cases: dict[str, Callable[[], Any]] = {}
    for case in FIRST_ORDER:
        config = zk.AlignConfig(optimizer=case.removeprefix("align-"), lr=LR)
        cases[case] = partial(FirstOrder(trained, config).step, 0, batches, LR)
    for name, layers in (("focused", FOCUSED[0]), ("full", None)):
        refiner = zk.ZORefiner(model, tokenizer, zk.RefineConfig(lr=LR, layers=layers))
        cases[name] = _step(refiner, batches)
    times = interleave(cases, rounds(few(dtype, 9)))
    counts = {name: PAPER_STEPS["first" if name in FIRST_ORDER else "zeroth"] for name in cases}
    rows = {f"{counts[name]} steps, {name}": counts[name] * s for name, s in medians(times).items()}
    share = PAPER_STEPS["zeroth"] / PAPER_STEPS["first"]
    ratios = {
        f"{name} / {fo}": share * median_ratio(times, name, fo)
        for fo in FIRST_ORDER
        for name in cases
        if name not in FIRST_ORDER
    }
    report(
        f"seconds of 100 first-order steps (float32) and 10 zeroth-order ones ({dtype}), 8 x 128, "
        f"SmolLM2-135M, {torch.get_num_threads()} threads, extrapolated from "
        f"{len(times['full'])} steps of each",
        rows,
        {**ratios, "the paper's, Llama-3-8B": PAPER_TIME},
    )
    benchmark.pedantic(cases["focused"], rounds=1)
