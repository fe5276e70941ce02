"""Every arm under every condition: against the noise scale, and quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zo_kernels.robustness.conditions import (
    ACTIVATION_NOISE,
    CLEAN,
    NOISES,
    QUANTIZED,
    WEIGHT_NOISE,
)
from zo_kernels.robustness.metrics import METRICS, Metric, bounds, pooled, seed_means, whole
from zo_kernels.robustness.plots.canvas import (
    STYLE,
    arm_fill,
    arm_style,
    legend,
    load_matplotlib,
    new_figure,
    png,
)

NOISE_AXIS = {
    "rel_std": r"weight noise $\sigma$ ($\times$ std of each tensor)",
    "rel_norm": r"weight noise $\sigma$ ($\times$ norm of each tensor)",
    "abs": r"weight noise $\sigma$ (absolute)",
}
ACTIVATION_AXIS = r"activation noise $\alpha$ ($\times$ std of each token)"
PANELS = {
    "refusal_loss": ("Refusal loss", "nats per token"),
    "refusal_rate": ("Refusal rate", "harmful prompts refused (%)"),
    "perplexity": ("Perplexity", "perplexity (log scale)"),
}
_LABEL_ROOM = 30  # characters of upright labels below one panel
_BANDS = 5  # more arms have whiskers, for their bands would lie over each other, and more room
_WIDE = 5  # so many times the least value of an axis: a broken arm leaves no room for the others
_BARS = 24  # bars that one of three panels side by side takes


def metric_vs_noise(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes | None:
    """Draw refusal loss, refusal rate and perplexity against the noise scale, a row a kind.

    Args:
        records: `Evaluation.run` records of all arms.
        arms: label -> displayed name, in the order of the legend.

    Returns:
        A PNG file, or None where no noise was evaluated. One line an arm, a point per training
        seed or, of one seed, per noise draw; a band (of many arms whiskers) of 95 % over seeds,
        draws and prompts. What was not measured is left out, conditions and metrics; where some
        values came out not finite the points of the others are there, and no mean.

    Raises:
        ImportError: matplotlib is missing.
    """
    kinds = [kind for kind in NOISES if any(r["kind"] == kind for r in whole(records))]
    panels = _measured([r for r in whole(records) if r["kind"] in (CLEAN, *kinds)])
    if not kinds or not panels:
        return None
    with load_matplotlib().rc_context(STYLE):
        many = len(arms) > _BANDS
        if many:
            figure = new_figure(15, 1.0 + 3.7 * len(kinds) * len(panels))
            axes = figure.subplots(len(kinds) * len(panels), 1, squeeze=False)
            axes = axes.reshape(len(kinds), len(panels))
        else:
            figure = new_figure(15, 0.6 + 4.4 * len(kinds))
            axes = figure.subplots(len(kinds), len(panels), squeeze=False)
        weights = [r["noise_kind"] for r in records]
        names = {WEIGHT_NOISE: NOISE_AXIS[weights[0]], ACTIVATION_NOISE: ACTIVATION_AXIS}
        for kind, row in zip(kinds, axes, strict=True):
            for axis, (metric, (title, unit)) in zip(row, panels.items(), strict=True):
                _lines(
                    axis, [r for r in whole(records) if r["kind"] in (CLEAN, kind)], arms, metric
                )
                axis.set(title=title, xlabel=names[kind], ylabel=unit)
                _scale(axis, metric)
                if many and metric == "refusal_loss":
                    _logarithmic_if_wide(axis)
        # A gap above the panels belongs to the legend, which lies over none of the data.
        legend(figure, axes[0][0].get_legend_handles_labels()[0])
        return png(figure)


def quantized_bars(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes | None:
    """Draw the same metrics without noise and quantised: a group a scheme, a bar an arm.

    Returns:
        A PNG file, or None where nothing was quantised. Whiskers of 95 % are over training seeds
        and prompts (windows of text for the perplexity), points are training seeds. Metrics that
        were not measured are left out.

    Raises:
        ImportError: matplotlib is missing.
    """
    chosen = [r for r in whole(records) if r["kind"] in (CLEAN, QUANTIZED)]
    panels = _measured(chosen)
    if all(r["kind"] == CLEAN for r in chosen) or not panels:
        return None
    many = len(arms) * len({r["family"] for r in chosen}) > _BARS
    with load_matplotlib().rc_context(STYLE | {"hatch.linewidth": 1.5}):
        figure = new_figure(15, 0.7 + 3.6 * len(panels) if many else 5.2)
        lines, columns = (len(panels), 1) if many else (1, len(panels))
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, (metric, (title, unit)) in zip(axes, panels.items(), strict=True):
            _bars(axis, chosen, arms, metric, numbers=not many)
            axis.set(title=title, ylabel=unit)
            if not many or axis is axes[-1]:
                axis.set_xlabel("weights")
        from matplotlib.patches import Patch

        fills = enumerate(arms.values())
        legend(figure, [Patch(label=name, **arm_fill(number)) for number, name in fills])
        return png(figure)


def _measured(records: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Titles and units of the metrics that some record has."""
    return {
        metric: words
        for metric, words in PANELS.items()
        if any(r[metric] is not None for r in records)
    }


