"""What zeroth-order noise measures and does: gradients, curvature, and the way to flat minima.

Statistics are compared within 4 of their standard errors, which each test states.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import zo_kernels as zk
from zo_kernels import noise
from zo_kernels.chat import Encoded, batch_stream
from zo_kernels.modes import Slot
from zo_kernels.refine.curvature import mean_noise, measure_curvature

EPS = 0.1


def bowl(size=48, flat=False):
    """A parameter with its name's slot, a quadratic loss in float64, curvatures and gradient."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.nn.Parameter(torch.randn(size, generator=generator))
    curvature = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
    curvature *= not flat
    slope = torch.randn(size, generator=generator, dtype=torch.float64)
    slot = Slot("w", weight, zk.stream_id("w"))

    def loss():
        w = weight.double()
        return float(((0.5 * curvature * w + slope) * w).sum().detach())

    return slot, loss, curvature, curvature * weight.detach().double() + slope


@pytest.mark.parametrize("flat", [True, False], ids=["linear", "quadratic"])
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("mode", ["streamed", "inplace"])
def test_the_two_point_estimator(mode, distribution, flat):
    """E = g, and E |estimate - g|^2 = (d + 1) |g|^2 of normals, (d - 1) |g|^2 of signs.

    From ZOSGD's own projected gradients along its own noise, of K directions in one step, and the
    mean of them from the step that it takes. Standard errors: sqrt((|g|^2 + g_i^2) / K) of element
    i of the mean (at most), and that of the sample for the square.
    """
    slot, loss, _, gradient = bowl(flat=flat)
    size, count = len(gradient), 2000
    before = slot.tensor.detach().clone().double()
    optimizer = zk.ZOSGD(
        [("w", slot.tensor)], lr=1.0, eps=EPS, queries=count, seed=11, mode=mode,
        distribution=distribution,
    )  # fmt: skip
    optimizer.step(loss)
    record = optimizer.last_step
    assert record.directions == list(range(count))
    squared = float(gradient.square().sum())
    errors, total = [], torch.zeros_like(gradient)
    for direction, slope in zip(record.directions, record.projected_gradients, strict=True):
        z = torch.zeros(size)
        zk.perturb_(
            [z], 1.0, seed=11, direction=direction, streams=[slot.stream],
            distribution=distribution,
        )  # fmt: skip
        estimate = slope * z.double()
        total += estimate
        errors.append(float((estimate - gradient).square().sum()))
    expected = (size + 1 if distribution == "normal" else size - 1) * squared
    error = statistics.stdev(errors) / math.sqrt(count)
    assert abs(statistics.fmean(errors) - expected) < 4 * error < 0.2 * expected
    mean = total / count
    spread = ((squared + gradient.square()) / count).sqrt()
    assert ((mean - gradient).abs() < 4 * spread).all()
    assert float(spread.max()) < 0.2 * math.sqrt(squared)
    # The step is that mean: to the rounding of 2000 float32 sums.
    assert torch.allclose(before - slot.tensor.detach().double(), mean, atol=1e-3 * squared**0.5)


def test_measured_curvature_of_a_quadratic():
    """Standard errors over R draws: sqrt(2 tr H^2 / R) of the trace, sqrt(2 / R) |g|^2 of s^2."""
    slot, loss, curvature, gradient = bowl()
    before = slot.tensor.detach().clone()
    trace, squared = float(curvature.sum()), float(gradient.square().sum())
    for unit in (1.0, 0.25):
        found = measure_curvature(loss, [slot], [unit], EPS, draws=200, seed=3)
        error = math.sqrt(2 * float(curvature.square().sum()) / 200) * unit**2
        assert abs(found.trace - unit**2 * trace) < 4 * error < 0.1 * unit**2 * trace
        assert found.rise == pytest.approx(EPS**2 / 2 * found.trace)
        # The reported error is the true one within its own: 1 / sqrt(2 draws), and 4 of these.
        assert found.rise_se == pytest.approx(EPS**2 / 2 * error, rel=4 / math.sqrt(400))
        slope = squared * unit**2
        assert abs(found.squared_slope - slope) < 4 * slope * math.sqrt(2 / 200)
        assert found.gradient_share == 1.0  # of one batch
        assert found.stable_rate() == pytest.approx(1 / (3 * found.trace))
        assert found.learning_rate(10**6) < found.stable_rate()
        walk = 0.5 * EPS / math.sqrt(10**6 / 4 * found.squared_slope)
        assert found.learning_rate(10**6, queries=4) == pytest.approx(walk)
        assert found.loss == loss() and found.draws == 200
    assert torch.equal(slot.tensor, before)
    # Of signs <v, H v> is the trace itself where H is diagonal.
    signs = measure_curvature(loss, [slot], [1.0], EPS, draws=3, seed=3, distribution="rademacher")
    assert signs.trace == pytest.approx(trace, rel=1e-4)


