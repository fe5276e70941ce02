"""The evaluation report: a JSON summary, a Markdown page and two plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_kernels.files import write_file
from zo_kernels.robustness import plots
from zo_kernels.robustness.conditions import NOISES
from zo_kernels.robustness.suite import METRICS, paired, summary

_TITLES = {
    "refusal_loss": "Refusal loss on harmful prompts (nats per token, lower is safer)",
    "refusal_rate": "Refusal rate on harmful prompts (0 to 1, higher is safer)",
    "over_refusal_rate": "Refusal rate on harmless prompts (0 to 1, lower is better)",
    "perplexity": "Perplexity of the utility text (lower is better)",
    "harmless_loss": "Loss on helpful answers to harmless prompts (nats per token)",
}
_MARK = "\N{DAGGER}"
_PM = "\N{PLUS-MINUS SIGN}"


def write_report(
    directory: str | os.PathLike[str],
    records: Sequence[dict[str, Any]],
    *,
    title: str,
    arms: Sequence[str] | Mapping[str, str],
    training_logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
    compare: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Path]:
    """Write `summary.json`, `summary.md`, `metric_vs_noise.png` and `loss_per_step.png`.

    Each file appears under its name in one step, complete; an old one of that name is replaced.

    Args:
        directory: where to; made if absent.
        records: `suite.evaluate` records of all arms, evaluated with one configuration.
        title: heading of the page.
        arms: labels in the order of the rows, or label -> displayed name.
        training_logs: panel title -> rows with keys step and loss; None or empty: no loss plot.
        notes: sentences put below the heading.
        compare: (reference, other) label pairs for the paired differences other - reference.
            None: every arm listed after "aligned" against it; if no arm has that label, the last
            arm against the one before.

    Returns:
        File name -> path of what was written.

    Raises:
        ValueError: no arms, an arm without records, a record of no arm, or a comparison of
            unknown arms.
        ImportError: matplotlib is missing; nothing has been written then.
    """
    names = dict(arms) if isinstance(arms, Mapping) else {label: label for label in arms}
    labels = {record["label"] for record in records}
    if not names or labels != set(names):
        raise ValueError(f"expected records of exactly the arms {list(names)}, got {labels}")
    pairs = _default_pairs(list(names)) if compare is None else list(compare)
    unknown = [pair for pair in pairs if not set(pair) <= set(names)]
    if unknown:
        raise ValueError(f"expected comparisons among {list(names)}, got {unknown}")
    table = summary(records)
    differences = _differences(records, pairs)
    document = {
        "title": title,
        "notes": list(notes),
        "arms": names,
        "settings": _settings(records),
        "summary": table,
        "paired": differences,
    }
    page = _page(title, notes, names, records, table, pairs, differences)
    files = {
        "summary.json": json.dumps(document, indent=2, allow_nan=False) + "\n",
        "summary.md": page,
        "metric_vs_noise.png": plots.metric_vs_noise(records, names),
    }
    if training_logs:
        files["loss_per_step.png"] = plots.loss_per_step(training_logs)
    root = Path(directory)
    for name, data in files.items():
        write_file(root / name, data)
    return {name: root / name for name in files}


def _default_pairs(labels: list[str]) -> list[tuple[str, str]]:
    """Pairs to compare when the caller names none, see `write_report`."""
    if "aligned" in labels:
        return [("aligned", label) for label in labels[labels.index("aligned") + 1 :]]
    return [(labels[-2], labels[-1])] if len(labels) > 1 else []


def _settings(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all records share; a setting in which they differ is an error."""
    keys = ("noise_seed", "noise_kind", "noise_on", "refusal_list")
    keys += ("harmful_count", "harmless_count")
    for key in keys:
        if len({record[key] for record in records}) > 1:
            raise ValueError(
                f"expected one {key} in all records, got {sorted({r[key] for r in records})}"
            )
    return {key: records[0][key] for key in keys}


