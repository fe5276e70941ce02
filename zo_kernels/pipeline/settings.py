"""Configuration classes from mappings, as YAML files have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Config = TypeVar("Config")


def fits(value: Any, annotation: str) -> bool:
    """Whether a value read from YAML is of a dataclass field's type, such as "int | None"."""
    if isinstance(value, list) and "tuple" in annotation:
        item = next(one for one in ("float", "int", "str") if one in annotation)
        return all(fits(one, item) for one in value)
    if value is None:
        return "None" in annotation
    if isinstance(value, bool):
        return "bool" in annotation
    kinds = {"str": (str,), "int": (int,), "float": (int, float)}
    return any(isinstance(value, kinds.get(one, ())) for one in annotation.split(" | "))


def numbered(value: Any, annotation: str) -> Any:
    """The value with numbers for the texts that YAML has for them, such as 1e-3 without a dot.

    Only where the field of this type may be a float, and only finite ones.
    """
    if isinstance(value, list):
        return [numbered(one, annotation) for one in value]
    if not isinstance(value, str) or "float" not in annotation:
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def configured(kind: type[Config], values: Mapping[str, Any] | None, where: str) -> Config:
    """A configuration from a mapping of its fields; those that it does not name have defaults.

    Args:
        kind: a dataclass.
        values: by field name, with - or _; lists where the field is a tuple, and texts of numbers
            where it is one (``numbered``).
        where: what errors begin with.

    Raises:
        ValueError: no mapping, an unknown field, one without default that is not given, or a value
            that its field cannot have.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of options, got {values!r}")
    types = {field.name: str(field.type) for field in fields(kind)}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ValueError(f"{where}: expected options out of {list(types)}, got {key!r}")
        found = numbered(value, types[name])
        if not fits(found, types[name]):
            raise ValueError(f"{where}.{name}: expected {types[name]}, got {value!r}")
        chosen[name] = tuple(found) if isinstance(found, list) else found
    for field in fields(kind):
        if field.default is field.default_factory is MISSING and field.name not in chosen:
            raise ValueError(f"{where}: expected {field.name} among the options, got none")
    return kind(**chosen)
