"""Replay of a directory: the bits of replay in memory, in little memory, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_logs import header_of, steps_of, write
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels.refine import checkpoint
from zo_kernels.replay import fingerprint, read_log, replay_, weights
from zo_kernels.replay.directory import replay_directory
from zo_kernels.replay.walk import verify
from zo_kernels.replay.weights import WeightFolder

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def saved(path, model, shard="1GB"):
    """The model and its tokenizer in a directory."""
    model.save_pretrained(path, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(path)
    return path


def log_of(
    path, model, *, mode="streamed", chosen=lambda name: True, count=5, mark=True, **options
):
    """A log over a model's parameters in two groups, with a mark in the middle and at the end."""
    named = {n: p.detach() for n, p in model.named_parameters() if chosen(n)}
    names = list(named)
    groups = [{n: named[n] for n in names[0::2]}, {n: named[n] for n in names[1::2]}]
    units = {n: 0.25 + i / 7 for i, n in enumerate(names)}
    header = header_of(groups, units, queries=2, mode=mode, **options)
    steps = steps_of(count, queries=2, groups=2, skip=[3])
    plain = read_log(write(path.with_suffix(".plain"), header, steps))
    marks = {stop: fingerprint(in_memory(model, plain, stop).items()) for stop in (2, count)}
    return read_log(write(path, header, steps, marks if mark else None))


def in_memory(model, log, stop=None):
    """The logged parameters after replay, by name."""
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    replay_(named, log, stop=stop)
    return {p.name: named[p.name] for p in log.header.parameters()}


def tensors_of(path):
    """All tensors of a directory, and the file of each."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {name: (tensor, file.name) for name, tensor in load_file(file).items()}
    return found


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


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


def renamed(path, names):
    """Rename tensors of model.safetensors; a list of names means copies."""
    tensors = load_file(path / "model.safetensors")
    for old, new in names.items():
        tensor = tensors.pop(old)
        tensors |= {name: tensor.clone() for name in new}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]], ids=str)
@pytest.mark.parametrize("tie", [True, None])
def test_tied_weights_under_either_name_or_both(tmp_path, names, tie):
    model = tiny_model("llama_tied", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    renamed(base, {EMBEDDING: names})
    edit_config(base, tie_word_embeddings=tie)
    log = log_of(tmp_path / "log", model)
    replay_directory(base, log, tmp_path / "out")
    expected, after = in_memory(model, log), tensors_of(tmp_path / "out")
    assert set(after) == {*expected} - {EMBEDDING} | {*names}
    for name, (tensor, _) in after.items():
        assert_same(tensor, expected[EMBEDDING if name == HEAD else name])


def test_embedding_and_head_that_differ_are_two(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    log = log_of(tmp_path / "log", model, chosen=lambda n: n == EMBEDDING or "proj" in n)
    for tie in (False, None):
        edit_config(base, tie_word_embeddings=tie)
        replay_directory(base, log, tmp_path / "out")
        after = tensors_of(tmp_path / "out")
        assert_same(after[HEAD][0], model.lm_head.weight.detach())
        assert_same(after[EMBEDDING][0], in_memory(model, log)[EMBEDDING])
    renamed(base, {EMBEDDING: []})
    edit_config(base, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=f"'{EMBEDDING}': expected this parameter of the log, got"):
        replay_directory(base, log, tmp_path / "new")


def test_a_base_model_saved_alone(tmp_path):
    """GPT-2's published files lack the prefix that the model with a head gives."""
    model = tiny_model("gpt2", torch.float16)
    saved(tmp_path / "base", model)
    log = log_of(tmp_path / "log", model)
    before = tensors_of(tmp_path / "base")
    renamed(tmp_path / "base", {n: [n.removeprefix("transformer.")] for n in before})
    replay_directory(tmp_path / "base", log, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    for name, tensor in in_memory(model, log).items():
        assert_same(after[name.removeprefix("transformer.")][0], tensor)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["a"].update(data_offsets=[4, 12]), "'a': expected bytes from"),
        (lambda t: t["a"].update(shape=[3]), "'a': expected bytes from"),
        (lambda t: t["a"].pop("dtype"), "expected the header of a safetensors file"),
        (lambda t: t.pop("a"), "expected bytes from|bytes by its header"),
    ],
)
def test_damaged_safetensors_are_named(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(ValueError, match=message):
        WeightFolder(tmp_path)
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(ValueError, match="got no whole header"):
        WeightFolder(tmp_path)


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
