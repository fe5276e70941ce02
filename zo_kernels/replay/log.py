"""The log of a run: a header, then one record per step, which is all that replay needs.

    magic (8 bytes) | format: u32 | header length: u32 | header: JSON | crc32: u32
    then records:  kind: u8 | payload length: u32 | payload | crc32: u32

All numbers are little-endian. A record's crc32 covers its kind, length and payload and starts from
the header's, so a record of another log is no record of this one. The payloads, with Q queries and
G groups:

    step   step: u32, flags: u8 (1: skipped), l+: f64[Q], l-: f64[Q], then per group
           lr: f64[G], eps: f64[G], decay: f64[G], coefficients: f64[G][Q]
    mark   steps: u32, fingerprint of the weights after so many steps: 16 bytes

Step numbers count from 0 without a gap; a mark's count is that of the steps before it.

A writer brings each record to the disk before it begins the next, so a crash leaves at most one
record incomplete, the last: cut short, or with zeros where blocks were never written. What a reader
finds wrong is therefore such a torn tail, left out and reported, only if it begins with the kind of
a record and is no longer than that record, or begins with a zero byte and is no longer than a step.

Everything else that is wrong is damage, and an error: a wrong checksum with more behind it than one
record, an unknown kind, a gap in the numbers. A flipped bit in the very last record cannot be told
from a torn write: that record is left out too, never read as another value, and a run that resumes
takes the step again.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zo_kernels.replay.header import Header

FORMAT = 1
MAGIC = b"\x89ZOLOG\r\n"
_FIXED = struct.Struct("<8sII")
HEAD = struct.Struct("<BI")
CHECKSUM = struct.Struct("<I")
STEP, MARK = 0x53, 0x4D  # two kinds that no single flipped bit turns into each other
SKIPPED = 1
MARK_PAYLOAD = struct.Struct("<I16s")


@dataclass(frozen=True, slots=True)
class Mark:
    """The weights' fingerprint after so many steps."""

    steps: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Log:
    """What a file holds.

    Attributes:
        path: of the file.
        header: see ``Header``.
        steps: structured numpy array, one row per step: step, flags, losses_plus (Q,),
            losses_minus (Q,), lr (G,), eps (G,), decay (G,), coefficients (G, Q).
        marks: in the order of the file.
        torn: bytes of an incomplete last record, which was left out.
        size: bytes of the file without them.
        checksum: crc32 of the header, from which the records' start.
    """

    path: Path
    header: Header
    steps: np.ndarray
    marks: tuple[Mark, ...]
    torn: int
    size: int
    checksum: int

    @property
    def skipped(self) -> np.ndarray:
        """Which steps made no update because a loss was not finite: (steps,) bool."""
        return self.steps["flags"] & SKIPPED != 0

    def stop(self, steps: int | None = None) -> int:
        """The number of steps to replay: all, or the first ``steps``.

        Raises:
            ValueError: the log has fewer.
        """
        count = len(self.steps)
        if steps is None:
            return count
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= count:
            raise ValueError(
                f"steps: expected an int from 0 to {count}, which {self.path} holds, got {steps!r}"
            )
        return steps


def step_dtype(queries: int, groups: int) -> np.dtype:
    """The layout of a step's payload."""
    doubles = ("lr", "eps", "decay")
    return np.dtype(
        [
            ("step", "<u4"),
            ("flags", "u1"),
            ("losses_plus", "<f8", (queries,)),
            ("losses_minus", "<f8", (queries,)),
            *((name, "<f8", (groups,)) for name in doubles),
            ("coefficients", "<f8", (groups, queries)),
        ]
    )


def encode_header(header: Header) -> tuple[bytes, int]:
    """The bytes before the first record, and the crc32 from which the records' start."""
    text = header.encode()
    data = _FIXED.pack(MAGIC, FORMAT, len(text)) + text
    seed = zlib.crc32(data)
    return data + CHECKSUM.pack(seed), seed


