"""Two arms, condition by condition: what differs, by how much, and whether it is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from zo_kernels.robustness import statistics
from zo_kernels.robustness.conditions import ACTIVATION_NOISE, CLEAN, QUANTIZED, WEIGHT_NOISE
from zo_kernels.robustness.metrics import JUDGE_TITLES, METRICS, Metric, items, whole
from zo_kernels.robustness.seeds import by_seed, check_draws

SAME = (
    *("prompts", "noise_seed", "noise_kind", "noise_on", "refusal_list", "detector"),
    *("refusal", "max_length", "max_new_tokens"),
    *("text", "perplexity_window", "perplexity_tokens"),
)
"""Fields that must agree for records to be paired; and of each judge its fingerprint."""
LEVEL = 0.05
_WINDOWS = ("utility_losses", "divergences")
_TESTS = {
    "mcnemar": "McNemar's test",
    "sign-flip": "sign-flip test",
    "crossed-t": "t test over {factors}",
}
_WORDS = {
    CLEAN: "as it is",
    WEIGHT_NOISE: "under weight noise {level:g}",
    ACTIVATION_NOISE: "under activation noise {level:g}",
    QUANTIZED: "as {family}",
}


def compare_records(
    reference: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare two arms in every condition and metric that both have.

    An arm is a model that exists once (records without a `training_seed`) or one model a training
    seed. Arms of the same seeds are paired seed by seed; a model that exists once meets each seed's
    model of the other arm.

    Args:
        reference, other: `Evaluation.run` records of one arm each.
        seed: of the resampling.

    Returns:
        One dict per condition family and metric: reference, other (labels), family, kind, level,
        metric, the fields of `statistics.Difference` (other - reference; of the perplexity, the
        loss behind it), adjusted_p (Benjamini-Hochberg over all rows returned), significant:
        adjusted_p at or below 0.05 and an interval without 0, and a sentence. Where a value is
        missing or not finite the numbers are None.

    Raises:
        ValueError: records of several arms, of other prompts or other noise, other draws, a draw
            twice, other training seeds, or no condition in common.
    """
    arms = [_families(records) for records in (reference, other)]
    for key in SAME:
        values = {str(r.get(key)) for records in (reference, other) for r in records}
        if len(values) > 1:
            raise ValueError(f"expected equal {key} to pair by, got {sorted(values)}")
    for key in (f"{judge}_model" for judge in JUDGE_TITLES):
        values = {r[key] for records in (reference, other) for r in records if r.get(key)}
        if len(values) > 1:
            raise ValueError(f"expected one {key} to pair by, got {sorted(values)}")
    common = [family for family in arms[0] if family in arms[1]]
    if not common:
        raise ValueError(f"expected a common condition, got {list(arms[0])} and {list(arms[1])}")
    rows = []
    for family in common:
        a, b = arms[0][family], arms[1][family]
        seeds = [by_seed(arm) for arm in (a, b)]
        draws = [check_draws(arm[0], groups) for arm, groups in zip((a, b), seeds, strict=True)]
        if draws[0] != draws[1]:
            raise ValueError(f"{family}: expected the same draws once each, got {draws}")
        sets = [list(groups) for groups in seeds if None not in groups]
        if len(sets) == 2 and sets[0] != sets[1]:
            raise ValueError(
                f"{family}: expected the same training seeds, to pair {a[0]['label']} and "
                f"{b[0]['label']} seed by seed, got {sets[0]} and {sets[1]}"
            )
        for metric in METRICS.values():
            if any(r.get(metric.items) is None for r in (*a, *b)):
                continue  # not measured here
            if metric.field == "divergence" and a[0]["kind"] == CLEAN:
                continue  # 0 by definition
            row = {
                "reference": a[0]["label"],
                "other": b[0]["label"],
                **{key: a[0][key] for key in ("family", "kind", "level")},
                "metric": metric.field,
            }
            first, second = items(a, metric), items(b, metric)
            missing = [[value is None for value in arm[0][metric.items]] for arm in (a, b)]
            if first is None or second is None or missing[0] != missing[1]:
                empty = dict.fromkeys(statistics.Difference.__annotations__)
                rows.append(
                    row
                    | empty
                    | {
                        "prompts": len(a[0][metric.items]),
                        "draws": len(draws[0]),
                        "training_seeds": max(map(len, seeds)),
                    }
                )
            else:
                rows.append(
                    row | asdict(statistics.compare(first, second, rate=metric.rate, seed=seed))
                )
    known = [row for row in rows if row["p_value"] is not None]
    for row, p in zip(known, statistics.adjusted([r["p_value"] for r in known]), strict=True):
        row["adjusted_p"] = p
        row["significant"] = p <= LEVEL and not row["low"] <= 0 <= row["high"]
    for row in rows:
        row.setdefault("adjusted_p", None)
        row.setdefault("significant", None)
        row["sentence"] = _sentence(row)
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """One sentence on all comparisons of two arms.

    Args:
        rows: of one call of `compare_records`.
        names: label -> displayed name.
    """
    what = f"{names[rows[0]['other']]} against {names[rows[0]['reference']]}"
    judged = [row for row in rows if row["significant"] is not None]
    found = [row for row in judged if row["significant"]]
    if not judged:
        return f"{what}: nothing could be compared; values are missing or not finite."
    if not found:
        return (
            f"{what}: none of {len(judged)} differences is significant; these "
            f"{_listed(['prompts', 'draws', *_seeds(rows)])} do not tell the two apart."
        )
    better = sum(direction(row) == "better" for row in found)
    worse = sum(direction(row) == "worse" for row in found)
    neither = len(found) - better - worse
    counts = [f"{better} better", f"{worse} worse"]
    counts += [f"{neither} neither better nor worse"] if neither else []
    verb = "is" if len(found) == 1 else "are"
    return (
        f"{what}: {len(found)} of {len(judged)} differences {verb} significant at a false "
        f"discovery rate of {100 * LEVEL:.0f} %: {', '.join(counts)}."
    )


