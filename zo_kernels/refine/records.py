"""JSON-lines records, shared by all long work."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from zo_kernels.files import naming, write_file
from zo_kernels.replay import read_log

_LOSSES = {"loss", "losses_plus", "losses_minus", "clean_loss", "held_out_loss"}


class MetricsLog:
    """Appends one JSON object per line, each flushed as it is written.

    Args:
        path: the file; its folder is made. An existing file is continued after its last whole line,
            or emptied with ``fresh``.
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not fresh:
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)  # an interrupted write
        self._file = self.path.open("w" if fresh else "a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; NaN and infinities become null, which is JSON."""
        with naming(self.path):
            self._file.write(_line(record))
            self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self.path):
            self._file.close()


def write_records(path: str | os.PathLike[str], records: Sequence[dict[str, Any]]) -> None:
    """Replace a JSON-lines file in one step: it holds the old records or all of the new ones."""
    write_file(path, "".join(map(_line, records)))


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a JSON-lines file; a torn last line (an interrupted write) is left out.

    Raises:
        ValueError: a line before the last is not JSON, naming file and line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line!r}") from error
    return records


def logged_records(
    path: str | os.PathLike[str], log: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """The records of the steps in an unfinished refinement's replay log.

    The log is ahead of the records, since it is written before the weights change: of a step whose
    record a kill has cost, what the log says is there. Of several records of a step the last one
    counts. Losses that were not finite, which JSON has as null, are NaN.

    Args:
        path: JSON lines of the run, if there are any.
        log: its replay log.
    """
    known = {r["step"]: r for r in read_records(path)} if Path(path).exists() else {}
    records: list[dict[str, Any]] = []
    for row in read_log(log).steps:
        logged = step_record(row) | {"seconds": records[-1]["seconds"] if records else 0.0}
        records.append(_losses_read(known.get(logged["step"], logged)))
    return records


def step_record(row: np.void) -> dict[str, Any]:
    """What a step's row in a replay log (``Log.steps``) says of it, as its record has it."""
    plus, minus = list(map(float, row["losses_plus"])), list(map(float, row["losses_minus"]))
    return {
        "step": int(row["step"]),
        "losses_plus": plus,
        "losses_minus": minus,
        "lr": list(map(float, row["lr"])),
        "loss": sum(plus + minus) / len(plus + minus),
    }


def _losses_read(record: dict[str, Any]) -> dict[str, Any]:
    """A record with NaN for losses that are null: those were not finite."""
    read = dict(record)
    for name in _LOSSES & record.keys():
        value = record[name]
        read[name] = [_number(x) for x in value] if isinstance(value, list) else _number(value)
    return read


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The value with null for every number that JSON has not: NaN and infinities."""
    if isinstance(value, float) and not (value - value == 0):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
