"""Which modules are decoder blocks, and which weights their linears have."""

from __future__ import annotations

import pytest
from tiny_views import tiny_gpt2, tiny_llama
from torch import nn

from zo_kernels.blocks import decoder_blocks, linear_weights


def test_decoder_blocks() -> None:
    assert list(decoder_blocks(tiny_llama())) == ["model.layers.0", "model.layers.1"]
    assert list(decoder_blocks(tiny_gpt2())) == ["transformer.h.0", "transformer.h.1"]
    model = tiny_llama()
    experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    model.model.layers[0].experts = experts  # lists within a block are no lists of blocks
    assert list(decoder_blocks(model)) == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ValueError, match="no decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("tie", [False, True])
def test_linear_weights_llama(tie: bool) -> None:
    names = list(linear_weights(tiny_llama(tie=tie)))
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(names) == 2 * len(projections)
    assert {name.split(".")[-2] for name in names} == set(projections)


def test_linear_weights_gpt2() -> None:
    names = list(linear_weights(tiny_gpt2()))
    assert names == [
        f"transformer.h.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_linear_weights_none_found() -> None:
    with pytest.raises(ValueError, match="no decoder blocks"):
        linear_weights(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no decoder blocks"):
        linear_weights(nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4)])}))


def test_linear_weights_leaves_out_tied_and_embedding() -> None:
    """A linear inside a block that shares the embedding's or the head's weight is left out."""
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    count = len(linear_weights(model))
    mlp.extra = nn.Linear(32, 64, bias=False)
    assert len(linear_weights(model)) == count + 1
    for shared in (model.model.embed_tokens, model.lm_head):
        mlp.extra.weight = shared.weight
        assert len(linear_weights(model)) == count
