"""Tensors of a directory: under which name a logged parameter is found, and damaged files."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_replay import EMBEDDING, HEAD, assert_same, in_memory, log_of, saved, tensors_of

from zo_kernels.replay import replay_directory
from zo_kernels.replay.weights import WeightFolder


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


def test_embedding_and_head_that_are_equal_but_not_tied_are_two(tmp_path):
    model = tiny_model("llama_tied", torch.bfloat16)
    base = saved(tmp_path / "base", model)
    renamed(base, {EMBEDDING: [EMBEDDING, HEAD]})
    edit_config(base, tie_word_embeddings=False)
    log = log_of(tmp_path / "log", model)
    replay_directory(base, log, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert_same(after[HEAD][0], model.lm_head.weight.detach())
    assert_same(after[EMBEDDING][0], in_memory(model, log)[EMBEDDING])


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
