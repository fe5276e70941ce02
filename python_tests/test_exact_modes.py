"""Every mode but mezo: weights come back bit for bit, updates agree, and records say what was."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from helpers import DTYPES, NAMES, assert_same_bits, left_behind, weights
from tiny_models import bits, closure_of, same_bits, tiny_model

import zo_kernels as zk
from zo_kernels import ops
from zo_kernels.modes import MODES
from zo_kernels.noise import stream_id
from zo_kernels.replay.header import ARITHMETICS

EXACT = sorted(name for name, mode in MODES.items() if mode.exact)
ALIKE = sorted(name for name in EXACT if ARITHMETICS[name] == "stochastic")


def test_every_mode_but_mezo_is_exact_and_can_be_replayed():
    assert set(MODES) - set(EXACT) == {"mezo"} and set(ARITHMETICS) == set(EXACT)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("mode", EXACT)
def test_a_thousand_steps_of_zero_lr_leave_every_bit(mode, dtype, distribution):
    """Zeros of both signs, subnormals and the largest finite numbers among them."""
    hard = weights((41, 13), dtype, 1)
    hard[~torch.isfinite(hard)] = torch.finfo(dtype).max
    hard[0] = 0.0
    tensors = {
        "hard": torch.nn.Parameter(hard.clone()),
        "usual": torch.nn.Parameter((0.02 * torch.randn(300)).to(dtype)),
        "one": torch.nn.Parameter(torch.tensor([-0.0], dtype=dtype)),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    optimizer = zk.ZOSGD(
        tensors.items(), lr=0.0, eps=1e-3, mode=mode, distribution=distribution, diagnostics=False
    )

    def closure():
        return sum((t * 1.0).float().clamp(-1, 1).sum() for t in tensors.values())

    gradients = set()
    for _ in range(1000 if distribution == "normal" else 100):
        optimizer.step(closure)
        gradients.update(optimizer.last_step.projected_gradients)
    assert len(gradients) > 10, "nothing was perturbed"
    for name, tensor in tensors.items():
        assert_same_bits(tensor.detach(), before[name], name)


def run(mode, dtype, steps, *, log=None, **options):
    """A tiny model after so many steps on the tiny batch; the optimizer too."""
    model = tiny_model("llama_tied", dtype)
    parameters = list(model.named_parameters())
    groups = [
        {"params": parameters[::2], "weight_decay": 0.1},
        {"params": parameters[1::2], "lr": 2e-3},
    ]
    optimizer = zk.ZOSGD(groups, lr=1e-2, eps=1e-2, mode=mode, seed=3, **options)
    if log is not None:
        optimizer.start_log(log)
    closure = closure_of(model)
    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"queries": 2}, {"relative_eps": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_modes_of_one_arithmetic_are_one_run(dtype, options):
    model, optimizer = run("streamed", dtype, 5, **options)
    expected, record = bits(model), optimizer.last_step
    for mode in set(ALIKE) - {"streamed"}:
        other, its = run(mode, dtype, 5, **options)
        assert same_bits(other, expected), mode
        assert its.last_step == record, mode


@pytest.mark.parametrize("options", [{}, {"queries": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_masters_follow_a_float32_run_from_the_same_losses(dtype, options):
    """The weights of master are the rounding of what float32 arithmetic makes of its log."""
    model, optimizer = run("master", dtype, 5, **options)
    for name, master in optimizer.mode.state().items():
        tensor = dict(model.named_parameters())[name].detach()
        assert master.dtype == torch.float32 and not torch.equal(master.to(dtype).float(), master)
        assert_same_bits(tensor, master.to(dtype), name)
    model, optimizer = run("master8", dtype, 5, **options)
    residuals = optimizer.mode.state()
    assert all(residuals[name].any() for name, p in model.named_parameters() if p.dim() == 2)


@pytest.mark.parametrize("mode", ["master", "master8"])
def test_weights_written_by_others_are_refused(mode):
    model, optimizer = run(mode, torch.bfloat16, 1)
    closure = closure_of(model)
    with torch.no_grad():
        model.model.norm.weight += 1.0
    before = bits(model)
    with pytest.raises(RuntimeError, match=rf"mode '{mode}': expected 'model.norm.weight' as its"):
        optimizer.step(closure)
    assert same_bits(model, before)


@pytest.mark.parametrize("mode", ["master", "master8"])
def test_an_evaluation_in_place_between_two_steps_changes_nothing(mode):
    """It gives the weights back, so they count as not written."""
    model, _ = run(mode, torch.bfloat16, 3)
    expected = bits(model)
    model, optimizer = run(mode, torch.bfloat16, 1)
    for _ in range(2):
        with zk.perturbed(model, sigma=0.5, seed=1, in_place=True):
            with zk.quantized(model, "int4", in_place=True):
                pass
        with zk.quantized(model, "int4", in_place=True):
            pass
        optimizer.step(closure_of(model))
    assert same_bits(model, expected)
    with zk.perturbed(model, sigma=0.5, seed=1, in_place=True):
        pass
    with torch.no_grad():
        model.model.norm.weight += 1.0
    with pytest.raises(RuntimeError, match=rf"mode '{mode}': expected 'model.norm.weight' as its"):
        optimizer.step(closure_of(model))


@pytest.mark.parametrize("mode", ["master", "master8"])
def test_state_beside_the_weights_is_saved_and_loaded(mode, tmp_path):
    model, _ = run(mode, torch.bfloat16, 6)
    expected = bits(model)
    model, optimizer = run(mode, torch.bfloat16, 3)
    torch.save({"model": model.state_dict(), "zo": optimizer.state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt")
    other, fresh = run(mode, torch.bfloat16, 0)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["zo"])
    closure = closure_of(other)
    for _ in range(3):
        fresh.step(closure)
    assert same_bits(other, expected)
    broken = saved["zo"]
    broken["zo"]["held"]["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"mode '{mode}', state of 'model.norm.weight': expected"):
        run(mode, torch.bfloat16, 0)[1].load_state_dict(broken)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("bad_call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_exception_at_any_evaluation(mode, bad_call, error):
    model = tiny_model("llama", torch.bfloat16)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2, mode=mode, queries=2)
    loss, lock, calls = closure_of(model), threading.Lock(), []

    def closure():
        with lock:
            calls.append(0)
            bad = len(calls) == bad_call
        result = loss()
        if bad:
            raise error
        return result

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert same_bits(model, before)
    assert optimizer.steps == 0 and type(error).__name__ in optimizer.last_step.skipped
    optimizer.step(loss)
    assert not same_bits(model, before) and not left_behind()


@pytest.mark.parametrize("mode", ["snapshot", "master"])
def test_memory_that_ends_while_weights_are_perturbed(mode, monkeypatch):
    """As where tensors of a second dtype or device come to it."""
    model = tiny_model("llama", torch.bfloat16)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-2, eps=1e-1, mode=mode)
    original = ops.combine_

    def combine_(dst, src, scales, *, streams, **options):
        original(dst[:2], src[:2], scales[:2], streams=streams[:2], **options)
        assert not same_bits(model, before)
        raise MemoryError("none left")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="none left"):
        patch.setattr(ops, "combine_", combine_)
        optimizer.step(closure_of(model))
    assert same_bits(model, before) and optimizer.steps == 0
    optimizer.step(closure_of(model))
    assert optimizer.steps == 1 and not same_bits(model, before)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("bad_call", [1, 2])
def test_a_non_finite_loss_at_any_evaluation(mode, bad_call):
    model = tiny_model("llama", torch.float16)
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2, mode=mode)
    loss, calls = closure_of(model), []

    def closure():
        calls.append(0)
        number = len(calls)
        result = loss()
        return math.nan if number == bad_call else result

    with pytest.warns(UserWarning, match="step 0 skipped: non-finite loss in query 0"):
        optimizer.step(closure)
    assert same_bits(model, before) and optimizer.steps == 1
    assert optimizer.last_step.update_norm is None


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_records_say_what_happened_to_the_weights(mode, dtype):
    model, optimizer = run(mode, dtype, 1)
    named = dict(model.named_parameters())
    kept = optimizer.mode.state() if mode == "master" else {}
    before = {n: kept.get(n, p).detach().clone().double() for n, p in named.items()}
    norm = math.sqrt(sum(p.detach().double().square().sum() for p in named.values()))
    optimizer.step(closure_of(model))
    kept = optimizer.mode.state() if mode == "master" else {}
    record = optimizer.last_step
    moved = [kept.get(n, p).detach().double() - before[n] for n, p in named.items()]
    length = math.sqrt(sum(d.square().sum() for d in moved))
    if mode != "master8":  # whose residuals move too
        assert record.update_norm == pytest.approx(length, rel=1e-4)
        still = sum((d == 0).sum().item() for d in moved) / sum(d.numel() for d in moved)
        assert record.lost <= still + 1e-9 and (dtype == torch.float32 or record.lost > 0 or kept)
    assert record.update_ratio == pytest.approx(record.update_norm / norm, rel=0.02)
    tolerance = 1e-4 if ARITHMETICS[mode] != "stochastic" or dtype == torch.float32 else 0.5
    assert record.intended_norm == pytest.approx(record.update_norm, rel=tolerance)
    assert record.restore_error == 0.0 and record.gradient_std > 0


@pytest.mark.parametrize("mode", EXACT)
def test_the_update_follows_the_z_that_was_applied(mode):
    """Their cosine is 1: both are the same bits of z, seen in float32 through no rounding."""
    w = torch.nn.Parameter(torch.zeros(5000))
    seen = []

    def closure():
        seen.append((w * 1.0).detach().clone())
        return seen[-1].sum()

    optimizer = zk.ZOSGD([("w", w)], lr=0.5, eps=1.0, mode=mode)
    optimizer.step(closure)
    z = zk.normal(5000, seed=0, direction=0, stream=stream_id("w"))
    plus, minus = sorted(seen, key=lambda t: not torch.equal(t, z))
    assert torch.equal(plus, z) and torch.equal(minus, -z)
    scale = -0.5 * optimizer.last_step.projected_gradients[0]
    assert torch.equal(w.detach(), torch.tensor(scale, dtype=torch.float32) * z)


def test_inplace_weights_stay_where_they_are():
    model = tiny_model("llama", torch.bfloat16)
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-3, eps=1e-2, mode="inplace")
    closure, seen = closure_of(model), set()

    def spy():
        seen.add(tuple(p.data_ptr() for p in model.parameters()))
        return closure()

    optimizer.step(spy)
    assert seen == {tuple(addresses)}


@pytest.mark.parametrize("mode", ["inplace", "snapshot", "master"])
def test_compiled_models_see_the_perturbed_weights(mode):
    """Where they are in place; streamed refuses such a model, whose functions it does not see."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 8)
    losses = []
    for name, called in (("streamed", model), (mode, compiled)):
        optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=0.1, mode=name)
        optimizer.step(lambda called=called: called(x).square().mean())
        losses.append(optimizer.last_step.losses_plus + optimizer.last_step.losses_minus)
    assert losses[0] == losses[1]
