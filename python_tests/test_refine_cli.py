"""align and refine at the command line: their files, and runs that are stopped and go on."""

from __future__ import annotations

import sys

import pytest
import tiny_study
import torch
from helpers import run
from tiny_study import model_options

from zo_kernels.refine import checkpoint
from zo_kernels.refine import records as records_module
from zo_kernels.refine.records import read_records

files = tiny_study.root


def fail(*arguments):
    raise OSError("no space left on device")


def test_align_then_refine(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "aligned"
    options = [*model_options(files), "--out", out, "--batch-size", 2]
    assert run("align", *options, "--steps", 8, "--lr", 1e-3) == 0
    assert "8 steps in" in capsys.readouterr().out
    assert len(read_records(tmp_path / "aligned.jsonl")) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "aligned.jsonl", "aligned.png"]
    # A run that fails leaves the model and the log of the run before.
    monkeypatch.setattr(checkpoint, "save", fail)
    assert run("align", *options, "--steps", 2) == 1
    monkeypatch.undo()
    assert len(read_records(tmp_path / "aligned.jsonl")) == 8 and (out / "config.json").exists()
    assert (tmp_path / "aligned.png").read_bytes().startswith(b"\x89PNG")
    options = ["--model", out, "--data", files / "data.jsonl", "--out", tmp_path / "refined"]
    assert run("refine", *options, "--steps", 5, "--batch-size", 2, "--dtype", "bfloat16") == 0
    log = read_records(tmp_path / "refined.jsonl")
    assert [r["directions"] for r in log] == [[0], [1], [2], [3], [4]]
    refined, _ = checkpoint.load(tmp_path / "refined", dtype="bfloat16")
    aligned, _ = checkpoint.load(out, dtype="bfloat16")
    assert checkpoint.fingerprint(refined) != checkpoint.fingerprint(aligned)
    assert refined.dtype == torch.bfloat16


def test_a_stopped_alignment_is_resumed(files, tmp_path, capsys, monkeypatch):
    """The same weights and the same log as of a run that nobody stopped."""
    options = [*model_options(files), "--batch-size", 2, "--accumulation", 2, "--noise", 0.1]
    options += ["--steps", 7, "--save-every", 3]
    assert run("align", *options, "--out", tmp_path / "whole") == 0
    original = records_module.MetricsLog.write

    def stop(log, record):
        original(log, record)
        if record["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module.MetricsLog, "write", stop)
    parts = [*options, "--out", tmp_path / "parts"]
    assert run("align", *parts) == 130
    monkeypatch.undo()
    assert not (tmp_path / "parts").exists()
    assert run("align", *parts) == 1
    assert "is of an unfinished run; go on with it by --resume" in capsys.readouterr().err
    assert run("align", *parts, "--resume", "--lr", 5) == 1
    assert "lr: expected 3e-05 as in" in capsys.readouterr().err
    assert run("align", *parts, "--resume") == 0
    prints, losses = set(), []
    for name in ("whole", "parts"):
        prints.add(checkpoint.fingerprint(checkpoint.load(tmp_path / name, dtype="float32")[0]))
        losses.append([(r["step"], r["loss"]) for r in read_records(tmp_path / f"{name}.jsonl")])
    assert len(prints) == 1 and losses[0] == losses[1] and len(losses[0]) == 7
    assert not list(tmp_path.glob("*.partial*"))
    assert run("align", *parts, "--resume") == 1
    assert "resume: expected what an unfinished run leaves" in capsys.readouterr().err


def test_a_killed_refinement_is_resumed_and_replayed(files, tmp_path, capsys, monkeypatch):
    """The same weights as of a run that nobody stopped, and as the log alone gives."""
    options = [*model_options(files), "--batch-size", 2, "--schedule", "cosine"]
    assert run("refine", *options, "--out", tmp_path / "whole", "--steps", 6) == 0
    assert "replay log" in capsys.readouterr().out

    out = tmp_path / "parts"
    original = records_module.MetricsLog.write

    def stop(log, record):
        original(log, record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(records_module.MetricsLog, "write", stop)
    assert run("refine", *options, "--out", out, "--steps", 6) == 130
    monkeypatch.undo()
    assert not out.exists()
    assert run("refine", *options, "--out", out, "--steps", 6) == 1
    assert "is of an unfinished run; go on with it by --resume" in capsys.readouterr().err
    assert run("refine", *options, "--out", out, "--steps", 6, "--resume", "--lr", 5) == 1
    assert "lr: expected 0.001 as in" in capsys.readouterr().err
    assert run("refine", *options, "--out", out, "--steps", 6, "--resume") == 0
    capsys.readouterr()
    assert [r["step"] for r in read_records(tmp_path / "parts.jsonl")] == list(range(6))
    log = tmp_path / "parts.zolog"
    assert run("replay", "--base", files / "base", "--log", log, "--out", tmp_path / "again") == 0
    prints = {
        name: checkpoint.fingerprint(checkpoint.load(tmp_path / name, dtype="float32")[0])
        for name in ("whole", "parts", "again")
    }
    assert len(set(prints.values())) == 1
    assert run("refine", *options, "--out", out, "--steps", 6, "--resume") == 1
    assert "resume: expected what an unfinished run leaves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "ends"),
    [
        ("align", ["--save-every", 2], ["", ".jsonl"]),
        ("refine", ["--held-out-every", 2, "--patience", 3], ["", ".jsonl", ".zolog"]),
    ],
)
def test_a_run_is_finished_before_its_figure_is_drawn(
    command, options, ends, files, tmp_path, monkeypatch
):
    data, folder = tmp_path / "data.jsonl", tmp_path / "new"
    data.write_text((files / "data.jsonl").read_text() * 4)  # so that some can be held out
    arguments = [command, *model_options(files), "--data", data, "--out", folder / "out"]
    arguments += ["--steps", 4, "--batch-size", 2, *options]

    def stop(logs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zo_kernels.robustness.plots.loss_per_step", stop)
        assert run(*arguments) == 130
    assert sorted(p.name for p in folder.iterdir()) == [f"out{end}" for end in ends]
    assert len(read_records(folder / "out.jsonl")) == 4
    assert run(*arguments) == 0 and (folder / "out.png").exists()


def test_a_missing_matplotlib_is_said_before_the_work(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("align", "refine"):
        assert run(command, *model_options(files), "--out", tmp_path / "out") == 1
        assert "matplotlib: pip install 'zo-kernels[refine]'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
