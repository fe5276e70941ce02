"""zk.perturbed and zk.quantized in place: the weights themselves change, and come back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_views import bits, read, same_bits, tiny_gpt2, tiny_llama

import zo_kernels as zk
from zo_kernels.blocks import linear_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_in_place(dtype: torch.dtype) -> None:
    """The same weights, where they are, also to what does not go through torch functions."""
    model, ids = tiny_llama(dtype), torch.arange(12).view(1, 12)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :9] = -0.0
    before = bits(model)
    with torch.no_grad():
        with zk.perturbed(model, sigma=0.5, seed=1, draw=2):
            noisy, read_as = model(ids).logits, read(model)
        with zk.perturbed(model, sigma=0.5, seed=1, draw=2, in_place=True) as stds:
            assert len(stds) == 14 and same_bits(bits(model), read_as)
            assert torch.equal(model(ids).logits, noisy)
            with zk.quantized(model, "int4"):
                coarse = read(model)
        assert same_bits(before, bits(model))
        with zk.perturbed(model, sigma=0.5, seed=1, draw=2), zk.quantized(model, "int4"):
            assert same_bits(coarse, read(model))
    with (
        pytest.raises(KeyboardInterrupt),
        zk.perturbed(model, sigma=0.5, seed=1, in_place=True),
    ):
        raise KeyboardInterrupt
    assert same_bits(before, bits(model))
    with (
        pytest.raises(RuntimeError, match="in_place: expected False within another"),
        zk.quantized(model, "int4"),
        zk.perturbed(model, sigma=0.5, seed=1, in_place=True),
    ):
        pass
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_in_place(dtype: torch.dtype) -> None:
    """The same weights, where they are; as before after the block, whatever ends it."""
    for model in (tiny_llama(dtype), tiny_gpt2().to(dtype)):
        ids, before = torch.arange(12).view(1, 12), bits(model)
        with torch.no_grad():
            with zk.quantized(model, "int4", group_size=16):
                coarse, read_as = model(ids).logits, read(model)
            with zk.quantized(model, "int4", group_size=16, in_place=True) as names:
                assert names == list(linear_weights(model))
                assert same_bits(bits(model), read_as)
                assert torch.equal(model(ids).logits, coarse)
            assert same_bits(before, bits(model))
        with pytest.raises(KeyboardInterrupt), zk.quantized(model, "int4", in_place=True):
            raise KeyboardInterrupt
        assert same_bits(before, bits(model))
    model = tiny_llama()
    with (
        pytest.raises(RuntimeError, match="in_place: expected False within another"),
        zk.perturbed(model, sigma=0.5, seed=1),
        zk.quantized(model, "int4", in_place=True),
    ):
        pass
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    before = bits(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj"):
        zk.quantized(model, "int4", in_place=True).__enter__()
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("noisy", [False, True], ids=["quantized", "perturbed"])
def test_in_place_in_one_thread_at_a_time(noisy) -> None:
    """A block of another thread is refused, and the weights come back; one thread may nest them."""
    model, ids = tiny_llama(), torch.arange(12).view(1, 12)
    view = zk.quantized(model, "int4", in_place=True)

    def context():
        return zk.perturbed(model, sigma=0.5, seed=1, in_place=True) if noisy else view

    def changed() -> dict[str, torch.Tensor]:
        with context():
            return bits(model)

    before, expected = bits(model), changed()
    with ThreadPoolExecutor(1) as other:
        with context():
            with pytest.raises(RuntimeError, match="in_place: expected no block of another thread"):
                other.submit(changed).result()
            assert same_bits(bits(model), expected)
            with torch.no_grad(), view, context():
                model(ids)
            assert same_bits(bits(model), expected)
        assert same_bits(bits(model), before)
        assert same_bits(other.submit(changed).result(), expected)
    assert same_bits(bits(model), before)
