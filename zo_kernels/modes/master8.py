"""Eight bits more for every 16-bit weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.modes.base import Closure, Companions, GroupUpdate, Slot
from zo_kernels.modes.streamed import StreamedMode


class Master8Mode(StreamedMode):
    """Streamed weights whose updates go into the weight and an int8 residual below it.

    Extra memory: 1 byte per 16-bit weight beside that of streaming; float32 weights have no
    residual. The losses are those at the weights themselves. Weights that others wrote between two
    steps (by operations that count versions, so not through ``.data``) are refused.
    """

    name = "master8"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._residuals = Companions(self.name, _no_residual, lambda residual, weight: False)

    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """See ``Mode.evaluate_pair``; refuses weights that were written by others."""
        self._residuals.of(slots)
        return super().evaluate_pair(slots, scales, direction, closure)

    def apply(self, update: GroupUpdate, directions: Sequence[int], changes: Tensor | None) -> None:
        """See ``Mode.apply``; rounds to nearest, 24 bits wide."""
        ops.advance_(
            [slot.tensor for slot in update.slots],
            [ops.Update(directions, update.scales, update.src_scale)],
            seed=self.seed,
            streams=[slot.stream for slot in update.slots],
            residuals=self._residuals.of(update.slots),
            distribution=self.distribution,
            changes=changes,
            backend=self.backend,
        )
        self._residuals.settled(update.slots)

    def state(self) -> dict[str, Tensor]:
        """See ``Mode.state``."""
        return dict(self._residuals.tensors)

    def load_state(self, state: dict[str, Tensor], slots: Sequence[Slot]) -> None:
        """See ``Mode.load_state``."""
        self._residuals.load(state, slots)


def _no_residual(weight: Tensor) -> Tensor:
    shape = (0,) if weight.dtype == torch.float32 else weight.shape
    return torch.zeros(shape, dtype=torch.int8, device=weight.device)
