"""zk.perturbed_activations and zk.quantized_activations: the right noise, fresh, and gone after."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_views import bits, same_bits, tiny_llama
from torch import nn

import zo_kernels as zk
from zo_kernels.activations import sequences
from zo_kernels.blocks import decoder_blocks
from zo_kernels.noise import EVAL_ACTIVATION_NOISE, assign_streams

IDS = torch.arange(12).view(2, 6)
NOISE = {"alpha": 0.1, "seed": 7}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def outputs(model: nn.Module, name: str, forwards: int = 1) -> list[torch.Tensor]:
    """What comes out of a block, ahead of the contexts' hooks entered later."""
    seen: list[torch.Tensor] = []

    def keep(module, arguments, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    hook = decoder_blocks(model)[name].register_forward_hook(keep)
    with torch.no_grad():
        for _ in range(forwards):
            model(IDS)
    hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_noise_of_the_first_block(dtype) -> None:
    """h + alpha * std * z at the stated address, fresh in the second forward."""
    model, name = tiny_llama(dtype), "model.layers.0"
    (clean,) = outputs(model, name)
    with zk.perturbed_activations(model, **NOISE, draw=3) as names:
        assert names == ["model.layers.0", "model.layers.1"]
        first, second = outputs(model, name, forwards=2)
    exact = clean.float()
    scale = 0.1 * exact.std(dim=-1, correction=0, keepdim=True)
    for forward, got in enumerate((first, second)):
        z = zk.normal(
            clean.numel(),
            seed=7,
            direction=EVAL_ACTIVATION_NOISE + 3,
            stream=assign_streams(names)[name],
            offset=forward << 34,
        )
        assert torch.equal(got, (exact + scale * z.view(clean.shape)).to(dtype))
    assert not torch.equal(first, second)


def test_each_block_and_draw_has_noise_of_its_own() -> None:
    model = tiny_llama()
    with torch.no_grad():
        clean = model(IDS).logits
        found = []
        for options in ({}, {"draw": 1}, {"seed": 8}, {"blocks": ["model.layers.1"]}, {}):
            with zk.perturbed_activations(model, **{**NOISE, **options}):
                found.append(model(IDS).logits)
    assert torch.equal(found[0], found[-1])  # the same calls again
    assert all(not torch.equal(a, b) for a, b in zip(found[:4], [*found[1:4], clean], strict=True))
    (before,) = outputs(model, "model.layers.0")
    with zk.perturbed_activations(model, **NOISE, blocks=["model.layers.1"]):
        (only,) = outputs(model, "model.layers.0")
    assert torch.equal(before, only)


def test_size_of_the_noise() -> None:
    """Measured per token: alpha times that token's own standard deviation."""
    model, name = tiny_llama(), "model.layers.0"
    (clean,) = outputs(model, name)
    ratios = []
    with zk.perturbed_activations(model, **NOISE, blocks=[name]):
        for noisy in outputs(model, name, forwards=40):
            std = clean.std(dim=-1, correction=0, keepdim=True)
            ratios.append((noisy - clean) / std)
    found = torch.stack(ratios)
    assert found.std().item() == pytest.approx(0.1, rel=5 / math.sqrt(2 * found.numel()))
    assert abs(found.mean().item()) < 5 * 0.1 / math.sqrt(found.numel())


def test_alpha_zero_and_tokens_without_spread() -> None:
    model = tiny_llama()
    with torch.no_grad():
        clean = model(IDS).logits
        with zk.perturbed_activations(model, alpha=0.0, seed=1):
            assert torch.equal(model(IDS).logits, clean)


def test_decoding() -> None:
    """The prompt and each decoding step have noise of their own; cached generation runs."""
    model, name = tiny_llama(), "model.layers.0"
    lengths = []

    def keep(module, arguments, output):
        lengths.append((output[0] if isinstance(output, tuple) else output).shape[1])

    options = {"max_new_tokens": 5, "do_sample": False}
    hook = decoder_blocks(model)[name].register_forward_hook(keep)
    with torch.no_grad():
        with zk.perturbed_activations(model, alpha=2.0, seed=1):
            once = model.generate(IDS, **options)
        with zk.perturbed_activations(model, alpha=2.0, seed=1):
            again = model.generate(IDS, **options)
        plain = model.generate(IDS, **options)
    hook.remove()
    assert lengths == [6, 1, 1, 1, 1] * 3
    assert torch.equal(once, again) and not torch.equal(once, plain)


def test_exceptions_take_the_hooks_off() -> None:
    model = tiny_llama()
    before = bits(model)
    with (
        pytest.raises(KeyboardInterrupt),
        zk.perturbed_activations(model, **NOISE),
        zk.quantized_activations(model),
    ):
        assert hooks(model) == 2 + 14
        raise KeyboardInterrupt
    assert hooks(model) == 0 and same_bits(before, bits(model))


def test_quantised_activations() -> None:
    """The first linear's input, one scale per token; W4A4 by nesting."""
    model = tiny_llama()
    linear = model.model.layers[0].self_attn.q_proj
    seen = []
    hook = linear.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        clean = model(IDS).logits
        hook.remove()
        with zk.quantized_activations(model, "int4") as names:
            assert len(names) == 14 and names[0] == "model.layers.0.self_attn.q_proj"
            hook = linear.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
            coarse = model(IDS).logits
            hook.remove()
            with zk.quantized(model, "int4"):
                both = model(IDS).logits
        with zk.quantized_activations(model, "int8"):
            fine = model(IDS).logits
    x = seen[0]
    expected = zk.fake_quant(x.reshape(-1, 32), "int4", group_size="row").view(x.shape)
    assert torch.equal(seen[1], expected) and not torch.equal(x, expected)
    assert not torch.equal(both, coarse)
    assert (fine - clean).norm() < 0.2 * (coarse - clean).norm()
    assert torch.equal(seen[0], x)


def test_errors() -> None:
    model = tiny_llama()
    for bad, message in (
        ({"alpha": -0.1}, "alpha: expected"),
        ({"alpha": math.nan}, "alpha: expected"),
        ({"draw": 1 << 28}, "draw: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"blocks": ["model.layers.7"]}, "blocks: expected names out of"),
    ):
        options = {**NOISE, **bad}
        with pytest.raises(ValueError, match=message), zk.perturbed_activations(model, **options):
            pass
    for bad, message in (
        ({"alpha": "a"}, r"alpha: expected a float, got str \('a'\)"),
        ({"draw": 0.5}, r"draw: expected an int, got float \(0.5\)"),
        ({"seed": True}, r"seed: expected an int, got bool \(True\)"),
    ):
        options = {**NOISE, **bad}
        with pytest.raises(TypeError, match=message), zk.perturbed_activations(model, **options):
            pass
    with pytest.raises(ValueError, match="scheme"), zk.quantized_activations(model, "int9"):
        pass
    with (
        pytest.raises(ValueError, match="backend: expected"),
        zk.quantized_activations(model, backend="cuda"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"input of 'model\.layers\.0\..*': expected finite"),
        torch.no_grad(),
        zk.quantized_activations(model),
    ):
        model(inputs_embeds=torch.full((1, 2, 32), math.nan))
    with (
        pytest.raises(TypeError, match="expected a floating-point tensor"),
        zk.perturbed_activations(model, **NOISE),
    ):
        next(iter(decoder_blocks(model)["model.layers.0"]._forward_hooks.values()))(
            None, (), "text"
        )
    assert hooks(model) == 0


def test_noise_by_sequence_and_position() -> None:
    """Padding, the batch and the cached decoding steps do not change a sequence's noise."""
    model, name = tiny_llama(), "model.layers.0"
    block, seen = decoder_blocks(model)[name], []
    hook = block.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    ids = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad(), zk.perturbed_activations(model, **NOISE, blocks=[name]):
        after = block.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        with sequences([7, 9], [2, 0]):
            cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
            more = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
            model(input_ids=ids[:, :1], attention_mask=more, past_key_values=cache)
        after.remove()
    hook.remove()
    stream, width = assign_streams(list(decoder_blocks(model)))[name], seen[0].shape[-1]
    for clean, noisy, first in ((seen[0], seen[1], 0), (seen[2], seen[3], 5)):
        for row, (number, padding) in enumerate(((7, 2), (9, 0))):
            skipped = max(0, padding - first)
            z = zk.normal(
                (clean.shape[1] - skipped) * width,
                seed=7,
                direction=EVAL_ACTIVATION_NOISE,
                stream=stream,
                offset=((1 << 27) + number << 34) + (first + skipped - padding) * width,
            ).view(-1, width)
            exact = clean[row, skipped:]
            expected = exact + 0.1 * exact.std(dim=-1, correction=0, keepdim=True) * z
            assert torch.equal(noisy[row, skipped:], expected)
            assert torch.equal(noisy[row, :skipped], clean[row, :skipped])


def test_sequences_errors() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="number in 0"), sequences([1 << 27], [0]):
        pass
    with pytest.raises(ValueError, match="for each row"), sequences([1, 2], [0]):
        pass
    with pytest.raises(ValueError, match="no other around"), sequences([1], [0]):
        with sequences([2], [0]):
            pass
    with zk.perturbed_activations(model, **NOISE), sequences([1], [0]):
        with pytest.raises(ValueError, match="expected an output of 1 sequences, as announced"):
            model(IDS)
    with zk.perturbed_activations(model, **NOISE):
        model(IDS)  # the failed one left nothing behind
