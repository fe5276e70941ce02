"""How training went: the loss of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from zo_kernels.robustness.plots.canvas import COLOURS, STYLE, load_matplotlib, new_figure, png


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
    with load_matplotlib().rc_context(STYLE):
        columns = min(3, len(logs))
        lines = -(-len(logs) // columns)
        figure = new_figure(max(6.5, 5.2 * columns), 4.2 * lines)
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
        return png(figure)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values, of fewer at the start."""
    sums = [0.0, *accumulate(values)]
    return [
        (sums[i] - sums[max(0, i - width)]) / (i - max(0, i - width)) for i in range(1, len(sums))
    ]
