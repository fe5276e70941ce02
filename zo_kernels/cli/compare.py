"""The command that compares: compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zo_kernels.cli.show import print_files


def add_commands(commands: Any, make: Any) -> None:
    """Add it to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "compare", _compare, "tell whether models differ, by paired tests")
    command.add_argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="folders of evaluate; the first is the "
        "reference",
    )  # fmt: skip
    command.add_argument("--out", type=Path, help="folder for a report (default: none)")


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from zo_kernels.refine.records import read_records
    from zo_kernels.robustness.comparison import compare_records, difference, p_text, verdict
    from zo_kernels.robustness.metrics import METRICS
    from zo_kernels.robustness.report import write_report

    arms: dict[str, list[dict[str, Any]]] = {}
    for run in options.runs:
        path = run / "evaluation.jsonl" if run.is_dir() else run
        if not path.is_file():
            raise FileNotFoundError(f"expected a folder of zo-kernels evaluate, got {run}")
        found = read_records(path)
        labels = list(dict.fromkeys(record["label"] for record in found))
        for label in labels:
            # Two folders may hold models of one name: then the folders tell them apart.
            name = label if label not in arms else f"{path.parent.name}/{label}"
            if name in arms:
                raise ValueError(f"expected each model once, got {name!r} again in {run}")
            arms[name] = [record | {"label": name} for record in found if record["label"] == label]
    if len(arms) < 2:
        raise ValueError(f"expected at least two models to compare, got {list(arms)}")
    names = {name: name for name in arms}
    reference = next(iter(arms))
    console = Console()
    for other in list(arms)[1:]:
        rows = compare_records(arms[reference], arms[other])
        table = Table("condition", "metric", "difference [95 %]", "p", "adjusted p")
        for row in rows:
            cells = [row["family"], METRICS[row["metric"]].compared, difference(row)]
            cells += [p_text(row["p_value"]), p_text(row["adjusted_p"])]
            # The brackets of intervals are not markup.
            table.add_row(*map(escape, cells), style="bold" if row["significant"] else None)
        console.print(table)
        for row in rows:
            if row["significant"]:
                console.print(row["sentence"], highlight=False, markup=False)
        console.print(verdict(rows, names), style="bold", highlight=False, markup=False)
    if options.out:
        records = [record for found in arms.values() for record in found]
        pairs = [(reference, other) for other in list(arms)[1:]]
        files = write_report(
            options.out, records, title="Comparison of " + ", ".join(arms), arms=names,
            compare=pairs,
        )  # fmt: skip
        print_files(files)
