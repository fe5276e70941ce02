"""The question at one look: what each arm changes against the reference, condition by condition."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from zo_kernels.robustness.comparison import direction
from zo_kernels.robustness.metrics import METRICS, Metric
from zo_kernels.robustness.plots.canvas import STYLE, load_matplotlib, new_figure, png

UTILITY = ("perplexity", "harmless_loss", "over_refusal_rate")
"""Utility metrics; the first that was compared is drawn."""
_COLUMNS = 5  # panels side by side
_LETTERS = 26  # a line of an arm's name
_FAR = 6  # so many times further than the next: what is worse by that leaves no room to the others
_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "chance": "#8C8C8C"}


def differences(
    comparisons: Sequence[Sequence[Mapping[str, Any]]], arms: Mapping[str, str]
) -> bytes | None:
    """Draw paired differences with their 95 % intervals: a panel a condition, a row an arm.

    Args:
        comparisons: rows of `compare_records`, a sequence for each pair of arms.
        arms: label -> displayed name.

    Returns:
        A PNG file, or None without comparisons. Above the refusal loss, below one utility metric
        (`UTILITY`). Filled markers are significant after adjustment, and coloured by whether they
        are for the better. Each panel has its own scale; an arm that is worse by far more than all
        others is an arrow with its number.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = [row for found in comparisons for row in found]
    compared = {row["metric"] for row in rows}
    shown = [m for m in ("refusal_loss", *(u for u in UTILITY if u in compared)) if m in compared]
    if not shown:
        return None
    metrics = [METRICS[name] for name in shown[:2]]
    references = dict.fromkeys(row["reference"] for row in rows)
    names = {
        (row["reference"], row["other"]): textwrap.fill(
            arms[row["other"]]
            if len(references) == 1
            else f"{arms[row['other']]} against {arms[row['reference']]}",
            _LETTERS,
        )
        for row in rows
    }
    families = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(_COLUMNS, len(families))
    lines = math.ceil(len(families) / columns)
    height = 0.9 + 0.22 * sum(name.count("\n") + 1.4 for name in names.values())
    with load_matplotlib().rc_context(STYLE | {"font.size": 11.0, "axes.titlesize": 11.0}):
        figure = new_figure(
            2.6 + 2.5 * max(columns, 3), len(metrics) * (lines * height + 0.5) + 0.5
        )
        for part, metric in zip(
            figure.subfigures(len(metrics), 1, squeeze=False).flatten(), metrics, strict=True
        ):
            part.suptitle(_title(metric, list(references), arms), fontsize=13)
            axes = part.subplots(lines, columns, squeeze=False, sharey=True).flatten()
            for axis, family in zip(axes, families, strict=False):
                found = {
                    (row["reference"], row["other"]): row
                    for row in rows
                    if row["family"] == family and row["metric"] == metric.field
                }
                _panel(axis, found, list(names), metric)
                axis.set_title(family)
            axes[0].set_yticks(range(len(names)), names.values())
            axes[0].set_ylim(len(names) - 0.4, -0.6)
            for axis in axes[len(families) :]:
                axis.set_visible(False)
        _key(figure)
        return png(figure)


def _title(metric: Metric, references: Sequence[str], arms: Mapping[str, str]) -> str:
    name = metric.short if metric.rate else metric.compared
    unit = "points" if metric.rate else "nats per token"
    against = f" to {arms[references[0]]}" if len(references) == 1 else ""
    return f"{name[0].upper()}{name[1:]}: difference{against} ({unit}; {metric.better} is better)"


def _panel(
    axis: Any,
    found: Mapping[tuple[str, str], Mapping[str, Any]],
    order: Sequence[tuple[str, str]],
    metric: Metric,
) -> None:
    """Draw one condition: a marker and an interval a row."""
    by = metric.factor
    end = 1.15 * by * _reach([row for row in found.values() if row["mean"] is not None])
    axis.axvline(0, color="black", linewidth=1.0)
    axis.grid(visible=False, axis="y")
    axis.set_xlim(-end, end)
    axis.xaxis.get_major_locator().set_params(nbins=4)
    for place, pair in enumerate(order):
        row = found.get(pair)
        if row is None:
            continue
        if row["mean"] is None:
            axis.text(0, place, "n/a", ha="center", va="center", backgroundcolor="white")
            continue
        mean, low, high = (by * row[key] for key in ("mean", "low", "high"))
        colour = _COLOURS[_kind(row)]
        axis.plot([low, high], [place, place], color=colour, linewidth=1.6)
        if abs(mean) <= end:
            filled = colour if row["significant"] else "white"
            axis.plot(mean, place, "o", color=colour, markerfacecolor=filled, markersize=7)
        else:
            side = math.copysign(1.0, mean)
            axis.plot(
                side * 0.94 * end, place, ">" if side > 0 else "<", color=colour, markersize=7,
                markerfacecolor=colour if row["significant"] else "white",
            )  # fmt: skip
            axis.annotate(
                f"{mean:+.3g}", (side * 0.86 * end, place), color=colour, fontsize=9,
                ha="right" if side > 0 else "left", va="bottom",
            )  # fmt: skip


def _reach(rows: Sequence[Mapping[str, Any]]) -> float:
    """How far from 0 a panel goes: to all ends of intervals but those of arms that broke."""
    known = sorted(rows, key=_end)
    while (
        len(known) > 1 and _kind(known[-1]) == "worse" and _end(known[-1]) > _FAR * _end(known[-2])
    ):
        known.pop()
    return (_end(known[-1]) if known else 0.0) or 1.0


def _end(row: Mapping[str, Any]) -> float:
    return max(abs(row["low"]), abs(row["high"]))


def _kind(row: Mapping[str, Any]) -> str:
    """Whether a difference is for the better; chance, if it is not significant."""
    return direction(row) if row["significant"] else "chance"


def _key(figure: Any) -> None:
    from matplotlib.lines import Line2D

    words = {
        "better": "significant, better",
        "worse": "significant, worse",
        "chance": "not significant",
    }
    handles = [
        Line2D(
            [], [], color=_COLOURS[kind], marker="o", markersize=7, label=text,
            markerfacecolor="white" if kind == "chance" else _COLOURS[kind],
        )
        for kind, text in words.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
