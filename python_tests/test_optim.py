"""ZOSGD: the arithmetic of a step."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import bits, closure_of, same_bits, tiny_model

import zo_kernels as zk
from zo_kernels.moments import standard_deviation
from zo_kernels.noise import stream_id


def quadratic(size=400, dtype=torch.float32, seed=0):
    """l = |w - t|^2 / 2 in float64, as a closure, and w."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
    target = torch.randn(size, generator=generator).double()
    return weight, lambda: ((weight * 1.0).double() - target).square().sum() / 2


@pytest.mark.parametrize("queries", [1, 3])
def test_one_step_is_its_formula(queries):
    """theta - lr / Q sum_q g_q z_q, g from losses at explicitly perturbed weights."""
    weight, loss = quadratic()
    start = weight.detach().clone()
    lr, eps = 1e-3, 1e-2
    optimizer = zk.ZOSGD([("w", weight)], lr=lr, eps=eps, queries=queries, seed=7)
    optimizer.steps = 5
    returned = optimizer.step(loss)
    expected, losses = start.double(), []
    scales = []
    for q in range(queries):
        z = zk.normal(400, seed=7, direction=5 * queries + q, stream=stream_id("w"))
        pair = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight.copy_(start)
                address = {"seed": 7, "direction": 5 * queries + q, "streams": [stream_id("w")]}
                zk.perturb_([weight], sign * eps, **address)
                pair.append(float(loss()))
        g = (pair[0] - pair[1]) / (2 * eps)
        losses += pair
        scales.append(-lr * g / queries)
        expected = expected + scales[-1] * z.double()
    assert optimizer.last_step.directions == [5 * queries + q for q in range(queries)]
    assert returned == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    updated = start.clone()
    zk.combine_(
        [updated], [updated], scales, seed=7, directions=optimizer.last_step.directions,
        streams=[stream_id("w")],
    )  # fmt: skip
    optimizer.steps = 5
    with torch.no_grad():
        weight.copy_(start)
    optimizer.step(loss)
    assert torch.equal(weight, updated)
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_estimator_is_unbiased_with_the_known_variance():
    """E g z = gradient and E |g z|^2 = (d + 2) |gradient|^2 on a linear loss."""
    size, draws = 30, 4000
    gradient = torch.linspace(-1, 1, size).double()
    weight = torch.nn.Parameter(torch.zeros(size))
    optimizer = zk.ZOSGD([("w", weight)], lr=0.0, eps=0.5)
    estimates = []
    for _ in range(draws):
        optimizer.step(lambda: ((weight * 1.0).double() * gradient).sum())
        record = optimizer.last_step
        z = zk.normal(size, seed=0, direction=record.directions[0], stream=stream_id("w"))
        estimates.append(record.projected_gradients[0] * z.double())
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - gradient
    # Each coordinate's variance is |g|^2 + g_i^2; 4.5 standard errors, 30 coordinates.
    spread = ((gradient.square().sum() + gradient.square()) / draws).sqrt()
    assert (error.abs() < 4.5 * spread).all()
    second = estimates.square().sum(1).mean() / gradient.square().sum()
    assert second == pytest.approx(size + 2, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_steps_with_zero_lr_leave_every_bit(dtype):
    model = tiny_model("llama_tied", dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0.0
        model.model.layers[0].mlp.up_proj.weight[1] = -0.0
        model.model.layers[0].mlp.up_proj.weight[2] = torch.finfo(dtype).tiny / 4
    before = bits(model)
    optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=1e-2)
    for _ in range(100):
        optimizer.step(closure_of(model))
    assert same_bits(model, before) and optimizer.steps == 100


def test_the_loss_falls_on_a_model():
    model = tiny_model("llama")
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-3, eps=1e-2)
    losses = [optimizer.step(closure_of(model)) for _ in range(150)]
    assert sum(losses[-20:]) / 20 < losses[0] - 0.3


def test_bfloat16_updates_below_half_an_ulp_arrive():
    """200 steps of 1/50 ulp each: nearest rounding would move nothing."""
    weight = torch.nn.Parameter(torch.full((32768,), 1.0, dtype=torch.bfloat16))
    optimizer = zk.ZOSGD([("w", weight)], lr=1.0, eps=1e-3)
    total = torch.zeros(32768, dtype=torch.float64)
    for _ in range(200):
        z = zk.normal(32768, seed=0, direction=optimizer.steps, stream=stream_id("w"))
        gradients = iter([1e-4 * 1e-3, -1e-4 * 1e-3])
        optimizer.step(lambda g=gradients: next(g) + 0.0 * float(weight.sum()))
        total -= 1e-4 * z.double()
    moved = weight.detach().double() - 1.0
    gain = float((moved * total).sum() / total.square().sum())
    # Rounding noise: each update adds less than ulp^2 / 4, ulp = 2^-7 above and 2^-8 below 1.
    standard_error = math.sqrt(200 * 32768 * total.square().mean() * 2**-7 * 8e-5) / float(
        total.square().sum()
    )
    assert abs(gain - 1) < 4 * standard_error < 0.4


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.bfloat16, 1e-5, 5e-4), (torch.float32, 1e-10, 1e-8)], ids=str
)
def test_mezo_reports_its_drift(dtype, low, high):
    """Measured by others at eps = 1e-3, weights of std 0.02: rms 8e-5 in bfloat16, 1e-9 in fp32."""
    drift = {}
    for mode in ("mezo", "streamed"):
        model = tiny_model("llama", dtype)
        optimizer = zk.ZOSGD(model.named_parameters(), lr=0.0, eps=1e-3, mode=mode)
        optimizer.step(closure_of(model))
        drift[mode] = optimizer.last_step.restore_error
    assert low < drift["mezo"] < high and drift["streamed"] == 0.0


