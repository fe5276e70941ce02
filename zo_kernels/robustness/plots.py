"""The report's figures, drawn with matplotlib's Agg canvas and without its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from zo_kernels.robustness.conditions import (
    ACTIVATION_NOISE,
    CLEAN,
    NOISES,
    QUANTIZED,
    WEIGHT_NOISE,
)
from zo_kernels.robustness.metrics import METRICS, bounds, layer_rises, pooled, whole

# Okabe and Ito's palette: told apart under the common kinds of colour blindness. Its yellow is
# left out, being hard to see on white; markers tell the arms apart without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
_STYLE = {
    "font.size": 12.0,
    "axes.titlesize": 13.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LABEL_ROOM = 30  # characters of upright labels below one panel


def metric_vs_noise(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes | None:
    """Draw refusal loss, refusal rate and perplexity against the noise scale, a row a kind.

    Args:
        records: `Evaluation.run` records of all arms.
        arms: label -> displayed name, in the order of the legend.

    Returns:
        A PNG file, or None where no noise was evaluated. One line an arm, a point per noise draw,
        a band of 95 % (bootstrap over draws and prompts). Conditions in which a metric was not
        measured are left out.

    Raises:
        ImportError: matplotlib is missing.
    """
    kinds = [kind for kind in NOISES if any(r["kind"] == kind for r in whole(records))]
    if not kinds:
        return None
    with _matplotlib().rc_context(_STYLE):
        figure = _figure(15, 0.6 + 4.4 * len(kinds))
        axes = figure.subplots(len(kinds), len(PANELS), squeeze=False)
        weights = [r["noise_kind"] for r in records]
        names = {WEIGHT_NOISE: NOISE_AXIS[weights[0]], ACTIVATION_NOISE: ACTIVATION_AXIS}
        for kind, row in zip(kinds, axes, strict=True):
            for axis, (metric, (title, unit)) in zip(row, PANELS.items(), strict=True):
                _lines(
                    axis, [r for r in whole(records) if r["kind"] in (CLEAN, kind)], arms, metric
                )
                axis.set(title=title, xlabel=names[kind], ylabel=unit)
                _scale(axis, metric)
        # A gap above the panels belongs to the legend, which lies over none of the data.
        _legend(figure, axes[0][0].get_legend_handles_labels()[0])
        return _png(figure)


def quantized_bars(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes | None:
    """Draw the same metrics without noise and quantised: a group a scheme, a bar an arm.

    Returns:
        A PNG file, or None where nothing was quantised. Whiskers of 95 % are over prompts (windows
        of text for the perplexity).

    Raises:
        ImportError: matplotlib is missing.
    """
    chosen = [r for r in whole(records) if r["kind"] in (CLEAN, QUANTIZED)]
    if all(r["kind"] == CLEAN for r in chosen):
        return None
    with _matplotlib().rc_context(_STYLE):
        figure = _figure(15, 5.2)
        axes = figure.subplots(1, len(PANELS))
        for axis, (metric, (title, unit)) in zip(axes, PANELS.items(), strict=True):
            _bars(axis, chosen, arms, metric)
            axis.set(title=title, xlabel="weights", ylabel=unit)
        from matplotlib.patches import Patch

        colours = dict(zip(arms.values(), COLOURS * len(arms), strict=False))
        _legend(figure, [Patch(color=colours[name], label=name) for name in arms.values()])
        return _png(figure)


def layer_map(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes | None:
    """Draw how the refusal loss rises when one decoder block is disturbed, as a heat map.

    Args:
        records: `Evaluation.run` records with conditions in one block (`EvaluationConfig.layers`).
        arms: label -> displayed name.

    Returns:
        A PNG file, or None without such records. A row an arm and disturbance, a column a block;
        the mean over draws and prompts of the loss minus the undisturbed one of these prompts.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = layer_rises(records)
    if not rows:
        return None
    with _matplotlib().rc_context(_STYLE | {"axes.grid": False}):
        values = np.array(list(rows.values()))
        figure = _figure(max(7.0, 2.5 + 0.4 * values.shape[1]), 1.8 + 0.5 * len(rows))
        axis = figure.subplots()
        limit = float(np.nanmax(np.abs(values), initial=1e-6))
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        several = len(arms) > 1
        names = [f"{arms[label]}: {state}" if several else state for label, state in rows]
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="decoder block", title="Rise of the refusal loss, one block disturbed")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, label="nats per token")
        return _png(figure)


