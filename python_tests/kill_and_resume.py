"""Runs that are killed at random moments and resumed until they are done; a program of its own.

    python kill_and_resume.py FOLDER --kills 200

The final weights of each run, in every mode that can be replayed, must be bit for bit those of a
run that nobody disturbed. They begin with a skipped step, and a warm start in the one behind it.
Children are forked, so that a life costs milliseconds and not an import.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

import zo_kernels as zk
from zo_kernels import noise
from zo_kernels.replay.header import ARITHMETICS

warnings.filterwarnings("ignore", message="ZOSGD: step 0 skipped")
torch.set_num_threads(1)  # a forked child has no threads but its own

STEPS = 40


def make(mode: str) -> tuple[dict[str, torch.nn.Parameter], zk.ZOSGD]:
    """A little model and its optimizer."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (300, 70), "b": (70,), "c": (5000,)}
    tensors = {
        name: torch.nn.Parameter(
            (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        )
        for name, shape in shapes.items()
    }
    optimizer = zk.ZOSGD(
        tensors.items(), lr=1e-2, eps=1e-3, mode=mode, seed=5, relative_eps=mode == "master",
        update_norm=1e-3 if mode == "inplace" else None,
    )  # fmt: skip
    return tensors, optimizer


def live(mode: str, log: Path | None) -> list[torch.Tensor]:
    """Take a run to its end, from where its log ends; the final weights."""
    tensors, optimizer = make(mode)
    if log is not None and log.exists():
        optimizer.resume_log(log)
    else:
        optimizer.warm_start([noise.LAYER_SCORING, 2**32 - 1], {"a": [1e-3, -2e-3], "c": [0, 1e-3]})
        if log is not None:
            optimizer.start_log(log)

    def closure() -> torch.Tensor | float:
        loss = sum(
            ((tensor * 1.0).float() - optimizer.steps).square().sum() for tensor in tensors.values()
        )
        return loss if optimizer.steps else math.inf

    while optimizer.steps < STEPS:
        optimizer.step(closure)
    return [tensor.detach() for tensor in tensors.values()]


def child(mode: str, log: Path) -> int:
    """Fork a life of the run; its process id."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        torch.save(live(mode, log), log.with_suffix(".new"))
        log.with_suffix(".new").rename(log.with_suffix(".pt"))
        status = 0
    finally:
        os._exit(status)


def main() -> int:
    """Kill until there were enough kills in every mode; 0 if all runs ended as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    modes = sorted(ARITHMETICS)
    killed, finished = dict.fromkeys(modes, 0), dict.fromkeys(modes, 0)
    expected, seconds = {}, {}
    live(modes[0], None)  # the first life is long
    for mode in modes:
        started = time.perf_counter()
        expected[mode] = live(mode, None)
        seconds[mode] = time.perf_counter() - started
    number = 0
    while min(killed.values()) < options.kills / len(modes):
        mode = min(modes, key=killed.get)
        log = options.folder / f"{mode}-{number}.zolog"
        number += 1
        while not log.with_suffix(".pt").exists():
            life = child(mode, log)
            time.sleep(chance.uniform(0.0, seconds[mode]))
            os.kill(life, signal.SIGKILL)
            _, status = os.waitpid(life, 0)
            if os.WIFSIGNALED(status):
                killed[mode] += 1
            elif os.waitstatus_to_exitcode(status):
                print(f"{mode}: a life failed", file=sys.stderr)
                return 1
        for found, wanted in zip(torch.load(log.with_suffix(".pt")), expected[mode], strict=True):
            if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
                print(f"{mode}: {log} ended with other weights", file=sys.stderr)
                return 1
        finished[mode] += 1
    print(f"{sum(killed.values())} kills, {sum(finished.values())} runs: {killed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
