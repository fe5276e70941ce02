"""The header of a log: everything that the noise and the arithmetic of a run depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels.checks import DTYPES, FLOAT32_MAX, expect_int, expect_range
from zo_kernels.noise import DISTRIBUTIONS, NOISE_SPEC, canonical_name

#: How weights take an update, by the optimizer's mode:
#: stochastic: ``ops.advance_`` with stochastic rounding;
#: master: float32 copies, to nearest; a weight is its copy rounded to its dtype;
#: master8: ``ops.advance_`` with int8 residuals.
ARITHMETICS = {
    "streamed": "stochastic",
    "dual": "stochastic",
    "inplace": "stochastic",
    "snapshot": "stochastic",
    "master": "master",
    "master8": "master8",
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def arithmetic_of(mode: str) -> str:
    """The arithmetic of a mode's updates: "stochastic", "master" or "master8".

    Raises:
        ValueError: the mode is unknown, or it is "mezo".
    """
    if mode == "mezo":
        raise ValueError(
            "mode 'mezo' cannot be replayed: its evaluations round the weights on the way out and "
            "back, and what that leaves in them is in no log; use 'streamed' or another exact mode"
        )
    if mode not in ARITHMETICS:
        raise ValueError(f"mode: expected one of {sorted(ARITHMETICS)}, got {mode!r}")
    return ARITHMETICS[mode]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One logged parameter.

    Attributes:
        name: as the optimizer has it; compared without wrappers (``noise.canonical_name``).
        stream: of its noise.
        shape, dtype: of the full parameter; the dtype by name, such as "bfloat16".
        unit: factor of its scales: 1, or its standard deviation with ``relative_eps``. None only
            in a header that resumes a log: the file's counts.
    """

    name: str
    stream: int
    shape: tuple[int, ...]
    dtype: str
    unit: float | None = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"parameter: expected a name, got {self.name!r}")
        expect_range(f"'{self.name}'.stream", self.stream, 1 << 32)
        for size in self.shape:
            if expect_int(f"'{self.name}'.shape", size) < 0:
                raise ValueError(f"'{self.name}'.shape: expected sizes, got {self.shape}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"'{self.name}'.dtype: expected one of {sorted(DTYPE_NAMES)}, got {self.dtype!r}"
            )
        unit = self.unit
        if unit is not None and not (isinstance(unit, float) and unit >= 0 and math.isfinite(unit)):
            raise ValueError(
                f"'{self.name}'.unit: expected a finite float of at least 0, got {unit!r}"
            )

    @classmethod
    def of(cls, name: str, tensor: Tensor, stream: int, unit: float | None = 1.0) -> Parameter:
        """The entry of a tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, stream, tuple(tensor.shape), dtype, unit)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPE_NAMES[self.dtype]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class WarmStart:
    """An update that joins that of the first step which is not skipped, after it.

        theta_i = round(theta_i + sum_k scales[i][k] z_k)

    Attributes:
        directions: of the z; reserved ones, such as those that scored layers, are allowed.
        scales: by parameter name, one per direction; parameters without stay as they are.
    """

    directions: tuple[int, ...]
    scales: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("warm_start.directions: expected at least one, got none")
        for direction in self.directions:
            expect_range("warm_start.directions", direction, 1 << 32)
        for name, scales in self.scales.items():
            if len(scales) != len(self.directions):
                raise ValueError(
                    f"warm_start.scales['{name}']: expected {len(self.directions)}, one per "
                    f"direction, got {len(scales)}"
                )
            if not all(abs(scale) <= FLOAT32_MAX for scale in scales):  # NaN neither
                raise ValueError(
                    f"warm_start.scales['{name}']: expected numbers in the range of float32, got "
                    f"{list(scales)}"
                )


@dataclass(frozen=True, slots=True)
class Header:
    """What a log says once.

    Attributes:
        seed, queries, mode, distribution: as of ``ZOSGD``.
        groups: the parameters of each parameter group, in the optimizer's order.
        base: ``fingerprint`` of the logged parameters before the first step, or None.
        user: anything that JSON can hold: configuration, a fingerprint of the data.
        warm_start: an update beside that of the first step, or None.
        noise_spec: ``noise.NOISE_SPEC`` of the run.
        package: version of zo_kernels; set when the log is made.
        created: time of that, ISO 8601 in UTC; likewise.
    """

    seed: int
    queries: int
    mode: str
    distribution: str
    groups: tuple[tuple[Parameter, ...], ...]
    base: str | None = None
    user: Any = None
    warm_start: WarmStart | None = None
    noise_spec: int = NOISE_SPEC
    package: str | None = None
    created: str | None = None

    def __post_init__(self) -> None:
        expect_range("seed", self.seed, 1 << 64)
        if expect_int("queries", self.queries) < 1:
            raise ValueError(f"queries: expected at least 1, got {self.queries}")
        arithmetic_of(self.mode)
        if self.warm_start is not None:
            unknown = sorted(self.warm_start.scales.keys() - {p.name for p in self.parameters()})
            if unknown:
                raise ValueError(
                    f"warm_start: expected parameters of the run, got '{unknown[0]}' "
                    f"({len(unknown)} in all)"
                )
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution: expected one of {DISTRIBUTIONS}, got {self.distribution!r}"
            )
        if self.noise_spec != NOISE_SPEC:
            raise ValueError(
                f"noise_spec: expected {NOISE_SPEC}, which this version makes, got "
                f"{self.noise_spec!r}: the log needs another version of zo_kernels"
            )
        if self.base is not None:
            check_fingerprint("base", self.base)
        if not self.groups or not all(self.groups):
            raise ValueError(
                "groups: expected at least one, each with a parameter, got an empty one"
            )
        for field in ("name", "stream"):
            seen: dict[Any, str] = {}
            for parameter in self.parameters():
                value = getattr(parameter, field)
                key = canonical_name(value) if field == "name" else value
                if key in seen:
                    raise ValueError(
                        f"'{parameter.name}': expected a {field} of its own, got {key!r}, which "
                        f"'{seen[key]}' has"
                    )
                seen[key] = parameter.name

    @property
    def arithmetic(self) -> str:
        """How updates are rounded: see ``ARITHMETICS``."""
        return arithmetic_of(self.mode)

    def parameters(self) -> Iterator[Parameter]:
        """The parameters of all groups."""
        for group in self.groups:
            yield from group

    def encode(self) -> bytes:
        """As JSON.

        Raises:
            TypeError, ValueError: ``user`` is not JSON, or a unit is missing.
        """
        for parameter in self.parameters():
            if parameter.unit is None:
                raise ValueError(
                    f"'{parameter.name}'.unit: expected a float in a new log, got None"
                )
        record = {name: getattr(self, name) for name in _PLAIN}
        record["arithmetic"] = self.arithmetic
        if self.warm_start is not None:
            record["warm_start"] = {
                "directions": self.warm_start.directions,
                "scales": dict(self.warm_start.scales),
            }
        record["groups"] = [
            {
                "parameters": [
                    {name: getattr(parameter, name) for name in Parameter.__slots__}
                    for parameter in group
                ]
            }
            for group in self.groups
        ]
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """From JSON, checked.

        Raises:
            ValueError: naming the field, what was expected and what came.
        """
        record = json.loads(data)
        try:
            groups = tuple(
                tuple(Parameter(**{**p, "shape": tuple(p["shape"])}) for p in group["parameters"])
                for group in record.pop("groups")
            )
            arithmetic = record.pop("arithmetic")
            warm = record.pop("warm_start", None)
            if warm is not None:
                warm = WarmStart(
                    tuple(warm["directions"]), {n: tuple(s) for n, s in warm["scales"].items()}
                )
            header = cls(groups=groups, warm_start=warm, **record)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"header: expected the fields of this format, got {error}") from error
        if arithmetic != header.arithmetic:
            raise ValueError(
                f"arithmetic: expected {header.arithmetic!r} in mode '{header.mode}', got "
                f"{arithmetic!r}"
            )
        return header

    def check_continues(self, found: Header) -> None:
        """Refuse unless a run with this header can go on with the log of the found one.

        ``package``, ``created``, ``user`` and ``warm_start`` may differ, and so may ``base`` and
        the units where one of the two is None.

        Raises:
            ValueError: naming the field, what was expected and what the log has.
        """
        for field in ("noise_spec", "seed", "queries", "mode", "distribution"):
            _same(field, getattr(self, field), getattr(found, field))
        if self.base is not None and found.base is not None:
            _same("base", self.base, found.base)
        _same("groups", len(self.groups), len(found.groups))
        for number, (mine, theirs) in enumerate(zip(self.groups, found.groups, strict=True)):
            names = [[canonical_name(p.name) for p in group] for group in (mine, theirs)]
            _same(f"groups[{number}]", *names)
            for a, b in zip(mine, theirs, strict=True):
                for field in ("stream", "shape", "dtype"):
                    _same(f"'{a.name}'.{field}", getattr(a, field), getattr(b, field))
                if a.unit is not None:
                    _same(f"'{a.name}'.unit", a.unit, b.unit)


_PLAIN = [name for name in Header.__slots__ if name != "groups"]


def check_fingerprint(name: str, value: object) -> str:
    """32 lower-case hexadecimal digits; ValueError otherwise."""
    text = value if isinstance(value, str) else ""
    if len(text) != 32 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{name}: expected a fingerprint of 32 hexadecimal digits, got {value!r}")
    return text


def _same(field: str, expected: Any, found: Any) -> None:
    if isinstance(expected, list) and isinstance(found, list) and expected != found:
        # Long lists of names: the first that differs says enough.
        place = next(
            (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
            min(len(expected), len(found)),
        )
        field = f"{field}[{place}]"
        expected, found = (
            names[place] if place < len(names) else None for names in (expected, found)
        )
    if expected != found:
        raise ValueError(f"{field}: expected {expected!r}, got {found!r}")
