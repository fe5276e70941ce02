"""The tensors of a directory, one after the other through the steps of a log."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zo_kernels.checks import expect_device
from zo_kernels.noise import canonical_name
from zo_kernels.progress import Progress
from zo_kernels.replay.apply import CHUNK, Replica, chunks, expect_base
from zo_kernels.replay.fingerprint import TensorDigest, combine_digests
from zo_kernels.replay.log import Log
from zo_kernels.replay.updates import logged_updates
from zo_kernels.replay.weights import DTYPES, Entry, WeightFolder, pieces


@dataclass(frozen=True, slots=True)
class Check:
    """A fingerprint of a log or a model, and the one that replay gives."""

    what: str
    steps: int
    expected: str
    found: str

    @property
    def ok(self) -> bool:
        """Whether they are the same."""
        return self.expected == self.found


class Walk:
    """One tensor after the other through the steps of a log, with fingerprints on the way."""

    def __init__(
        self,
        folder: WeightFolder,
        log: Log,
        stop: int,
        *,
        backend: str | None,
        device: torch.device | str,
        chunk: int,
        progress: Progress | None,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self.folder, self.log, self.stop = folder, log, stop
        self.marks = [mark for mark in log.marks if mark.steps <= stop]
        self.counts = sorted({stop, *(mark.steps for mark in self.marks)})
        self.digests: dict[int, dict[str, bytes]] = {count: {} for count in self.counts}
        self._backend, self._chunk = backend, chunk
        self._device = expect_device("device", device)
        #: (group, member, parameter, tensor of the directory) of all that is logged.
        self.places = [
            (group, member, parameter, folder.find(parameter))
            for group, parameters in enumerate(log.header.groups)
            for member, parameter in enumerate(parameters)
        ]
        owners: dict[Entry, str] = {}
        for _, _, parameter, entry in self.places:
            other = owners.setdefault(entry, parameter.name)
            if other != parameter.name:
                raise ValueError(
                    f"'{parameter.name}' and '{other}': expected two tensors, got one, "
                    f"'{entry.name}' in {entry.path}"
                )
        self._progress = progress
        self._done = 0.0
        self._total = max(1, sum(p.numel for p in log.header.parameters()) * (1 + stop))

    def check_base(self) -> None:
        """Refuse another model than the log's."""
        if self.log.header.base is not None:
            found = base_fingerprint(self.folder, self.log, self._advance)
            expect_base(self.log.header, found, str(self.folder.directory))

    def tensor(
        self, group: int, member: int, entry: Entry, write: Callable[[Tensor], None] | None = None
    ) -> None:
        """Replay one tensor; note its digests, and hand it piece by piece to ``write``."""
        parameter = self.log.header.groups[group][member]
        text = canonical_name(parameter.name)
        if DTYPES[entry.dtype] != parameter.torch_dtype:
            text += f" (cast from {entry.dtype} to the log's {parameter.dtype})"
        segments, begin = [], 0
        for count in self.counts:
            updates = logged_updates(self.log, group, begin, count, [member])
            segments.append((count, begin, list(chunks(updates, self._chunk))))
            begin = count
        digests = {
            count: TensorDigest(parameter.name, parameter.torch_dtype, parameter.shape)
            for count in self.counts
        }
        for first, read in pieces(entry, parameter.torch_dtype):
            piece = read.to(self._device)
            replica = Replica(
                self.log.header, [piece], [parameter], offsets=[first], backend=self._backend
            )
            for count, start, parts in segments:
                for part in parts:
                    replica.advance_([update for _, update in part])
                    self._advance(text, piece.numel() * (part[-1][0] + 1 - start))
                    start = part[-1][0] + 1
                self._advance(text, piece.numel() * (count - start))
                replica.settle_()
                digests[count].update(piece)
            if write is not None:
                write(piece)
        for count, digest in digests.items():
            self.digests[count][parameter.name] = digest.digest()

    def checks(self) -> list[Check]:
        """The log's marks against what the walk came by."""
        return [
            Check(f"mark {number} of the log", mark.steps, mark.fingerprint, self.at(mark.steps))
            for number, mark in enumerate(self.marks)
        ]

    def at(self, steps: int) -> str:
        """The fingerprint after so many steps."""
        return combine_digests(self.digests[steps])

    def _advance(self, text: str, amount: float) -> None:
        self._done = min(self._done + amount, self._total)
        if self._progress is not None:
            self._progress(text, self._done, self._total)


def verify(
    base: str | os.PathLike[str],
    log: Log,
    *,
    model: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> list[Check]:
    """Replay without writing: does it give the fingerprints of the marks, and of a model?

    Args:
        model: directory of the refined model, of all steps; its weights are cast to the dtypes of
            the log.
        base, log, backend, device, chunk, progress: as for ``replay_directory``.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``replay_directory``; not where a fingerprint
            differs, which the checks say.
    """
    folder = WeightFolder(Path(base))
    refined = None if model is None else WeightFolder(Path(model))
    walk = Walk(
        folder, log, log.stop(), backend=backend, device=device, chunk=chunk, progress=progress
    )  # fmt: skip
    walk.check_base()
    for group, member, _, entry in walk.places:
        walk.tensor(group, member, entry)
    if progress is not None:
        progress(f"{walk.stop} steps", 1, 1)
    found = walk.checks()
    if refined is not None:
        expected = base_fingerprint(refined, log)
        found.append(Check(f"model {model}", walk.stop, expected, walk.at(walk.stop)))
    return found


def base_fingerprint(
    folder: WeightFolder, log: Log, advance: Callable[[str, float], None] | None = None
) -> str:
    """The fingerprint of a log's parameters as a directory has them, in the dtypes of the log."""
    digests = {}
    for parameter in log.header.parameters():
        entry = folder.find(parameter)
        digest = TensorDigest(parameter.name, parameter.torch_dtype, parameter.shape)
        for _, piece in pieces(entry, parameter.torch_dtype):
            digest.update(piece)
            if advance is not None:
                advance(f"checking {folder.directory.name}", piece.numel())
        digests[parameter.name] = digest.digest()
    return combine_digests(digests)
