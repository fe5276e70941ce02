"""Replay of a Hugging Face directory into a new one, in the memory of a piece of a tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from zo_kernels.files import replace_folder
from zo_kernels.progress import Progress
from zo_kernels.replay.apply import CHUNK
from zo_kernels.replay.log import Log
from zo_kernels.replay.walk import Walk
from zo_kernels.replay.weights import DTYPES, INDEX, WeightFolder, copy_bytes, write_file_header

# Weights in other formats would be those of the base.
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay made.

    Attributes:
        out: the new directory.
        steps: steps replayed.
        fingerprint: of the logged parameters after them.
        marks: step counts of the log's marks that were found again.
        notes: what else there is to say, as sentences.
    """

    out: Path
    steps: int
    fingerprint: str
    marks: tuple[int, ...]
    notes: tuple[str, ...]


def replay_directory(
    base: str | os.PathLike[str],
    log: Log,
    out: str | os.PathLike[str],
    *,
    stop: int | None = None,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Replayed:
    """Write the model of a log: its base with the first ``stop`` steps applied, bit for bit.

    Tensors that the log does not name are copied as bytes, other files as they are; weights in
    other formats are left out. Logged tensors of another dtype than the log's are cast to it, as
    they were when the run loaded them, and config.json follows if all logged dtypes are one. The
    memory is that of a piece of 16 M elements, whatever the model. The new directory appears
    complete or not at all.

    Args:
        base: Hugging Face directory with safetensors, in one file or several.
        log: from ``read_log``.
        out: the new directory; absent, empty or an earlier checkpoint.
        stop: steps; all without.
        backend: as for ``ops.advance_``.
        device: where the pieces are computed.
        chunk: updates in one pass; any number gives the same bits.
        progress: called as progress(text, done, total).

    Raises:
        FileNotFoundError, FileExistsError, OSError, ValueError: naming the file, parameter or
            option, what was expected and what came; so also where the base is not the log's
            (checked before anything is written) or a mark of the log is not found again.
    """
    source, target = Path(base), Path(out)
    stop = log.stop(stop)
    _check_apart(target, source, log.path)
    folder = WeightFolder(source)
    walk = Walk(
        folder, log, stop, backend=backend, device=device, chunk=chunk, progress=progress
    )  # fmt: skip
    with replace_folder(target) as work:
        walk.check_base()
        size = _write_weights(walk, work)
        for check in walk.checks():
            if not check.ok:
                raise ValueError(
                    f"{check.what}, after {check.steps} steps: expected fingerprint "
                    f"{check.expected}, got {check.found}"
                )
        notes = _write_config(walk, work, size) + _copy_others(folder, work)
    if progress is not None:
        progress(f"{stop} steps", 1, 1)
    if log.torn:
        notes.append(f"the log ends with {log.torn} bytes of an incomplete record, left out")
    if log.header.base is None:
        notes.append("the log has no fingerprint of its base, which was taken at its word")
    marks = tuple(dict.fromkeys(mark.steps for mark in walk.marks))
    return Replayed(target, stop, walk.at(stop), marks, tuple(notes))


def _check_apart(out: Path, base: Path, log: Path) -> None:
    """The new directory holds neither the base nor the log, and is not in the base."""
    here, base, log = out.resolve(), base.resolve(), log.resolve()
    for name, other in (("base", base), ("log", log)):
        if here in (other, *other.parents):
            raise ValueError(f"out: expected a directory apart from the {name}, got {out}")
    if base in here.parents:
        raise ValueError(f"out: expected a directory outside the base, got {out}")


def _write_weights(walk: Walk, work: Path) -> int:
    """All safetensors files, each from its first byte to its last; returns the tensors' bytes."""
    jobs = {entry.name: (group, member) for group, member, _, entry in walk.places}
    for group, member, _, entry in walk.places:
        twin = walk.folder.twin(entry)
        if twin is not None:
            jobs.setdefault(twin.name, (group, member))
    groups = walk.log.header.groups
    dtypes = {name: groups[group][member].torch_dtype for name, (group, member) in jobs.items()}
    size = 0
    for file in walk.folder.files:
        with (work / file.path.name).open("wb") as stream:
            size += write_file_header(stream, file, dtypes)
            for entry in file.entries:
                if entry.name in jobs:
                    walk.tensor(*jobs[entry.name], entry, _writer(stream))
                else:
                    copy_bytes(entry, stream)
    return size


def _writer(stream: BinaryIO) -> Callable[[Tensor], None]:
    def write(piece: Tensor) -> None:
        stream.write(memoryview(piece.cpu().view(torch.uint8).numpy()))

    return write


def _write_config(walk: Walk, work: Path, size: int) -> list[str]:
    """The index and the configuration, where they change; returns notes."""
    folder = walk.folder
    if folder.index is not None:
        metadata = {**folder.index.get("metadata", {}), "total_size": size}
        index = {**folder.index, "metadata": metadata}
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    casts = {
        entry.dtype
        for _, _, parameter, entry in walk.places
        if DTYPES[entry.dtype] != parameter.torch_dtype
    }
    if not casts:
        return []
    names = sorted({parameter.dtype for _, _, parameter, _ in walk.places})
    if len(names) == 1 and folder.config:
        config = json.loads(json.dumps(folder.config))
        for table in (config, config.get("text_config") or {}):
            for key in ("dtype", "torch_dtype"):
                if key in table:
                    table[key] = names[0]
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = names[0]
        text = json.dumps(config, indent=2) + "\n"
        (work / "config.json").write_text(text, encoding="utf-8")
    return [
        f"logged tensors are {', '.join(names)} as in the run, cast from {', '.join(sorted(casts))}"
    ]


def _copy_others(folder: WeightFolder, work: Path) -> list[str]:
    """Files that the new directory does not have yet; returns notes."""
    left = []
    for path in sorted(folder.directory.rglob("*")):
        place = path.relative_to(folder.directory)
        hidden = any(part.startswith(".") for part in place.parts)
        target = work / place
        if hidden or not path.is_file() or target.exists():
            continue
        if path.name.removesuffix(".index.json").endswith(_OTHER_WEIGHTS):
            left.append(str(place))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return [f"weights of the base in other files were left out: {', '.join(left)}"] if left else []
