"""Weight noise and fake quantisation of models: exact restore, the right noise and weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import zo_kernels as zk
from zo_kernels.robustness.perturbations import (
    linear_weights,
    noise_std,
    round_to_nearest,
    weight_noise,
)

transformers = pytest.importorskip("transformers")


def tiny_llama(dtype: torch.dtype = torch.float32, tie: bool = False) -> nn.Module:
    """A two-layer Llama with weights drawn from a generator of its own."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return randomised(transformers.LlamaForCausalLM(config), dtype)


def tiny_gpt2() -> nn.Module:
    """A two-layer GPT-2: Conv1D linears, tied head."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return randomised(transformers.GPT2LMHeadModel(config), torch.float32)


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill the parameters from a local generator, so no test depends on global randomness."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters as raw bytes."""
    return {
        name: p.detach().clone().contiguous().view(torch.uint8)
        for name, p in model.named_parameters()
    }


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of raw bytes are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    with pytest.raises(ValueError, match="no linear weights inside decoder blocks"):
        linear_weights(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no linear weights"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["abs", "rel_std", "rel_norm"])
def test_noise_changes_and_restores(dtype: torch.dtype, kind: str) -> None:
    model = tiny_llama(dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0  # the sign of zero is a bit too
    before = bits(model)
    chosen = set(linear_weights(model))
    with weight_noise(model, sigma=0.1, seed=1, draw=0, kind=kind) as stds:
        during = bits(model)
        assert set(stds) == chosen
    changed = {name for name in before if not torch.equal(before[name], during[name])}
    assert changed == chosen
    assert same_bits(before, bits(model))


def test_noise_restores_after_exception() -> None:
    model = tiny_llama()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), weight_noise(model, sigma=1.0, seed=1, draw=0):
        assert not same_bits(before, bits(model))
        raise KeyboardInterrupt
    assert same_bits(before, bits(model))
    with pytest.raises(RuntimeError, match="body"), round_to_nearest(model, bits=3):
        assert not same_bits(before, bits(model))
        raise RuntimeError("body")
    assert same_bits(before, bits(model))


def test_noise_leaves_training_possible() -> None:
    model = tiny_llama()
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode(), weight_noise(model, sigma=0.1, seed=1, draw=0):
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in linear_weights(model).values())


def test_sigma_zero_is_identity() -> None:
    model = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0
    before = bits(model)
    with weight_noise(model, sigma=0.0, seed=1, draw=0) as stds:
        assert same_bits(before, bits(model))
    assert set(stds.values()) == {0.0}


def test_noise_is_addressed() -> None:
    model = tiny_llama()

    def sample(seed: int, draw: int) -> dict[str, torch.Tensor]:
        with weight_noise(model, sigma=0.1, seed=seed, draw=draw):
            return bits(model)

    first = sample(1, 0)
    assert same_bits(first, sample(1, 0))
    assert not same_bits(first, sample(1, 1))
    assert not same_bits(first, sample(2, 0))
    # Equal shapes in two layers must not get equal noise.
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    with weight_noise(model, sigma=0.1, seed=1, draw=0):
        a, b = (layer.mlp.up_proj.weight for layer in model.model.layers)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", ["abs", "rel_std", "rel_norm"])
def test_noise_size_measured(kind: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)  # std and rms now differ a lot
    before = {name: p.detach().double() for name, p in linear_weights(model).items()}
    before = {name: value.clone() for name, value in before.items()}
    sigma, ratios = 0.2, []
    with weight_noise(model, sigma=sigma, seed=3, draw=7, kind=kind):
        for name, parameter in linear_weights(model).items():
            noise = parameter.detach().double() - before[name]
            wanted = {
                "abs": sigma,
                "rel_std": sigma * before[name].std(correction=0).item(),
                "rel_norm": sigma * before[name].norm().item() / math.sqrt(noise.numel()),
            }[kind]
            # Five standard errors of a sample std and of a sample mean.
            assert noise.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * noise.numel()))
            assert abs(noise.mean().item()) < 5 * wanted / math.sqrt(noise.numel())
            ratios.append(noise.std().item() / wanted)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.03)


def test_noise_std_formulas() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert noise_std(weight, sigma=0.5, kind="abs") == 0.5
    assert noise_std(weight, sigma=0.5, kind="rel_std") == pytest.approx(0.5 * math.sqrt(3.5))
    assert noise_std(weight, sigma=0.5, kind="rel_norm") == pytest.approx(0.5 * math.sqrt(12.5))


def test_noise_errors() -> None:
    model = tiny_llama()
    before = bits(model)
    good = {"sigma": 0.1, "seed": 0, "draw": 0}
    for bad, message in (
        ({"kind": "relative"}, "noise kind"),
        ({"sigma": -0.1}, "sigma >= 0"),
        ({"sigma": math.nan}, "sigma >= 0"),
        ({"draw": 1 << 28}, "draw"),
        ({"draw": -1}, "draw"),
        ({"seed": 1 << 64}, "seed"),
        ({"parameters": {"no.such": model.lm_head.weight}}, r"no\.such"),
    ):
        with pytest.raises(ValueError, match=message), weight_noise(model, **(good | bad)):
            pass
    assert same_bits(before, bits(model))
    integers = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with (
        pytest.raises(TypeError, match="int8"),
        weight_noise(model, parameters={"lm_head.weight": integers}, **good),
    ):
        pass
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = math.nan
    with (
        pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight"),
        weight_noise(model, **good),
    ):
        pass


def test_round_to_nearest_errors() -> None:
    """The errors of zk.fake_quant, naming the parameter; the weights are as they were."""
    model = tiny_llama()
    before = bits(model)
    for bad, message in (
        ({"bits": 1}, "scheme: expected one of .*, got 'int1'"),
        ({"bits": 4, "group_size": 5}, r"a divisor of 32, the in dimension of model\.layers\.0\."),
    ):
        with pytest.raises(ValueError, match=message), round_to_nearest(model, **bad):
            pass
        assert same_bits(before, bits(model))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 2] = math.nan
    before = bits(model)
    message = r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite values"
    with pytest.raises(ValueError, match=message), round_to_nearest(model, bits=4):
        pass
    assert same_bits(before, bits(model))


def test_round_to_nearest_on_models() -> None:
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    for model, flip in ((llama, False), (gpt2, True)):
        before = bits(model)
        weights = {name: p.detach().clone() for name, p in linear_weights(model).items()}
        with round_to_nearest(model, bits=4, group_size=16):
            for name, parameter in linear_weights(model).items():
                old = weights[name].t() if flip else weights[name]
                want = zk.fake_quant(old.contiguous(), "int4", group_size=16)
                assert torch.equal(parameter.t() if flip else parameter, want), name
                assert not torch.equal(parameter, weights[name])
        assert same_bits(before, bits(model))
