"""What a step does to a group of parameters: one function for the optimizer and for replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from zo_kernels.noise import training_direction
from zo_kernels.ops import Update

if TYPE_CHECKING:
    from zo_kernels.replay.header import Parameter, WarmStart
    from zo_kernels.replay.log import Log


def group_update(
    units: Sequence[float],
    coefficients: Sequence[float],
    decay: float,
    directions: Sequence[int],
    members: Sequence[int] | None = None,
) -> Update | None:
    """theta_i = round(decay * theta_i + sum_q units[i] * coefficients[q] * z_q), as an update.

    The products are float64; the operation rounds them to float32. A group that the step leaves
    alone (no product but 0, and decay 1) has no update, not even a pass: zeros keep their signs.

    Args:
        units: of all tensors of the group: 1, or the standard deviation with ``relative_eps``.
        coefficients: one per query, -lr * g_q / queries.
        decay: 1 - lr * weight_decay.
        directions: one per query.
        members: places in ``units`` of the tensors that the update is for; all without. Whether
            there is an update does not depend on them.
    """
    if decay == 1.0 and not (
        any(coefficients) and any(unit * c for unit in units for c in coefficients)
    ):
        return None
    chosen = units if members is None else [units[i] for i in members]
    return Update(directions, [[unit * c for c in coefficients] for unit in chosen], decay)


def warm_start_update(
    warm_start: WarmStart, parameters: Sequence[Parameter], members: Sequence[int] | None = None
) -> Update | None:
    """The warm start of a group, as an update; None if it moves none of the group's parameters.

    Args:
        warm_start: of the run.
        parameters: all of the group's.
        members: as in ``group_update``.
    """
    still = (0.0,) * len(warm_start.directions)
    rows = [list(warm_start.scales.get(parameter.name, still)) for parameter in parameters]
    if not any(map(any, rows)):
        return None
    chosen = rows if members is None else [rows[i] for i in members]
    return Update(list(warm_start.directions), chosen, 1.0)


def logged_updates(
    log: Log, group: int, start: int, stop: int, members: Sequence[int] | None = None
) -> Iterator[tuple[int, Update]]:
    """(step, update) of each step in [start, stop) that changes the group, in order.

    A warm start comes as another update of its step.
    """
    header = log.header
    units = [float(p.unit) for p in header.groups[group]]
    rows = log.steps[start:stop]
    applied = ~log.skipped[start:stop]
    coefficients = rows["coefficients"][:, group].tolist()
    decays = rows["decay"][:, group].tolist()
    warm_step = None
    if header.warm_start is not None and log.skipped[:start].all():
        # No step before these was applied: the first that is has the warm start.
        warm_step = next(iter((start + applied.nonzero()[0]).tolist()), None)
    for place in applied.nonzero()[0].tolist():
        step = start + place
        directions = [
            training_direction(step, header.queries, query) for query in range(header.queries)
        ]
        update = group_update(units, coefficients[place], decays[place], directions, members)
        if update is not None:
            yield step, update
        if step == warm_step:
            warm = warm_start_update(header.warm_start, header.groups[group], members)
            if warm is not None:
                yield step, warm
