"""Checks the published vectors and every kernel's bits on this machine's devices, with speeds.

Results are records, each a JSON object with a ``kind``:

    unavailable  device, backend, reason: it is not here, and nothing is wrong
    vectors      backend, isa, device, op, bits
    kernel       backend, isa, device, case, dtype, elements, bytes_per_element, bits, speed
    rival        device, case, dtype, elements, bytes_per_element, speed, reason (of no speed)
    failure      device, reason: some of its records are missing

``bits`` has a ``verdict``: "ok", "wrong bits" (with the first index, expected and got in
hexadecimal) or "failed" (with the reason). ``speed`` is described at ``measure.speed``.

Each device has a process of its own, so that a crash there leaves the records so far and those of
the others: ``python -m zo_kernels.pipeline.verify DEVICE SETTINGS`` prints its records.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from zo_kernels.pipeline import rivals
from zo_kernels.pipeline.cases import ALIGNMENT, CASES, Reference
from zo_kernels.pipeline.measure import COMPILED_SHARE, Record, check_vectors, explained, measure
from zo_kernels.pipeline.rooms import INTERPRETER, full_elements, rooms_of

#: Takes a line of progress.
Tell = Callable[[str], None]
GPU_ROUNDS, OTHER_ROUNDS = 21, {"cpu": 5, INTERPRETER: 2}


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        elements: of full-size buffers; None: by device. The interpreter has its own.
        rounds: at most, of each table of times; None: by device.
        seconds: after which a table begins no further round, once it has three.
        cases: names of cases; None: all.
        process_seconds: after which a device's process is stopped.
    """

    elements: int | None = None
    rounds: int | None = None
    seconds: float = 6.0
    cases: Sequence[str] | None = None
    process_seconds: float = 1200.0

    def check(self) -> None:
        """ValueError naming a setting that makes no sense."""
        if self.elements is not None and self.elements < ALIGNMENT:
            raise ValueError(f"elements: expected at least {ALIGNMENT}, got {self.elements}")
        if self.rounds is not None and self.rounds < 2:
            raise ValueError(f"rounds: expected at least 2, got {self.rounds}")
        for name in self.cases or ():
            if name not in (case.name for case in CASES):
                raise ValueError(f"cases: expected names of CASES, got {name!r}")


def verify(names: Sequence[str], settings: Settings) -> list[Record]:
    """The records of devices, named as ``rooms.devices`` does, in their order."""
    return [record for name in names for record in verify_apart(name, settings)]


def whole(device: str, settings: Settings, tell: Tell) -> Iterator[Record]:
    """``verify_device``; an error becomes the last record."""
    try:
        yield from verify_device(device, settings, tell)
    except Exception as error:
        yield {"kind": "failure", "device": device, **explained(error)}


def verify_device(device: str, settings: Settings, tell: Tell) -> Iterator[Record]:
    """The records of one device, made in this process, as they come."""
    elements = settings.elements or full_elements(device)
    if device == INTERPRETER:
        elements = full_elements(device)
    elements = elements // ALIGNMENT * ALIGNMENT
    rooms, missing = rooms_of(device, elements)
    for backend, reason in missing.items():
        yield {"kind": "unavailable", "device": device, "backend": backend, "reason": reason}
    if not rooms:
        return
    for room in rooms:
        tell(f"{room}: published vectors")
        yield from check_vectors(room)
    cases = [c for c in CASES if settings.cases is None or c.name in settings.cases]
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    rounds = settings.rounds or OTHER_ROUNDS.get(device, GPU_ROUNDS)
    reason = None
    if device != INTERPRETER:
        tell(f"{device}: compiling MeZO's loop")
        count = elements // COMPILED_SHARE if device == "cpu" else elements
        reason = rivals.compile_reason(device, count, dtypes)
    reference = Reference()
    for dtype in dtypes:
        tell(f"{device}: bits and times of {dtype}")
        try:
            yield from measure(
                rooms,
                [case for case in cases if case.dtype == dtype],
                elements,
                reference,
                rounds=rounds,
                seconds=settings.seconds,
                compile_reason=reason,
            )
        except Exception as error:  # it may be memory: other dtypes go on
            yield {"kind": "failure", "device": device, "dtype": str(dtype), **explained(error)}


def verify_apart(device: str, settings: Settings) -> list[Record]:
    """``verify_device`` in a process of its own; what it had found stays if that dies."""
    env = rivals.worker_environment(interpret=device == INTERPRETER)
    limit = settings.process_seconds
    try:
        done = subprocess.run(
            worker_command(device, settings), env=env, stdout=subprocess.PIPE, timeout=limit
        )
        output, ending = done.stdout, _ending(done.returncode)
    except subprocess.TimeoutExpired as error:
        output, ending = error.stdout or b"", f"its process was stopped after {limit:g} s"
    lines = output.decode().split("\n")[:-1]  # what follows the last line's end is torn
    records = [json.loads(line) for line in lines]
    if ending:
        records.append({"kind": "failure", "device": device, "reason": ending})
    return records


def _ending(status: int) -> str | None:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}" if status else None


def worker_command(device: str, settings: Settings) -> list[str]:
    """The process that works on a device."""
    arguments = [device, json.dumps(asdict(settings))]
    return [sys.executable, "-m", "zo_kernels.pipeline.verify", *arguments]


def problems(records: Sequence[Record]) -> list[str]:
    """One sentence for each verdict that is not "ok" and each part that is missing."""
    sentences = []
    for record in records:
        verdict = record.get("bits", {}).get("verdict", "ok")
        if record["kind"] == "failure":
            sentences.append(f"{record['device']}: {record['reason']}")
        elif verdict != "ok":
            room = " ".join(filter(None, (record["backend"], record["isa"])))
            what = record.get("case") or f"{record['op']} of the published vectors"
            sentences.append(f"{room} on {record['device']}, {what}: {describe(record['bits'])}")
    return sentences


def describe(bits: Record) -> str:
    """A verdict as words: "ok", or what is wrong."""
    if bits["verdict"] == "wrong bits":
        return "wrong bits at index {index}, expected {expected}, got {got}".format(**bits)
    return "ok" if bits["verdict"] == "ok" else f"failed: {bits['reason']}"


def line_writer() -> Tell:
    """Prints lines on standard error, with rich where it is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return lambda line: print(line, file=sys.stderr, flush=True)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    return lambda line: console.print(line, style="dim")


def _worker() -> int:
    device, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    # Only records go to the pipe: what libraries print on standard output goes to the terminal.
    # Where a kernel's arithmetic wraps on purpose, numpy would warn of it in the interpreter.
    with os.fdopen(os.dup(1), "w") as pipe, np.errstate(over="ignore"):
        os.dup2(2, 1)
        try:
            for record in whole(device, settings, line_writer()):
                print(json.dumps(record), file=pipe, flush=True)
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