def encode_record(kind: int, payload: bytes, seed: int) -> bytes:
    """One record."""
    data = HEAD.pack(kind, len(payload)) + payload
    return data + CHECKSUM.pack(zlib.crc32(data, seed))


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read and check a whole log.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no log, of another format or NOISE_SPEC, or damaged; names the file, the
            byte, the record, what was expected and what came.
    """
    source = Path(path)
    if source.exists() and not stat.S_ISREG(source.stat().st_mode):
        raise OSError(f"log: expected an ordinary file, got {source}")
    return parse_log(source, source.read_bytes())


def parse_log(source: Path, data: bytes) -> Log:
    """``read_log`` of a file's bytes."""
    header, start, seed = _read_header(source, data)
    layout = step_dtype(header.queries, len(header.groups))
    frames = {
        HEAD.pack(kind, size): (kind, HEAD.size + size + CHECKSUM.size)
        for kind, size in ((STEP, layout.itemsize), (MARK, MARK_PAYLOAD.size))
    }
    view, size, offset, record = memoryview(data), len(data), start, 0
    payloads: list[memoryview] = []
    marks: list[Mark] = []
    while offset < size:
        kind, length = frames.get(data[offset : offset + HEAD.size], (0, 0))
        end = offset + length
        if not kind or end > size:
            break
        body = end - CHECKSUM.size
        if zlib.crc32(view[offset:body], seed) != int.from_bytes(view[body:end], "little"):
            break
        payload = view[offset + HEAD.size : body]
        if kind == STEP:
            number = int.from_bytes(payload[:4], "little")
            payloads.append(payload)
        else:
            number, digest = MARK_PAYLOAD.unpack(payload)
            marks.append(Mark(number, digest.hex()))
        if number != len(payloads) - (kind == STEP):
            raise ValueError(
                f"{source}: record {record} at byte {offset}: expected a "
                f"{'step' if kind == STEP else 'mark of steps'} numbered "
                f"{len(payloads) - (kind == STEP)}, got {number}"
            )
        offset, record = end, record + 1
    if offset < size:
        reason = _damage(data[offset:], frames)
        if reason:
            raise ValueError(f"{source}: record {record} at byte {offset}: {reason}")
    steps = np.frombuffer(b"".join(payloads), dtype=layout)
    return Log(source, header, steps, tuple(marks), size - offset, offset, seed)


def _read_header(path: Path, data: bytes) -> tuple[Header, int, int]:
    """The header, the place of the first record, and the crc32 that the records' start from."""
    if not data.startswith(MAGIC):
        raise ValueError(f"{path}: byte 0: expected a log of zo_kernels, got {data[:8]!r}")
    if len(data) < _FIXED.size:
        raise ValueError(f"{path}: byte {len(data)}: expected a whole header, got the end of file")
    _, version, length = _FIXED.unpack_from(data)
    if version != FORMAT:
        raise ValueError(
            f"{path}: byte 8: expected format {FORMAT}, which this version reads, got {version}"
        )
    end = _FIXED.size + length
    if end + CHECKSUM.size > len(data):
        raise ValueError(
            f"{path}: byte 12: expected a whole header of {length} bytes, got the end of file at "
            f"byte {len(data)}"
        )
    expected, seed = CHECKSUM.unpack_from(data, end)[0], zlib.crc32(data[:end])
    if seed != expected:
        raise ValueError(
            f"{path}: byte {end}: expected the header's checksum {seed:08x}, got {expected:08x}: "
            "the file is damaged"
        )
    try:
        return Header.decode(data[_FIXED.size : end]), end + CHECKSUM.size, seed
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: header: {error}") from error


def _damage(tail: bytes, frames: dict[bytes, tuple[int, int]]) -> str | None:
    """Why the bytes from the first wrong record on are no torn tail; None if they are one."""
    if tail[0] == 0:
        limit = max(length for _, length in frames.values())
        if len(tail) <= limit:
            return None
        return f"expected a record, got {len(tail)} bytes that begin with zero: the file is damaged"
    for kind, length in frames.values():
        if tail[0] == kind and len(tail) > length:
            return (
                f"expected a record of {length} bytes with its checksum, got a wrong one with "
                f"{len(tail) - length} bytes behind it: the file is damaged"
            )
        if tail[0] == kind:
            return None
    return f"expected a step or a mark, got kind 0x{tail[0]:02x}: the file is damaged"
