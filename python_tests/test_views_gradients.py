"""zk.perturbed and zk.quantized under training: which backward passes are refused, and steps."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from tiny_views import tiny_llama
from torch import nn

import zo_kernels as zk
from zo_kernels.blocks import linear_weights
from zo_kernels.noise import model_streams


def test_training_goes_on_outside() -> None:
    model, ids = tiny_llama(), torch.arange(12).view(1, 12)
    with torch.inference_mode(), zk.perturbed(model, sigma=0.1, seed=1):
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in linear_weights(model).values())


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("rounding", [False, True])
def test_a_backward_pass_through_a_changed_copy_is_refused(noise, rounding) -> None:
    """Within the block and after it; forwards go on, and in_place gives the gradients."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    x = torch.linspace(-1.0, 1.0, 32).view(4, 8).requires_grad_()

    def views(**options) -> ExitStack:
        stack, options = ExitStack(), {"parameters": "*.weight", **options}
        if noise:
            stack.enter_context(zk.perturbed(model, sigma=0.5, seed=0, **options))
        if rounding:
            stack.enter_context(zk.quantized(model, "int4", **options))
        return stack

    with views(in_place=True):
        expected = model(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    if not (noise or rounding):
        assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], gradient)
        return
    message = r"'0\.weight': expected no gradient .* torch\.no_grad\(\), .* in_place=True"
    with views():
        losses = [model[:1](x).sum(), model[:1](x).sum()]
        with pytest.raises(RuntimeError, match=message):
            losses[0].backward()
        found = model(x)
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=message):
        losses[1].backward()
    with pytest.raises(RuntimeError, match=r"'2\.weight': expected no gradient"):
        found.square().sum().backward()
    assert x.grad is None
    with torch.no_grad(), views():
        assert torch.equal(model(x), expected)


def test_a_backward_pass_over_an_end_of_a_block_in_place_is_refused() -> None:
    """Of what was computed before it too; torch says that the weights were modified."""
    model, x = nn.Linear(4, 4), torch.linspace(-1.0, 1.0, 8).view(2, 4).requires_grad_()
    options, message = {"parameters": "weight", "in_place": True}, "modified by an inplace op"
    for context in (
        lambda: zk.perturbed(model, sigma=0.5, seed=0, **options),
        lambda: zk.quantized(model, "int2", **options),
    ):
        outside = model(x).sum()
        with context():
            with pytest.raises(RuntimeError, match=message):
                outside.backward()
            inside = model(x).sum()
            with context():
                pass
            with pytest.raises(RuntimeError, match=message):
                inside.backward()
            inside = model(x).sum()
            inside.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=message):
            inside.backward()


@pytest.mark.parametrize("mode", ["streamed", "dual", "inplace"])
def test_a_step_through_the_quantizer(mode) -> None:
    """Contexts within the closure see the perturbed weights; around a streamed step is refused."""
    model, ids = tiny_llama(), torch.arange(12).view(1, 12)

    def loss():
        with torch.no_grad(), zk.quantized(model, "int4"):
            return model(input_ids=ids, labels=ids).loss

    optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=0.05, seed=3, mode=mode)
    optimizer.step(loss)
    record = optimizer.last_step
    found = []
    streams = model_streams(model)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])
                zk.perturb_([p], sign * 0.05, seed=3, direction=0, streams=[streams[name]])
        found.append(float(loss()))
    assert [record.losses_plus[0], record.losses_minus[0]] == found
    if mode != "inplace":
        with (
            pytest.raises(RuntimeError, match="expected a step outside of zk"),
            zk.quantized(model, "int4"),
        ):
            optimizer.step(loss)
