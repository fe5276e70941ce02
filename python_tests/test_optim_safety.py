"""ZOSGD: which parameters it takes, what it refuses, what it survives, what it remembers."""

from __future__ import annotations

import copy
import math
import signal
import warnings

import pytest
import torch
from tiny_models import bits, closure_of, same_bits, tiny_model

import zo_kernels as zk
from zo_kernels.optim import named_parameters


def test_tied_weights_are_one_parameter():
    model = tiny_model("llama_tied")
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-2)
    optimizer.step(closure_of(model))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    shared = torch.randn(8, 8)
    with pytest.raises(ValueError, match="memory of their own"):
        zk.ZOSGD([("a", torch.nn.Parameter(shared)), ("b", torch.nn.Parameter(shared))])


@pytest.mark.parametrize("bad_call", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_skips_the_step(value, bad_call):
    model = tiny_model("qwen2", torch.bfloat16)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2, queries=2)
    loss, calls = closure_of(model), []

    def closure():
        calls.append(0)
        result = loss()
        return value if len(calls) == bad_call + 1 else result

    with pytest.warns(UserWarning, match="step 0 skipped: non-finite loss"):
        optimizer.step(closure)
    assert same_bits(model, before)
    assert "non-finite" in optimizer.last_step.skipped and optimizer.steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss)
    assert optimizer.last_step.skipped is None and not same_bits(model, before)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("bad_call", [1, 2])
def test_an_exception_leaves_the_weights(error, bad_call):
    model = tiny_model("llama", torch.float16)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2)
    calls = []

    def closure():
        calls.append(0)
        if len(calls) == bad_call:
            raise error
        return closure_of(model)()

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert same_bits(model, before) and optimizer.steps == 0
    assert optimizer.last_step.skipped.startswith(type(error).__name__)


@pytest.mark.parametrize("mode", ["streamed", "inplace", "mezo"])
def test_ctrl_c_during_the_update_leaves_a_step_that_was_taken(mode, monkeypatch, ctrl_c):
    model = tiny_model("llama")
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-2, mode=mode)
    update = optimizer.mode.update

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        update(*args)

    monkeypatch.setattr(optimizer.mode, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model))
    assert optimizer.steps == 1 and not same_bits(model, before)
    assert optimizer.last_step.skipped is None and optimizer.last_step.update_norm > 0


def test_an_exception_in_mezo_mode_undoes_the_perturbation():
    model = tiny_model("llama")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = zk.ZOSGD(model.named_parameters(), eps=1e-1, mode="mezo")
    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, start[name], atol=1e-6)


def test_frozen_parameters_are_left_alone():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-2)
    optimizer.step(closure_of(model))
    after = bits(model)
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name], before[name]) and not same_bits(model, before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        optimizer.step(closure_of(model))


@pytest.mark.parametrize("mode", ["streamed", "mezo"])
def test_state_dict_round_trip_continues_bit_for_bit(mode, tmp_path):
    options = {"lr": 1e-3, "eps": 0.1, "relative_eps": True, "queries": 2, "mode": mode, "seed": 9}
    straight = tiny_model("llama", torch.bfloat16)
    resumed = copy.deepcopy(straight)

    def make(model, **changes):
        optimizer = zk.ZOSGD(model.named_parameters(), **{**options, **changes})
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def go(model, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step(closure_of(model))
            scheduler.step()

    first = make(straight)
    go(straight, *first, 6)
    second = make(resumed)
    go(resumed, *second, 3)
    torch.save([part.state_dict() for part in second], tmp_path / "state.pt")
    torch.save(resumed.state_dict(), tmp_path / "model.pt")
    third_model = tiny_model("llama", torch.bfloat16, seed=5)
    third_model.load_state_dict(torch.load(tmp_path / "model.pt"))
    third = make(third_model, seed=1, lr=5.0)
    for part, state in zip(third, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    go(third_model, *third, 3)
    assert same_bits(third_model, bits(straight)) and third[0].steps == 6


def test_state_dict_of_another_run_is_refused():
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    state = zk.ZOSGD([("a", a)]).state_dict()
    with pytest.raises(ValueError, match="expected streams"):
        zk.ZOSGD([("b", b)]).load_state_dict(state)
    with pytest.raises(ValueError, match="expected mode mezo, got streamed"):
        zk.ZOSGD([("a", a)], mode="mezo").load_state_dict(state)
    state["zo"]["noise_spec"] = 99
    with pytest.raises(ValueError, match="expected noise_spec 1, got 99"):
        zk.ZOSGD([("a", a)]).load_state_dict(state)
    with pytest.raises(ValueError, match="expected a ZOSGD state"):
        zk.ZOSGD([("a", a)]).load_state_dict(torch.optim.SGD([b]).state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected a finite value of at least 0"),
        ({"eps": math.nan}, ValueError, "eps: expected a finite value"),
        ({"eps": "big"}, TypeError, "eps: expected a number, got str"),
        ({"queries": 0}, ValueError, "queries: expected an int of at least 1, got 0"),
        ({"mode": "fast"}, ValueError, "mode: expected one of"),
        ({"seed": -1}, ValueError, "seed: expected an int with 0 <= seed"),
        ({"seed": 2**64}, ValueError, "seed: expected an int with 0 <= seed"),
        ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
        ({"clip_projected_gradient": -1.0}, ValueError, "clip_projected_gradient: expected"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        zk.ZOSGD([("w", torch.nn.Parameter(torch.zeros(3)))], **options)


def test_bad_parameters_are_named():
    plain = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match="expected named parameters"):
        zk.ZOSGD([plain])
    double = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"'w': expected float32, bfloat16 or float16, got torch.f"):
        zk.ZOSGD([("w", double)])
    strided = torch.nn.Parameter(torch.zeros(4, 6).t())
    with pytest.raises(ValueError, match="'w': expected a contiguous tensor"):
        zk.ZOSGD([("w", strided)])
    with pytest.raises(TypeError, match="expected a closure"):
        zk.ZOSGD([("w", plain)]).step()
    with pytest.raises(TypeError, match=r"one-element loss, got a tensor of shape \(3,\)"):
        zk.ZOSGD([("w", plain)]).step(lambda: plain * 1.0)


def test_named_parameters_select_by_pattern():
    model = tiny_model("llama_tied")
    chosen = named_parameters(model, include=["*.mlp.*"], exclude=["*.1.*"])
    assert [name for name, _ in chosen] == [
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    ]
    with pytest.raises(ValueError, match=r"pattern '\*\.nothing' matches no parameter"):
        named_parameters(model, include=["*.nothing"])
