"""The tensors of a Hugging Face directory, read piece by piece; larger ones than memory too.

A safetensors file (https://huggingface.co/docs/safetensors) is the length of its header as u64,
the header, which is JSON: name -> dtype, shape, data_offsets (begin and end, counted from the end
of the header), and the tensors' bytes, row-major and little-endian, without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zo_kernels.noise import canonical_name
from zo_kernels.replay.header import Parameter

#: What can be read as the weights of a log.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
#: Elements of a tensor that are in memory at a time; a multiple of a Rademacher span.
PIECE = 1 << 24
INDEX = "model.safetensors.index.json"
_LENGTH = struct.Struct("<Q")
_HEADER_LIMIT = 100_000_000  # as the format's own library has it
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its bytes are [start, stop) of it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    metadata: dict[str, str]
    entries: tuple[Entry, ...]


def read_file_header(path: Path) -> WeightFile:
    """The header of a safetensors file, checked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or cut short; names the file and the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else size
        begin = _LENGTH.size + length
        if begin > size or length > _HEADER_LIMIT:
            raise ValueError(f"{path}: expected a safetensors file, got no whole header")
        try:
            table = json.loads(file.read(length))
            metadata = table.pop("__metadata__", {})
            entries = []
            for name, row in table.items():
                place = [begin + offset for offset in row["data_offsets"]]
                entries.append(Entry(path, name, row["dtype"], tuple(row["shape"]), *place))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected the header of a safetensors file: {error}"
            ) from error
    entries.sort(key=lambda e: (e.start, e.stop))
    place = begin
    for entry in entries:
        dtype = DTYPES.get(entry.dtype)
        right = dtype is None or entry.nbytes == math.prod(entry.shape) * dtype.itemsize
        if entry.start != place or entry.stop < entry.start or not right:
            raise ValueError(
                f"{path}: '{entry.name}': expected bytes from {place} on for {entry.dtype} of "
                f"shape {entry.shape}, got {entry.start} to {entry.stop}"
            )
        place = entry.stop
    if place != size:
        raise ValueError(f"{path}: expected {place} bytes by its header, got {size}")
    return WeightFile(path, metadata, tuple(entries))


class WeightFolder:
    """The weights of a Hugging Face directory.

    Args:
        directory: with model.safetensors, shards and their index, or adapter_model.safetensors.

    Attributes:
        files: the safetensors files.
        index: what the index of the shards holds, None without shards.
        config: what config.json holds; empty without.

    Raises:
        FileNotFoundError, ValueError: naming the file, what was expected and what came.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = _read_json(directory / INDEX)
        names = ["model.safetensors", "adapter_model.safetensors"]
        if self.index is not None:
            names = sorted(set(self.index.get("weight_map", {}).values()))
        else:
            names = [name for name in names if (directory / name).is_file()][:1]
        if not names:
            raise FileNotFoundError(
                f"{directory}: expected a Hugging Face directory with model.safetensors or {INDEX}"
            )
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{directory / INDEX}: expected names of files, got {name!r}")
        self.files = [read_file_header(directory / name) for name in names]
        self.config: dict[str, Any] = _read_json(directory / "config.json") or {}
        self._entries: dict[str, Entry] = {}
        for entry in (entry for file in self.files for entry in file.entries):
            name = canonical_name(entry.name)
            if name in self._entries:
                raise ValueError(f"{entry.path}: '{name}': expected it once, got it twice")
            self._entries[name] = entry

    def find(self, parameter: Parameter) -> Entry:
        """The tensor of a logged parameter.

        It has its name, that name without the base model's prefix (a base model saved alone), or,
        where the configuration ties embedding and head, the name of the other.

        Raises:
            ValueError: there is none, or of another shape, or not of floating point; names it.
        """
        name = canonical_name(parameter.name)
        _, _, bare = name.partition(".")
        entry = self._entries.get(name) or self._entries.get(bare)
        if entry is None and self._tied() is not False:
            entry = self._other(name)
        if entry is None:
            raise ValueError(
                f"'{name}': expected this parameter of the log, got none in {self.directory}; if "
                "the directory has it under another name, save the model anew with "
                "save_pretrained, or replay in memory (zo_kernels.replay.replay_)"
            )
        if entry.shape != parameter.shape:
            raise ValueError(
                f"'{name}': expected shape {parameter.shape} as in the log, got {entry.shape} in "
                f"{entry.path}"
            )
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"'{name}': expected one of {sorted(DTYPES)}, got {entry.dtype} in {entry.path}"
            )
        return entry

    def twin(self, entry: Entry) -> Entry | None:
        """The second copy of a tied embedding or head, if the files hold both and they are equal.

        Where they differ, each is a parameter.
        """
        other = self._other(canonical_name(entry.name))
        if self._tied() is False or other is None:
            return None
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            return None
        pairs = zip(pieces(entry), pieces(other), strict=True)
        same = all(torch.equal(_bytes(a), _bytes(b)) for (_, a), (_, b) in pairs)
        return other if same else None

    def _tied(self) -> bool | None:
        """Whether embedding and head are one; None if the configuration does not say."""
        inner = self.config.get("text_config") or {}
        return self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))

    def _other(self, name: str) -> Entry | None:
        """The head of an embedding or the embedding of a head, where there is one such name."""
        for mine, theirs in ((_EMBEDDINGS, _HEADS), (_HEADS, _EMBEDDINGS)):
            if name.endswith(mine):
                found = [e for n, e in self._entries.items() if n.endswith(theirs)]
                return found[0] if len(found) == 1 else None
        return None


def pieces(entry: Entry, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first element, flat tensor) for all elements in order, cast to dtype; memory of one piece.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    kind = DTYPES[entry.dtype]
    total = entry.nbytes // kind.itemsize
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        for first in range(0, total, PIECE):
            piece = torch.empty(min(PIECE, total - first), dtype=kind)
            _read_into(file, piece, entry)
            yield first, piece.to(dtype or kind)


def copy_bytes(entry: Entry, out: BinaryIO) -> None:
    """Write a tensor's bytes as they are, whatever its dtype."""
    left = entry.nbytes
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        while left:
            part = file.read(min(left, PIECE))
            if not part:
                raise OSError(f"{entry.path}: '{entry.name}': expected {left} more bytes")
            out.write(part)
            left -= len(part)


def write_file_header(out: BinaryIO, file: WeightFile, dtypes: Mapping[str, torch.dtype]) -> int:
    """The header of a file like another one, in which some tensors have other dtypes.

    Returns:
        How many bytes of tensors belong behind it, in the order of ``file.entries``.
    """
    table: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    place = 0
    for entry in file.entries:
        dtype = dtypes.get(entry.name)
        code = entry.dtype if dtype is None else DTYPE_CODES[dtype]
        size = entry.nbytes
        if dtype is not None:
            size = size // DTYPES[entry.dtype].itemsize * dtype.itemsize
        offsets = [place, place + size]
        table[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": offsets}
        place += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    out.write(_LENGTH.pack(len(text)) + text)
    return place


def _read_into(file: Any, tensor: Tensor, entry: Entry) -> None:
    view = memoryview(_bytes(tensor).numpy())
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError(f"{entry.path}: '{entry.name}': expected {len(view)} more bytes")
        view = view[count:]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _read_json(path: Path) -> dict[str, Any] | None:
    """An object in a file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
