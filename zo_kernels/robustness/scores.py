"""Layer scores as they are told: one row a decoder block, and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = (
    *("block", "number", "noise", "noise_se", "quant", "score", "score_se", "slope", "slope_se"),
    "selected",
)
"""What a row has. `block` is the block's name and `number` its place; `noise` and `quant` are the
rises of the loss with this block alone perturbed and quantised (nats per token), `score` what they
are combined to, `slope` the loss's derivative along the perturbation, `*_se` standard errors over
draws. A number is None where it was not measured; `selected` is whether the block is refined."""
SETTINGS = ("rho", "relative", "draws", "quantization", "estimator", "prompts", "settled")
"""How they were measured: scale of the perturbation and whether it is relative to the weights'
standard deviation, draws a block, the scheme of the quantisation term (None: no such term), the
estimator's name, prompts, and whether the selection is beyond the standard errors (None: unknown).
"""
_HEAD = ("block", "noise", "quantisation", "score", "slope", "selected")


def check_scores(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless there are rows and all fields and settings are there."""
    if not rows:
        raise ValueError("scores: expected a row for each decoder block, got none")
    for what, found, wanted in (
        *((f"row {i}", row, FIELDS) for i, row in enumerate(rows)),
        ("settings", settings, SETTINGS),
    ):
        missing = [key for key in wanted if key not in found]
        if missing:
            raise ValueError(f"scores, {what}: expected {list(wanted)}, got no {missing}")


def scores_told(settings: Mapping[str, Any]) -> list[str]:
    """How scores were measured, in sentences: of the measurement, and of the selection."""
    unit = " x the standard deviation of each tensor" if settings["relative"] else ""
    scheme = settings["quantization"]
    return [
        f"Rises of the loss in nats per token with one decoder block changed, over "
        f"{settings['prompts']} prompts: perturbed by rho {settings['rho']:g}{unit} "
        f"({settings['estimator']} estimator, {_count(settings['draws'], 'draw')} a block)"
        + (f", and quantised to {scheme}." if scheme else "; without a quantisation term."),
        {
            True: "The selection is settled: it stands beyond the scores' standard errors.",
            False: "The selection is not settled: within the scores' standard errors other draws "
            "could have selected other blocks.",
            None: "Whether other draws would select the same blocks was not determined.",
        }[settings["settled"]],
    ]


def scores_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Head and rows of texts, by block; the rows' last cells mark the selected ones."""
    ordered = sorted(rows, key=lambda row: row["number"])
    return {
        "head": list(_HEAD),
        "marked": True,
        "rows": [
            [
                f"{row['number']} ({row['block']})",
                _with_error(row["noise"], row["noise_se"]),
                _with_error(row["quant"], None),
                _with_error(row["score"], row["score_se"]),
                _with_error(row["slope"], row["slope_se"]),
                "yes" if row["selected"] else "no",
            ]
            for row in ordered
        ],
    }


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _with_error(value: float | None, error: float | None) -> str:
    """A number with its standard error, to the digits that tell blocks apart."""
    if value is None:
        return "n/a"
    return f"{value:+.4g}" if error is None else f"{value:+.4g} ± {error:.2g}"
