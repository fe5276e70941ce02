"""Times cases in turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, per case, of ``rounds`` rounds in which every case runs once.

    On a GPU each call is followed by a synchronisation.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: statistics.median(values) for name, values in times.items()}


def median_ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast, each ratio from one round."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