def _lines(
    axis: Any, records: Sequence[dict[str, Any]], arms: Mapping[str, str], metric: str
) -> None:
    """Draw an arm's values as points, their mean as a line and their 95 % interval around it."""
    measure = METRICS[metric]
    levels = sorted({r["level"] for r in records})
    dodge = 0.012 * levels[-1]
    for number, (label, name) in enumerate(arms.items()):
        found: dict[float, list[dict[str, Any]]] = {}
        for r in records:
            if r["label"] == label:
                found.setdefault(r["level"], []).append(r)
        # Arms stand a little apart so that equal points do not hide each other.
        shift = dodge * (number - (len(arms) - 1) / 2)
        style = arm_style(number)
        known = [
            (level + shift, *_mean_and_ends(rows, measure))
            for level, rows in sorted(found.items())
            if any(r[metric] is not None or metric in r["non_finite"] for r in rows)
        ]
        x = [at for at, *_ in known]
        axis.plot(
            x, [mean for _, mean, *_ in known], linewidth=2.0, markersize=7, label=name, **style
        )
        ends = [(at, mean, low, high) for at, mean, low, high in known if low is not None]
        if ends and len(arms) <= _BANDS:
            x, _, low, high = zip(*ends, strict=True)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for at, mean, low, high in ends if len(arms) > _BANDS else ():
            whiskers = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axis.errorbar(at, mean, whiskers, color=style["color"], linewidth=1.0, capsize=2)
        del style["linestyle"]  # of points it would be their outlines'
        for level, rows in found.items():
            values = _points(rows, measure)
            axis.scatter([level + shift] * len(values), values, s=16, alpha=0.6, zorder=3, **style)
    axis.set_xticks(levels)
    edge = 0.06 * levels[-1] if len(arms) <= _BANDS else dodge * (1 + len(arms) / 2)
    axis.set_xlim(-edge, levels[-1] + edge)


def _points(rows: Sequence[dict[str, Any]], measure: Metric) -> list[float]:
    """What is shown of the values behind a mean: the training seeds', of one seed the draws'."""
    several = len({r.get("training_seed") for r in rows}) > 1
    values = seed_means(rows, measure).values() if several else [r[measure.field] for r in rows]
    return [measure.factor * value for value in values if value is not None]


def _mean_and_ends(
    rows: Sequence[dict[str, Any]], measure: Metric
) -> tuple[float, float | None, float | None]:
    """An arm's mean in one family and the ends of its 95 % interval, as they are shown.

    The mean is NaN, a gap in a line, where a record has no value.
    """
    if any(r[measure.field] is None for r in rows):
        return math.nan, None, None
    mean = measure.factor * pooled([r[measure.field] for r in rows], measure)
    low, high = bounds(rows, measure)
    return (
        (mean, None, None) if low is None else (mean, measure.factor * low, measure.factor * high)
    )


def _bars(
    axis: Any,
    records: Sequence[dict[str, Any]],
    arms: Mapping[str, str],
    metric: str,
    *,
    numbers: bool,
) -> None:
    """Draw a metric as bars with whiskers, the perplexity as points: a group a family."""
    measure = METRICS[metric]
    families = list(dict.fromkeys(r["family"] for r in records))
    width = 0.8 / len(arms)
    for number, label in enumerate(arms):
        for place, family in enumerate(families):
            rows = [r for r in records if r["label"] == label and r["family"] == family]
            if not rows or any(r[metric] is None for r in rows):
                continue
            x = place + width * (number - (len(arms) - 1) / 2)
            value, low, high = _mean_and_ends(rows, measure)
            whisker = None if low is None else [[max(0.0, value - low)], [max(0.0, high - value)]]
            if metric == "perplexity":  # its axis has no zero for a bar to stand on
                style = arm_style(number) | {"linestyle": "none", "markersize": 8}
                hatched = arm_fill(number)["hatch"]
                style["markerfacecolor"] = "white" if hatched else style["color"]
                axis.errorbar(x, value, whisker, capsize=2, **style)
            else:
                axis.bar(x, value, 0.92 * width, yerr=whisker, capsize=2, **arm_fill(number))
            if len(rows) > 1:
                points = _points(rows, measure)
                dots = {"s": 9, "color": "white", "edgecolor": "black", "zorder": 3}
                beside = 0.3 * width * (metric == "perplexity")  # its markers are too small
                axis.scatter([x + beside] * len(points), points, **dots)
            if numbers:
                axis.annotate(
                    measure.text(value / measure.factor),
                    (x, value if low is None else high),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=9,
                    rotation=90 if len(arms) * len(families) > 6 else 0,
                )
    crowded = numbers and sum(map(len, families)) > _LABEL_ROOM
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(families)), families, **slanted)
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.15)
    if not numbers:
        axis.set_xlim(-0.5, len(families) - 0.5)  # panels lie below each other
    _scale(axis, metric)


def _scale(axis: Any, metric: str) -> None:
    """All of the range for a rate, a logarithmic axis with plain numbers for the perplexity."""
    if METRICS[metric].rate:
        axis.set_ylim(-4, 112)
        axis.set_yticks(range(0, 101, 20))
    elif metric == "perplexity":
        _logarithmic(axis)


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    plain = LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)


def _logarithmic_if_wide(axis: Any) -> None:
    """Make the axis logarithmic, and say so, if its lines' values are positive and far apart."""
    shown = (value for line in axis.get_lines() for value in line.get_ydata())
    values = [value for value in shown if not math.isnan(value)]
    if values and 0 < _WIDE * min(values) < max(values):
        _logarithmic(axis)
        axis.set_ylabel(f"{axis.get_ylabel()} (log scale)")
