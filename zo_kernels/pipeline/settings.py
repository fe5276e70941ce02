"""Configuration classes from mappings, as YAML files have them."""

from __future__ import annotations

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


def configured(kind: type[Config], values: Mapping[str, Any] | None, where: str) -> Config:
    """A configuration from a mapping of its fields; those that it does not name have defaults.

    Args:
        kind: a dataclass.
        values: by field name, with - or _; lists where the field is a tuple.
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
        if not fits(value, types[name]):
            raise ValueError(f"{where}.{name}: expected {types[name]}, got {value!r}")
        chosen[name] = tuple(value) if isinstance(value, list) else value
    for field in fields(kind):
        if field.default is field.default_factory is MISSING and field.name not in chosen:
            raise ValueError(f"{where}: expected {field.name} among the options, got none")
    return kind(**chosen)
