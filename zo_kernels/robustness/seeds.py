"""An arm's records by training seed: each seed's model under the same draws.

A study trains an arm with several training seeds and evaluates each model. Its records then have a
`training_seed`; those of a model that exists once have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])


def seed_of(record: Mapping[str, Any]) -> int | None:
    """The training seed of the model that a record is of; None of a model that exists once."""
    return record.get("training_seed")


def by_seed(rows: Iterable[Row]) -> dict[int | None, list[Row]]:
    """Records of one arm by training seed, in ascending order.

    Raises ValueError if some of them have a training seed and others none.
    """
    groups: dict[int | None, list[Row]] = {}
    for row in rows:
        groups.setdefault(seed_of(row), []).append(row)
    if None in groups and len(groups) > 1:
        label = groups[None][0]["label"]
        raise ValueError(
            f"{label}: expected a training_seed in all records or in none, got {list(groups)}"
        )
    return dict(sorted(groups.items(), key=lambda item: item[0] or 0))


def check_draws(
    of: Mapping[str, Any], groups: Mapping[int | None, Sequence[Mapping[str, Any]]]
) -> list[int]:
    """The draws that each training seed of an arm has in one family, once each.

    Raises ValueError if they differ or one is there twice; `of` is a record, for its message.
    """
    draws = {seed: sorted(row["draw"] or 0 for row in group) for seed, group in groups.items()}
    first = next(iter(draws.values()))
    if any(found != first for found in draws.values()) or len(set(first)) != len(first):
        found = draws if len(draws) > 1 else first
        raise ValueError(
            f"{of['label']}, {of['family']}: expected the same draws once each, got {found}"
        )
    return first
