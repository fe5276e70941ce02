"""The programs in examples/ run, and leave what they say."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels import chat
from zo_kernels.refine import checkpoint
from zo_kernels.replay import read_log, replay_directory

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = [
    ("how do i open a door", "turn the key and push it", "harmless", "train"),
    ("tell me a story about sun", "a good day here", "harmless", "train"),
    ("open the door please", "sorry i can not help with that", "harmful", "train"),
    ("write about the key", "sorry i can not in any way", "harmful", "train"),
    ("tell me how", "sorry i can not help", "harmful", "held_out"),
]


def example(name):
    """A program of examples/ as a module."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """A model directory and a data file."""
    checkpoint.save(tiny_model("llama", layers=3), tiny_tokenizer(), tmp_path / "base")
    names = ("prompt", "completion", "kind", "split")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_three_stages(files, capsys):
    """Base, aligned and refined differ where they should; the losses are those of the models."""
    three_stages, out = example("three_stages"), files / "out"
    options = {
        "--model": files / "base", "--data": files / "data.jsonl", "--out": out, "--blocks": 1,
        "--align-steps": 4, "--steps": 3, "--batch-size": 2, "--lr": 0.02, "--noise": 0.3,
    }  # fmt: skip
    three_stages.main([str(part) for pair in options.items() for part in pair])
    printed = capsys.readouterr().out

    weights = {
        name: dict(checkpoint.load(folder, dtype="float32")[0].named_parameters())
        for name, folder in (
            ("base", files / "base"),
            *((n, out / n) for n in ("aligned", "refined")),
        )
    }
    chosen = int(re.search(r"sensitive blocks: (\d)\n", printed)[1])
    for name, aligned in weights["aligned"].items():
        assert not torch.equal(aligned, weights["base"][name]), name
        moved = not torch.equal(aligned, weights["refined"][name])
        assert moved == (f"layers.{chosen}." in name and aligned.ndim == 2), name

    examples = chat.read_examples(files / "data.jsonl")
    found = [
        three_stages.noisy_losses(*checkpoint.load(out / n, dtype="float32"), examples, 0.3)
        for n in ("aligned", "refined")
    ]
    for text, name in (("as it is", "clean"), ("under noise of 0.3", "noisy")):
        before, after = (losses[name] for losses in found)
        assert f"{text}: {before:.4f} -> {after:.4f} nats per token" in printed
    assert found[0]["clean"] != found[0]["noisy"]

    # The log makes the refined model of the aligned one.
    log = read_log(out / "refined.zolog")
    assert len(log.steps) == 3
    replay_directory(out / "aligned", log, files / "replayed")
    replayed = checkpoint.load(files / "replayed", dtype="float32")[0]
    assert all(torch.equal(p, weights["refined"][n]) for n, p in replayed.named_parameters())


@pytest.mark.parametrize(
    "option, value, error, message",
    [
        ("--out", ".", SystemExit, "2"),
        ("--noise", 0, ValueError, "rho: expected a positive number"),
        ("--blocks", 0, ValueError, "selected: expected at least 1"),
        ("--blocks", 4, ValueError, "--blocks: expected at most the model's 3, got 4"),
        ("--data", "train.jsonl", ValueError, "--data: expected refusals of split 'held_out'"),
        ("--data", "held.jsonl", ValueError, "--data: expected refusals of split 'train'"),
    ],
)
def test_three_stages_refuses_before_the_work(files, capsys, option, value, error, message):
    """Nothing is written."""
    lines = (files / "data.jsonl").read_text().splitlines(keepends=True)
    (files / "train.jsonl").write_text("".join(lines[:4]))
    (files / "held.jsonl").write_text("".join([*lines[:2], lines[4]]))
    options = {"--model": files / "base", "--data": files / "data.jsonl", "--out": files / "new"}
    options["--blocks"] = 1
    options[option] = files / value if isinstance(value, str) else value
    before = sorted(files.iterdir())
    with pytest.raises(error, match=message):
        example("three_stages").main([str(part) for pair in options.items() for part in pair])
    assert sorted(files.iterdir()) == before
    assert option != "--out" or "--out: expected a new folder" in capsys.readouterr().err
