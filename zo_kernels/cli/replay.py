"""The commands that work with replay logs: replay, and log info, verify and diff."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_kernels.ops import BACKENDS
from zo_kernels.progress import progress_bar
from zo_kernels.refine.records import plain

if TYPE_CHECKING:
    from zo_kernels.replay import Log


def add_commands(commands: Any, make: Any) -> None:
    """Add them to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "replay", _replay, "rebuild a refined model from its base and its log")
    _add_base(command)
    command.add_argument("--log", type=Path, required=True, help="the log of the run")
    command.add_argument("--out", type=Path, required=True, help="folder for the model")
    part = command.add_mutually_exclusive_group()
    part.add_argument("--steps", type=int, metavar="N", help="the first N steps only")
    part.add_argument("--undo", type=int, metavar="N", help="without the last N steps")
    _add_where(command)

    logs = commands.add_parser(
        "log", help="look at replay logs", description="Look at replay logs."
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    command = make(logs, "info", _info, "what a log holds")
    command.add_argument("log", type=Path, metavar="FILE", help="the log")
    command.add_argument("--json", action="store_true", help="machine-readable, with all steps")

    command = make(logs, "verify", _verify, "replay without writing, and compare fingerprints")
    command.add_argument("log", type=Path, metavar="FILE", help="the log")
    _add_base(command)
    command.add_argument("--model", type=Path, help="folder of the model after all steps")
    _add_where(command)

    command = make(logs, "diff", _diff, "what two logs differ in")
    command.add_argument("a", type=Path, metavar="A", help="a log")
    command.add_argument("b", type=Path, metavar="B", help="another one")
    command.add_argument("--json", action="store_true", help="machine-readable")


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", type=Path, required=True, help="Hugging Face directory that the run began with"
    )


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", choices=BACKENDS, help="default: by device")
    command.add_argument("--device", default="cpu", help="torch device; the bits are the same")


def _replay(options: argparse.Namespace) -> None:
    from zo_kernels.replay import replay_directory

    log = _read(options.log)
    count = len(log.steps)
    stop = options.steps
    if options.undo is not None:
        if not 0 <= options.undo <= count:
            raise ValueError(f"undo: expected 0 to {count} steps, got {options.undo}")
        stop = count - options.undo
    with progress_bar("replay") as progress:
        done = replay_directory(
            options.base, log, options.out, stop=stop, backend=options.backend,
            device=options.device, progress=progress,
        )  # fmt: skip
    marks = "no mark to compare it with"
    if done.steps in done.marks:
        marks = "as marked in the log"
    print(f"{done.steps} of {count} steps; model {done.out}")
    print(f"fingerprint {done.fingerprint}, {marks}")
    for note in done.notes:
        print(note)


def _info(options: argparse.Namespace) -> None:
    log = _read(options.log)
    print(json.dumps(_record(log), indent=1) if options.json else _text(log))


def _verify(options: argparse.Namespace) -> None:
    from zo_kernels.replay import verify

    log = _read(options.log)
    if not log.marks and options.model is None:
        raise ValueError(f"{log.path}: expected a mark in it, or --model, got neither")
    with progress_bar("verify") as progress:
        checks = verify(
            options.base, log, model=options.model, backend=options.backend,
            device=options.device, progress=progress,
        )  # fmt: skip
    for check in checks:
        verdict = "as replayed" if check.ok else f"DIFFERENT: replay gives {check.found}"
        print(f"{check.what}, after {check.steps} steps: {check.expected}, {verdict}")
    wrong = [check.what for check in checks if not check.ok]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not the weights that replay gives")


def _diff(options: argparse.Namespace) -> None:
    from zo_kernels.replay import diff

    found = diff(_read(options.a), _read(options.b))
    if options.json:
        record = {
            "header": found.header, "steps": found.steps, "first": found.first,
            "losses": found.losses, "same_run": found.same_run,
        }  # fmt: skip
        print(json.dumps(plain(record), indent=1))
        return
    for field, (a, b) in found.header.items():
        print(f"{field}: {a} | {b}")
    a, b = found.steps
    print(f"steps: {a} | {b}" if a != b else f"steps: {a} in both")
    if found.losses is None:
        print("no step differs" if a == b else f"the first {min(a, b)} steps are the same")
    else:
        print(f"first step that differs: {found.first}")
        for sign, name in (("l+", "losses_plus"), ("l-", "losses_minus")):
            print(f"  {sign} {found.losses[0][name]} | {found.losses[1][name]}")


def _read(path: Path) -> Log:
    from zo_kernels.replay import read_log

    log = read_log(path)
    if log.torn:
        print(
            f"{path}: the last {log.torn} bytes are an incomplete record, left out; "
            f"{len(log.steps)} whole steps remain",
            file=sys.stderr,
        )
    return log


def _record(log: Log) -> dict[str, Any]:
    """All that a log holds, as JSON has it; numbers that are not finite become null."""
    rows = [
        {name: log.steps[name][n].tolist() for name in log.steps.dtype.names if name != "flags"}
        for n in range(len(log.steps))
    ]
    for row, skipped in zip(rows, log.skipped.tolist(), strict=True):
        row["skipped"] = skipped
    return plain(
        {
            "path": str(log.path),
            "size": log.size,
            "torn": log.torn,
            "header": json.loads(log.header.encode()),
            "marks": [{"steps": m.steps, "fingerprint": m.fingerprint} for m in log.marks],
            "steps": rows,
        }
    )


def _text(log: Log) -> str:
    header = log.header
    parameters = list(header.parameters())
    count, skipped = len(log.steps), int(log.skipped.sum())
    lines = [
        f"{log.path}: {count} steps ({skipped} skipped), {log.size} bytes",
        f"made {header.created} by zo_kernels {header.package}, noise spec {header.noise_spec}",
        f"seed {header.seed}, {header.queries} queries a step, {header.distribution} directions",
        f"mode {header.mode}, {header.arithmetic} arithmetic",
        f"{len(parameters)} parameters in {len(header.groups)} groups, "
        f"{sum(p.numel for p in parameters):,} elements, "
        f"{', '.join(sorted({p.dtype for p in parameters}))}",
        f"base {header.base or 'without fingerprint'}",
    ]
    if header.user is not None:
        lines.append(f"user {json.dumps(header.user)}")
    taken = (~log.skipped).nonzero()[0]
    if len(taken):
        means = [
            float((log.steps["losses_plus"][n] + log.steps["losses_minus"][n]).mean() / 2)
            for n in (taken[0], taken[-1])
        ]
        lines.append(f"mean loss {means[0]:.4f} in step {taken[0]}, {means[1]:.4f} in {taken[-1]}")
    lines += [f"mark after {mark.steps} steps: {mark.fingerprint}" for mark in log.marks]
    return "\n".join(lines)
