"""The evaluation report: a JSON summary, a Markdown page, figures, and all of it in one HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_kernels.files import write_file
from zo_kernels.robustness import html, plots
from zo_kernels.robustness.comparison import SAME
from zo_kernels.robustness.costs import PUBLISHED, costs_table, costs_told, with_shares
from zo_kernels.robustness.metrics import layer_rises, measured, summary
from zo_kernels.robustness.scores import check_scores, scores_table, scores_told
from zo_kernels.robustness.tables import COMPARED, compared, explained, metric_table

PAGES = ("report.html", "summary.md", "summary.json")
FIGURES = (
    *("differences.png", "metric_vs_noise.png", "quantization.png", "layers.png", "scores.png"),
    "loss_per_step.png",
)
"""What `write_report` writes: all of the pages, and the figures that there is data for."""
SETTINGS = (*SAME, "harmful_count", "harmless_count")


def write_report(
    directory: str | os.PathLike[str],
    records: Sequence[dict[str, Any]],
    *,
    title: str,
    arms: Sequence[str] | Mapping[str, str],
    training_logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
    compare: Sequence[tuple[str, str]] | None = None,
    costs: Sequence[Mapping[str, Any]] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write `report.html`, `summary.md`, `summary.json` and the figures that there is data for.

    `report.html` holds the figures too and needs no other file. Figures: `differences.png`,
    `metric_vs_noise.png`, `quantization.png`, `layers.png`, `scores.png`, `loss_per_step.png`. Each
    file appears under its name in one step, complete; an old one of that name is replaced, or
    removed where this report has none.

    Args:
        directory: where to; made if absent.
        records: `Evaluation.run` records of all arms, evaluated with one configuration; of an arm
            that was trained with several seeds those of all of them, told apart by their
            `training_seed`.
        title: heading of the page.
        arms: labels in the order of the rows, or label -> displayed name.
        training_logs: panel title -> rows with keys step and loss; None or empty: no loss plot.
        notes: sentences put below the heading.
        compare: (reference, other) label pairs that are compared. None: every arm listed after
            "aligned" against it; if no arm has that label, all others against the first.
        costs: what each stage cost, a row a stage, see `costs.with_shares`.
        scores: layer scores: "blocks", a row a decoder block with `scores.FIELDS`, and "settings",
            how they were measured, `scores.SETTINGS`.

    Returns:
        File name -> path of what was written.

    Raises:
        ValueError: no arms, an arm without records, a record of no arm, records of different
            prompts or settings, a comparison of unknown arms or of arms with other training
            seeds, or rows of costs or scores that lack something.
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
        "comparisons": [compared(records, names, *pair) for pair in pairs],
        "layers": {
            f"{label} {state}": [None if x != x else x for x in rises]
            for (label, state), rises in layer_rises(records).items()
        },
    }
    sections = []
    if scores is not None:
        check_scores(scores["blocks"], scores["settings"])
        document["scores"] = {key: scores[key] for key in ("settings", "blocks")}
        sections.append(
            {"title": "Layer scores", "texts": scores_told(scores["settings"])}
            | scores_table(scores["blocks"])
        )
    if costs is not None:
        rows = with_shares(costs)
        document["costs"] = {"stages": rows, "published": PUBLISHED}
        sections.append(
            {"title": "What each stage cost", "texts": costs_told(rows)} | costs_table(rows)
        )
    figures = (
        plots.differences([pair["rows"] for pair in document["comparisons"]], names),
        plots.metric_vs_noise(records, names),
        plots.quantized_bars(records, names),
        plots.layer_map(records, names),
        None if scores is None else plots.layer_scores(scores["blocks"], scores["settings"]),
        plots.loss_per_step(training_logs) if training_logs else None,
    )
    drawn = {n: data for n, data in zip(FIGURES, figures, strict=True) if data is not None}
    tables = [metric_table(metric, names, document["summary"]) for metric in measured(records)]
    told = explained(document["settings"], names, document["summary"])
    pages = (
        html.page(document, told, tables, COMPARED, sections, drawn, records),
        _markdown(document, told, tables, sections),
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


def _markdown(
    document: Mapping[str, Any],
    told: Sequence[str],
    tables: Sequence[Mapping[str, Any]],
    sections: Sequence[Mapping[str, Any]],
) -> str:
    """Put the Markdown page together."""
    lines = [f"# {document['title']}", ""]
    for text in (*document["notes"], *(c["verdict"] for c in document["comparisons"]), *told):
        lines += [text, ""]
    for table in tables:
        lines += [f"## {table['title']}", "", *_rows(table["head"], table["rows"]), ""]
    for pair in document["comparisons"]:
        lines += [f"## {pair['title']}", "", pair["verdict"], ""]
        lines += [*_rows(COMPARED, pair["cells"]), ""]
        lines += [f"- {row['sentence']}" for row in pair["rows"] if row["significant"]]
        lines.append("")
    for section in sections:
        lines += [f"## {section['title']}", ""]
        for text in section["texts"]:
            lines += [text, ""]
        lines += [*_rows(section["head"], section["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
