"""Reports in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADLINE = (
    "refusal_loss", "refusal_rate", "asr_harmbench", "asr_llama_guard", "over_refusal_rate",
    "perplexity",
)  # fmt: skip
"""Metrics of several models that go to the terminal; the report has all."""


def print_report(
    files: Mapping[str, Path], records: Sequence[dict[str, Any]], arms: Mapping[str, str]
) -> None:
    """The main numbers as tables in the terminal, and where the rest is."""
    from rich.console import Console
    from rich.table import Column, Table

    from zo_kernels.robustness.metrics import Metric, measured, summary

    console = Console()
    cells = summary(records)
    families = list(dict.fromkeys(family for found in cells.values() for family in found))
    metrics = measured(records)

    def text(label: str, family: str, metric: Metric) -> str:
        cell = cells[label].get(family, {}).get(metric.field)
        if cell is None or cell["mean"] is None:
            return "-"
        spread = f" ± {metric.text(cell['std'])}" if cell["std"] else ""
        return metric.text(cell["mean"]) + spread

    def show(title: str, rows: Mapping[str, str], columns: Sequence[str], cell: Any) -> None:
        table = Table("", *(Column(column, justify="right") for column in columns))
        for key, name in rows.items():
            table.add_row(name, *(cell(key, column) for column in columns))
        console.print(title, highlight=False)
        console.print(table)

    by_family = {family: family for family in families}
    if len(arms) == 1:
        [label] = arms
        shown = {metric.short_unit: metric for metric in metrics}
        # As many metrics side by side as a terminal of this width takes.
        per_table = max(1, (console.width - 14) // 18)
        for start in range(0, len(shown), per_table):
            columns = list(shown)[start : start + per_table]
            show("", by_family, columns, lambda family, name: text(label, family, shown[name]))
    else:
        for metric in (m for m in metrics if m.field in HEADLINE):
            # What there is more of, arms or conditions, goes down the page.
            if len(arms) < len(families):
                back = {name: label for label, name in arms.items()}
                show(
                    metric.title,
                    by_family,
                    list(back),
                    lambda family, name, m=metric, back=back: text(back[name], family, m),
                )
            else:
                show(
                    metric.title,
                    arms,
                    families,
                    lambda label, family, m=metric: text(label, family, m),
                )
    if any(
        cell["training_seeds"] > 1
        for f in cells.values()
        for m in f.values()
        for cell in m.values()
    ):
        console.print("±: over training seeds where a model has several, else over noise draws")
    print_files(files)


def print_files(files: Mapping[str, Path]) -> None:
    """Where a report's files are."""
    from rich.console import Console

    console = Console()
    for name, path in files.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
