"""Replay of a directory: the bits of replay in memory, in little memory, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_logs import header_of, steps_of, write
from tiny_models import tiny_model
from tiny_replay import HEAD, assert_same, in_memory, log_of, saved, tensors_of

from zo_kernels.refine import checkpoint
from zo_kernels.replay import fingerprint, read_log, replay_, replay_directory, verify, weights


@pytest.mark.parametrize("mode", ["streamed", "master", "master8"])
def test_a_sharded_model_in_pieces(tmp_path, mode, monkeypatch):
    """Every shard has its old tensors; the logged ones are those of replay in memory."""
    model = tiny_model("llama", torch.bfloat16)
    base = saved(tmp_path / "base", model, shard="10KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    log = log_of(tmp_path / "log", model, mode=mode, chosen=lambda n: "proj" in n or n == HEAD)
    expected, before = in_memory(model, log), tensors_of(base)
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_text("weights")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / ".cache").mkdir()
    (base / ".cache" / "x").write_text("x")
    for chunk, piece in ((64, 1 << 24), (1, 4096), (2, 300)):
        monkeypatch.setattr(weights, "PIECE", piece)
        seen = []
        done = replay_directory(
            base, log, tmp_path / "out", chunk=chunk,
            progress=lambda *args, seen=seen: seen.append(args),
        )  # fmt: skip
        after = tensors_of(tmp_path / "out")
        assert {n: f for n, (_, f) in after.items()} == {n: f for n, (_, f) in before.items()}
        for name, (tensor, _) in after.items():
            assert_same(tensor, expected.get(name, before[name][0]))
        assert done.fingerprint == fingerprint(expected.items()) and done.marks == (2, 5)
        assert all(0 <= a <= b for _, a, b in seen) and seen[-1][1] == seen[-1][2]
    assert done.notes == (
        "weights of the base in other files were left out: onnx/model.onnx, "
        "pytorch_model.bin.index.json",
    )
    files = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    left = {"onnx/model.onnx", "pytorch_model.bin.index.json", ".cache/x"}
    out = tmp_path / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files - left
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((out / weights.INDEX).read_text()) == json.loads(
        (base / weights.INDEX).read_text()
    )
    loaded, _ = checkpoint.load(out, dtype="bfloat16")
    for name, parameter in loaded.named_parameters():
        assert_same(parameter.detach(), after[name][0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "log", "log.plain", "out"]


def test_another_dtype_than_the_logs(tmp_path):
    """A float32 base is cast as the run cast it; config.json and the index follow."""
    model = tiny_model("llama")
    base = saved(tmp_path / "base", model, shard="20KB")
    log = log_of(
        tmp_path / "log", tiny_model("llama", torch.bfloat16), chosen=lambda n: "proj" in n
    )
    seen = []
    done = replay_directory(
        base, log, tmp_path / "out", progress=lambda text, *_: seen.append(text)
    )
    assert any("(cast from F32 to the log's bfloat16)" in text for text in seen)
    assert done.notes == ("logged tensors are bfloat16 as in the run, cast from F32",)
    expected = in_memory(tiny_model("llama", torch.bfloat16), log)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, (tensor, _) in after.items():
        assert_same(tensor, expected.get(name, before[name][0]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "dtype": "bfloat16"}
    index = json.loads((tmp_path / "out" / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t, _ in after.values())
    loaded, _ = checkpoint.load(tmp_path / "out", dtype="bfloat16")
    named = dict(loaded.named_parameters())
    assert fingerprint((n, named[n]) for n in expected) == done.fingerprint


def test_a_group_moves_as_one(tmp_path):
    """A tensor of unit 0 takes the passes of its group, and only those: zeros keep their signs."""
    tensors = {name: torch.full((8,), -0.0) for name in ("v", "w", "x")}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    groups = [{n: tensors[n] for n in "vw"}, {"x": tensors["x"]}]
    header = header_of(groups, {"w": 0.0, "x": 0.0})
    steps = [replace(step, groups=[replace(g, decay=1.0) for g in step.groups])
             for step in steps_of(2, groups=2)]  # fmt: skip
    log = read_log(write(tmp_path / "log", header, steps))
    replay_directory(tmp_path / "base", log, tmp_path / "out")
    after, expected = tensors_of(tmp_path / "out"), {n: t.clone() for n, t in tensors.items()}
    replay_(expected, log)
    for name, tensor in expected.items():
        assert_same(after[name][0], tensor)
    assert not expected["w"].signbit().all() and expected["x"].signbit().all()


def test_the_first_steps_only(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    log = log_of(tmp_path / "log", model)
    for stop, marks in ((0, ()), (2, (2,)), (4, (2,))):
        done = replay_directory(base, log, tmp_path / "out", stop=stop)
        assert (done.steps, done.marks) == (stop, marks)
        after = tensors_of(tmp_path / "out")
        for name, tensor in in_memory(model, log, stop).items():
            assert_same(after[name][0], tensor)


def test_refusals_write_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    log = log_of(tmp_path / "log", model)
    other = saved(tmp_path / "other", tiny_model("llama", torch.bfloat16, seed=1))
    qwen = saved(tmp_path / "qwen", tiny_model("qwen2", torch.bfloat16))
    wrong = read_log(write(tmp_path / "wrong", log.header, steps_of(1, queries=2, groups=2),
                           {1: "0" * 32}))  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    small = saved(tmp_path / "small", model)
    header = replace(log.header, groups=(
        (replace(log.header.groups[0][0], shape=(64, 16)),), *log.header.groups[1:]
    ))  # fmt: skip
    shaped = replace(log, header=header)
    cut = small / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    out = tmp_path / "out"
    for arguments, options, error, message in (
        (
            (other, log, out),
            {},
            ValueError,
            f"{other}: expected the weights that the log began with",
        ),
        ((base, wrong, out), {}, ValueError, "mark 0 of the log, after 1 steps: expected fingerpr"),
        ((base, log, tmp_path / "mine"), {}, FileExistsError, "holds other files"),
        ((base, log, base), {}, ValueError, "out: expected a directory apart from the base"),
        ((base, log, tmp_path), {}, ValueError, "out: expected a directory apart from the base"),
        ((base, log, base / "out"), {}, ValueError, "out: expected a directory outside the base"),
        ((tmp_path / "empty", log, out), {}, FileNotFoundError, "with model.safetensors or"),
        ((small, log, out), {}, ValueError, "bytes by its header, got"),
        ((base, shaped, out), {}, ValueError, r"embed_tokens.weight': expected shape \(64, 16\)"),
        ((base, log, out), {"stop": 6}, ValueError, "steps: expected an int from 0 to 5"),
        ((base, log, out), {"chunk": 0}, ValueError, "chunk: expected at least 1"),
        ((base, log, out), {"backend": "magic"}, ValueError, "backend: expected None or one of"),
    ):
        with pytest.raises(error, match=message):
            replay_directory(*arguments, **options)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, message
    bare = replace(log.header.groups[0][0], name="model.layers.7.extra.weight")
    extra = replace(log, header=replace(log.header, groups=((bare,), log.header.groups[1])))
    with pytest.raises(ValueError, match=r"'model.layers.7.extra.weight': expected this parameter"):
        replay_directory(qwen, extra, out)
    assert not out.exists()
    # An earlier output is kept when the next one fails.
    replay_directory(base, log, out)
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(shutil, "copyfile", lambda *_: os.open("/nowhere/x", os.O_RDONLY))
    with pytest.raises(FileNotFoundError):
        replay_directory(base, log, out, stop=1)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_verify(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    log = log_of(tmp_path / "log", model)
    replay_directory(base, log, tmp_path / "out")
    replay_directory(base, log, tmp_path / "early", stop=4)
    checks = verify(base, log, model=tmp_path / "out")
    assert [(c.steps, c.ok) for c in checks] == [(2, True), (5, True), (5, True)]
    checks = verify(base, log, model=tmp_path / "early")
    assert [(c.steps, c.ok) for c in checks] == [(2, True), (5, True), (5, False)]
    bad = write(tmp_path / "bad", log.header, steps_of(5, queries=2, groups=2),
                {2: log.marks[0].fingerprint, 5: log.marks[1].fingerprint})  # fmt: skip
    checks = verify(base, read_log(bad))  # its step 3 was not skipped
    assert [(c.steps, c.ok) for c in checks] == [(2, True), (5, False)]
    with pytest.raises(ValueError, match="the log of another model"):
        verify(tmp_path / "out", log)


MEMORY = """
import re, sys
from pathlib import Path
from zo_kernels.replay import read_log, weights
from zo_kernels.replay.directory import replay_directory
def peak():  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
weights.PIECE, folder = int(sys.argv[2]), Path(sys.argv[1])
replay_directory(folder / "small", read_log(folder / "small.log"), folder / "x")
before = peak()
replay_directory(folder / "large", read_log(folder / "large.log"), folder / "y")
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status")
def test_memory_is_that_of_a_piece(tmp_path):
    """120 MB of weights, a tensor of 64 MB among them, take a few MB more than 4 MB of weights."""
    for name, sizes in (("small", [1 << 20] * 2), ("large", [1 << 21] * 14 + [1 << 25])):
        tensors = {f"layer{i}.weight": torch.ones(n).bfloat16() for i, n in enumerate(sizes)}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        write(tmp_path / f"{name}.log", header_of([tensors]), steps_of(1))
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 120e6
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    grown = []
    for piece in (1 << 20, 1 << 25):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), str(piece)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout) * 1024)
        shutil.rmtree(tmp_path / "y")
        shutil.rmtree(tmp_path / "x")
    # Pieces of 2 MB; and, to see that this would show, the whole embedding at once.
    assert grown[0] < 24e6 and grown[1] > 60e6
