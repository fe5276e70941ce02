"""Prints as JSON the resident peaks (MB) of a bare forward and of a ZOSGD step on one model.

Usage: python peak_memory.py MODEL_DIRECTORY DTYPE
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from pathlib import Path

import torch

import zo_kernels as zk
from zo_kernels.refine.checkpoint import load


def resident_peak() -> float:
    """Peak resident memory since the last reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Give freed memory back to the system and start counting anew (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Measure: three forwards, reset, three forwards (their peak); the same with steps."""
    directory, dtype = sys.argv[1:]
    model, _ = load(directory, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 128), generator=generator)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-9, eps=1e-3)
    peaks = {}
    for name, run in (("forward", loss), ("step", lambda: optimizer.step(loss))):
        run()
        reset_peak()
        for _ in range(2):
            run()
        peaks[name] = resident_peak()
    leaf = max(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    extra = peaks["step"] - peaks["forward"]
    print(json.dumps({**peaks, "step - forward": extra, "largest leaf": leaf}))


if __name__ == "__main__":
    main()
