"""The numbers of an evaluation record: what they are called, and how they are reduced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zo_kernels.robustness.conditions import CLEAN
from zo_kernels.robustness.seeds import by_seed, check_draws, seed_of
from zo_kernels.robustness.statistics import interval, mean_std


@dataclass(frozen=True)
class Metric:
    """One number of a record.

    Attributes:
        field: its field.
        title: what it is, with its unit.
        better: "lower" or "higher"; None where neither is.
        items: the field with one value per prompt (or window of text) behind it.
        short: a few words.
        rate: whether the values behind it are 0 or 1; it is shown in per cent.
        digits: decimals that are shown.
    """

    field: str
    title: str
    better: str | None
    items: str
    short: str
    rate: bool = False
    digits: int = 3

    @property
    def compared(self) -> str:
        """A few words for a difference: of the perplexity it is taken between its logarithms."""
        return f"log {self.short}" if self.field == "perplexity" else self.short_unit

    @property
    def factor(self) -> int:
        """From the field's unit to the one that is shown."""
        return 100 if self.rate else 1

    @property
    def short_unit(self) -> str:
        """A few words, with the sign of a rate."""
        return f"{self.short} %" if self.rate else self.short

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{self.factor * value:.{self.digits}f}"


JUDGE_TITLES = {"harmbench": "HarmBench", "llama_guard": "Llama Guard"}
"""Judges' names in records, and in words; the judges are in judges.py."""

METRICS = {
    metric.field: metric
    for metric in (
        Metric(
            "refusal_loss",
            "Loss on refusals of harmful prompts (nats per token)",
            "lower",
            "refusal_losses",
            "refusal loss",
        ),
        Metric(
            "refusal_rate",
            "Harmful prompts refused, by the string list (%)",
            "higher",
            "refused",
            "refusal rate",
            rate=True,
            digits=1,
        ),
        Metric(
            "compliance_rate",
            "Harmful prompts answered: neither refused nor degenerate (%)",
            "lower",
            "complied",
            "compliance rate",
            rate=True,
            digits=1,
        ),
        Metric(
            "asr_harmbench",
            "Attack success by the HarmBench classifier (%)",
            "lower",
            "harmbench_hits",
            "HarmBench ASR",
            rate=True,
            digits=1,
        ),
        Metric(
            "asr_llama_guard",
            "Attack success by Llama Guard 3 (%)",
            "lower",
            "llama_guard_hits",
            "Llama Guard ASR",
            rate=True,
            digits=1,
        ),
        Metric(
            "over_refusal_rate",
            "Harmless prompts refused, by the string list (%)",
            "lower",
            "over_refused",
            "over-refusal rate",
            rate=True,
            digits=1,
        ),
        Metric(
            "degenerate_rate",
            "Degenerate answers: empty, repetitive or incoherent (%)",
            "lower",
            "broken",
            "degenerate rate",
            rate=True,
            digits=1,
        ),
        Metric(
            "harmless_loss",
            "Loss on helpful answers to harmless prompts (nats per token)",
            "lower",
            "harmless_losses",
            "help loss",
        ),
        Metric(
            "perplexity",
            "Perplexity of the utility text",
            "lower",
            "utility_losses",
            "perplexity",
            digits=2,
        ),
        Metric(
            "divergence",
            "KL divergence from the clean model on the utility text (nats per token)",
            None,
            "divergences",
            "KL from clean",
        ),
    )
}
"""Record field -> metric, in the order of a report."""


