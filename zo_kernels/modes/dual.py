"""Both points of a step at once: one z and one read of the weights serve two forwards.

The two evaluations run in two threads of which one at a time is at work. Where one of them comes
to an operation that reads parameters, it draws z once, perturbs a copy for itself and one for the
other, and goes on when the other has taken its copy there. So a step draws two normals per weight
(one for the pair, one for the update) instead of three, for any closure: no layer has to be known.
Where the two part ways (an expert that only one of them chose), each draws for itself, and so it
does for the weights that ``zk.quantized`` rounds within the closure, which takes one pass for both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.modes.base import Closure, Slot, loss_value
from zo_kernels.modes.reads import Part, Scratch
from zo_kernels.modes.streamed import StreamedMode, StreamedWeights
from zo_kernels.places import places


class Cancelled(BaseException):
    """Ends one evaluation because the other one failed."""


class Side:
    """One of the two evaluations: when it may run, and the copies that the other made for it."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self.turn = threading.Semaphore(0)
        self.prepared: tuple[list[tuple], list[Tensor]] | None = None
        self.error: BaseException | None = None
        self.done = False


class DualWeights(StreamedWeights):
    """``StreamedWeights`` that shares every z with another thread's.

    Args:
        own, other: the two sides; the sign of ``scales`` is that of the own one.
        Others as for ``StreamedWeights``.
    """

    def __init__(
        self,
        own: Side,
        other: Side,
        slots: Sequence[Slot],
        scales: Sequence[float],
        **options: object,
    ) -> None:
        super().__init__(slots, scales, scratch=own.scratch, **options)
        self._own, self._other = own, other

    def copies(self, parts: Sequence[Part]) -> list[Tensor]:
        """Perturbed copies, made here or by the other side."""
        keys = [(id(part.parameter), part.offset, part.source.shape) for part in parts]
        if self._own.prepared is None and self._other.prepared is not None:
            self._wait()
        if self._other.error is not None:
            raise Cancelled
        ready, self._own.prepared = self._own.prepared, None
        if ready is not None and ready[0] == keys:
            return ready[1]
        if self._other.done or self._other.prepared is not None:
            return super().copies(parts)
        shapes = [(part.source.shape, part.source) for part in parts]
        mine, theirs = self._own.scratch.allocate(shapes), self._other.scratch.allocate(shapes)
        for device, members in places(part.source.device for part in parts).items():
            with torch.no_grad():
                self._rooms[device].pair_(
                    [mine[i] for i in members],
                    [theirs[i] for i in members],
                    [parts[i].source for i in members],
                    [self._scales[id(parts[i].parameter)] for i in members],
                    seed=self._seed,
                    direction=self._direction,
                    streams=[self._streams[id(parts[i].parameter)] for i in members],
                    offsets=[parts[i].offset for i in members],
                    distribution=self._distribution,
                )
        self._other.prepared = keys, theirs
        return mine

    def _wait(self) -> None:
        """Let the other side run until it waits in its turn, or has ended."""
        if not self._other.done:
            self._other.turn.release()
            self._own.turn.acquire()


class DualMode(StreamedMode):
    """Streamed weights, with both evaluations of a pair in step; the same bits.

    Extra memory: twice the largest leaf, and the activations of two forwards. The closure is called
    from two threads, one at a time at work; it must not depend on being called twice in order.
    """

    name = "dual"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._other_scratch = Scratch()

    def evaluate_pair(
        self, slots: Sequence[Slot], scales: Sequence[float], direction: int, closure: Closure
    ) -> tuple[float, float]:
        """See ``Mode.evaluate_pair``.

        Raises:
            RuntimeError: if the closure reads none of the parameters through torch functions.
        """
        self.expect_alone()
        plus, minus = Side(self._scratch), Side(self._other_scratch)
        losses: dict[float, float] = {}

        def evaluate(own: Side, other: Side, sign: float) -> None:
            weights = DualWeights(
                own,
                other,
                slots,
                [sign * scale for scale in scales],
                seed=self.seed,
                direction=direction,
                backend=self.backend,
                distribution=self.distribution,
            )
            with torch.no_grad(), weights:
                losses[sign] = loss_value(closure())
            self.expect_used(weights, slots)

        settings = _thread_settings()

        def second() -> None:
            minus.turn.acquire()
            try:
                if plus.error is None:
                    settings()
                    evaluate(minus, plus, -1.0)
            except BaseException as error:  # raised again where the step was called
                minus.error = error
            finally:
                minus.done = True
                plus.turn.release()

        thread = threading.Thread(target=second, name="zo_kernels-dual", daemon=True)
        thread.start()
        try:
            evaluate(plus, minus, 1.0)
        except BaseException as error:
            plus.error = error
        plus.done = True
        minus.turn.release()
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:  # the other side must end before the caller goes on
                plus.error = error
        for error in (plus.error, minus.error):
            if error is not None and not isinstance(error, Cancelled):
                raise error
        return losses[1.0], losses[-1.0]


def _thread_settings() -> Callable[[], None]:
    """What makes another thread compute as this one does."""
    threads = torch.get_num_threads()
    cast = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    }
    caching = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    default_device = torch.get_default_device()

    def apply() -> None:
        torch.set_default_device(default_device)  # of that thread alone
        torch.set_num_threads(threads)
        for device, (enabled, dtype) in cast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(caching)
        if stream is not None:
            torch.cuda.set_stream(stream)

    return apply
