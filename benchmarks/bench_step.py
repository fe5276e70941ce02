"""A whole zeroth-order step on SmolLM2-135M against MeZO's step and two bare forwards.

Run: python -m pytest benchmarks/bench_step.py      (needs the demo extra: it prepares the model)
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import mezo
import pytest
import torch

import zo_kernels as zk
from zo_kernels.pipeline.timing import interleave, median_ratio, medians
from zo_kernels.refine.checkpoint import load
from zo_kernels.replay import fingerprint
from zo_kernels.replay.header import ARITHMETICS

LR, EPS = 1e-9, 1e-3
MODES = ("streamed", "dual", "inplace", "snapshot", "mezo")


@pytest.mark.parametrize("shape", [(4, 128), (8, 512)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step(benchmark, request, report, rounds, directory, dtype, shape):
    """Two threads; rows are seconds, ratios against two bare forwards of the same rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    model, _ = load(directory, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )

    parameters = list(model.parameters())
    modes = request.config.getoption("--modes") or MODES
    steps = {mode: zk.ZOSGD(model.named_parameters(), lr=LR, eps=EPS, mode=mode) for mode in modes}
    cases = {
        "two bare forwards": lambda: (loss(), loss()),
        **{f"ZOSGD {mode}": partial(its.step, loss) for mode, its in steps.items()},
        "MeZO's loop": lambda: mezo.step(parameters, loss, EPS, LR, 1),
    }
    times = interleave(cases, rounds(5 if shape == (4, 128) else 3))
    ratios = {
        f"{name} / two forwards": median_ratio(times, name, "two bare forwards")
        for name in cases
        if name != "two bare forwards"
    }
    report(
        f"step, SmolLM2-135M, {dtype}, {shape[0]} x {shape[1]}, 2 threads", medians(times), ratios
    )
    benchmark.pedantic(lambda: steps[modes[0]].step(loss), rounds=1)
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", sorted(ARITHMETICS))
def test_restore(benchmark, report, directory, mode):
    """Fifty steps of lr = 0 in bfloat16 leave every bit of the model."""
    model, _ = load(directory, dtype="bfloat16")
    ids = torch.arange(8)[None] + 100
    before = fingerprint(model.named_parameters())
    optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=EPS, mode=mode, diagnostics=False)
    losses = set()

    def step() -> None:
        optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses.update(optimizer.last_step.losses_plus)

    benchmark.pedantic(step, rounds=50)
    assert len(losses) == 50, "nothing was perturbed"
    same = fingerprint(model.named_parameters()) == before
    report(f"50 steps of lr = 0, SmolLM2-135M, bf16, {mode}", {}, {"every bit as before": same})
    assert same


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(benchmark, report, directory, dtype):
    """Peak of a step over the peak of a bare forward, in a process of its own; MB."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), str(directory), dtype]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    report(f"peak memory, SmolLM2-135M, {dtype}, 4 x 128 (MB)", found, {})
    benchmark.pedantic(lambda: None, rounds=1)
