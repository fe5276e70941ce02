"""replay and log at the command line: their files, their words, their refusals."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_logs import steps_of, write
from tiny_models import tiny_model
from tiny_replay import in_memory, log_of, saved, tensors_of

from zo_kernels import cli
from zo_kernels.replay import diff, read_log


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a log over it, and what replay gives in memory after some steps."""
    root = tmp_path_factory.mktemp("replay")
    model = tiny_model("llama", torch.bfloat16)
    saved(root / "base", model)
    log = log_of(root / "run.zolog", model, user={"steps": 5})
    return root, {stop: in_memory(model, log, stop) for stop in (2, 3, 5)}


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("options", "stop", "said"),
    [
        ([], 5, "as marked in the log"),
        (["--steps", 2], 2, "as marked in the log"),
        (["--undo", 2], 3, "no mark to compare it with"),
        (["--undo", 3, "--backend", "reference", "--device", "cpu"], 2, "as marked in the log"),
    ],
    ids=str,
)
def test_replay(files, tmp_path, capsys, options, stop, said):
    root, expected = files
    out = tmp_path / "out"
    base = ["--base", root / "base", "--log", root / "run.zolog", "--out", out]
    assert run("replay", *base, *options) == 0
    shown = capsys.readouterr().out
    assert f"{stop} of 5 steps; model {out}" in shown and said in shown
    after = tensors_of(out)
    for name, tensor in expected[stop].items():
        assert torch.equal(after[name][0].view(torch.uint8), tensor.view(torch.uint8)), name


def test_refusals(files, tmp_path, capsys):
    root, _ = files
    out = ["--out", tmp_path / "out"]
    base = ["--base", root / "base", "--log", root / "run.zolog", *out]
    for arguments, message in (
        (["replay", *base, "--undo", 6], "undo: expected 0 to 5 steps, got 6"),
        (["replay", *base, "--steps", 6], "steps: expected an int from 0 to 5, which"),
        (["replay", *base[:3], root / "none", *out], "none"),
        (
            ["replay", "--base", root, "--log", root / "run.zolog", *out],
            "with model.safetensors or",
        ),
        (["replay", *base, "--device", "cuda:99"], "device: expected a GPU out of the"),
        (["log", "info", root / "base" / "config.json"], "expected a log of zo_kernels"),
    ):
        assert run(*arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("replay", *base, "--undo", 1, "--steps", 1)
    assert "not allowed with argument" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_says_what_a_log_holds(files, tmp_path, capsys):
    root, _ = files
    path = root / "run.zolog"
    log = read_log(path)
    assert run("log", "info", path) == 0
    text = capsys.readouterr().out
    assert f"5 steps (1 skipped), {path.stat().st_size} bytes" in text
    assert "21 parameters in 2 groups" in text and '{"steps": 5}' in text
    assert "mode streamed, stochastic arithmetic" in text and log.header.base in text
    assert "mean loss 1.7812 in step 0, 3.1146 in 4" in text
    assert f"mark after 5 steps: {log.marks[1].fingerprint}" in text
    assert run("log", "info", path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"][1]["losses_plus"] == log.steps["losses_plus"][1].tolist()
    assert record["steps"][3]["skipped"] and record["steps"][3]["losses_plus"] == [None, None]
    assert record["header"]["seed"] == log.header.seed and len(record["marks"]) == 2
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:-1])
    assert run("log", "info", torn) == 0
    shown = capsys.readouterr()
    assert "5 steps" in shown.out and "are an incomplete record, left out" in shown.err


def test_verify_passes_and_fails(files, tmp_path, capsys):
    root, _ = files
    base, path = ["--base", root / "base"], root / "run.zolog"
    out = tmp_path / "out"
    assert run("replay", *base, "--log", path, "--out", out) == 0
    capsys.readouterr()
    assert run("log", "verify", path, *base, "--model", out) == 0
    assert capsys.readouterr().out.count("as replayed") == 3
    assert run("log", "verify", path, *base, "--model", root / "base") == 1
    shown = capsys.readouterr()
    assert shown.out.count("as replayed") == 2 and "DIFFERENT: replay gives" in shown.out
    assert "base: not the weights that replay gives" in shown.err
    log = read_log(path)
    bare = write(tmp_path / "bare", log.header, steps_of(5, queries=2, groups=2))
    assert run("log", "verify", bare, *base) == 1
    assert "expected a mark in it, or --model, got neither" in capsys.readouterr().err
    assert run("log", "verify", path, "--base", out) == 1
    assert "it is the log of another model" in capsys.readouterr().err


def test_diff(files, tmp_path, capsys):
    root, _ = files
    path, model = root / "run.zolog", tiny_model("llama", torch.bfloat16)
    assert run("log", "diff", path, path) == 0
    assert capsys.readouterr().out == "steps: 5 in both\nno step differs\n"
    other = tmp_path / "other"
    log_of(other, model, count=4, mark=False, seed=7, mode="master")
    assert run("log", "diff", path, other) == 0
    text = capsys.readouterr().out
    assert "seed: 9223372036854775813 | 7\nmode: streamed | master\n" in text
    assert "steps: 5 | 4\nthe first 4 steps are the same" in text
    log = read_log(path)
    steps = steps_of(5, queries=2, groups=2, skip=[3])
    steps[2].losses_minus[1] += 2**-40
    assert run("log", "diff", path, write(tmp_path / "late", log.header, steps)) == 0
    text = capsys.readouterr().out
    assert "first step that differs: 2" in text and f"l- {steps_of(3)[2].losses_minus}"[:-2] in text
    assert run("log", "diff", path, tmp_path / "late", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["first"] == 2 and record["header"] == {} and not record["same_run"]
    assert record["losses"][1]["losses_minus"] == steps[2].losses_minus


def test_diff_of_parameters(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    a = log_of(tmp_path / "a", model, user=1, created="then")
    b = log_of(tmp_path / "b", model, user=2, created="now")
    assert diff(a, b).header == {"user": (1, 2), "created": ("then", "now")}
    assert diff(a, b).same_run
    c = log_of(tmp_path / "c", model.half(), chosen=lambda name: "norm" not in name)
    found = diff(a, c)
    assert found.header["'model.norm.weight'"] == (True, False)
    assert found.header["'lm_head.weight'.dtype"] == ("bfloat16", "float16")
    assert found.first is None and not found.same_run
    d = read_log(write(tmp_path / "d", c.header, steps_of(2, queries=2, groups=2, size=1.0)))
    assert diff(c, d).first == 0 and diff(c, d).steps == (5, 2)


def test_help_says_what_the_options_mean(capsys):
    for arguments, words in (
        (["replay", "--help"], "--undo N without the last N steps"),
        (["log", "--help"], "replay without writing, and compare fingerprints"),
        (["log", "verify", "--help"], "--model MODEL folder of the model after all steps"),
        (["--help"], "rebuild a refined model from its base and its log"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 0
        assert words in " ".join(capsys.readouterr().out.split())