def test_the_gradients_share_is_told_from_batches_along_the_same_noise():
    """Batches with slopes g + n_j: q = |g|^2 / (|g|^2 + E|n|^2), here 1 / (1 + 3).

    Over R draws of M batches the estimate of |g|^2 has a standard error below
    sqrt(2 / R) (|g|^2 + E|n|^2 / M), and that of E s^2 below sqrt(2 / R) of it. The batches are the
    training set, whose gradient their mean has without noise.
    """
    slot, loss, _, gradient = bowl(flat=True)
    generator = torch.Generator().manual_seed(8)
    batches, draws = 6, 400
    noises = torch.randn(batches, len(gradient), generator=generator, dtype=torch.float64)
    noises -= noises.mean(0)  # so that g is the mean of the batches' gradients
    noises *= math.sqrt(3 * float(gradient.square().sum()) / float(noises.square().sum(1).mean()))

    def losses():
        w = slot.tensor.double()
        return [loss() + float((row * w).sum().detach()) for row in noises]

    found = measure_curvature(
        losses, [slot], [1.0], EPS, draws=draws, seed=2, mean_noise=mean_noise(batches, 1, batches)
    )
    squared = float(gradient.square().sum())
    error = 4 * math.sqrt(2 / draws)
    assert abs(found.squared_slope / squared - 4) < 4 * error
    assert abs(found.gradient_share - 1 / 4) < error * (1 + 3 / batches)


@pytest.mark.parametrize(
    ("batches", "size", "examples"), [(4, 1, 64), (4, 2, 16), (4, 2, 9), (4, 2, 8), (4, 4, 12)]
)
def test_the_mean_over_batches_has_the_noise_that_is_said(batches, size, examples):
    """As a run takes them, over many seeds: the variance of the mean, in units of E s^2 / n.

    Sampled variances over K seeds are within 4 sqrt(2 / K) of their mean; s^2 of batches that cross
    into a next epoch, which may be there twice, has a bias of at most b / N besides.
    """
    values = torch.randn(examples, generator=torch.Generator().manual_seed(1)).tolist()
    encoded = [Encoded((index, 0), 1, "harmless") for index in range(examples)]
    means, spreads, seeds = [], [], 600
    for seed in range(seeds):
        stream = batch_stream(encoded, batch_size=size, seed=seed, pad_id=0)
        taken = [
            statistics.fmean(values[int(row[0])] for row in next(stream)["input_ids"])
            for _ in range(batches)
        ]
        means.append(statistics.fmean(taken))
        spreads.append(statistics.variance(taken) / batches)
    expected = mean_noise(batches, size, examples) * statistics.fmean(spreads)
    margin = 4 * math.sqrt(2 / seeds) + (size / examples if batches * size > examples else 0.0)
    assert abs(statistics.variance(means, statistics.fmean(values)) - expected) < (
        margin * expected + 1e-12
    )
    # Independent batches would have more, by more than that.
    assert expected * (1 + margin) < statistics.fmean(spreads) or examples == 64


def test_draws_are_addressed_apart_from_training():
    """Directions CALIBRATION + draw, of the seed that was asked for."""
    slot, _, _, _ = bowl()
    clean = slot.tensor.detach().clone()
    seen = []
    measure_curvature(
        lambda: seen.append((slot.tensor * 1.0).detach()) or float(len(seen)), [slot], [2.0], EPS,
        draws=2, seed=9,
    )  # fmt: skip
    expected = [clean]
    for draw in range(2):
        for sign in (1, -1):
            copy = clean.clone()
            direction = noise.CALIBRATION + draw
            zk.perturb_(
                [copy], sign * EPS * 2.0, seed=9, direction=direction, streams=[slot.stream]
            )
            expected.append(copy)
    assert len(seen) == 5 and all(map(torch.equal, seen, expected))


