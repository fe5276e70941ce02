"""What two logs differ in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from zo_kernels.replay.header import Header
from zo_kernels.replay.log import Log


@dataclass(frozen=True, slots=True)
class Difference:
    """What two logs differ in.

    Attributes:
        header: field -> its values in a and b; parameters as "'name'.field".
        steps: number of steps of a and b.
        first: the first step that differs in any bit, among those that both have; None if none.
            0 where the numbers of queries or groups differ.
        losses: that step's losses_plus and losses_minus, in a and b.
    """

    header: dict[str, tuple[Any, Any]]
    steps: tuple[int, int]
    first: int | None
    losses: tuple[dict[str, list[float]], dict[str, list[float]]] | None

    @property
    def same_run(self) -> bool:
        """Whether both replay to the same weights from the same base: all but what is free text."""
        free = {"created", "package", "user"}
        return set(self.header) <= free and self.first is None and len(set(self.steps)) == 1


def diff(a: Log, b: Log) -> Difference:
    """Compare two logs: headers, numbers of steps, and the first step that differs."""
    count = min(len(a.steps), len(b.steps))
    if a.steps.dtype != b.steps.dtype:
        first = 0 if count else None
    else:
        size = a.steps.dtype.itemsize
        wrong = a.steps[:count].view(f"V{size}") != b.steps[:count].view(f"V{size}")
        first = int(wrong.argmax()) if wrong.any() else None
    losses = None
    if first is not None:
        losses = tuple(
            {name: log.steps[name][first].tolist() for name in ("losses_plus", "losses_minus")}
            for log in (a, b)
        )
    header = _header_differences(a.header, b.header)
    return Difference(header, (len(a.steps), len(b.steps)), first, losses)


def _header_differences(a: Header, b: Header) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields(Header):
        values = getattr(a, field.name), getattr(b, field.name)
        if field.name != "groups" and values[0] != values[1]:
            found[field.name] = values
    tables = [
        {p.name: {**asdict(p), "group": n} for n, group in enumerate(h.groups) for p in group}
        for h in (a, b)
    ]
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        mine, theirs = (table.get(name) for table in tables)
        if mine is None or theirs is None:
            found[f"'{name}'"] = (mine is not None, theirs is not None)
            continue
        for key in mine:
            if mine[key] != theirs[key]:
                found[f"'{name}'.{key}"] = (mine[key], theirs[key])
    order = [list(table) for table in tables]
    if order[0] != order[1] and sorted(order[0]) == sorted(order[1]):
        found["order of parameters"] = (order[0], order[1])
    return found
