"""A held-out loss under weight noise, watched while a refinement goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from zo_kernels import noise
from zo_kernels.chat import Encoded
from zo_kernels.modes import Slot
from zo_kernels.modes.streamed import StreamedWeights
from zo_kernels.refine.objective import Objective

_FIRST = noise.CALIBRATION + (1 << 20)  # below it, draws that calibrate


def held_out_part(
    encoded: Sequence[Encoded], every: int = 8
) -> tuple[list[Encoded], list[Encoded]]:
    """Training examples without every so many-th of each kind, and these.

    Raises:
        ValueError: there are so few examples of a kind that none is held out; names the kind.
    """
    counts: dict[str, int] = {}
    parts: tuple[list[Encoded], list[Encoded]] = ([], [])
    for example in encoded:
        counts[example.kind] = number = counts.get(example.kind, 0) + 1
        parts[number % every == 0].append(example)
    few = [kind for kind, count in counts.items() if count < every]
    if few or not counts:
        raise ValueError(
            f"held_out: expected at least {every} examples of each kind, to hold every {every}th "
            f"out, got {' and '.join(f'{counts[kind]} that are {kind}' for kind in few) or 'none'}"
        )
    return parts


def noisy_loss(
    objective: Objective, slots: Sequence[Slot], scales: Sequence[float], *, draws: int, seed: int
) -> float:
    """Mean of a loss over draws of weight noise, in nats per token.

    The draws' directions are part of ``noise.CALIBRATION``'s range, so no step has taken them and
    no evaluation will: what is chosen by this loss is not chosen by an evaluation's noise.

    Args:
        objective: the loss.
        slots, scales: the weights that are noisy, and each one's standard deviation of noise.
        draws: how many.
        seed: of the noise.
    """
    losses = []
    for draw in range(draws):
        with StreamedWeights(slots, scales, seed=seed, direction=_FIRST + draw):
            losses.append(objective())
    return sum(losses) / draws


class EarlyStop:
    """The best weights so far by a loss, and whether it is time to stop.

    Args:
        parameters: those that training moves, by name; a copy of them is kept in the host's memory.
        patience: measurements in a row without a new best that end the run.

    Attributes:
        best: the least loss so far.
        steps: after how many steps it was measured, 0 for none.
        losses: (steps, loss) of every measurement.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], patience: int) -> None:
        self._parameters, self._patience = dict(parameters), patience
        self._copies: dict[str, Tensor] = {}
        self._since = 0
        self.best, self.steps = math.inf, 0
        self.losses: list[tuple[int, float]] = []

    def note(self, steps: int, loss: float, weights: Mapping[str, Tensor] | None = None) -> None:
        """Take a measurement after so many steps into account.

        One before the first step (0) may be the best, but does not count as one without a new best.

        Args:
            weights: those that were measured, where the parameters are no longer these.
        """
        self.losses.append((steps, loss))
        if loss < self.best:
            self.best, self.steps, self._since = loss, steps, 0
            source = self._parameters if weights is None else weights
            self._copies = {
                name: source[name].detach().to("cpu", copy=True) for name in self._parameters
            }
        elif steps:
            self._since += 1

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return self._since >= self._patience

    def restore(self) -> None:
        """Give the parameters the best weights."""
        for name, copy in self._copies.items():
            self._parameters[name].detach().copy_(copy)
