"""zk.perturbed and zk.quantized: what weights read as, and that they stay as they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_views import bits, read, same_bits, tiny_gpt2, tiny_llama
from torch import nn

import zo_kernels as zk
from zo_kernels.blocks import linear_weights
from zo_kernels.modes.reads import untouched
from zo_kernels.noise import EVAL_WEIGHT_NOISE, model_streams
from zo_kernels.views import noise_std


def test_nothing_is_written() -> None:
    """Forwards under noise and quantisation give other logits; every bit is as it was."""
    model, ids = tiny_llama(torch.bfloat16), torch.arange(12).view(1, 12)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0  # the sign of zero is a bit too
    before, versions = bits(model), [p._version for p in model.parameters()]
    with torch.no_grad():
        clean = model(ids).logits
        with zk.perturbed(model, sigma=0.1, seed=1):
            noisy = model(ids).logits
        with zk.quantized(model, "int3"):
            coarse = model(ids).logits
        again = model(ids).logits
    assert torch.equal(clean, again)
    assert not torch.equal(clean, noisy) and not torch.equal(clean, coarse)
    assert same_bits(before, bits(model))
    assert versions == [p._version for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["abs", "rel_std", "rel_norm"])
def test_what_noisy_weights_read_as(dtype: torch.dtype, kind: str) -> None:
    """round(w + s z) of the linear weights, and nothing else changed."""
    model = tiny_llama(dtype)
    before, chosen, streams = read(model), linear_weights(model), model_streams(model)
    with zk.perturbed(model, sigma=0.1, seed=1, draw=5, kind=kind) as stds:
        assert set(stds) == set(chosen)
        during = read(model)
    for name, parameter in model.named_parameters():
        expected = parameter.detach().clone()
        if name in chosen:
            address = {"seed": 1, "direction": EVAL_WEIGHT_NOISE + 5, "streams": [streams[name]]}
            zk.perturb_([expected], stds[name], **address)
            assert not torch.equal(during[name], before[name])
        assert torch.equal(during[name], expected.view(torch.uint8)), name


@pytest.mark.parametrize(
    "scheme, options",
    [
        ("int4", {"group_size": 16}),
        ("int4", {"group_size": 16, "symmetric": False}),
        ("int8", {"group_size": "tensor"}),
        ("nf4", {"group_size": 16, "double_quant": True}),
        ("nvfp4", {}),
    ],
)
def test_what_quantised_weights_read_as(scheme, options) -> None:
    """zk.fake_quant of the linear weights; Conv1D's are stored the other way round."""
    for model, flip in ((tiny_llama(), False), (tiny_gpt2(), True)):
        before, chosen = read(model), linear_weights(model)
        with zk.quantized(model, scheme, **options) as names:
            assert names == list(chosen)
            during = read(model)
        for name, parameter in model.named_parameters():
            expected = parameter.detach()
            if name in chosen:
                weight = (expected.t() if flip else expected).contiguous()
                rounded = zk.fake_quant(weight, scheme, **options)
                expected = (rounded.t() if flip else rounded).contiguous()
                assert not torch.equal(during[name], before[name])
            assert torch.equal(during[name], expected.contiguous().view(torch.uint8)), name


def test_nested() -> None:
    """Inner contexts change what outer ones give, in both orders; others go side by side."""
    model = tiny_llama()
    name, weight = next(iter(linear_weights(model).items()))
    original = weight.detach().clone()
    stream = model_streams(model)[name]
    address = {"seed": 1, "direction": EVAL_WEIGHT_NOISE, "streams": [stream]}
    noise = {"sigma": 0.1, "seed": 1, "kind": "abs"}
    noisy = original.clone()
    zk.perturb_([noisy], 0.1, **address)
    with zk.perturbed(model, **noise), zk.quantized(model, "int3"):
        assert torch.equal(weight + 0.0, zk.fake_quant(noisy, "int3"))
    expected = zk.fake_quant(original, "int3")
    zk.perturb_([expected], 0.1, **address)
    with zk.quantized(model, "int3"), zk.perturbed(model, **noise):
        assert torch.equal(weight + 0.0, expected)
        assert torch.equal(weight.detach().clone(), expected)
    # The scale of relative noise is that of the weights themselves.
    with zk.quantized(model, "int2"), zk.perturbed(model, sigma=0.1, seed=1) as stds:
        assert stds[name] == noise_std(original, sigma=0.1, kind="rel_std")
        weight + 0.0
    other = model.lm_head.weight
    with (
        zk.quantized(model, "int3", parameters="lm_head.*"),
        zk.perturbed(model, **noise),
    ):
        assert torch.equal(weight + 0.0, noisy)
        assert torch.equal(other + 0.0, zk.fake_quant(other.detach().clone(), "int3"))
        both = torch.cat([weight[:1], other[:1]])
    assert torch.equal(both[0], noisy[0]) and torch.equal(weight.detach(), original)