def test_relative_eps_scales_by_each_tensors_deviation():
    generator = torch.Generator().manual_seed(0)
    small = torch.nn.Parameter(torch.randn(500, generator=generator) * 0.01)
    large = torch.nn.Parameter(torch.randn(500, generator=generator) * 10)
    constant = torch.nn.Parameter(torch.ones(20))
    named = [("small", small), ("large", large), ("constant", constant)]
    start = {name: p.detach().clone() for name, p in named}
    optimizer = zk.ZOSGD(named, lr=0.1, eps=0.5, relative_eps=True)
    deltas = []

    def closure():
        deltas.append({name: (p * 1.0) - start[name] for name, p in named})
        return 2.0 - len(deltas)  # 1, then 0: projected gradient 1 / (2 * 0.5) = 1

    optimizer.step(closure)
    for name in ("small", "large"):
        s = standard_deviation(start[name])
        z = zk.normal(500, seed=0, direction=0, stream=stream_id(name))
        assert torch.allclose(deltas[0][name], 0.5 * s * z, rtol=1e-3, atol=1e-6 * s)
        moved = dict(named)[name].detach() - start[name]
        assert torch.allclose(moved, -0.1 * s * z, rtol=1e-3, atol=1e-6 * s)
    assert torch.equal(constant, start["constant"])


def test_update_norm_hits_its_target_and_follows_the_schedule():
    model = tiny_model("llama")
    target = 1e-3
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1.0, eps=1e-2, update_norm=target)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure_of(model))
        scheduler.step()
        moved = sum(
            (a.detach() - b).square().sum() for a, b in zip(model.parameters(), start, strict=True)
        )
        norm = sum(b.square().sum() for b in start)
        ratio = float((moved / norm).sqrt())
        assert ratio == pytest.approx(target * 0.5**step, rel=0.05)
        assert optimizer.last_step.update_ratio == pytest.approx(ratio, rel=0.05)


def test_update_norm_makes_no_step_of_a_rate_of_0():
    """Also where the rate was 0 from the beginning; a rate that it gets later is one."""
    weight, loss = quadratic()
    start = weight.detach().clone()
    optimizer = zk.ZOSGD([("w", weight)], lr=0.0, eps=1e-2, update_norm=1e-2)
    optimizer.step(loss)
    assert torch.equal(weight, start) and optimizer.last_step.lr == [0.0]
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step(loss)
    assert optimizer.last_step.update_ratio == pytest.approx(1e-2, rel=0.3)


def test_weight_decay_and_clipping():
    weight, loss = quadratic()
    start = weight.detach().clone()
    optimizer = zk.ZOSGD(
        [("w", weight)], lr=0.1, eps=1e-2, weight_decay=0.5, clip_projected_gradient=1e-3
    )
    optimizer.step(loss)
    g = optimizer.last_step.projected_gradients[0]
    assert abs(g) == 1e-3
    z = zk.normal(400, seed=0, direction=0, stream=stream_id("w"))
    assert torch.allclose(weight, start * 0.95 - 0.1 * g * z, atol=1e-6)


def test_param_groups_have_their_own_lr_and_eps():
    a, b = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    optimizer = zk.ZOSGD(
        [
            {"params": [("a", a)], "lr": 0.1, "eps": 0.5},
            {"params": [("b", b)], "eps": 0.25},
        ],
        lr=0.0,
    )
    seen = []

    def closure():
        seen.append(((a * 1.0).std().item(), (b * 1.0).std().item()))
        return 2.0 - len(seen)

    optimizer.step(closure)
    assert seen[0][0] == pytest.approx(0.5, rel=0.15)
    assert seen[0][1] == pytest.approx(0.25, rel=0.15)
    assert a.detach().std() == pytest.approx(0.1, rel=0.15)  # lr * g, g = 1 / (2 * 0.5)
    assert torch.equal(b, torch.zeros(300))


def test_losses_that_are_plain_numbers_work():
    """A non-differentiable objective: how many weights are negative."""
    weight = torch.nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.1)
    optimizer = zk.ZOSGD([("w", weight)], lr=1e-4, eps=0.1, queries=4)
    before = int((weight < 0).sum())
    for _ in range(200):
        optimizer.step(lambda: int((weight < 0).sum()))
    assert int((weight < 0).sum()) < before - 20
