"""The interface that every mode fills in."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from zo_kernels import ops

#: Evaluates the loss: a one-element tensor or any number.
Closure = Callable[[], "Tensor | float"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter as a mode sees it: its name, the tensor and its noise stream."""

    name: str
    tensor: nn.Parameter
    stream: int


@dataclass(frozen=True, slots=True)
class GroupUpdate:
    """What a step does to one parameter group.

        theta = round(src_scale * theta + sum_k scales[.][k] z_k)

    Attributes:
        slots: the group's parameters.
        scales: for each, one factor per direction of the step.
        src_scale: factor of theta, for weight decay.
    """

    slots: Sequence[Slot]
    scales: Sequence[Sequence[float]]
    src_scale: float


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

        The weights may be left perturbed until ``update`` or ``settle``; an exception leaves them
        as they were.

        Args:
            slots: the parameters to perturb.
            scales: factor of z for each slot.
            direction: noise direction.
            closure: evaluates the loss; called twice.
        """

    def settle(self) -> bool:
        """Give the weights back if an evaluation left them perturbed, and say whether one had."""
        return False

    def update(
        self, updates: Sequence[GroupUpdate], directions: Sequence[int], changes: Tensor | None
    ) -> None:
        """Apply the updates, in place.

        Args:
            updates: one per parameter group that is updated.
            directions: of the step.
            changes: None, or where the three change statistics of every parameter go, float64
                (parameters, 3) on the CPU; see ``ops.combine_``. Rows of a group that is spread
                over several devices are left as they are.
        """
        self.settle()
        row = 0
        for update in updates:
            part = changes_like(changes, update.slots)
            self.apply(update, directions, part)
            if part is not None:
                changes[row : row + len(part)] = part.cpu()
            row += len(update.slots)

    def apply(self, update: GroupUpdate, directions: Sequence[int], changes: Tensor | None) -> None:
        """Apply one group's update; 16-bit weights are rounded stochastically."""
        tensors = [slot.tensor for slot in update.slots]
        ops.combine_(
            tensors,
            tensors,
            update.scales,
            seed=self.seed,
            directions=directions,
            streams=[slot.stream for slot in update.slots],
            rounding="stochastic",
            src_scale=update.src_scale,
            distribution=self.distribution,
            changes=changes,
            backend=self.backend,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors that the next step needs and the weights do not tell, by parameter name."""
        return {}

    def load_state(self, state: dict[str, Tensor], slots: Sequence[Slot]) -> None:
        """Take such tensors over.

        Raises:
            ValueError: they are not what this mode has for these parameters.
        """
        if state:
            raise ValueError(f"mode '{self.name}': expected no state, got {sorted(state)[:3]}")


def changes_like(changes: Tensor | None, slots: Sequence[Slot]) -> Tensor | None:
    """Room for the change statistics of slots that are on one device; None if not asked for."""
    if changes is None or len({slot.tensor.device for slot in slots}) > 1:
        return None
    return torch.empty(len(slots), 3, dtype=torch.float64, device=slots[0].tensor.device)


#: For tensors that were changed in place and given back to the bit: their versions before, after.
_given_back = WeakTensorKeyDictionary()


def written_version(tensor: Tensor) -> int:
    """The version of a tensor, as if ``changed_and_given_back`` had not counted any."""
    before, after = _given_back.get(tensor, (None, None))
    return before if after == tensor._version else tensor._version


@contextmanager
def changed_and_given_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let autograd know that tensors hold something else for the length of a block.

    A backward pass through what was computed on the other side of either end is torch's error then.
    """
    counted = [tensor for tensor in tensors if not tensor.is_inference()]
    versions = [written_version(tensor) for tensor in counted]
    torch.autograd.graph.increment_version(counted)
    try:
        yield
    finally:
        torch.autograd.graph.increment_version(counted)
        for tensor, version in zip(counted, versions, strict=True):
            _given_back[tensor] = version, tensor._version


class Companions:
    """Tensors that belong to parameters (a float32 master, a residual) while others leave those.

    Args:
        mode: the mode's name, for errors.
        make: the companion of a parameter that has none yet.
        fits: whether a companion and the parameter, which was written since, still agree.
    """

    def __init__(
        self, mode: str, make: Callable[[Tensor], Tensor], fits: Callable[[Tensor, Tensor], bool]
    ) -> None:
        self._mode, self._make, self._fits = mode, make, fits
        self.tensors: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}

    def of(self, slots: Sequence[Slot]) -> list[Tensor]:
        """The slots' companions.

        Raises:
            RuntimeError: a parameter was written by others since its last update.
        """
        for slot in slots:
            companion = self.tensors.get(slot.name)
            if companion is None:
                self.tensors[slot.name] = self._make(slot.tensor.detach())
                continue
            written = self._versions.get(slot.name) != written_version(slot.tensor)
            if written and not self._fits(companion, slot.tensor):
                raise RuntimeError(
                    f"mode '{self._mode}': expected '{slot.name}' as its last update left it, got "
                    "weights that were written since; make a new optimizer for them"
                )
        self.settled(slots)
        return [self.tensors[slot.name] for slot in slots]

    def settled(self, slots: Sequence[Slot]) -> None:
        """Note that the parameters are now as their companions say."""
        for slot in slots:
            self._versions[slot.name] = written_version(slot.tensor)

    def load(self, state: dict[str, Tensor], slots: Sequence[Slot]) -> None:
        """Take other companions over, of the slots' weights as they are now.

        Raises:
            ValueError: one is not what a parameter of the run needs.
        """
        known = {slot.name: slot.tensor for slot in slots}
        for name, tensor in state.items():
            if name not in known:
                raise ValueError(f"mode '{self._mode}': expected no state of '{name}', got some")
            like = self._make(known[name].detach())
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(
                    f"mode '{self._mode}', state of '{name}': expected {like.dtype} of shape "
                    f"{tuple(like.shape)}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        self.tensors = {n: t.to(known[n].device, copy=True) for n, t in state.items()}
        self.settled(slots)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done: weights and what gives them back change together.

    It comes after an exception of the block too, and to a handler that Python did not set at once.
    """
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may set a handler, and none that is not Python's can be given back.
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[0])
        elif pending:
            signal.raise_signal(signal.SIGINT)


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