def test_embeddings_and_rows() -> None:
    """Noise comes row by row where rows are looked up; groups that span rows come whole."""
    model, ids = tiny_llama(tie=True), torch.tensor([[3, 1, 3]])
    table = model.model.embed_tokens
    for context in (
        lambda: zk.perturbed(model, sigma=0.1, seed=1, parameters="*embed_tokens*"),
        lambda: zk.quantized(model, "int4", group_size="tensor", parameters="*embed_tokens*"),
        lambda: zk.quantized(model, "nvfp4", parameters="*embed_tokens*"),
    ):
        with torch.no_grad(), context():
            whole, looked_up, row = table.weight + 0.0, table(ids), table.weight[3]
        assert torch.equal(looked_up, whole[ids]) and torch.equal(row, whole[3])
        assert not torch.equal(whole, table.weight)


def test_generation_under_noise() -> None:
    """Cached decoding reads the same weights at every step."""
    model = tiny_llama()
    prompt, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), zk.perturbed(model, sigma=0.3, seed=1):
        cached = model.generate(prompt, use_cache=True, **options)
        plain = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_exceptions_end_the_context() -> None:
    model = tiny_llama()
    before, weight = bits(model), next(iter(linear_weights(model).values()))
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), zk.perturbed(model, sigma=1.0, seed=1):
            with zk.quantized(model, "int3"):
                weight + 0.0
                raise error
        assert same_bits(before, read(model)) and same_bits(before, bits(model))
    with zk.perturbed(model, sigma=0.1, seed=1):  # and the next one works
        assert not same_bits(before, read(model))


def test_selection() -> None:
    model = tiny_llama()
    with zk.quantized(model, "int4", parameters=["*.mlp.up_proj.*", "lm_head.weight"]) as names:
        assert len(names) == 3 and names[-1] == "lm_head.weight"
        model.lm_head.weight + 0.0
    with zk.perturbed(model, sigma=0.1, seed=0, parameters="*") as stds:
        assert len(stds) == len(list(model.parameters()))
        norm = model.model.norm.weight
        assert not torch.equal(norm + 0.0, untouched(norm))


def test_what_selects_no_parameters_is_refused() -> None:
    """By both views, before anything is looked at."""
    model = tiny_llama()
    for parameters, error, message in (
        ([], ValueError, r"parameters: expected at least one name or pattern, got \[\]"),
        ({}, ValueError, r"parameters: expected at least one name or pattern, got \{\}"),
        (3, TypeError, r"parameters: expected None, a mapping, .*, got int \(3\)"),
        (["*", 3], TypeError, r"parameters: expected patterns as str, got 3"),
    ):
        with (
            pytest.raises(error, match=message),
            zk.perturbed(model, sigma=0.1, seed=0, parameters=parameters),
        ):
            pass
        with pytest.raises(error, match=message):
            zk.quantized(model, "int4", parameters=parameters)


def test_sigma_zero_is_identity() -> None:
    model = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0
    before = bits(model)
    with zk.perturbed(model, sigma=0.0, seed=1) as stds:
        assert same_bits(before, bits(model))
    assert set(stds.values()) == {0.0}


