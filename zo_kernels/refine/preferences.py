"""Preference pairs: of two answers to a prompt, the one that is wanted and the one that is not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_kernels.chat import json_rows, text_field

#: Which of PKU-SafeRLHF's two judgements says what is wanted, and their columns.
PREFERRED = {"safer": "safer_response_id", "better": "better_response_id"}


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, the answer that is wanted, and one that is not."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | os.PathLike[str], *, preferred: str = "safer") -> list[Pair]:
    """Read preference pairs from a UTF-8 JSON Lines file, in file order.

    Each line is an object with the strings ``prompt``, ``chosen`` and ``rejected``, or one of
    PKU-SafeRLHF: ``prompt``, ``response_0``, ``response_1`` and, as 0 or 1, ``safer_response_id``
    and ``better_response_id``. Other fields are ignored, and so are blank lines.

    Args:
        path: the file.
        preferred: which judgement of PKU-SafeRLHF chooses, "safer" or "better".

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is malformed or there is no pair; the message starts with
            ``file:line:`` and names the field, what was expected and what came.
    """
    if preferred not in PREFERRED:
        raise ValueError(f"preferred: expected one of {list(PREFERRED)}, got {preferred!r}")
    name = os.fspath(path)
    rows = json_rows(Path(path).read_bytes(), name)
    pairs = [_pair(row, PREFERRED[preferred], where) for where, row in rows]
    if not pairs:
        raise ValueError(f"{name}:1: whole file: expected at least one pair, got none")
    return pairs


def _pair(row: Mapping[str, Any], column: str, where: str) -> Pair:
    prompt = text_field(row, "prompt", where)
    if "response_0" not in row and "response_1" not in row:
        return Pair(prompt, text_field(row, "chosen", where), text_field(row, "rejected", where))
    answers = [text_field(row, f"response_{i}", where) for i in (0, 1)]
    chosen = row.get(column)
    if isinstance(chosen, bool) or chosen not in (0, 1):
        got = repr(chosen) if column in row else "no such field"
        raise ValueError(f"{where}: field {column!r}: expected 0 or 1, got {got}")
    return Pair(prompt, answers[int(chosen)], answers[1 - int(chosen)])
