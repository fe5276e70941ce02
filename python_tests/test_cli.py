"""The command line as a whole: doctor, refusals that say why, help."""

from __future__ import annotations

import json

import pytest
import tiny_study
import torch
from helpers import run
from tiny_study import model_options

files = tiny_study.root


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
