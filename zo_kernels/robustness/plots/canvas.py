"""What all figures share: colours, sizes, and matplotlib's Agg canvas without its global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette: told apart under the common kinds of colour blindness. Its yellow is
# left out, being hard to see on white; markers tell the arms apart without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xxx")
STYLE = {
    "font.size": 12.0,
    "axes.titlesize": 13.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def arm_style(number: int) -> dict[str, str]:
    """Colour, marker and line of an arm: more arms than colours differ in the other two."""
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def arm_fill(number: int) -> dict[str, str]:
    """Colour and hatching of an arm's bars: more arms than colours differ in the hatching."""
    hatch = HATCHES[number // len(COLOURS) % len(HATCHES)]
    return {"facecolor": COLOURS[number % len(COLOURS)], "hatch": hatch, "edgecolor": "white"}


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """Put a legend above all panels, where it lies over none of the data."""
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4) or 1)


def load_matplotlib() -> Any:
    """Import matplotlib, or say how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'zo-kernels[refine]'") from error
    return matplotlib


def new_figure(width: float, height: float) -> Any:
    """Make a figure in inches on an Agg canvas, leaving pyplot and its backend alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
