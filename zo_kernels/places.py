"""Places of a list by a key, such as a device or a dtype: each is one call of a backend."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def places(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The places at which each key stands, keys in the order of their first places."""
    found: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return found
