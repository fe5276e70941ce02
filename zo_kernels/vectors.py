"""The published test vectors of the noise contract: the table, read, and computed by a backend.

The table is data/noise_vectors.txt; its header states the format. Each kind of line has one
function here that turns it into calls of the public operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from zo_kernels import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[[], Tensor]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Vector:
    """One line of the table.

    Attributes:
        kind: its first word, "normal", "rademacher" or "update".
        fields: its other words.
    """

    kind: str
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.kind, *self.fields))

    @property
    def index(self) -> int:
        """The element's index in the full parameter."""
        return int(self.fields[3])

    def calls(self, backend: str, device: str) -> list[tuple[str, Call, Tensor]]:
        """For each operation that the line tests: its name, the call on a backend, the result.

        Results have one element; words are int64, the rest has the line's dtype. The call's is on
        the device, the right one on the CPU.
        """
        return _KINDS[self.kind](self.fields, backend, device)


def table_text() -> str:
    """The file as it is."""
    return (resources.files("zo_kernels") / "data" / "noise_vectors.txt").read_text("ascii")


def read() -> list[Vector]:
    """All vectors, in the order of the table."""
    lines = [line.split() for line in table_text().splitlines() if not line.startswith("#")]
    return [Vector(kind, tuple(fields)) for kind, *fields in lines]


def from_pattern(pattern: int, name: str) -> Tensor:
    """One element of the named type with that bit pattern."""
    integer, size = (torch.int32, 32) if name == "fp32" else (torch.int16, 16)
    signed = pattern - (1 << size) if pattern >> (size - 1) else pattern
    return torch.tensor([signed], dtype=integer).view(DTYPES[name])


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor of 2, 4 or 8 bytes per element, on the CPU, as integers."""
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()])


def hexadecimal(element: Tensor) -> str:
    """The bit pattern of a tensor of one element: as many digits as its dtype has, "3f800000"."""
    size = element.element_size()
    return f"{bits(element).item() & ((1 << 8 * size) - 1):0{2 * size}x}"


def _float(pattern: str) -> float:
    return from_pattern(int(pattern, 16), "fp32").item()


def _normal(fields: Sequence[str], backend: str, device: str) -> list[tuple[str, Call, Tensor]]:
    seed, direction, stream, index, word, normal = fields
    address = {"seed": int(seed, 16), "direction": int(direction, 16), "offset": int(index)}
    address |= {"stream": int(stream, 16), "backend": backend, "device": device}
    return [
        ("random_words", lambda: ops.random_words(1, **address), torch.tensor([int(word, 16)])),
        ("normal", lambda: ops.normal(1, **address), from_pattern(int(normal, 16), "fp32")),
    ]


def _rademacher(fields: Sequence[str], backend: str, device: str) -> list[tuple[str, Call, Tensor]]:
    seed, direction, stream, index, sign = fields
    address = {"seed": int(seed, 16), "direction": int(direction, 16), "offset": int(index)}
    address |= {"stream": int(stream, 16), "backend": backend, "device": device}
    expected = from_pattern(int(sign, 16), "fp32")
    return [("rademacher", lambda: ops.rademacher(1, **address), expected)]


def _update(fields: Sequence[str], backend: str, device: str) -> list[tuple[str, Call, Tensor]]:
    seed, directions, stream, index, src_type, src, factor, scales, rounding = fields[:9]
    dst_type, dst = fields[9:]

    def call() -> Tensor:
        out = torch.empty(1, dtype=DTYPES[dst_type], device=device)
        ops.combine_(
            [out],
            [from_pattern(int(src, 16), src_type).to(device)],
            [_float(c) for c in scales.split(",")],
            seed=int(seed, 16),
            directions=[int(d, 16) for d in directions.split(",")],
            streams=[int(stream, 16)],
            offsets=[int(index)],
            rounding=rounding,
            src_scale=_float(factor),
            backend=backend,
        )
        return out

    return [("combine_", call, from_pattern(int(dst, 16), dst_type))]


_KINDS = {"normal": _normal, "rademacher": _rademacher, "update": _update}
