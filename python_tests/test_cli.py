"""The command line end to end on a tiny model: every command, its files, its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels import cli
from zo_kernels.pipeline import demo as demo_module
from zo_kernels.refine import checkpoint
from zo_kernels.refine import records as records_module
from zo_kernels.refine.records import read_records

ROWS = [
    ("how do i open a door", "turn the key and push it", "harmless"),
    ("tell me a story", "a good day about sun", "benign"),
    ("write a story about cat", "the cat is here", "harmless"),
    ("open the door please", "sorry i can not help with that", "harmful"),
    ("tell me how", "sorry i can not in any way", "harmful"),
    ("write about the key", "sorry i can not help", "harmful"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model directory and a data file."""
    root = tmp_path_factory.mktemp("cli")
    checkpoint.save(tiny_model("llama_tied"), tiny_tokenizer(), root / "base")
    lines = [json.dumps({"prompt": p, "completion": c, "kind": k}) for p, c, k in ROWS]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    return root


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def model_options(files):
    return ["--model", files / "base", "--data", files / "data.jsonl", "--dtype", "float32"]


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
    assert "resume: expected an unfinished run's log" in capsys.readouterr().err


def small_demo(files, out, monkeypatch):
    """The demo with a budget of seconds; the built-in text suits no tiny tokenizer."""
    monkeypatch.setattr(demo_module, "MIN_SECONDS", 0.6)
    return ["demo", "--model", files / "base", "--data", files / "data.jsonl", "--out", out,
            "--minutes", 0.01]  # fmt: skip


def test_demo_and_its_resumption(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run(*small_demo(files, out, monkeypatch)) == 0
    shown = capsys.readouterr().out
    for name in demo_module.ARMS.values():
        assert name in shown
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == list(demo_module.ARMS)
    assert [(c["reference"], c["other"]) for c in summary["comparisons"]] == [
        ("aligned", "more_fo"),
        ("aligned", "refined"),
    ]
    records = read_records(out / "evaluation.jsonl")
    by_arm = {arm: [r for r in records if r["label"] == arm] for arm in demo_module.ARMS}
    assert {len(rows) for rows in by_arm.values()} == {9}
    for control, aligned in zip(by_arm["lr0"], by_arm["aligned"], strict=True):
        assert {**control, "label": "aligned"} == aligned
    assert "bit-identical to the aligned model" in (out / "summary.md").read_text()
    for name in ("metric_vs_noise.png", "loss_per_step.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    prints = {
        arm: checkpoint.fingerprint(checkpoint.load(out / arm, dtype="float32")[0])
        for arm in ("aligned", "more_fo", "refined")
    }
    assert len(set(prints.values())) == 3
    log = out / "refined.zolog"
    verified = ["log", "verify", log, "--base", out / "aligned", "--model", out / "refined"]
    assert run(*verified) == 0
    refined = prints["refined"]

    # Killed in the middle of the last evaluation: what is finished is kept, the rest done again.
    lines = (out / "evaluation.jsonl").read_text().splitlines()
    (out / "evaluation.jsonl").write_text("\n".join(lines[:-4]) + '\n{"label": "more')
    (out / "summary.json").unlink()
    assert run(*small_demo(files, out, monkeypatch)) == 0
    again = read_records(out / "evaluation.jsonl")

    def timeless(rows):
        return sorted(
            json.dumps({k: v for k, v in r.items() if k != "seconds"}, sort_keys=True) for r in rows
        )

    assert timeless(again) == timeless(records)
    assert (out / "summary.json").exists()
    assert "bit-identical to the aligned model" in (out / "summary.md").read_text()
    assert checkpoint.fingerprint(checkpoint.load(out / "refined", dtype="float32")[0]) == refined

    # Another configuration must not continue in the same folder.
    assert run(*small_demo(files, out, monkeypatch), "--eps", 0.2) == 1
    assert "differs in evaluation, refine" in capsys.readouterr().err


def test_doctor(capsys):
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["noise_spec"] == 1 and found["backends"]["reference"] == "ok"
    assert found["backends"]["native"] == "ok" and "scalar" in found["isas"]
    # Builds of the package index leave "+cu..." out of their metadata.
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["memory"] > 1 << 30
    assert set(found["speeds"]) == {"perturb_", "MeZO loop", "copy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["refine", "--mode", "magic"], "mode: expected one of"),
        (["refine", "--parameters", "*.nothing"], "matches no parameter"),
        (["refine", "--eps", "-1"], "eps: expected a finite value"),
        (["refine", "--dtype", "int4"], "dtype: expected auto or one of"),
        (["align", "--data", "missing.jsonl"], "missing.jsonl"),
        (["evaluate", "--quantization", "int7.5"], "int7.5"),
    ],
)
def test_refusals_say_why_and_write_nothing(arguments, message, files, tmp_path, capsys):
    out = tmp_path / "out"
    command, *rest = arguments
    assert run(command, *model_options(files), "--out", out, *rest) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_existing_folder_with_other_files_is_refused(files, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert run("align", *model_options(files), "--out", tmp_path) == 1
    assert "holds other files" in capsys.readouterr().err
    assert run(*["demo", "--model", files / "base", "--out", tmp_path]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_help_shows_options_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        run("refine", "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--eps EPS perturbation scale." in text and "(default: 0.1)" in text
