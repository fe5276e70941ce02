"""Curvature of a loss from antithetic evaluations, and the learning rate that it allows.

For directions v with E v v^T = I,

    c = (l(theta + eps v) + l(theta - eps v)) / 2 - l(theta) ~ (eps^2 / 2) v^T H v,
    E c = (eps^2 / 2) tr(H) + O(eps^4),   s = (l(+) - l(-)) / (2 eps) ~ v^T g,   E s^2 = ||g||^2.

Steps theta -= lr s v along such estimates are stable on a quadratic if
sum_i lr h_i / (2 (1 - lr h_i)) < 1 over the eigenvalues h_i of H, so only if lr <= 2 / tr(H)
(compare "Zeroth-order optimization at the edge of stability"); a third of 1 / tr(H) leaves room for
the noise of batches.
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
"""Learning rate that is taken, in units of 1 / tr(H)."""


@dataclass(frozen=True)
class Curvature:
    """What antithetic draws at one scale found, in the coordinates of the scale.

    Attributes:
        loss: l(theta).
        rise, rise_se: mean of c over draws, and its standard error.
        trace: 2 rise / eps^2.
        squared_slope: mean of s^2 over draws: the squared norm of the gradient of the loss
            measured, batch noise included.
        draws: how many.
    """

    loss: float
    rise: float
    rise_se: float
    trace: float
    squared_slope: float
    draws: int

    def learning_rate(self) -> float:
        """``STABLE_SHARE`` / trace.

        Raises:
            ValueError: the rise is not above 2 standard errors: no rate can be told from it.
        """
        if not self.rise > 2 * self.rise_se:
            raise ValueError(
                "lr: expected noise that raises the loss, so that a learning rate can be told from "
                f"it, got a rise of {self.rise:.3g} +- {self.rise_se:.3g} nats in {self.draws} "
                "draws; give a number, more calibration draws or a greater eps"
            )
        return STABLE_SHARE / self.trace


def measure_curvature(
    loss: Callable[[], float],
    slots: Sequence[Slot],
    units: Sequence[float],
    eps: float,
    *,
    draws: int,
    seed: int,
    distribution: str = "normal",
) -> Curvature:
    """Measure the curvature of a loss at the weights as they are, which are never written.

    Directions are ``noise.CALIBRATION`` + draw: no step and no evaluation has them.

    Args:
        loss: a pure function of the slots' tensors.
        slots: the parameters that are perturbed.
        units: of each, the factor of eps.
        eps: scale of the perturbation, above 0.
        draws: at least 2; 2 ``draws`` + 1 losses are taken.
        seed, distribution: of the noise.

    Raises:
        ValueError: fewer draws, or an eps of 0.
        FloatingPointError: a loss is not finite.
    """
    if draws < 2 or not eps > 0:
        raise ValueError(f"expected at least 2 draws and eps above 0, got {draws} and {eps}")
    clean = loss()
    rises, squares = [], []
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
                sides.append(loss())
        plus, minus = sides
        if not all(map(math.isfinite, (clean, plus, minus))):
            raise FloatingPointError(
                f"calibration draw {draw}: expected finite losses, got {clean}, {plus}, {minus}"
            )
        rises.append((plus + minus) / 2 - clean)
        squares.append(((plus - minus) / (2 * eps)) ** 2)
    rise = statistics.fmean(rises)
    return Curvature(
        loss=clean,
        rise=rise,
        rise_se=statistics.stdev(rises) / math.sqrt(draws),
        trace=2 * rise / eps**2,
        squared_slope=statistics.fmean(squares),
        draws=draws,
    )
