"""The three in-place passes of MeZO, with their drift: for comparison only."""

from __future__ import annotations

from collections.abc import Sequence

from zo_kernels import ops
from zo_kernels.modes.base import Closure, Mode, Slot, loss_value


class MezoMode(Mode):
    """theta += eps z; theta -= 2 eps z; theta += eps z, each rounded to the weights' dtype.

    The passes do not invert each other: after one step about 46 % of the weights differ in any
    dtype (by rms 8e-5 in bfloat16 at eps = 1e-3), a random walk that 16-bit models notice. Noise
    generation is fused and addressed like everywhere here; only the arithmetic of Malladi et al.,
    "Fine-tuning language models with just forward passes" (2023), is kept.
    """

    name = "mezo"
    exact = False

    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """See ``Mode.evaluate_pair``; on an exception the last perturbation is subtracted."""
        at = 0.0
        try:
            self._add(slots, scales, direction, 1.0)
            at = 1.0
            plus = loss_value(closure())
            self._add(slots, scales, direction, -2.0)
            at = -1.0
            minus = loss_value(closure())
        finally:
            if at:
                self._add(slots, scales, direction, -at)
        return plus, minus

    def _add(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, factor: float
    ) -> None:
        ops.perturb_(
            [slot.tensor for slot in slots],
            [factor * scale for scale in scales],
            seed=self.seed,
            direction=direction,
            streams=[slot.stream for slot in slots],
            distribution=self.distribution,
            backend=self.backend,
        )