def _differences(
    records: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Paired differences of every comparison, noise level and metric."""
    result = []
    for reference, other in pairs:
        a = [record for record in records if record["label"] == reference]
        b = [record for record in records if record["label"] == other]
        for level in sorted({r["level"] for r in a if r["kind"] == "weight_noise"}):
            for metric in METRICS:
                row = {"reference": reference, "other": other, "level": level, "metric": metric}
                result.append(row | paired(a, b, metric, level))
    return result


def _page(
    title: str,
    notes: Sequence[str],
    names: Mapping[str, str],
    records: Sequence[dict[str, Any]],
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    pairs: Sequence[tuple[str, str]],
    differences: Sequence[dict[str, Any]],
) -> str:
    """Put the Markdown page together."""
    kinds = {record["family"]: record["kind"] for record in records}
    families = list(kinds)
    settings = _settings(records)
    lines = [f"# {title}", "", *(line for note in notes for line in (note, ""))]
    lines += [
        f"{settings['harmful_count']} harmful and {settings['harmless_count']} harmless prompts; "
        f'refusals by the string list "{settings["refusal_list"]}"; weight noise '
        f"`{settings['noise_kind']}` on `{settings['noise_on']}` weights, seed "
        f"{settings['noise_seed']}. Columns: `w0.05` is weight noise of scale 0.05, mean {_PM} "
        "standard deviation over the noise draws; `a0.05` the same of noise on the decoder blocks' "
        "outputs, in units of each token's; `int4` is round-to-nearest fake quantisation, `-a8` "
        "with 8-bit activations.",
        "",
        f"{_MARK} One checkpoint, quantised or read as it is: a single deterministic number with "
        "no error bar. Differences in these columns cannot be told from chance here.",
    ]
    for metric, heading in _TITLES.items():
        marks = [family + ("" if kinds[family] in NOISES else _MARK) for family in families]
        lines += ["", f"## {heading}", "", _row(["arm", *marks]), _row(["---"] * (len(marks) + 1))]
        for label, name in names.items():
            cells = [_cell(table[label].get(family, {}).get(metric)) for family in families]
            lines.append(_row([name, *cells]))
    for reference, other in pairs:
        rows = [d for d in differences if (d["reference"], d["other"]) == (reference, other)]
        lines += ["", f"## Paired differences: {names[other]} minus {names[reference]}", ""]
        lines += _paired_lines(rows)
        fixed = [family for family in families if kinds[family] not in NOISES]
        lines += [
            "",
            f"Without noise and quantised{_MARK} (no error bar):",
            "",
            _row(["metric", *fixed]),
            _row(["---"] * (len(fixed) + 1)),
        ]
        for metric in _TITLES:
            cells = []
            for family in fixed:
                a = table[reference].get(family, {}).get(metric, {}).get("mean")
                b = table[other].get(family, {}).get(metric, {}).get("mean")
                cells.append("n/a" if a is None or b is None else f"{b - a:+.4f}")
            lines.append(_row([metric, *cells]))
    return "\n".join(lines) + "\n"


def _paired_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of one comparison's paired differences, and sentences for each noise level."""
    if not rows:
        return ["No weight noise was evaluated: there is nothing to pair."]
    lines = [_row(["noise", "metric", "difference", "standard error", "draws"])]
    lines.append(_row(["---"] * 5))
    for row in rows:
        values = [
            "n/a" if row[key] is None else format(row[key], form)
            for key, form in (("mean", "+.4f"), ("standard_error", ".4f"))
        ]
        lines.append(_row([f"{row['level']:g}", row["metric"], *values, str(row["n"])]))
    lines.append("")
    for row in rows:
        if row["metric"] in ("refusal_loss", "refusal_rate"):
            lines.append(f"- {_sentence(row)}")
    draws = min(row["n"] for row in rows)
    if draws > 1:
        lines += [
            "",
            f"Mean {_PM} 2 standard errors from {draws} draws covers about "
            f"{100 * _coverage(2.0, draws - 1):.0f} % (Student's t with {draws - 1} degrees of "
            "freedom), over noise draws on these prompts and this pair of checkpoints only. "
            "Each line is one of several comparisons.",
        ]
    return lines


def _sentence(row: Mapping[str, Any]) -> str:
    """Say in words whether a paired difference exceeds two standard errors."""
    what = f"Noise {row['level']:g}, {row['metric'].replace('_', ' ')}: "
    d, error = row["mean"], row["standard_error"]
    if d is None:
        return what + "not measured, or not finite, in every draw of both arms; no difference."
    if error is None:
        return what + f"difference {d:+.4f} from a single draw, no standard error, no judgement."
    if error == 0:
        return what + f"difference {d:+.4f} in every draw; the draws show no spread to judge it by."
    above = abs(d) > 2 * error
    return (
        what + f"difference {d:+.4f} {_PM} {error:.4f} (s.e.): |d| is "
        f"{'more' if above else 'not more'} than 2 s.e., so these draws "
        f"{'show a difference' if above else 'do not show a difference'}."
    )


def _cell(entry: Mapping[str, Any] | None) -> str:
    """One table cell: mean, with the spread over draws where there are several."""
    if entry is not None and entry["non_finite"]:
        return f"not finite in {entry['non_finite']} of {entry['n']}"
    if entry is None or entry["mean"] is None:
        return "n/a"
    spread = "" if entry["std"] is None else f" {_PM} {entry['std']:.3f}"
    return f"{entry['mean']:.3f}{spread}"


def _row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _coverage(limit: float, freedom: int) -> float:
    """P(|T| <= limit) for Student's t, by Simpson's rule on its density."""
    norm = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    steps = 200
    density = [
        norm * (1 + (limit * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(steps + 1)
    ]
    inner = 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])
    return 2 * limit / steps / 3 * (density[0] + inner + density[-1])
