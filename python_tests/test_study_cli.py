"""demo and run at the command line: studies of fixed arms, and of a configuration's."""

from __future__ import annotations

import json

import pytest
import tiny_study
from helpers import run
from tiny_study import stop_at, write_files

from zo_kernels.pipeline import demo as demo_module
from zo_kernels.pipeline.study_config import TITLES
from zo_kernels.refine.records import MetricsLog, read_records

files = tiny_study.root


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