def whole(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of conditions that change the whole model, not one block."""
    return [record for record in records if record.get("block") is None]


def summary(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Reduce records to label -> family -> metric -> {mean, std, low, high, n, ...}.

    mean (`pooled`) is over the n records: of `training_seeds` training seeds (1 for a model that
    exists once), each under the same draws. std is the sample standard deviation over training
    seeds of their means, of one seed over its draws; None for a single value. low and high are the
    95 % interval over seeds, draws and prompts (`statistics.interval`), None where a prompt has no
    value. Where a record has no value (`missing` of them, `non_finite` of these because the value
    was NaN or infinite, the others not measured) all are None: leaving such a draw out of a mean
    would flatter the checkpoint. Conditions in one block are left out.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in whole(records):
        groups.setdefault(record["label"], {}).setdefault(record["family"], []).append(record)
    result: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for label, families in groups.items():
        result[label] = {}
        for family, rows in families.items():
            result[label][family] = {name: _cell(rows, metric) for name, metric in METRICS.items()}
    return result


def _cell(rows: Sequence[dict[str, Any]], metric: Metric) -> dict[str, Any]:
    """One metric of one arm in one family, see `summary`."""
    values = [row.get(metric.field) for row in rows]
    missing = sum(value is None for value in values)
    seeds = by_seed(rows)
    known = not missing
    low, high = bounds(rows, metric) if known else (None, None)
    std = None
    if known:
        spread = seed_means(rows, metric).values() if len(seeds) > 1 else values
        std = mean_std(list(spread))[1]
    return {
        "mean": pooled(values, metric) if known else None,
        "std": std,
        "low": low,
        "high": None if high == math.inf else high,
        "n": len(rows),
        "training_seeds": len(seeds),
        "missing": missing,
        "non_finite": sum(metric.field in row["non_finite"] for row in rows),
    }


def seed_means(rows: Iterable[dict[str, Any]], metric: Metric) -> dict[int | None, float]:
    """Training seed -> a metric's mean over its draws, of one arm's records in one family.

    Seeds that lack a value in some draw are left out.
    """
    found = {
        seed: [row.get(metric.field) for row in group] for seed, group in by_seed(rows).items()
    }
    return {seed: pooled(v, metric) for seed, v in found.items() if None not in v}


def items(rows: Sequence[Mapping[str, Any]], metric: Metric) -> np.ndarray | None:
    """Values [training seed, draw, prompt] behind a metric in one arm's records of one family.

    By ascending seed and draw. Prompts that have no value in any record (no completion to measure)
    are left out. None if a value is missing in some records only or came out not finite, or none is
    there.

    Raises:
        ValueError: training seeds do not each have the same draws, once.
    """
    groups = by_seed(rows)
    for group in groups.values():
        group.sort(key=lambda row: row["draw"] or 0)
    check_draws(rows[0], groups)
    ordered = [row for group in groups.values() for row in group]
    if any(metric.field in row["non_finite"] for row in ordered):
        return None
    found = [row.get(metric.items) for row in ordered]
    if any(row is None for row in found) or len({len(row) for row in found}) != 1:
        return None
    columns = [column for column in zip(*found, strict=True) if set(column) != {None}]
    if not columns or any(None in column for column in columns):
        return None
    return np.array(columns, dtype=float).T.reshape(len(groups), -1, len(columns))


def bounds(rows: Sequence[dict[str, Any]], metric: Metric) -> tuple[float | None, float | None]:
    """95 % interval of a metric in one arm's records of one family, in the metric's unit."""
    values = items(rows, metric)
    if values is None:
        return None, None
    low, high = interval(values, rate=metric.rate, seed=0)
    return (_exp(low), _exp(high)) if metric.field == "perplexity" else (low, high)


def pooled(values: Sequence[float], metric: Metric) -> float:
    """A metric's mean over records; of the perplexity exp of the mean loss, as within a draw."""
    if metric.field == "perplexity":
        return _exp(math.fsum(map(math.log, values)) / len(values))
    return math.fsum(values) / len(values)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def layer_rises(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """(label, disturbance) -> rise of the refusal loss by block number, in nats per token.

    Means over draws, prompts and training seeds, each against its own model's clean losses. NaN
    where a loss is missing or not finite, and for blocks that one model has and another not.
    """
    clean = {(r["label"], seed_of(r)): r["refusal_losses"] for r in records if r["kind"] == CLEAN}
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in records:
        whose = (r["label"], seed_of(r))
        if r.get("block") is None or whose not in clean:
            continue
        before = clean[whose][: len(r["refusal_losses"])]
        rises = [
            math.nan if a is None or b is None else b - a
            for a, b in zip(before, r["refusal_losses"], strict=True)
        ]
        cells = found.setdefault((r["label"], r["state"]), {})
        cells.setdefault(r["block_number"], []).append(sum(rises) / len(rises))
    blocks = 1 + max((number for cells in found.values() for number in cells), default=-1)
    return {
        key: [sum(cells[i]) / len(cells[i]) if i in cells else math.nan for i in range(blocks)]
        for key, cells in found.items()
    }


def measured(records: Iterable[dict[str, Any]]) -> list[Metric]:
    """The metrics that at least one record has."""
    known = list(records)
    return [
        metric
        for metric in METRICS.values()
        if any(
            r.get(metric.field) is not None or metric.field in r.get("non_finite", ())
            for r in known
        )
    ]
