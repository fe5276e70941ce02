"""The evaluation report: a JSON summary, a Markdown page, figures, and all of it in one HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_kernels.files import write_file
from zo_kernels.robustness import html, plots
from zo_kernels.robustness.comparison import SAME, compare_records, difference, p_text, verdict
from zo_kernels.robustness.degenerate import COMPRESSION, SURPRISE
from zo_kernels.robustness.metrics import METRICS, Metric, layer_rises, measured, summary, whole
from zo_kernels.robustness.refusals import refusal_list

PAGES = ("report.html", "summary.md", "summary.json")
FIGURES = ("metric_vs_noise.png", "quantization.png", "layers.png", "loss_per_step.png")
"""What `write_report` writes: all of the pages, and the figures that there is data for."""
SETTINGS = (*SAME, "harmful_count", "harmless_count")
_COMPARED = ("condition", "metric", "difference [95 %]", "effect", "p", "adjusted p", "significant")


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
    """Write `report.html`, `summary.md`, `summary.json` and the figures that there is data for.

    `report.html` holds the figures too and needs no other file. Figures: `metric_vs_noise.png`,
    `quantization.png`, `layers.png`, `loss_per_step.png`. Each file appears under its name in one
    step, complete; an old one of that name is replaced, or removed where this report has none.

    Args:
        directory: where to; made if absent.
        records: `Evaluation.run` records of all arms, evaluated with one configuration.
        title: heading of the page.
        arms: labels in the order of the rows, or label -> displayed name.
        training_logs: panel title -> rows with keys step and loss; None or empty: no loss plot.
        notes: sentences put below the heading.
        compare: (reference, other) label pairs that are compared. None: every arm listed after
            "aligned" against it; if no arm has that label, all others against the first.

    Returns:
        File name -> path of what was written.

    Raises:
        ValueError: no arms, an arm without records, a record of no arm, records of different
            prompts or settings, or a comparison of unknown arms.
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
    document = {
        "title": title,
        "notes": list(notes),
        "arms": names,
        "settings": _settings(records),
        "summary": summary(records),
        "comparisons": [_compared(records, names, *pair) for pair in pairs],
        "layers": {
            f"{label} {state}": [None if x != x else x for x in rises]
            for (label, state), rises in layer_rises(records).items()
        },
    }
    figures = (
        plots.metric_vs_noise(records, names),
        plots.quantized_bars(records, names),
        plots.layer_map(records, names),
        plots.loss_per_step(training_logs) if training_logs else None,
    )
    drawn = {n: data for n, data in zip(FIGURES, figures, strict=True) if data is not None}
    tables = [_table(metric, names, document["summary"]) for metric in measured(records)]
    explained = _explained(document["settings"])
    pages = (
        html.page(document, explained, tables, _COMPARED, drawn, records),
        _markdown(document, explained, tables),
        json.dumps(document, indent=2, allow_nan=False) + "\n",
    )
    files: dict[str, str | bytes] = dict(zip(PAGES, pages, strict=True)) | drawn
    root = Path(directory)
    for name, data in files.items():
        write_file(root / name, data)
    for name in set(FIGURES) - drawn.keys():
        (root / name).unlink(missing_ok=True)  # of an earlier report
    return {name: root / name for name in files}


def _default_pairs(labels: list[str]) -> list[tuple[str, str]]:
    """Pairs to compare when the caller names none, see `write_report`."""
    first = labels.index("aligned") if "aligned" in labels else 0
    return [(labels[first], label) for label in labels[first + 1 :]]