def test_a_rate_is_told_only_from_what_is_significant():
    """A linear loss does not rise; one that falls neither."""
    slot, loss, _, _ = bowl(flat=True)
    found = measure_curvature(loss, [slot], [1.0], EPS, draws=8, seed=0)
    assert abs(found.rise) < 1e-5
    with pytest.raises(ValueError, match=r"lr: expected noise that raises .* in 8 draws; give a"):
        found.stable_rate()
    slot, loss, _, _ = bowl()
    with pytest.raises(ValueError, match="lr: expected noise that raises the loss"):
        measure_curvature(lambda: -loss(), [slot], [1.0], EPS, draws=8, seed=0).stable_rate()
    for draws, eps in ((1, EPS), (2, 0.0), (2, -1.0), (2, math.nan)):
        with pytest.raises(ValueError, match=f"at least 2 draws and eps above 0, got {draws}"):
            measure_curvature(loss, [slot], [1.0], eps, draws=draws, seed=0)
    losses = iter([1.0, 1.0, 1.0, 2.0, math.nan])
    with pytest.raises(
        FloatingPointError, match=r"calibration draw 1: .* got \[1.0\], \[2.0\], \[nan\]"
    ):
        measure_curvature(lambda: (loss(), next(losses))[1], [slot], [1.0], EPS, draws=2, seed=0)


def test_the_rate_is_stable_and_twelve_times_it_is_not():
    """Steps along two-point estimates contract in the mean square only if lr <= 2 / tr(H)."""
    for factor, low, high in ((1.0, 0.0, 0.5), (12.0, 1e3, math.inf)):  # 1 / (3 tr H), 4 / tr H
        slot, loss, curvature, gradient = bowl()
        above = 0.5 * float((gradient.square() / curvature).sum())
        least = loss() - above
        rate = measure_curvature(loss, [slot], [1.0], EPS, draws=64, seed=1).stable_rate()
        optimizer = zk.ZOSGD([("w", slot.tensor)], lr=factor * rate, eps=EPS, seed=1)
        for _ in range(150):
            optimizer.step(loss)
        assert low < (loss() - least) / above < high


class Valley:
    """f = sum_i (a_i b_i - 1)^2: minima along a valley, with tr(H) = 2 (|a|^2 + |b|^2) everywhere.

    It begins at an exact minimum, where the gradient is 0 and tr(H) is twice the least.
    """

    def __init__(self, size: int = 24) -> None:
        self.a = torch.nn.Parameter(torch.full((size,), 2.0))
        self.b = torch.nn.Parameter(torch.full((size,), 0.5))

    @property
    def named(self):
        return [("a", self.a), ("b", self.b)]

    def loss(self):
        return (self.a.double() * self.b.double() - 1).square().sum()

    def trace(self):
        return float(2 * (self.a.double().square() + self.b.double().square()).sum().detach())


def refined(eps, steps=160, queries=8, seed=0):
    """tr(H) before and after, and the lengths of the steps."""
    valley = Valley()
    before = valley.trace()
    assert float(valley.loss().detach()) == 0.0
    optimizer = zk.ZOSGD(valley.named, lr=6e-3, eps=eps, queries=queries, seed=seed)
    lengths = []
    for _ in range(steps):
        optimizer.step(valley.loss)
        lengths.append(optimizer.last_step.update_norm)
    return before, valley, lengths


def walked(lengths, seed):
    """The change of tr(H) on a random walk of steps as long as these."""
    valley = Valley()
    before = valley.trace()
    names = [name for name, _ in valley.named]
    tensors = [tensor.detach() for _, tensor in valley.named]
    size = sum(tensor.numel() for tensor in tensors)
    for step, length in enumerate(lengths):
        zk.perturb_(
            tensors, length / math.sqrt(size), seed=seed, direction=noise.RANDOM_WALK + step,
            streams=[zk.stream_id(name) for name in names],
        )  # fmt: skip
    return valley.trace() - before


def test_refinement_at_a_stationary_point_flattens_at_the_noise_scale_alone():
    """The smoothed loss f + eps^2/2 tr(H) + ... has a slope where f has none.

    So steps at the scale of the noise lower tr(H), those at 1e-3 do next to nothing, and a random
    walk of steps as long raises tr(H), which is convex here, by 2 sum |step|^2 in the mean: within
    4 standard errors over 24 walks.
    """
    before, valley, lengths = refined(eps=0.3)
    assert valley.trace() < 0.85 * before
    still = refined(eps=1e-3)[1]
    assert abs(still.trace() - before) < 1e-4 * (before - valley.trace())

    changes = [walked(lengths, seed) for seed in range(24)]
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(24)
    assert abs(mean - 2 * sum(length**2 for length in lengths)) < 4 * error
    assert min(changes) > valley.trace() - before  # no walk comes near
