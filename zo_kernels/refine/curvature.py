"""Curvature of a loss from antithetic evaluations, and the learning rate that it allows.

For directions v with E v v^T = I,

    c = (l(theta + eps v) + l(theta - eps v)) / 2 - l(theta) ~ (eps^2 / 2) v^T H v,
    E c = (eps^2 / 2) tr(H) + O(eps^4),   s = (l(+) - l(-)) / (2 eps) ~ v^T g,   E s^2 = ||g||^2.

A step theta -= lr s v with the s of one batch changes the loss in the mean by about

    -lr ||g||^2 + (lr^2 / 2) tr(H) E s^2                  (v and s nearly independent)

where E s^2 has the batch's noise besides ||g||^2. It is least at lr = q / tr(H) with the gradient's
share q = ||g||^2 / E s^2, told from several batches along the same v, g being that of the training
set; and on a quadratic no rate above 2 / tr(H) is stable. A third of q / tr(H) leaves room for a
trace that grows on the way.

That bounds the steps where the loss curves. Where it is flat, T steps are a random walk of root
mean square lr sqrt(T E s^2) in each coordinate, which does no harm on a quadratic but moves a
network to where its H is another: blocks to which the loss is insensitive would be given rates that
break it. So the walk is kept within half of eps, the noise that is to be survived.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zo_kernels import noise
from zo_kernels.modes import Slot
from zo_kernels.modes.streamed import StreamedWeights

STABLE_SHARE = 1 / 3
"""Learning rate that is taken, in units of q / tr(H)."""
WALK_SHARE = 1 / 2
"""Root mean square walk of a whole run in each coordinate, in units of eps, at the most."""
_LEAST_SHARE = 1 / 32
"""Gradient shares below are taken for this one: a few draws cannot tell them from 0."""


@dataclass(frozen=True)
class Curvature:
    """What antithetic draws at one scale found, in the coordinates of the scale.

    Attributes:
        loss: l(theta), the mean over batches.
        rise, rise_se: mean of c over draws, and its standard error.
        trace: 2 rise / eps^2.
        squared_slope: mean of s^2 over draws and batches: the squared norm of the gradient, batch
            noise included.
        gradient_share: q, the share of that which is the gradient's of the training set; 1 for a
            single batch.
        draws: how many.
        eps: the scale.
    """

    loss: float
    rise: float
    rise_se: float
    trace: float
    squared_slope: float
    gradient_share: float
    draws: int
    eps: float

    def stable_rate(self) -> float:
        """``STABLE_SHARE`` * gradient_share / trace.

        Raises:
            ValueError: the rise is not above 2 standard errors: no rate can be told from it.
        """
        if not self.rise > 2 * self.rise_se:
            raise ValueError(
                "lr: expected noise that raises the loss, so that a learning rate can be told from "
                f"it, got a rise of {self.rise:.3g} +- {self.rise_se:.3g} nats in {self.draws} "
                "draws; give a number, more calibration draws or a greater eps"
            )
        return STABLE_SHARE * self.gradient_share / self.trace

    def learning_rate(self, steps: int, queries: int = 1) -> float:
        """The smaller of ``stable_rate`` and ``WALK_SHARE`` * eps / sqrt(T E s^2 / Q).

        Args:
            steps: T, of the run.
            queries: Q, directions per step, whose estimates are averaged.

        Raises:
            ValueError: as ``stable_rate``.
        """
        stable = self.stable_rate()
        length = math.sqrt(steps * self.squared_slope / queries)
        return min(stable, WALK_SHARE * self.eps / length) if length else stable


def measure_curvature(
    loss: Callable[[], float | Sequence[float]],
    slots: Sequence[Slot],
    units: Sequence[float],
    eps: float,
    *,
    draws: int,
    seed: int,
    distribution: str = "normal",
    mean_noise: float = 1.0,
) -> Curvature:
    """Measure the curvature of a loss at the weights as they are, which are never written.

    Directions are ``noise.CALIBRATION`` + draw: no step and no evaluation has them.

    Args:
        loss: a pure function of the slots' tensors: a number, or those of several batches of a
            step's size.
        slots: the parameters that are perturbed.
        units: of each, the factor of eps.
        eps: scale of the perturbation, above 0.
        draws: at least 2; 2 ``draws`` + 1 losses are taken.
        seed, distribution: of the noise.
        mean_noise: see the function of that name; 1 for batches that are independent of each other.

    Raises:
        ValueError: fewer draws, or an eps of 0.
        FloatingPointError: a loss is not finite.
    """
    if draws < 2 or not eps > 0:
        raise ValueError(f"expected at least 2 draws and eps above 0, got {draws} and {eps}")
    clean = _losses(loss)
    rises, squares, gradients = [], [], []
    for draw in range(draws):
        sides = []
        for sign in (1.0, -1.0):
            with StreamedWeights(
                slots,
                [sign * eps * unit for unit in units],
                seed=seed,
                direction=noise.CALIBRATION + draw,
                distribution=distribution,
            ):
                sides.append(_losses(loss))
        plus, minus = sides
        if not all(map(math.isfinite, (*clean, *plus, *minus))):
            raise FloatingPointError(
                f"calibration draw {draw}: expected finite losses, got {clean}, {plus}, {minus}"
            )
        rises.append(
            (statistics.fmean(plus) + statistics.fmean(minus)) / 2 - statistics.fmean(clean)
        )
        slopes = [(a - b) / (2 * eps) for a, b in zip(plus, minus, strict=True)]
        squares.append(statistics.fmean(slope**2 for slope in slopes))
        # The squared mean has the noise of the mean, which the batches' spread tells.
        spread = statistics.variance(slopes) / len(slopes) if len(slopes) > 1 else 0.0
        gradients.append(statistics.fmean(slopes) ** 2 - mean_noise * spread)
    rise, squared = statistics.fmean(rises), statistics.fmean(squares)
    share = statistics.fmean(gradients) / squared if squared else 1.0
    return Curvature(
        loss=statistics.fmean(clean),
        rise=rise,
        rise_se=statistics.stdev(rises) / math.sqrt(draws),
        trace=2 * rise / eps**2,
        squared_slope=squared,
        gradient_share=min(1.0, max(share, _LEAST_SHARE)),
        draws=draws,
        eps=eps,
    )


def mean_noise(batches: int, size: int, examples: int) -> float:
    """Variance of the mean over a run's first batches, in units of that of independent ones.

    Batches come without replacement within an epoch: of a whole epoch the mean is the training
    set's and has no noise, and of r of N examples it has 1 - r / N of that of independent ones.

    Args:
        batches, size: how many batches, and the examples of each.
        examples: of the training set.
    """
    rest = batches * size % examples
    return rest / (batches * size) * (1 - rest / examples)


def _losses(loss: Callable[[], float | Sequence[float]]) -> list[float]:
    found = loss()
    return list(found) if isinstance(found, Sequence) else [float(found)]
