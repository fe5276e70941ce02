"""Which decoder blocks matter: one disturbed at a time, and the scores that select them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zo_kernels.robustness.metrics import layer_rises
from zo_kernels.robustness.plots.canvas import COLOURS, STYLE, load_matplotlib, new_figure, png
from zo_kernels.robustness.scores import check_scores

_TICKS = 40  # numbers of blocks below one figure
_NUMBERED = 12  # as many blocks have their scores written in


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
    with load_matplotlib().rc_context(STYLE | {"axes.grid": False}):
        values = np.array(list(rows.values()))
        figure = new_figure(max(7.0, 2.5 + 0.4 * values.shape[1]), 1.8 + 0.5 * len(rows))
        axis = figure.subplots()
        limit = float(np.nanmax(np.abs(values), initial=1e-6))
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        several = len(arms) > 1
        names = [f"{arms[label]}: {state}" if several else state for label, state in rows]
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="decoder block", title="Rise of the refusal loss, one block disturbed")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, label="nats per token")
        return png(figure)


def layer_scores(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> bytes:
    """Draw the scores of decoder blocks: bars of both terms, a heat map of what they combine to.

    Args:
        rows: one a block, see `scores.FIELDS`.
        settings: how they were measured, see `scores.SETTINGS`.

    Returns:
        A PNG file. Whiskers are two standard errors; triangles mark the selected blocks, whose
        bars are strong. A term that was measured nowhere has no panel.

    Raises:
        ValueError: no rows, or one that lacks a field.
        ImportError: matplotlib is missing.
    """
    check_scores(rows, settings)
    ordered = sorted(rows, key=lambda row: row["number"])
    numbers = [row["number"] for row in ordered]
    noise = f"perturbed, $\\rho$ = {settings['rho']:g}"
    terms = [
        term
        for term in (
            ("noise", "noise_se", noise + (r" $\times$ std" if settings["relative"] else "")),
            ("quant", None, f"quantised to {settings['quantization']}"),
        )
        if any(row[term[0]] is not None for row in ordered)
    ]
    with load_matplotlib().rc_context(STYLE):
        figure = new_figure(max(8.0, 3.0 + 0.4 * len(rows)), 2.0 + 2.4 * len(terms))
        axes = figure.subplots(
            len(terms) + 1, 1, sharex=True, height_ratios=[*([2.4] * len(terms)), 0.7]
        )
        axes = np.atleast_1d(axes)
        for axis, colour, (field, error, title) in zip(axes, COLOURS, terms, strict=False):
            _term(axis, ordered, field, error, colour)
            axis.set(title=title, ylabel="nats per token")
        _strip(figure, axes[-1], ordered)
        axes[-1].set_xlabel(f"decoder block ({settings['prompts']} prompts)")
        step = -(-len(rows) // _TICKS)
        axes[-1].set_xticks(numbers[::step])
        axes[-1].set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
        return png(figure)


def _term(
    axis: Any, rows: Sequence[Mapping[str, Any]], field: str, error: str | None, colour: str
) -> None:
    """Draw one term's bars, those of selected blocks strong, with two standard errors."""
    from matplotlib.colors import to_rgb

    pale = [0.4 * part + 0.6 for part in to_rgb(colour)]
    for row in rows:
        if row[field] is None:
            continue
        spread = row[error] if error else None
        axis.bar(
            row["number"],
            row[field],
            0.75,
            color=colour if row["selected"] else pale,
            yerr=None if spread is None else 2 * spread,
            error_kw={"linewidth": 1.2, "capsize": 2},
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(visible=False, axis="x")


def _strip(figure: Any, axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the combined scores as a heat map of one line, with triangles over selected blocks."""
    values = np.array([[np.nan if row["score"] is None else row["score"] for row in rows]])
    edges = (rows[0]["number"] - 0.5, rows[-1]["number"] + 0.5, 0.0, 1.0)
    image = axis.imshow(values, cmap="viridis", aspect="auto", extent=edges)
    marked = [row["number"] for row in rows if row["selected"]]
    axis.scatter(marked, [1.25] * len(marked), marker="v", s=60, color="black", clip_on=False)
    axis.set(title="score; triangles: selected", yticks=[])
    axis.title.set_y(1.4)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, cax=axis.inset_axes((1.01, 0.0, 0.012, 1.0)))
    if len(rows) <= _NUMBERED:
        known = values[~np.isnan(values)]
        middle = (known.min() + known.max()) / 2 if known.size else 0.0
        for row, value in zip(rows, values[0], strict=True):
            if not np.isnan(value):
                ink = "black" if value > middle else "white"
                axis.text(row["number"], 0.5, f"{value:.3g}", color=ink, ha="center", va="center")