def test_noise_is_addressed() -> None:
    model = tiny_llama()

    def sample(seed: int, draw: int) -> dict[str, torch.Tensor]:
        with zk.perturbed(model, sigma=0.1, seed=seed, draw=draw):
            return read(model)

    first = sample(1, 0)
    assert same_bits(first, sample(1, 0))
    assert not same_bits(first, sample(1, 1))
    assert not same_bits(first, sample(2, 0))
    # Equal shapes in two layers must not get equal noise.
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    with zk.perturbed(model, sigma=0.1, seed=1):
        a, b = (layer.mlp.up_proj.weight + 0.0 for layer in model.model.layers)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("kind", ["abs", "rel_std", "rel_norm"])
def test_noise_size_measured(kind: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.3)  # std and rms now differ a lot
    before = {name: p.detach().double() for name, p in linear_weights(model).items()}
    sigma, ratios = 0.2, []
    with zk.perturbed(model, sigma=sigma, seed=3, draw=7, kind=kind):
        for name, parameter in linear_weights(model).items():
            noise = parameter.double() - before[name]
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
        ({"kind": "relative"}, r"kind: expected one of \('abs', .*, got 'relative'"),
        ({"sigma": -0.1}, "sigma: expected a finite number >= 0, got -0.1"),
        ({"sigma": math.nan}, "sigma: expected a finite float32 value, got nan"),
        ({"draw": 1 << 28}, "draw: expected"),
        ({"draw": -1}, "draw: expected"),
        ({"seed": 1 << 64}, "seed: expected"),
        ({"parameters": {"no.such": model.lm_head.weight}}, r"parameters: expected .*no\.such"),
        ({"parameters": "*.experts.*"}, r"got '\*\.experts\.\*', which matches none"),
    ):
        with pytest.raises(ValueError, match=message), zk.perturbed(model, **(good | bad)):
            pass
    for bad, message in (
        ({"sigma": "a"}, r"sigma: expected a float, got str \('a'\)"),
        ({"draw": 0.5}, r"draw: expected an int, got float \(0.5\)"),
        ({"seed": 0.5}, r"seed: expected an int, got float \(0.5\)"),
        ({"seed": True}, r"seed: expected an int, got bool \(True\)"),
    ):
        with pytest.raises(TypeError, match=message), zk.perturbed(model, **(good | bad)):
            pass
    assert same_bits(before, bits(model))
    integers = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with (
        pytest.raises(TypeError, match="int8"),
        zk.perturbed(model, parameters={"lm_head.weight": integers}, **good),
    ):
        pass
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = math.nan
    with (
        pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight"),
        zk.perturbed(model, **good),
    ):
        pass


def test_quantized_errors() -> None:
    """The errors of zk.fake_quant, naming the parameter, before the block is entered."""
    model = tiny_llama()
    before = bits(model)
    for arguments, message in (
        ({"scheme": "int1"}, "scheme: expected one of .*, got 'int1'"),
        (
            {"scheme": "int4", "group_size": 5},
            r"a divisor of 32, the in dimension of model\.layers\.0\.",
        ),
        ({"scheme": "int4", "parameters": "*norm*"}, "expected a weight of two dimensions or more"),
    ):
        entered = False
        with pytest.raises(ValueError, match=message), zk.quantized(model, **arguments):
            entered = True
        assert not entered
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[2, 2] = math.nan
    message = r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite values"
    with pytest.raises(ValueError, match=message), zk.quantized(model, "int4"):
        pass
    after = bits(model)
    del before["model.layers.1.mlp.down_proj.weight"], after["model.layers.1.mlp.down_proj.weight"]
    assert same_bits(before, after)


def test_a_block_that_reads_nothing_is_an_error() -> None:
    """Such as one around a compiled model, or another model."""
    model, other = tiny_llama(), tiny_gpt2()
    ids = torch.arange(4).view(1, 4)
    for what in (
        lambda: zk.perturbed(model, sigma=0.1, seed=0),
        lambda: zk.quantized(model, "int4"),
    ):
        with pytest.raises(RuntimeError, match="no torch function read one of them"), what():
            other(ids)
    weight = next(iter(linear_weights(model).values()))
    with (
        pytest.raises(RuntimeError, match="takes the address of"),
        zk.quantized(model, "int4"),
    ):
        weight.data_ptr()
