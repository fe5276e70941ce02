"""Writing a log: each record is on the disk before the run goes on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import numpy as np

from zo_kernels.checks import FLOAT32_MAX
from zo_kernels.files import sync, write_file
from zo_kernels.replay.header import Header, check_fingerprint
from zo_kernels.replay.log import (
    MARK,
    MARK_PAYLOAD,
    SKIPPED,
    STEP,
    Mark,
    encode_header,
    encode_record,
    read_log,
    step_dtype,
)


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What a step did to one parameter group.

    Attributes:
        lr, eps: of the step.
        decay: 1 - lr * weight_decay.
        coefficients: one per query, -lr * g_q / queries.
    """

    lr: float
    eps: float
    decay: float
    coefficients: Sequence[float]


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it is logged.

    Attributes:
        step: its number, from 0.
        losses_plus, losses_minus: one per query; fewer in a skipped step, the rest becomes NaN.
        groups: one entry per parameter group of the header.
        skipped: whether no update was made; coefficients and decays count for nothing then.
    """

    step: int
    losses_plus: Sequence[float]
    losses_minus: Sequence[float]
    groups: Sequence[GroupStep]
    skipped: bool = False


class LogWriter:
    """Makes a log and appends to it; see ``zo_kernels.replay.log`` for the format.

    Each record is one write and one fsync. A failed one is taken back: the file ends with its last
    whole record, the error names the file, and the writer can go on.

    Args:
        path: a new file; its folder is made.
        header: ``package`` and ``created`` are set where they are None.

    Attributes:
        path: of the file.
        header: as the file has it.
        steps: number of steps in the file.
        torn: bytes of an incomplete record that ``resume`` cut off.

    Raises:
        FileExistsError: there is such a file.
        OSError: it cannot be written; then there is none.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        from zo_kernels import __version__

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        header = replace(
            header, package=header.package or __version__, created=header.created or now
        )
        data, seed = encode_header(header)
        target = Path(path)
        _create(target, data)
        self._open(target, header, seed, len(data), 0, 0)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], header: Header) -> LogWriter:
        """Go on with a log after its last whole record; a torn tail is cut off.

        Args:
            header: of the run that goes on; see ``Header.check_continues``.

        Raises:
            ValueError: the header is of another run, naming the field, what was expected and what
                the file has; or the file is damaged. Nothing has been written then.
        """
        log = read_log(path)
        try:
            header.check_continues(log.header)
        except ValueError as error:
            raise ValueError(f"{log.path}: not the log of this run: {error}") from error
        writer = cls.__new__(cls)
        writer._open(log.path, log.header, log.checksum, log.size, len(log.steps), log.torn)
        writer._mark = log.marks[-1] if log.marks else None
        writer._cut()
        return writer

    def _open(self, path: Path, header: Header, seed: int, end: int, steps: int, torn: int) -> None:
        self.path, self.header, self.steps, self.torn = path, header, steps, torn
        self._seed, self._end, self._dirty = seed, end, torn > 0
        self._layout = step_dtype(header.queries, len(header.groups))
        self._units = [max(float(p.unit) for p in group) for group in header.groups]
        self._mark: Mark | None = None  # the last one in the file
        self._file = path.open("ab", buffering=0)

    def write_step(self, step: Step) -> None:
        """Append a step and bring it to the disk.

        Raises:
            ValueError: it is not the next one, or does not fit the header; nothing is written.
            OSError: it could not be written; the file is as before.
        """
        queries, groups = self.header.queries, self.header.groups
        if step.step != self.steps:
            raise ValueError(f"{self.path}: expected step {self.steps}, got {step.step}")
        _expect_count("groups", step.groups, len(groups))
        row = np.zeros((), self._layout)
        row["step"], row["flags"] = step.step, SKIPPED if step.skipped else 0
        for name in ("losses_plus", "losses_minus"):
            losses = list(getattr(step, name))
            if step.skipped:
                losses += [math.nan] * (queries - len(losses))
            _expect_count(name, losses, queries)
            row[name] = losses
        for number, group in enumerate(step.groups):
            _expect_count(f"groups[{number}].coefficients", group.coefficients, queries)
            numbers = [group.lr, group.eps, group.decay, *group.coefficients]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"groups[{number}]: expected finite numbers, got {group}")
            # What no operation would take must not be in a log.
            scales = [self._units[number] * c for c in group.coefficients]
            if max(map(abs, (group.decay, *scales))) > FLOAT32_MAX and not step.skipped:
                raise ValueError(
                    f"groups[{number}]: expected decay and unit * coefficients in the range of "
                    f"float32, got {group} with units up to {self._units[number]}"
                )
            row["lr"][number], row["eps"][number] = group.lr, group.eps
            row["decay"][number], row["coefficients"][number] = group.decay, group.coefficients
        self._append(STEP, row.tobytes())
        self.steps += 1

    def write_mark(self, fingerprint: str) -> None:
        """Append the fingerprint of the logged parameters after the steps, unless it is there.

        Raises:
            ValueError: it is no fingerprint.
            OSError: it could not be written; the file is as before.
        """
        digest = bytes.fromhex(check_fingerprint("fingerprint", fingerprint))
        mark = Mark(self.steps, fingerprint)
        if mark != self._mark:
            self._append(MARK, MARK_PAYLOAD.pack(self.steps, digest))
            self._mark = mark

    def drop_after(self, steps: int) -> None:
        """Take back the steps from number ``steps`` on, and the marks behind them.

        Raises:
            ValueError: there are fewer; nothing has been written then.
            OSError: the file could not be shortened.
        """
        if not 0 <= steps <= self.steps:
            raise ValueError(f"{self.path}: expected 0 to {self.steps} steps, got {steps}")
        marks = read_log(self.path).marks
        kept = [mark for mark in marks if mark.steps <= steps]
        sizes = (
            len(encode_record(STEP, bytes(self._layout.itemsize), self._seed)),
            len(encode_record(MARK, bytes(MARK_PAYLOAD.size), self._seed)),
        )
        self._end -= (self.steps - steps) * sizes[0] + (len(marks) - len(kept)) * sizes[1]
        self.steps, self._dirty = steps, True
        self._mark = kept[-1] if kept else None
        self._cut()

    def close(self) -> None:
        """Close the file; it can be resumed."""
        self._file.close()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, kind: int, payload: bytes) -> None:
        record = encode_record(kind, payload, self._seed)
        if self._dirty:
            self._cut()
        number = self._file.fileno()
        size = os.fstat(number).st_size
        if size != self._end:
            raise OSError(
                f"{self.path}: expected {self._end} bytes, found {size}: another process writes "
                "this log"
            )
        try:
            written = os.write(number, record)
            while written < len(record):  # the disk is full: the next write says why
                written += os.write(number, record[written:])
            os.fsync(number)
        except BaseException as error:
            self._dirty = True
            where = self._take_back()
            if isinstance(error, OSError):
                text = f"{error.strerror}; after {self.steps} steps, {where}"
                raise OSError(error.errno, text, str(self.path)) from error
            raise
        self._end += len(record)

    def _cut(self) -> None:
        """Back to the last whole record."""
        if self._dirty:
            os.ftruncate(self._file.fileno(), self._end)
            os.fsync(self._file.fileno())
            self._dirty = False

    def _take_back(self) -> str:
        """Cut off what a failed write left, now or before the next; says what the log ends with."""
        try:
            self._cut()
        except OSError as error:
            return f"the log ends with a part of a record, which could not be cut off ({error})"
        return "the log ends with its last whole record"


def _create(path: Path, data: bytes) -> None:
    """A new file that holds all of the data, on the disk; FileExistsError if there is one."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"log: expected a new file, got {path}, which exists; resume it")
    try:
        write_file(path, data)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; no log was made", str(path)) from error
    sync(path.parent)


def _expect_count(name: str, values: Sequence[object], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: expected {count}, got {len(values)}")
