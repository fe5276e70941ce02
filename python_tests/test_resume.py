"""Runs with a replay log: resumed, replayed, killed; and what they refuse."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import bits, closure_of, same_bits, tiny_model

import zo_kernels as zk
from zo_kernels.optim import logged, zosgd
from zo_kernels.replay import read_log, replay_
from zo_kernels.replay.header import ARITHMETICS

MODES = sorted(ARITHMETICS)
RUNS = [
    {},
    {"queries": 2, "relative_eps": True, "eps": 0.1},
    {"update_norm": 1e-3, "weight_decay": 0.1, "distribution": "rademacher"},
]


def make(mode, dtype, **options):
    """A tiny model, its optimizer, a schedule, and a closure that fails in step 3."""
    model = tiny_model("llama_tied", dtype)
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 3, **options}
    optimizer = zk.ZOSGD(model.named_parameters(), mode=mode, **options)
    loss = closure_of(model)

    def closure():
        value = loss()
        return math.inf if optimizer.steps == 3 else value

    return model, optimizer, closure


def advance(optimizer, closure, until):
    while optimizer.steps < until:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + optimizer.steps)
        optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:ZOSGD. step 3 skipped")
@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_an_uninterrupted_one(mode, dtype, options, tmp_path, monkeypatch):
    """Also where ||theta|| decides about the learning rate and is measured now and then."""
    monkeypatch.setattr(logged, "NORM_PERIOD", 4)
    monkeypatch.setattr(zosgd, "NORM_PERIOD", 4)
    model, optimizer, closure = make(mode, dtype, **options)
    optimizer.start_log(tmp_path / "whole.zolog")
    advance(optimizer, closure, 9)
    expected, state = bits(model), optimizer.mode.state()
    optimizer.end_log()

    model, optimizer, closure = make(mode, dtype, **options)
    optimizer.start_log(tmp_path / "parts.zolog")
    advance(optimizer, closure, 6)
    model, optimizer, closure = make(mode, dtype, **options)
    assert optimizer.resume_log(tmp_path / "parts.zolog") == 6
    advance(optimizer, closure, 9)
    assert same_bits(model, expected)
    for name, tensor in optimizer.mode.state().items():
        assert torch.equal(tensor, state[name]), name
    optimizer.end_log()
    whole, parts = read_log(tmp_path / "whole.zolog"), read_log(tmp_path / "parts.zolog")
    assert whole.steps.tobytes() == parts.steps.tobytes() and whole.marks[-1] == parts.marks[-1]
    assert whole.skipped.tolist() == [n == 3 for n in range(9)]

    model, _, _ = make(mode, dtype, **options)
    replay_(dict(model.named_parameters()), whole, chunk=3)
    assert same_bits(model, expected)


def test_killed_at_random_moments(tmp_path):
    """SIGKILL, 200 times, in all modes that can be replayed; see kill_and_resume.py."""
    script = Path(__file__).parent / "kill_and_resume.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path, "--kills", "200"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) >= 200


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_leaves_the_weights_and_the_run(mode, tmp_path, monkeypatch):
    """The step that cannot be logged is not taken; when there is room again, it is."""
    model, optimizer, closure = make(mode, torch.bfloat16)
    optimizer.start_log(tmp_path / "log")
    advance(optimizer, closure, 2)
    before, size = bits(model), (tmp_path / "log").stat().st_size

    def full(number, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device; after 2 steps, the log ends with"):
        optimizer.step(closure)
    monkeypatch.undo()
    assert same_bits(model, before) and optimizer.steps == 2
    assert (tmp_path / "log").stat().st_size == size and "OSError" in optimizer.last_step.skipped
    advance(optimizer, closure, 3)
    other, its, closure = make(mode, torch.bfloat16)
    advance(its, closure, 3)
    assert same_bits(other, bits(model)) and len(read_log(tmp_path / "log").steps) == 3


def test_logs_of_other_runs_are_refused(tmp_path):
    _, optimizer, closure = make("streamed", torch.bfloat16)
    log = tmp_path / "log"
    optimizer.start_log(log)
    advance(optimizer, closure, 2)
    with pytest.raises(ValueError, match="start_log: expected no step before it, got 2"):
        optimizer.start_log(tmp_path / "other")
    with pytest.raises(ValueError, match="resume_log: expected no step before it, got 2"):
        optimizer.resume_log(log)
    cases = [
        ({"mode": "streamed", "dtype": torch.bfloat16, "seed": 4}, "seed: expected 4, got 3"),
        ({"mode": "master", "dtype": torch.bfloat16}, "mode: expected 'master', got 'streamed'"),
        ({"mode": "streamed", "dtype": torch.float32}, "dtype: expected 'float32', got 'bfloat16'"),
        ({"mode": "streamed", "dtype": torch.bfloat16, "queries": 2}, "queries: expected 2, got 1"),
        (
            {"mode": "streamed", "dtype": torch.bfloat16, "relative_eps": True},
            "relative_eps: expected False as in",
        ),
    ]
    for options, message in cases:
        model, fresh, _ = make(**options)
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            fresh.resume_log(log)
        assert same_bits(model, before) and fresh.steps == 0 and fresh.log is None
    model, fresh, _ = make("streamed", torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(ValueError, match="it is the log of another model"):
        fresh.resume_log(log)
    _, mezo, _ = make("mezo", torch.bfloat16)
    with pytest.raises(ValueError, match="mode 'mezo' cannot be replayed: its evaluations round"):
        mezo.start_log(tmp_path / "mezo")
    assert not (tmp_path / "mezo").exists()
    _, relative, closure = make("streamed", torch.bfloat16, relative_eps=True)
    relative.start_log(tmp_path / "relative")
    relative.step(closure)
    _, absolute, _ = make("streamed", torch.bfloat16)
    with pytest.raises(ValueError, match=r"embed_tokens.weight'.unit: expected 1.0, got 0\.0"):
        absolute.resume_log(tmp_path / "relative")


def test_the_logged_parameters_stay_the_same(tmp_path):
    model, optimizer, closure = make("inplace", torch.bfloat16)
    optimizer.start_log(tmp_path / "log")
    with pytest.raises(RuntimeError, match="add_param_group: expected it before the log was begun"):
        optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.zeros(3)))]})
    with pytest.raises(RuntimeError, match="load_state_dict: expected no log, got one"):
        optimizer.load_state_dict(optimizer.state_dict())
    model.model.norm.weight.requires_grad_(False)
    before = bits(model)
    with pytest.raises(ValueError, match=r"got 1 that changed, such as 'model\.norm\.weight'"):
        optimizer.step(closure)
    assert same_bits(model, before) and optimizer.steps == 0
    model, optimizer, closure = make("inplace", torch.bfloat16)
    names = dict(model.named_parameters())
    groups = [{"params": [(n, p)]} for n, p in names.items()]
    optimizer = zk.ZOSGD(groups, lr=1e-2, eps=1e-2)
    optimizer.start_log(tmp_path / "groups")
    optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match="expected the parameter groups with which the log began"):
        optimizer.step(closure)
    with pytest.raises(ValueError, match="end_log: expected a log that was begun"):
        make("inplace", torch.bfloat16)[1].end_log()
