"""The command line end to end on a tiny model: every command, its files, its refusals."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_study import write_files

from zo_kernels import cli, noise
from zo_kernels.pipeline import demo as demo_module
from zo_kernels.pipeline.study_config import TITLES
from zo_kernels.refine import checkpoint
from zo_kernels.refine import records as records_module
from zo_kernels.refine.records import MetricsLog, read_records
from zo_kernels.refine.scores import Scores
from zo_kernels.replay import read_log


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model directory and a data file."""
    return write_files(tmp_path_factory.mktemp("cli"))


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


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's arguments with a model of its own and tenths of a second for each stage."""
    monkeypatch.setattr(demo_module, "LEAST_SECONDS", 0.2)
    root = write_files(tmp_path / "files", layers=5)
    return ["demo", "--model", root / "base", "--data", root / "data.jsonl",
            "--out", tmp_path / "out", "--minutes", 1e-4, "--eps", 0.2]  # fmt: skip


def test_demo_and_its_resumption(demo, tmp_path, monkeypatch, capsys):
    """A study of fixed arms, whose refinement ends by its time; started again, it goes on."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop_at(MetricsLog.write, "records/more_fo-0.jsonl"))
        assert run(*demo) == 130
    before = {p: p.read_bytes() for p in (out / "training").iterdir() if p.is_file()}
    assert (out / "training" / "more_fo-0.model" / "config.json").exists()
    assert len(read_records(out / "records" / "more_fo-0.jsonl")) == 1
    capsys.readouterr()
    assert run(*demo) == 0
    assert {p: p.read_bytes() for p in before} == before
    shown = capsys.readouterr().out
    arms = ("base", "aligned", "lr0", "zo_full", "zo_robust", "more_fo", "walk_robust")
    assert all(TITLES[arm].split()[0] in shown for arm in arms) and "report.html" in shown
    records = read_records(out / "evaluation.jsonl")
    conditions = ["clean", *(f"w0.2/{n}" for n in range(3)), "int8", "int4"]
    assert [(r["label"], r["condition"]) for r in records] == [
        (arm, condition) for arm in (*arms[:3], *sorted_arms(records)) for condition in conditions
    ]
    assert set(sorted_arms(records)) == set(arms[3:])
    generated = {r["condition"] for r in records if r["harmful_answers"] is not None}
    assert generated == {"clean", "int4"}
    first, *others = (
        json.loads((out / "training" / f"{arm}-0.json").read_text())
        for arm in ("zo_full", "zo_robust", "more_fo")
    )
    assert first["config"]["seconds"] == 0.2 <= first["seconds"] and first["steps"] < 10_000
    assert all(other["seconds"] >= first["seconds"] for other in others)
    assert "as much time as" in (out / "summary.md").read_text()
    log = out / "training" / "zo_full-0.zolog"
    assert run("log", "verify", log, "--base", out / "aligned") == 0

    for option, named in ((["--eps", 0.3], "evaluation, refine, score"), (["--lr", 1], "refine")):
        assert run(*demo, *option) == 1
        assert f"differs in {named}\n" in capsys.readouterr().err


def sorted_arms(records):
    """Labels of arms with training seeds, as they come."""
    return list(dict.fromkeys(r["label"] for r in records if "training_seed" in r))


def stop_at(original, where, count=2):
    """MetricsLog.write that is interrupted at the line of this number of a file."""
    seen = []

    def stop(log, record):
        if log.path.as_posix().endswith(where):
            seen.append(record)
            if len(seen) == count:
                raise KeyboardInterrupt
        original(log, record)

    return stop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", 0], "minutes: expected a positive number, got 0"),
        (["--eps", -1], "expected"),
        (["--lr", "fast"], "lr: expected a number or 'auto', got 'fast'"),
        (["--seed", -1], "expected 0 <= seed < 2**64, got -1"),
        (["--model", "none"], "model: expected a Hugging Face directory"),
    ],
)
def test_refusals_of_the_demo(options, message, demo, tmp_path, capsys):
    assert run(*demo, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_with_options_instead_of_the_files(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zo_kernels.pipeline.study.torch.set_num_threads", lambda n: seen.append(n))
    seen: list[int] = []
    config = tmp_path / "mine.yaml"
    config.write_text(
        "model: elsewhere\ndtype: float32\nalign: none\narms: [zo_full]\n"
        "refine: {steps: 2, batch_size: 2}\n"
        "evaluation: {noise: [], quantization: [int4], generate_under: [], perplexity_tokens: 16}\n"
    )
    arguments = ["run", "--config", config, "--model", files / "base", "--seeds", 3, 5,
                 "--data", files / "data.jsonl", "--text", files / "text.txt"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--threads", 1) == 0
    shown = capsys.readouterr().out
    assert "full ZO" in shown and "over training seeds" in shown
    records = read_records(tmp_path / "runs" / "mine" / "evaluation.jsonl")
    assert [r["training_seed"] for r in records if r["label"] == "zo_full"] == [3, 3, 5, 5]
    assert seen[0] == 1 and len(seen) == 2
    assert run(*arguments, "--seeds", 3, 3) == 1
    assert "seeds: expected some, each once, got [3, 3]" in capsys.readouterr().err
    assert run(*arguments, "--device", "meta", "--out", tmp_path / "meta") == 1
    assert "device: expected cpu or cuda, got 'meta'" in capsys.readouterr().err
    assert not (tmp_path / "meta").exists()


def test_studies_of_one_name_have_folders_of_their_own(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr("zo_kernels.cli.study._study", lambda config, out: places.append(out))
    for folder in ("configs/a", "configs/b/c", "configs", "other"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "own.yaml").write_text("model: smollm2\n")
        assert run("run", "--config", tmp_path / folder / "own.yaml") == 0
    assert [out.as_posix() for out in places] == [
        "runs/a-own", "runs/b-c-own", "runs/own", "runs/own",
    ]  # fmt: skip


def scoring(files, out):
    return ["score", *model_options(files), "--out", out, "--selected", 1, "--kind", "all",
            "--draws", 2, "--max-draws", 2, "--batch-size", 2, "--rho", 0.3]  # fmt: skip


def test_score_and_its_resumption(files, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*scoring(files, whole)) == 0
    shown = capsys.readouterr().out
    assert "block" in shown and "forwards over the examples" in shown
    assert (whole / "scores.png").read_bytes().startswith(b"\x89PNG")
    scores = Scores.load(whole / "scores.json")
    assert (len(scores.blocks), scores.draws, scores.examples) == (2, 2, 4)
    assert f"Blocks {scores.selected()[0]};" in shown
    losses = read_records(whole / "losses.jsonl")
    assert len(losses) == 1 + 2 * 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop_at(MetricsLog.write, "losses.jsonl", 5))
        assert run(*scoring(files, parts)) == 130
    with (parts / "losses.jsonl").open("a") as file:
        file.write('{"block": 1, "wh')  # as a kill leaves it
    assert not (parts / "scores.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop_at(MetricsLog.write, "losses.jsonl", 2 * 5 - 2))
        assert run(*scoring(files, parts)) == 0  # seven losses are missing, no more
    again = Scores.load(parts / "scores.json")
    assert replace(again, seconds=scores.seconds) == scores

    # Other settings are refused, and those that leave each loss as it is are not.
    capsys.readouterr()
    assert run(*scoring(files, parts), "--rho", 0.2, "--seed", 1) == 1
    message = capsys.readouterr().err
    assert "differs in rho, seed; --fresh starts it over" in message
    assert Scores.load(parts / "scores.json") == again
    before = read_records(parts / "losses.jsonl")
    assert len(before) == 11
    assert run(*scoring(files, parts), "--max-draws", 4, "--draws", 4, "--selected", 2) == 0
    assert Scores.load(parts / "scores.json").draws == 4
    assert read_records(parts / "losses.jsonl")[:11] == before
    assert run(*scoring(files, parts), "--rho", 0.2, "--fresh") == 0
    fresh = Scores.load(parts / "scores.json")
    assert fresh.config.rho == 0.2 and fresh.loss == scores.loss and fresh.blocks != scores.blocks
    assert len(read_records(parts / "losses.jsonl")) == 11


def test_refine_begins_with_scores(files, tmp_path, capsys):
    """Their blocks and, with a warm start, their slopes: which the log holds."""
    assert run(*scoring(files, tmp_path / "scored")) == 0
    file = tmp_path / "scored" / "scores.json"
    [block] = Scores.load(file).selected()
    options = [*model_options(files), "--batch-size", 2, "--steps", 3, "--lr", 0.5]
    found = set()
    for name, more in (("cold", []), ("warm", ["--warm-start"]), ("other", ["--warm-start"])):
        layers = ["--layers", 1 - block] if name == "other" else []
        scores = ["--scores", file, *more, *layers]
        assert run("refine", *options, "--out", tmp_path / name, *scores) == 0
        log = read_log(tmp_path / f"{name}.zolog")
        moved = {p.name.split(".")[2] for p in log.header.parameters()}
        assert moved == {str(1 - block if layers else block)}
        warm = log.header.warm_start
        assert (warm is not None) == bool(more)
        if warm is not None:
            assert list(warm.directions) == [noise.LAYER_SCORING, noise.LAYER_SCORING + 1]
            assert set(warm.scales) == {p.name for p in log.header.parameters()}
        again = tmp_path / f"{name}-again"
        replayed = ["replay", "--base", files / "base", "--log", tmp_path / f"{name}.zolog"]
        assert run(*replayed, "--out", again) == 0
        prints = {
            checkpoint.fingerprint(checkpoint.load(folder, dtype="float32")[0])
            for folder in (tmp_path / name, again)
        }
        assert len(prints) == 1
        found |= prints
    assert len(found) == 3

    capsys.readouterr()
    refusals = [
        (["--warm-start"], "warm-start: expected --scores with it, got none"),
        (["--scores", file, "--warm-start", "--seed", 1], "scores: expected seed 1"),
        (["--scores", files / "data.jsonl"], "data.jsonl: expected scores of zo-kernels score"),
        (["--layers", 7], "layers: expected 0 to 1, got 7"),
    ]
    for more, message in refusals:
        assert run("refine", *options, "--out", tmp_path / "none", *more) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


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


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_options_with_their_meaning(capsys):
    text = help_of("refine", capsys)
    assert "--eps EPS perturbation scale, a number; or" in text and "(default: 0.1)" in text


def test_help_says_what_auto_is(capsys):
    for command in ("align", "dpo"):
        assert "--dtype DTYPE auto (float32), float32, bfloat16" in help_of(command, capsys)
    for command in ("refine", "score", "evaluate"):
        assert "--dtype DTYPE auto (fast on the device), float32" in help_of(command, capsys)