def _settings(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all records share; a setting in which they differ is an error."""
    for key in SETTINGS:
        if len({record[key] for record in records}) > 1:
            raise ValueError(
                f"expected one {key} in all records, got {sorted({r[key] for r in records})}"
            )
    return {key: records[0][key] for key in SETTINGS}


def _compared(
    records: Sequence[dict[str, Any]], names: Mapping[str, str], reference: str, other: str
) -> dict[str, Any]:
    """One comparison: its rows as numbers and as they are shown, and a verdict."""
    a, b = ([r for r in whole(records) if r["label"] == label] for label in (reference, other))
    rows = compare_records(a, b)
    return {
        "reference": reference,
        "other": other,
        "title": f"{names[other]} against {names[reference]}",
        "verdict": verdict(rows, names),
        "rows": rows,
        "cells": [
            [
                row["family"],
                METRICS[row["metric"]].compared,
                difference(row),
                "n/a" if row["effect"] is None else f"{row['effect']:+.2f}",
                p_text(row["p_value"]),
                p_text(row["adjusted_p"]),
                {True: "yes", False: "no", None: "n/a"}[row["significant"]],
            ]
            for row in rows
        ],
    }


def _explained(settings: Mapping[str, Any]) -> list[str]:
    """How the numbers are to be read."""
    return [
        f"{settings['harmful_count']} harmful and {settings['harmless_count']} harmless prompts "
        f'(digest {settings["prompts"]}); refusals by the string list "{settings["refusal_list"]}" '
        f"({refusal_list(settings['refusal_list']).source});"
        f" weight noise {settings['noise_kind']} on {settings['noise_on']} weights, seed "
        f"{settings['noise_seed']}. w0.05: weight noise of scale 0.05; a0.05: noise on the decoder "
        "blocks' outputs in units of each token's standard deviation; int4 and the like: "
        "round-to-nearest fake quantisation, -a8 with 8-bit activations.",
        "In brackets: 95 % intervals over prompts (windows of text for perplexity and divergence) "
        "and, where there are noise draws, over these too: of a few draws they are wide. Without "
        "draws: exact for rates, else by the bootstrap; another rounding of the same checkpoint "
        "may fall elsewhere.",
        f'An answer is degenerate ("{settings["detector"]}") if it is empty, compresses more than '
        f"{COMPRESSION:g} times, or costs the clean model more than {SURPRISE:g} nats per token. A "
        "string list takes such answers for compliance; the compliance rate leaves them out.",
    ]


def _table(
    metric: Metric,
    names: Mapping[str, str],
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
) -> dict[str, Any]:
    """A metric's table: what there is more of, arms or conditions, goes down the page.

    Conditions in which no arm was measured are left out.
    """
    families = [
        family
        for family in dict.fromkeys(family for cells in table.values() for family in cells)
        if any(_known(cells.get(family, {}).get(metric.field)) for cells in table.values())
    ]
    rows, columns = list(names.items()), [(family, family) for family in families]
    turned = len(rows) < len(columns)
    if turned:
        rows, columns = columns, rows
    cells = [
        [name, *(_cell(metric, table, *((b, a) if turned else (a, b))) for b, _ in columns)]
        for a, name in rows
    ]
    return {"title": metric.title, "head": ["", *(name for _, name in columns)], "rows": cells}


def _known(entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and (entry["mean"] is not None or entry["non_finite"] > 0)


def _cell(metric: Metric, table: Mapping[str, Any], label: str, family: str) -> str:
    """One table cell: the mean with its interval."""
    entry = table[label].get(family, {}).get(metric.field)
    if entry is not None and entry["non_finite"]:
        return f"not finite in {entry['non_finite']} of {entry['n']}"
    if entry is None or entry["mean"] is None:
        return "n/a"
    mean = metric.text(entry["mean"])
    if entry["low"] is None:
        return mean
    return f"{mean} [{metric.text(entry['low'])}, {metric.text(entry['high'])}]"


def _markdown(
    document: Mapping[str, Any], explained: Sequence[str], tables: Sequence[Mapping[str, Any]]
) -> str:
    """Put the Markdown page together."""
    lines = [f"# {document['title']}", ""]
    for text in (*document["notes"], *(c["verdict"] for c in document["comparisons"]), *explained):
        lines += [text, ""]
    for table in tables:
        lines += [f"## {table['title']}", "", *_rows(table["head"], table["rows"]), ""]
    for compared in document["comparisons"]:
        lines += [f"## {compared['title']}", "", compared["verdict"], ""]
        lines += [*_rows(_COMPARED, compared["cells"]), ""]
        lines += [f"- {row['sentence']}" for row in compared["rows"] if row["significant"]]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
