"""Seconds of calls on any device, taken in turns, so that what else the machine does hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

#: Seconds of one call: a timer is given the call and makes it.
Timer = Callable[[Callable[[], object]], float]
LEAST_ROUNDS = 3
_CLEARED = 1 << 28  # bytes


def wall_seconds(run: Callable[[], object]) -> float:
    """Wall time of a call whose work is done when it returns: the timer of CPUs."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class EventTimer:
    """Times calls on a GPU by two events on its current stream.

    256 MiB are cleared ahead of the first event. That takes the GPU long enough for the host to
    run ahead, so launches are not counted, and it empties the second-level cache.

    Args:
        device: a torch device with an index, "cuda:0".
        module: ``torch.cuda`` (CUDA and ROCm), ``torch.xpu``, or anything that offers their
            ``device``, ``Event`` and ``synchronize``.
    """

    def __init__(self, device: torch.device, module: ModuleType | Any) -> None:
        self._device, self._module = device, module
        self._cleared = torch.empty(_CLEARED, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds between the events around the call's work."""
        with self._module.device(self._device):
            start = self._module.Event(enable_timing=True)
            end = self._module.Event(enable_timing=True)
            self._cleared.zero_()
            start.record()
            run()
            end.record()
            self._module.synchronize(self._device)
        return start.elapsed_time(end) / 1e3  # milliseconds


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    timer: Timer = wall_seconds,
    budget: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, per case, of rounds in which every case runs once.

    Args:
        cases: name -> call.
        rounds: how many are kept.
        warmup: rounds before them.
        timer: measures a call.
        budget: seconds after which no further round begins, once there are LEAST_ROUNDS.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.monotonic()
    for number in range(-warmup, rounds):
        late = budget is not None and time.monotonic() - begin > budget
        if late and number >= LEAST_ROUNDS:
            break
        for name, run in cases.items():
            seconds = timer(run)
            if number >= 0:
                times[name].append(seconds)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast, each ratio from one round."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
