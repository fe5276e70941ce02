"""Modes that write the perturbed weights where the model's own are: at fixed addresses.

Some holder keeps what gives the weights back: the exceptions to one rounding (``inplace``), a copy
(``snapshot``) or a float32 master of which the weights are the rounding (``master``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.modes.base import (
    Closure,
    Companions,
    GroupUpdate,
    Mode,
    Slot,
    changes_like,
    loss_value,
    uninterrupted,
)


class Holder(Protocol):
    """Perturbed tensors and the way back; ``ops.Held`` is one."""

    def swap_(self, scales: Sequence[float]) -> None:
        """Perturb by other scales, along the same z."""

    def release_(
        self,
        scales: Sequence[float] | None = None,
        *,
        src_scale: float = 1.0,
        rounding: str = "nearest",
        changes: Tensor | None = None,
    ) -> None:
        """Give the weights back, or updated along the same z."""


class HeldMode(Mode):
    """Evaluates at both points in place; the way back may be joined with the update."""

    exact = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._holder: Holder | None = None
        self._slots: list[Slot] = []
        self._direction = -1

    @abstractmethod
    def hold(self, slots: Sequence[Slot], scales: Sequence[float], direction: int) -> Holder:
        """Perturb the slots' tensors in place."""

    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """See ``Mode.evaluate_pair``; leaves the weights at the second point."""
        self.settle()
        with uninterrupted():
            self._holder = self.hold(slots, scales, direction)
            self._slots, self._direction = list(slots), direction
        try:
            plus = loss_value(closure())
            with uninterrupted():
                self._holder.swap_([-scale for scale in scales])
            minus = loss_value(closure())
        except BaseException:
            self.settle()
            raise
        return plus, minus

    def settle(self) -> bool:
        """See ``Mode.settle``."""
        with uninterrupted():
            if self._holder is None:
                return False
            self._holder.release_()
            self._holder = None
        return True

    def update(
        self, updates: Sequence[GroupUpdate], directions: Sequence[int], changes: Tensor | None
    ) -> None:
        """See ``Mode.update``; joined with the way back where one z and one decay do it all."""
        slots = [slot for update in updates for slot in update.slots]
        if (
            self._holder is None
            or list(directions) != [self._direction]
            or slots != self._slots
            or len({update.src_scale for update in updates}) > 1
        ):
            super().update(updates, directions, changes)
            return
        part = changes_like(changes, slots)
        with uninterrupted():
            self._holder.release_(
                [row[0] for update in updates for row in update.scales],
                src_scale=updates[0].src_scale,
                rounding="stochastic",
                changes=part,
            )
            self._holder = None
        if part is not None:
            changes.copy_(part)


class InplaceMode(HeldMode):
    """Exact in place: +eps z, then -eps z, then the update, without a copy of the weights.

    Extra memory: about 0.09 byte per weight at eps a twentieth of the weights' standard deviation;
    see ``ops.Held``. For callers that need perturbed weights at fixed addresses.
    """

    name = "inplace"

    def hold(self, slots: Sequence[Slot], scales: Sequence[float], direction: int) -> Holder:
        """See ``HeldMode.hold``."""
        return ops.Held(
            [slot.tensor for slot in slots],
            scales,
            seed=self.seed,
            direction=direction,
            streams=[slot.stream for slot in slots],
            distribution=self.distribution,
            backend=self.backend,
        )


