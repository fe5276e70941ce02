"""What one step did, and the run's statistics so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepRecord:
    """What one step did. Lists have one entry per query.

    Attributes:
        step: its number, from 0.
        directions, losses_plus, losses_minus: of each query that was evaluated.
        projected_gradients: (l+ - l-) / (2 eps) of the first parameter group, after clipping.
        lr: of each parameter group that has trainable parameters, as it was used.
        update_norm: ||dtheta||, the square root of the summed squared changes of all weights, as
            they were rounded; a warm start is not counted.
        intended_norm: the same before rounding.
        update_ratio: ``update_norm`` / ||theta||, which is measured every 100 steps.
        lost: share of the weights whose change was lost to rounding.
        gradient_mean, gradient_std: of all projected gradients of this process so far.
        restore_error: root mean square change that the evaluations left in the weights before the
            update: 0 by construction in the exact modes, measured on the first 4096 elements of
            each tensor in others.
        skipped: why no update was made, else None.

    Norms and ``lost`` are None without an update or diagnostics.
    """

    step: int
    directions: list[int] = field(default_factory=list)
    losses_plus: list[float] = field(default_factory=list)
    losses_minus: list[float] = field(default_factory=list)
    projected_gradients: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    update_norm: float | None = None
    intended_norm: float | None = None
    update_ratio: float | None = None
    lost: float | None = None
    gradient_mean: float | None = None
    gradient_std: float | None = None
    restore_error: float = 0.0
    skipped: str | None = None

    @property
    def loss(self) -> float:
        """Mean of all losses evaluated in the step; NaN if there was none."""
        losses = self.losses_plus + self.losses_minus
        return sum(losses) / len(losses) if losses else math.nan


@dataclass(slots=True)
class Running:
    """Mean and standard deviation of a growing sample (Welford's recurrence)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._squares += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation of the values so far, 0 for fewer than two."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0
