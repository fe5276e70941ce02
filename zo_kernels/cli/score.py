"""The command that scores layers: score."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_kernels.cli.options import add_model, add_options, examples_of, expect_same, read

if TYPE_CHECKING:
    from zo_kernels.refine.scores import Scores

CONFIG = ("zo_kernels.refine.scores", "ScoreConfig")
FREE = ("draws", "max_draws", "selected", "seconds", "normalization", "quant_weight")
"""Settings in which a scoring may be gone on with: they leave each loss as it is."""


def add_commands(commands: Any, make: Any) -> None:
    """Add it to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    from zo_kernels.refine.scores import ScoreConfig

    command = make(
        commands, "score", _score, "how sensitive each decoder block is, and which to refine"
    )
    add_model(command)
    command.add_argument("--out", type=Path, required=True, help="folder for scores and the figure")
    command.add_argument(
        "--fresh", action="store_true", help="start over what another scoring left in --out"
    )
    command.add_argument("--split", choices=("train", "held_out", "all"), default="train")
    add_options(command, *CONFIG, skip=("max_length", "examples"))
    command.add_argument(
        "--examples", type=_count_or_all, default=ScoreConfig.examples, metavar="NUMBER",
        help="the first so many of the kind, or all",
    )  # fmt: skip


def _count_or_all(text: str) -> int | None:
    """A number of examples; None for "all"."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'all', got {text!r}") from None


def _score(options: argparse.Namespace) -> None:
    from zo_kernels import chat
    from zo_kernels.files import write_file
    from zo_kernels.progress import progress_bar
    from zo_kernels.refine import checkpoint
    from zo_kernels.refine.records import MetricsLog, write_records
    from zo_kernels.refine.scoring import score
    from zo_kernels.robustness.plots import layer_scores
    from zo_kernels.robustness.prompts import digest

    config = read(options, *CONFIG)
    config.check()
    examples = examples_of(options, options.split)
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype, device=options.device)
    encoded = chat.encode(tokenizer, examples, max_length=config.max_length)
    settings = {
        "model": checkpoint.fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "examples_digest": digest(examples),
        **asdict(config),
    }
    losses = options.out / "losses.jsonl"
    finished = _finished(options.out, settings, options.fresh)
    write_records(losses, finished)  # without the torn line of a kill
    with MetricsLog(losses) as log, progress_bar("score") as progress:
        scores = score(
            model, tokenizer, encoded, config,
            finished=finished, on_result=log.write, progress=progress,
        )  # fmt: skip
    scores.save(options.out / "scores.json")
    write_file(options.out / "scores.png", layer_scores(scores.rows(), scores.settings()))
    print_scores(scores)
    print(f"scores: {options.out / 'scores.json'}, figure: {options.out / 'scores.png'}")


def _finished(out: Path, settings: dict[str, Any], fresh: bool) -> list[dict[str, Any]]:
    """The losses that a scoring with the same settings left in this folder."""
    from zo_kernels.files import write_file
    from zo_kernels.refine.records import read_records

    path, losses = out / "score.json", out / "losses.jsonl"
    found = read_records(losses) if losses.exists() and not fresh else []
    if found:
        expect_same(path, settings, FREE, "scoring")
    write_file(path, json.dumps(settings, indent=1) + "\n")
    return found


def print_scores(scores: Scores) -> None:
    """The scores as a table in the terminal, and what they say."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from zo_kernels.robustness.scores import scores_table, scores_told

    console = Console()
    shown = scores_table(scores.rows())
    table = Table(*shown["head"])
    for row in shown["rows"]:
        table.add_row(*map(escape, row), style="bold" if row[-1] == "yes" else None)
    console.print(table)
    for text in scores_told(scores.settings()):
        console.print(text, highlight=False, markup=False)
    distance = (
        ""
        if scores.separation is None
        else f" the chosen blocks and the others are {scores.separation:.1f} standard errors apart;"
    )
    console.print(
        f"Blocks {', '.join(map(str, scores.selected()))};{distance} loss {scores.loss:.4f} nats "
        f"per token; {scores.forwards:.1f} forwards over the examples, where whole ones would have "
        f"been {scores.naive_forwards:.0f}.",
        highlight=False,
    )