class Copies:
    """A holder that writes the perturbed tensors from sources that it does not change.

    Args:
        mode: whose seed, distribution and backend the noise has.
        slots, scales, direction: as in ``Mode.evaluate_pair``.
        sources: one per slot, of its shape and device; the weights are these, rounded.
    """

    def __init__(
        self,
        mode: Mode,
        slots: Sequence[Slot],
        scales: Sequence[float],
        direction: int,
        sources: Sequence[Tensor],
    ) -> None:
        self._mode, self._direction, self._sources = mode, direction, list(sources)
        self._tensors = [slot.tensor.detach() for slot in slots]
        self._streams = [slot.stream for slot in slots]
        try:
            self.swap_(scales)
        except BaseException:
            self.release_()  # nobody else knows of this holder yet
            raise

    def swap_(self, scales: Sequence[float]) -> None:
        """See ``Holder``."""
        self._combine(self._tensors, scales)

    def release_(
        self,
        scales: Sequence[float] | None = None,
        *,
        src_scale: float = 1.0,
        rounding: str = "nearest",
        changes: Tensor | None = None,
    ) -> None:
        """See ``Holder``."""
        if scales is None:
            for tensor, source in zip(self._tensors, self._sources, strict=True):
                tensor.copy_(source)
            return
        options = {"src_scale": src_scale, "rounding": rounding, "changes": changes}
        self._combine(self._tensors, scales, **options)

    def _combine(self, dst: Sequence[Tensor], scales: Sequence[float], **options: object) -> None:
        ops.combine_(
            dst,
            self._sources,
            [[scale] for scale in scales],
            seed=self._mode.seed,
            directions=[self._direction],
            streams=self._streams,
            distribution=self._mode.distribution,
            backend=self._mode.backend,
            **options,
        )


class Masters(Copies):
    """The same with float32 sources that take the updates."""

    def release_(
        self,
        scales: Sequence[float] | None = None,
        *,
        src_scale: float = 1.0,
        rounding: str = "nearest",
        changes: Tensor | None = None,
    ) -> None:
        """See ``Holder``; the change statistics are those of the masters."""
        if scales is not None:
            self._combine(self._sources, scales, src_scale=src_scale, changes=changes)
        super().release_()


class SnapshotMode(HeldMode):
    """A copy of the weights in their own dtype; the perturbed ones are written from it."""

    name = "snapshot"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: dict[str, Tensor] = {}

    def hold(self, slots: Sequence[Slot], scales: Sequence[float], direction: int) -> Holder:
        """See ``HeldMode.hold``."""
        for slot in slots:
            buffer = self._buffers.get(slot.name)
            if buffer is None or buffer.device != slot.tensor.device:
                self._buffers[slot.name] = slot.tensor.detach().clone()
            else:
                buffer.copy_(slot.tensor.detach())
        return Copies(self, slots, scales, direction, [self._buffers[s.name] for s in slots])


class MasterMode(HeldMode):
    """float32 masters take the updates; the weights are their rounding.

    Extra memory: 4 bytes per weight. Weights that others wrote between two steps (by operations
    that count versions, so not through ``.data``) are refused unless they are what they were.
    """

    name = "master"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._masters = Companions(
            self.name,
            lambda weight: weight.to(torch.float32, copy=True),
            lambda master, weight: torch.equal(master.to(weight.dtype), weight),
        )

    def hold(self, slots: Sequence[Slot], scales: Sequence[float], direction: int) -> Holder:
        """See ``HeldMode.hold``."""
        return Masters(self, slots, scales, direction, self._masters.of(slots))

    def settle(self) -> bool:
        """See ``Mode.settle``."""
        held = super().settle()
        if held:
            self._masters.settled(self._slots)
        return held

    def update(
        self, updates: Sequence[GroupUpdate], directions: Sequence[int], changes: Tensor | None
    ) -> None:
        """See ``Mode.update``; the change statistics are those of the masters."""
        super().update(updates, directions, changes)
        self._masters.settled([slot for update in updates for slot in update.slots])

    def apply(self, update: GroupUpdate, directions: Sequence[int], changes: Tensor | None) -> None:
        """See ``Mode.apply``."""
        masters = self._masters.of(update.slots)
        ops.combine_(
            masters,
            masters,
            update.scales,
            seed=self.seed,
            directions=directions,
            streams=[slot.stream for slot in update.slots],
            src_scale=update.src_scale,
            distribution=self.distribution,
            changes=changes,
            backend=self.backend,
        )
        for slot, master in zip(update.slots, masters, strict=True):
            slot.tensor.detach().copy_(master)

    def state(self) -> dict[str, Tensor]:
        """See ``Mode.state``."""
        return dict(self._masters.tensors)

    def load_state(self, state: dict[str, Tensor], slots: Sequence[Slot]) -> None:
        """See ``Mode.load_state``."""
        self._masters.load(state, slots)
