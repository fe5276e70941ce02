"""A GPU's events without a GPU, for the tests of what is timed."""

from __future__ import annotations

import time
from contextlib import contextmanager


class Twin:
    """torch.cuda's part in timing, on the CPU: events take the clock's time, in order of calls.

    As on a GPU, a time can be read only after a synchronisation that followed the event.
    """

    def __init__(self):
        self.log = []
        self.clock = time.perf_counter
        self.cleared = None

    @contextmanager
    def device(self, device):
        self.log.append(("enter", device))
        yield
        self.log.append(("leave", device))

    def synchronize(self, device):
        self.log.append(("synchronize", device))

    def Event(self, enable_timing):
        assert enable_timing
        return TwinEvent(self)


class TwinEvent:
    def __init__(self, twin):
        self.twin = twin

    def record(self):
        assert self.twin.cleared is None or (self.twin.cleared == 0).all()
        self.time = self.twin.clock()
        self.place = len(self.twin.log)
        self.twin.log.append(("record", None))

    def elapsed_time(self, end):
        later = [what for what, _ in self.twin.log[max(self.place, end.place) :]]
        if "synchronize" not in later:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end.time - self.time) * 1e3
