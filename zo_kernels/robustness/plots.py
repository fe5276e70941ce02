"""The report's two plots, drawn with matplotlib's Agg canvas and without its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from zo_kernels.robustness.conditions import CLEAN, QUANTIZED, WEIGHT_NOISE

# Okabe and Ito's palette: told apart under the common kinds of colour blindness. Its yellow is
# left out, being hard to see on white; markers tell the arms apart without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NOISE_AXIS = {
    "rel_std": r"noise scale $\sigma$ ($\times$ std of each tensor)",
    "rel_norm": r"noise scale $\sigma$ ($\times$ norm of each tensor)",
    "abs": r"noise scale $\sigma$ (absolute)",
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


def metric_vs_noise(records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> bytes:
    """Draw refusal loss and refusal rate against the noise scale, and quantisation as bars.

    Args:
        records: `suite.evaluate` records of all arms.
        arms: label -> displayed name, in the order of the legend.

    Returns:
        A PNG file. One line an arm, a point per noise draw, a band from the lowest draw to the
        highest. Conditions in which a metric was not measured are left out.

    Raises:
        ImportError: matplotlib is missing.
    """
    with _matplotlib().rc_context(_STYLE):
        figure = _figure(15, 5.2)
        axes = figure.subplots(1, 3)
        kinds = [r["noise_kind"] for r in records if r["kind"] == WEIGHT_NOISE]
        noise_axis = NOISE_AXIS[kinds[0]] if kinds else "noise scale"
        panels = (
            (axes[0], "refusal_loss", 1.0, "refusal loss (nats per token)", "Refusal loss"),
            (axes[1], "refusal_rate", 100.0, "harmful prompts refused (%)", "Refusal rate"),
        )
        for axis, metric, factor, label, title in panels:
            _lines(axis, records, arms, metric, factor)
            axis.set(title=f"{title} under weight noise", xlabel=noise_axis, ylabel=label)
        axes[1].set_ylim(-4, 104)
        _bars(axes[2], records, arms)
        # A gap above the panels belongs to the legend, which lies over none of the data.
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4) or 1)
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
    axis: Any, records: Sequence[dict[str, Any]], arms: Mapping[str, str], metric: str, by: float
) -> None:
    """Draw an arm's draws as points, their mean as a line and their range as a band."""
    levels = sorted({r["level"] for r in records if r["kind"] == WEIGHT_NOISE})
    dodge = 0.012 * (levels[-1] if levels else 1.0)
    for number, (label, name) in enumerate(arms.items()):
        values: dict[float, list[float]] = {}
        for r in records:
            known = r["kind"] in (CLEAN, WEIGHT_NOISE)
            if r["label"] == label and known and r[metric] is not None:
                values.setdefault(r["level"], []).append(by * r[metric])
        # Arms stand a little apart so that equal points do not hide each other.
        shift = dodge * (number - (len(arms) - 1) / 2)
        x = [level + shift for level in sorted(values)]
        rows = [values[level] for level in sorted(values)]
        style = {"color": COLOURS[number % 7], "marker": MARKERS[number % 7]}
        means = [sum(row) / len(row) for row in rows]
        axis.plot(x, means, linewidth=2.0, markersize=7, label=name, **style)
        low, high = [min(row) for row in rows], [max(row) for row in rows]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for position, row in zip(x, rows, strict=True):
            axis.scatter([position] * len(row), row, s=16, alpha=0.6, zorder=3, **style)
    axis.set_xticks([0.0, *levels])


def _bars(axis: Any, records: Sequence[dict[str, Any]], arms: Mapping[str, str]) -> None:
    """Draw refusal loss without noise and quantised: a group a scheme, a bar an arm."""
    families = list(dict.fromkeys(r["family"] for r in records if r["kind"] == QUANTIZED))
    families = ["clean", *families]
    width = 0.8 / len(arms)
    for number, label in enumerate(arms):
        for place, family in enumerate(families):
            for r in records:
                value = r["refusal_loss"]
                if (r["label"], r["family"]) == (label, family) and value is not None:
                    x = place + width * (number - (len(arms) - 1) / 2)
                    axis.bar(x, value, 0.92 * width, color=COLOURS[number % 7])
                    axis.annotate(
                        f"{value:.2f}",
                        (x, value),
                        xytext=(0, 2),
                        textcoords="offset points",
                        ha="center",
                        va="bottom",
                        fontsize=9,
                        rotation=90 if len(arms) * len(families) > 12 else 0,
                    )
    crowded = sum(map(len, families)) > _LABEL_ROOM
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(families)), families, **slanted)
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.12)
    axis.set(
        title="Quantised weights (no error bar)",
        xlabel="weights",
        ylabel="refusal loss (nats per token)",
    )


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