def loss_per_step(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw one panel a training log: the loss of each step faint, its running mean strong.

    Args:
        logs: name -> rows with `step` and `loss` (nats per token); rows without a finite loss
            (skipped steps) are left out.

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is missing.
    """
    with _matplotlib().rc_context(_STYLE):
        columns = min(3, len(logs))
        lines = -(-len(logs) // columns)
        figure = _figure(max(6.5, 5.2 * columns), 4.2 * lines)
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for number, (axis, (name, rows)) in enumerate(zip(axes, logs.items(), strict=False)):
            kept = [
                (row["step"], row["loss"])
                for row in rows
                if row.get("loss") is not None and math.isfinite(row["loss"])
            ]
            steps, losses = [step for step, _ in kept], [loss for _, loss in kept]
            width = max(1, min(len(losses), max(5, len(losses) // 10)))
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=1.0, label="each step")
            axis.plot(
                steps,
                _running_mean(losses, width),
                color=colour,
                linewidth=2.2,
                label=f"mean of the last {width}",
            )
            axis.set(title=name, xlabel="step", ylabel="loss (nats per token)")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False)
        for axis in axes[len(logs) :]:
            axis.set_visible(False)
        return _png(figure)


def _lines(
    axis: Any, records: Sequence[dict[str, Any]], arms: Mapping[str, str], metric: str
) -> None:
    """Draw an arm's draws as points, their mean as a line and their 95 % interval as a band."""
    by = METRICS[metric].factor
    levels = sorted({r["level"] for r in records})
    dodge = 0.012 * levels[-1]
    for number, (label, name) in enumerate(arms.items()):
        found: dict[float, list[dict[str, Any]]] = {}
        for r in records:
            if r["label"] == label and r[metric] is not None:
                found.setdefault(r["level"], []).append(r)
        # Arms stand a little apart so that equal points do not hide each other.
        shift = dodge * (number - (len(arms) - 1) / 2)
        x = [level + shift for level in sorted(found)]
        rows = [[by * r[metric] for r in found[level]] for level in sorted(found)]
        style = {"color": COLOURS[number % 7], "marker": MARKERS[number % 7]}
        means = [
            by * pooled([r[metric] for r in found[level]], METRICS[metric])
            for level in sorted(found)
        ]
        axis.plot(x, means, linewidth=2.0, markersize=7, label=name, **style)
        ends = [bounds(found[level], METRICS[metric]) for level in sorted(found)]
        known = [
            (at, by * low, by * high)
            for at, (low, high) in zip(x, ends, strict=True)
            if low is not None
        ]
        if known:
            axis.fill_between(
                *zip(*known, strict=True), color=style["color"], alpha=0.15, linewidth=0
            )
        for position, row in zip(x, rows, strict=True):
            axis.scatter([position] * len(row), row, s=16, alpha=0.6, zorder=3, **style)
    axis.set_xticks(levels)
    axis.set_xlim(-0.06 * levels[-1], 1.06 * levels[-1])


def _bars(
    axis: Any, records: Sequence[dict[str, Any]], arms: Mapping[str, str], metric: str
) -> None:
    """Draw a metric as bars with whiskers: a group a family, a bar an arm."""
    by, measure = METRICS[metric].factor, METRICS[metric]
    families = list(dict.fromkeys(r["family"] for r in records))
    width = 0.8 / len(arms)
    for number, label in enumerate(arms):
        for r in records:
            if r["label"] != label or r[metric] is None:
                continue
            x = families.index(r["family"]) + width * (number - (len(arms) - 1) / 2)
            value = by * r[metric]
            low, high = bounds([r], measure)
            whisker = (
                None
                if low is None
                else [[max(0.0, value - by * low)], [max(0.0, by * high - value)]]
            )
            axis.bar(x, value, 0.92 * width, yerr=whisker, color=COLOURS[number % 7], capsize=2)
            axis.annotate(
                measure.text(r[metric]),
                (x, value if low is None else by * high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                rotation=90 if len(arms) * len(families) > 6 else 0,
            )
    crowded = sum(map(len, families)) > _LABEL_ROOM
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(families)), families, **slanted)
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.15)
    _scale(axis, metric)


def _scale(axis: Any, metric: str) -> None:
    """All of the range for a rate, a logarithmic axis with plain numbers for the perplexity."""
    if METRICS[metric].rate:
        axis.set_ylim(-4, 112)
        axis.set_yticks(range(0, 101, 20))
    elif metric == "perplexity":
        from matplotlib.ticker import LogFormatter

        axis.set_yscale("log")
        plain = LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(plain)


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4) or 1)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values, of fewer at the start."""
    sums = [0.0, *accumulate(values)]
    return [
        (sums[i] - sums[max(0, i - width)]) / (i - max(0, i - width)) for i in range(1, len(sums))
    ]


def _matplotlib() -> Any:
    """Import matplotlib, or say how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the report's plots need matplotlib: pip install 'zo-kernels[demo]'"
        ) from error
    return matplotlib


def _figure(width: float, height: float) -> Any:
    """Make a figure in inches on an Agg canvas, leaving pyplot and its backend alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
