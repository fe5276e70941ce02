"""Tiny models in directories, and logs over them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from tiny_logs import header_of, steps_of, write
from tiny_models import tiny_tokenizer

from zo_kernels.replay import fingerprint, read_log, replay_

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
