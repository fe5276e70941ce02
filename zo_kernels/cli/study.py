"""The command that runs a study: run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zo_kernels.cli.show import print_report


def add_commands(commands: Any, make: Any) -> None:
    """Add it to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "run", _run, "a study: align, score, refine, and every control")
    command.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    command.add_argument("--out", type=Path, help="folder of the study (default: runs/<config>)")
    for name in ("model", "data", "text"):
        command.add_argument(f"--{name}", type=Path, help=f"instead of the file's {name}")
    command.add_argument("--threads", type=int, help="torch's threads, instead of the file's")
    command.add_argument(
        "--seeds", type=int, nargs="+", help="training seeds, instead of the file's"
    )


def _run(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from rich.console import Console

    from zo_kernels.pipeline.study import Study
    from zo_kernels.pipeline.study_config import TITLES, read_study
    from zo_kernels.refine.records import read_records

    config = read_study(options.config)
    given = {name: getattr(options, name) for name in ("model", "data", "text")}
    changes = {name: str(path) for name, path in given.items() if path is not None}
    if options.threads is not None:
        changes["threads"] = options.threads
    if options.seeds is not None:
        changes["seeds"] = tuple(options.seeds)
    config = replace(config, **changes)
    out = options.out or Path("runs") / options.config.stem
    console = Console(stderr=True, highlight=False)
    files = Study(config, out, console.print).run()
    records = read_records(out / "evaluation.jsonl")
    labels = dict.fromkeys(record["label"] for record in records)
    print_report(files, records, {label: TITLES.get(label, label) for label in labels})
