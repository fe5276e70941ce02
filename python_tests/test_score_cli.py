"""score at the command line, stopped and gone on with, and refine with its scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_study
from helpers import run
from tiny_study import model_options, stop_at

from zo_kernels import noise
from zo_kernels.refine import checkpoint
from zo_kernels.refine.records import MetricsLog, read_records
from zo_kernels.refine.scores import Scores
from zo_kernels.replay import read_log

files = tiny_study.root


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
