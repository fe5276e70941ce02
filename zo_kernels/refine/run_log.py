"""What a refinement's replay log says of its run, and what a run that goes on with it needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_kernels.chat import Encoded
from zo_kernels.noise import canonical_name
from zo_kernels.refine.config import RETIRED, RefineConfig
from zo_kernels.refine.held_out import EarlyStop
from zo_kernels.replay import Log, WarmStart, read_log, replay_


def description(config: RefineConfig, examples: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
    """What a log's header has under ``user``, beside the rate: the options, the examples' digests.

    Options that a run may change when it goes on (``seconds``; ``steps`` where neither a schedule
    nor a rate that is measured depends on them) are left out.

    Args:
        config: of the run.
        examples: by the name of their use; no digest of an empty use.
    """
    constant = config.schedule == "constant" and config.lr != "auto"
    free = ("steps", "seconds") if constant else ("seconds",)
    options = {name: value for name, value in asdict(config).items() if name not in free}
    options["layers"] = options["layers"] and list(options["layers"])  # as JSON has it
    digests = {name: _digest(encoded) for name, encoded in examples.items() if encoded}
    return {"options": options, **digests}


def read_run(path: Path) -> Log:
    """The log of a refinement.

    Raises:
        ValueError: it is another one's.
    """
    log = read_log(path)
    if not isinstance(log.header.user, dict) or "options" not in log.header.user:
        raise ValueError(f"{path}: expected the log of a refinement, got another one")
    return log


def check_run(path: Path, log: Log, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, which names what differs, if a log is not of the run of a description."""
    logged = log.header.user
    # An option that an older version did not know had its default; steps that it left out are free.
    defaults = {name: value for name, value in asdict(RefineConfig()).items() if name != "steps"}
    taken = defaults | logged["options"]
    for name, value in {**RETIRED, **wanted["options"]}.items():
        if name in taken and taken[name] != value:
            raise ValueError(f"{name}: expected {taken[name]!r} as in {path}, got {value!r}")
    for name in wanted.keys() - {"options"}:
        if logged.get(name) != wanted[name]:
            raise ValueError(f"{name}: expected the examples with which {path} began, got others")


def logged_rate(path: Path, log: Log) -> float:
    """The learning rate before the schedule that a log's run has measured.

    Raises:
        ValueError: the log has none.
    """
    lr = log.header.user.get("lr")
    if not isinstance(lr, float):
        raise ValueError(f"lr: expected the rate that was measured in {path}, got {lr!r}")
    return lr


def check_warm_start(path: Path, log: Log, warm: WarmStart | None) -> None:
    """Raise ValueError if a run would not begin with the update from scores that a log has."""
    logged = log.header.warm_start
    if (logged is None) != (warm is None):
        had, got = ("those", "none") if warm is None else ("none", "some")
        raise ValueError(f"scores: expected {had} as {path} began, got {got}")
    if logged is not None and _canonical(logged) != _canonical(warm):
        raise ValueError(f"scores: expected those with which {path} began, got others")


def _canonical(warm: WarmStart) -> tuple[Any, ...]:
    """What tells one warm start from another, whatever wraps the model."""
    return warm.directions, {canonical_name(n): row for n, row in warm.scales.items()}


def recall(
    early_stop: EarlyStop,
    log: Log,
    parameters: Mapping[str, Tensor],
    earlier: Sequence[Mapping[str, Any]],
    every: int,
) -> None:
    """Let early stopping know of the steps of a log, and of the best weights among them.

    The measurement after the last step may be missing: the run ended before its record was there.

    Args:
        early_stop: which knows of the weights before the first step alone.
        log: of the run that goes on.
        parameters: those with which it began, by name; not written.
        earlier: the records of its steps.
        every: steps between two measurements.

    Raises:
        ValueError: another measurement is missing.
    """
    done = len(log.steps)
    losses = {r["step"] + 1: r["held_out_loss"] for r in earlier if "held_out_loss" in r}
    weights = {name: p.detach().clone() for name, p in parameters.items()} if done else {}
    state, at = None, 0
    for steps in range(every, done + 1, every):
        if steps not in losses:
            if steps == done:
                break
            raise ValueError(
                f"earlier: expected the held-out loss after {steps} steps, which early "
                "stopping needs to go on, got none"
            )
        loss = math.nan if losses[steps] is None else float(losses[steps])  # null in JSON
        if loss < early_stop.best:
            state, at = replay_(weights, log, start=at, stop=steps, state=state), steps
        early_stop.note(steps, loss, weights)


def _digest(encoded: Sequence[Encoded]) -> str:
    """A fingerprint of examples."""
    return hashlib.sha256(repr([asdict(item) for item in encoded]).encode()).hexdigest()
