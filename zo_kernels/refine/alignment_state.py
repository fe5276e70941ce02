"""The file from which a killed alignment goes on, bit for bit as if nobody had stopped it.

The batches and the noise of a step are pure functions of its number, so besides the float32
weights and the optimizer's state only that number and the time spent are kept. The file is
replaced in one step: a kill while it is written leaves the one before.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zo_kernels.chat import Encoded
from zo_kernels.files import replace_file
from zo_kernels.refine.checkpoint import fingerprint
from zo_kernels.refine.config import RETIRED

if TYPE_CHECKING:
    from zo_kernels.refine.align import AlignConfig
    from zo_kernels.refine.dpo import DPOConfig
    from zo_kernels.refine.preferences import Pair

_KIND = "zo_kernels alignment 1"


def run_identity(
    model: Any, data: Sequence[Encoded | Pair], config: AlignConfig | DPOConfig
) -> dict[str, Any]:
    """What a resumed run must share with its beginning: model, data, options.

    ``seconds`` is free, and so is ``steps`` where no learning rate hangs on it.
    """
    constant = config.schedule == "constant" and config.warmup == 0
    free = ("steps", "seconds") if constant else ("seconds",)
    return {
        "model": fingerprint(model),
        "data": hashlib.sha256(repr([asdict(item) for item in data]).encode()).hexdigest(),
        "options": {name: v for name, v in asdict(config).items() if name not in free},
    }


def write_state(
    path: str | os.PathLike[str],
    identity: dict[str, Any],
    records: Sequence[dict[str, Any]],
    first_order: dict[str, Any],
) -> None:
    """Replace the file.

    Args:
        path: the file.
        identity: see ``run_identity``.
        records: of all steps taken.
        first_order: ``FirstOrder.state()`` after them.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    content = {
        "kind": _KIND,
        "identity": identity,
        "records": list(records),
        "first_order": first_order,
    }
    with replace_file(path) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # torch's writer says where it stopped, not why
            why = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path}: expected a state that can be written, got: {why}") from error


def read_state(
    path: str | os.PathLike[str], identity: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records and the ``FirstOrder.state()`` in a file, whose tensors are read when used.

    Args:
        path: the file.
        identity: of the run that is to go on from it, or None to have a look.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no state of an alignment, or of another run: names what differs.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"resume: expected an unfinished alignment's state {path}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: expected the state of an alignment, got {error}") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ValueError(f"{path}: expected the state of an alignment ({_KIND!r}), got another")
    if identity is not None:
        expect_same(path, content["identity"], identity)
    return content["records"], content["first_order"]


def expect_same(path: Any, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ValueError naming the first difference of two ``run_identity``s, one from a file."""
    for name in {**saved["options"], **own["options"]}:
        was, now = saved["options"].get(name), (RETIRED | own["options"]).get(name)
        if was != now:
            raise ValueError(f"{name}: expected {was!r} as in {path}, got {now!r}")
    for name, what in (("model", "the weights"), ("data", "the examples")):
        if saved[name] != own[name]:
            raise ValueError(f"{name}: expected {what} with which {path} began, got others")