def difference(row: Mapping[str, Any]) -> str:
    """A difference with its interval, as it is shown: "+6.2 [+2.1, +10.4]"; points of a rate."""
    if row["mean"] is None:
        return "n/a"
    by, digits, _ = _unit(METRICS[row["metric"]])
    mean, low, high = (f"{by * row[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def direction(row: Mapping[str, Any]) -> str:
    """Whether a difference is "better", "worse" or "neither better nor worse"."""
    better = METRICS[row["metric"]].better
    if better is None or row["mean"] == 0:
        return "neither better nor worse"
    return "better" if (row["mean"] > 0) == (better == "higher") else "worse"


def p_text(p: float | None) -> str:
    """A p value as it is shown."""
    return "n/a" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _families(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    labels = {record["label"] for record in records}
    if len(labels) != 1:
        raise ValueError(f"expected records of one arm, got {sorted(labels)}")
    families: dict[str, list[Mapping[str, Any]]] = {}
    for record in whole(records):
        families.setdefault(record["family"], []).append(record)
    return families


def _unit(metric: Metric) -> tuple[float, int, str]:
    """Factor, decimals and unit of a metric's differences."""
    return (100, 1, "points") if metric.rate else (1, 3, "nats per token")


def _sentence(row: Mapping[str, Any]) -> str:
    """A comparison in plain words."""
    metric = METRICS[row["metric"]]
    where = _WORDS[row["kind"]].format(**row)
    name = metric.short if metric.rate else metric.compared
    start = f"{name[0].upper()}{name[1:]} {where}: "
    if row["mean"] is None:
        return start + "not finite, or not there, for some prompts; not compared."
    windows = metric.items in _WINDOWS
    counts = [f"{row['prompts']} {'windows of text' if windows else 'prompts'}"]
    counts += [f"{row['draws']} draws"] if row["draws"] > 1 else []
    counts += [f"{row['training_seeds']} training seeds"] if row["training_seeds"] > 1 else []
    test = _TESTS[row["test"]].format(factors=_factors(row))
    unit = _unit(metric)[2]
    verb = f"is significant and {direction(row)}" if row["significant"] else "is not significant"
    return (
        f"{start}the difference {difference(row)} {unit} {verb} ({test}, "
        f"p {p_text(row['p_value'])}, adjusted {p_text(row['adjusted_p'])}; {', '.join(counts)})."
    )


def _factors(row: Mapping[str, Any]) -> str:
    """What a crossed test takes as random."""
    draws = ["draws"] if row["draws"] > 1 else []
    return _listed([*_seeds([row]), *draws, "prompts"])


def _seeds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["training seeds"] if any(row["training_seeds"] > 1 for row in rows) else []


def _listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
