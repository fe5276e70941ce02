"""The interface that every mode fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from zo_kernels import ops

#: Evaluates the loss: a one-element tensor or any number.
Closure = Callable[[], "Tensor | float"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter as a mode sees it: its name, the tensor and its noise stream."""

    name: str
    tensor: nn.Parameter
    stream: int


class Mode(ABC):
    """Evaluates losses at theta + scale * z and applies updates to theta.

    Args:
        seed: key of all noise of the run.
        backend: None (by device) or a backend's name.
        distribution: of z, "normal" or "rademacher".
    """

    name: ClassVar[str]
    #: Whether an evaluation leaves every weight bit-identical.
    exact: ClassVar[bool]

    def __init__(
        self, *, seed: int, backend: str | None = None, distribution: str = "normal"
    ) -> None:
        self.seed = seed
        self.backend = backend
        self.distribution = distribution

    @abstractmethod
    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """The losses at theta + scales * z and theta - scales * z, as Python floats.

        Args:
            slots: the parameters to perturb.
            scales: factor of z for each slot.
            direction: noise direction.
            closure: evaluates the loss; called twice.
        """

    def update(
        self,
        slots: Sequence[Slot],
        scales: Sequence[Sequence[float]],
        directions: Sequence[int],
        src_scale: float,
    ) -> None:
        """theta = round(src_scale * theta + sum_k scales[.][k] z_k) in one pass, in place.

        16-bit weights are rounded stochastically, from the bits of the last direction's words.
        """
        tensors = [slot.tensor for slot in slots]
        ops.combine_(
            tensors,
            tensors,
            scales,
            seed=self.seed,
            directions=directions,
            streams=[slot.stream for slot in slots],
            rounding="stochastic",
            src_scale=src_scale,
            distribution=self.distribution,
            backend=self.backend,
        )


def loss_value(loss: Tensor | float) -> float:
    """The closure's result as a float.

    Raises:
        TypeError: if it is neither a one-element tensor nor a number.
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise TypeError(
            f"closure: expected a one-element loss, got a tensor of shape {tuple(loss.shape)}"
        )
    try:
        return float(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"closure: expected a one-element tensor or a number, got {type(loss).__name__}"
        ) from error
