"""The default mode: weights stay as they are, and each operation reads a perturbed copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zo_kernels import ops
from zo_kernels.checks import check_tensor, expect_finite
from zo_kernels.modes.base import Closure, Mode, Slot, loss_value
from zo_kernels.modes.reads import Part, Perturbation, Scratch, StreamedReads
from zo_kernels.places import places


class StreamedWeights(StreamedReads):
    """Context in which the slots' parameters read as ``round(w + scale * z)``.

    Args:
        slots: the parameters.
        scales: factor of z for each.
        seed, direction, backend, distribution: of the noise.
        scratch: buffer to reuse between contexts; a new one by default.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        scales: Sequence[float],
        *,
        seed: int,
        direction: int,
        backend: str | None = None,
        distribution: str = "normal",
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__([(slot.name, slot.tensor) for slot in slots], scratch)
        for slot, scale in zip(slots, scales, strict=True):
            check_tensor(f"'{slot.name}'", slot.tensor)
            expect_finite(f"scale of '{slot.name}'", scale)
        self._streams = {id(slot.tensor): slot.stream for slot in slots}
        self._scales = {id(s.tensor): scale for s, scale in zip(slots, scales, strict=True)}
        self._seed, self._direction, self._distribution = seed, direction, distribution
        # Straight to the backend: a model has hundreds of operations a forward, and what the
        # public op checks is checked here once.
        self._rooms = {
            device: ops.backend_for(device, backend)
            for device in {slot.tensor.device for slot in slots}
        }

    def perturbation(self, parameter: Tensor) -> Perturbation | None:
        """See ``StreamedReads.perturbation``."""
        key = id(parameter)
        if key not in self._names:
            return super().perturbation(parameter)
        if self._outer is not None and self._outer.covers(parameter):
            return None
        return Perturbation(
            self._scales[key],
            self._seed,
            self._direction,
            self._streams[key],
            self._distribution,
            self._rooms[parameter.device],
        )

    def fill(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """One launch for each device."""
        for device, members in places(part.source.device for part in parts).items():
            self._rooms[device].combine_(
                [copies[i] for i in members],
                [parts[i].source for i in members],
                [[self._scales[id(parts[i].parameter)]] for i in members],
                seed=self._seed,
                directions=[self._direction],
                streams=[self._streams[id(parts[i].parameter)] for i in members],
                offsets=[parts[i].offset for i in members],
                src_scale=1.0,
                stochastic=False,
                distribution=self._distribution,
                changes=None,
            )


class StreamedMode(Mode):
    """The default: weights stay as they are until the update; exact by construction."""

    name = "streamed"
    exact = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._scratch = Scratch()

    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """See ``Mode.evaluate_pair``.

        Raises:
            RuntimeError: if the closure reads none of the parameters through torch functions.
        """
        self.expect_alone()
        losses = []
        for sign in (1.0, -1.0):
            with StreamedWeights(
                slots,
                [sign * scale for scale in scales],
                seed=self.seed,
                direction=direction,
                backend=self.backend,
                distribution=self.distribution,
                scratch=self._scratch,
            ) as weights:
                losses.append(loss_value(closure()))
            self.expect_used(weights, slots)
        return losses[0], losses[1]

    def expect_alone(self) -> None:
        """RuntimeError inside another context that changes what parameters read as."""
        if StreamedReads.active():
            raise RuntimeError(
                f"mode '{self.name}': expected a step outside of zk.perturbed and zk.quantized, "
                "which change what the weights read as; enter them within the closure"
            )

    def expect_used(self, weights: StreamedWeights, slots: Sequence[Slot]) -> None:
        """RuntimeError if no operation of the closure read a parameter."""
        if not weights.used:
            raise RuntimeError(
                f"mode '{self.name}': the closure read none of the {len(slots)} parameters through "
                f"torch functions (the first is '{slots[0].name}'); is it the model whose "
                "parameters the optimizer has, and is it called without torch.compile?"
            )
