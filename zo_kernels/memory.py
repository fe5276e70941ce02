"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """Context that measures the peak memory of what runs inside it; not to be nested.

        with PeakMemory("cpu") as memory:
            optimizer.step(closure)
        print(memory.peak - memory.before)

    On a CUDA device this is what torch has allocated there. On a Linux CPU it is the process's
    resident memory (the weights, the interpreter, mapped files that were touched), counted anew
    after freed memory was given back to the system. Elsewhere (macOS, a kernel without
    ``/proc/self/clear_refs``) nothing can be reset: ``before`` and ``peak`` are then the highest
    resident memory since the process began (``ru_maxrss``), so that ``peak - before`` is a lower
    bound; measure in a fresh process.

    Args:
        device: torch device.

    Attributes:
        before: bytes in use at the beginning.
        peak: bytes in use at most until the end; there after the context ends, by an exception too.

    Raises:
        ValueError: a device that is neither the CPU nor CUDA.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got '{self.device}'")
        self.before = 0
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        """Count anew from here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            reset_peak()
            self.before = resident_peak()
        return self

    def __exit__(self, *error: object) -> None:
        """Read the peak."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = resident_peak()


def resident_peak() -> int:
    """Peak resident memory in bytes since the last reset, or since the process began."""
    if _CLEAR_REFS.exists():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Give freed memory back to the system and, where that is possible, count anew (Linux)."""
    if _CLEAR_REFS.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        _CLEAR_REFS.write_text(_RESET_PEAK)
