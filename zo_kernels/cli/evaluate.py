"""The command that measures: evaluate."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo_kernels.cli.options import (
    add_model,
    add_options,
    examples_of,
    expect_same,
    read,
    read_suite,
)
from zo_kernels.cli.show import print_report

CONFIG = ("zo_kernels.robustness.conditions", "EvaluationConfig")
FILES = ("data", "text")
LISTS = ("harmful", "harmless", "prompts")
TEXTS = ("judge_dtype", "label", "split", "dtype", "device")
FOLDERS = ("judge",)
"""Options beside the configuration's that a suite file may have: files, lists of them, texts, and
names with folders."""
FREE = ("copy_weights", "noise", "activation_noise", "quantization", "draws", "layers")
"""Settings in which an evaluation may be gone on with: they leave each record as it is."""


def add_commands(commands: Any, make: Any) -> None:
    """Add it to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "evaluate", _evaluate, "measure alignment under perturbations")
    add_model(command)
    prompts = "prompts: CSV of AdvBench, HarmBench, ..., JSON lines, chat JSON, or lines of text"
    command.add_argument("--harmful", type=Path, nargs="+", help=f"harmful {prompts}")
    command.add_argument("--harmless", type=Path, nargs="+", help=f"harmless {prompts}")
    command.add_argument(
        "--prompts", type=Path, nargs="+", help="prompts that say what they are, such as XSTest's"
    )
    command.add_argument("--out", type=Path, required=True, help="folder for records and report")
    command.add_argument(
        "--suite",
        type=Path,
        help="YAML file with options (all but model and out; judge: {NAME: DIR})",
    )
    command.add_argument(
        "--fresh", action="store_true", help="start over what another evaluation left in --out"
    )
    command.add_argument("--split", choices=("held_out", "train", "all"), default="held_out")
    command.add_argument("--text", type=Path, help="plain text for perplexity (default: built in)")
    command.add_argument(
        "--judge",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="judge models: harmbench=DIR, llama_guard=DIR",
    )
    command.add_argument("--judge-dtype", default="auto", help="as --dtype, of the judges")
    command.add_argument("--label", help="the model's name in the report (default: its folder's)")
    add_options(command, *CONFIG, skip=("max_length",))


def suite_defaults(path: Path) -> dict[str, Any]:
    """The options of a suite file."""
    return read_suite(path, *CONFIG, files=FILES, lists=LISTS, texts=TEXTS, folders=FOLDERS)


def _evaluate(options: argparse.Namespace) -> None:
    from zo_kernels import chat
    from zo_kernels.progress import progress_bar
    from zo_kernels.refine import checkpoint
    from zo_kernels.refine.records import MetricsLog, write_records
    from zo_kernels.robustness.prompts import digest, text_digest
    from zo_kernels.robustness.report import write_report
    from zo_kernels.robustness.suite import Evaluation

    config = read(options, *CONFIG)
    config.conditions()  # what is wrong with it comes up before the model is loaded
    judges = _judges(options.judge)
    examples = _examples(options)
    text = options.text.read_text("utf-8") if options.text else chat.builtin_utility_text()
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype, device=options.device)
    evaluation = Evaluation(model, tokenizer, examples, text, config)
    label = options.label or options.model.resolve().name
    settings = {
        "label": label,
        "model": checkpoint.fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "text": text_digest(text),
        "examples": digest(examples),
        **asdict(config),
    }
    records_path, times_path = options.out / "evaluation.jsonl", options.out / "times.jsonl"
    finished, times = _finished(options.out, settings, options.fresh)
    write_records(records_path, finished)  # without the torn line of a kill
    write_records(times_path, times)
    with (
        MetricsLog(records_path) as log,
        MetricsLog(times_path) as clock,
        progress_bar("evaluate") as progress,
    ):

        def keep(record: dict[str, Any]) -> None:
            # Times apart: two evaluations then leave the same bytes.
            clock.write({"condition": record["condition"], "seconds": record["seconds"]})
            log.write(_timeless(record))

        records = evaluation.run(label, finished=finished, on_result=keep, progress=progress)
    # Conditions that an earlier call measured and this one did not ask for stay.
    asked = {record["condition"] for record in records}
    records = [*map(_timeless, records), *(r for r in finished if r["condition"] not in asked)]
    write_records(records_path, records)
    del model, tokenizer, evaluation  # a judge gets all of the memory
    for name, directory in judges.items():
        gc.collect()
        records = _judged(records, examples, name, directory, options)
        write_records(records_path, records)
    files = write_report(options.out, records, title=f"Robustness of {label}", arms=[label])
    print_report(files, records, {label: label})


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def _examples(options: argparse.Namespace) -> list[Any]:
    """Examples of --harmful, --harmless and --prompts; of kinds that these lack, of --data."""
    from zo_kernels.robustness.prompts import read_prompts

    examples = []
    for kind in ("harmful", "harmless"):
        for path in getattr(options, kind) or ():
            examples += read_prompts(path, kind)
    for path in options.prompts or ():
        examples += read_prompts(path)
    named = {example.kind for example in examples}
    for kind in ("harmful", "harmless"):
        if kind not in named:
            examples += [e for e in examples_of(options, options.split) if e.kind == kind]
    return examples


def _finished(
    out: Path, settings: dict[str, Any], fresh: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and times of an evaluation with the same settings that was cut off in this folder.

    Otherwise the folder is prepared for a new one.
    """
    from zo_kernels.files import write_file
    from zo_kernels.refine.records import read_records
    from zo_kernels.robustness.report import FIGURES, PAGES

    path, records_path = out / "evaluation.json", out / "evaluation.jsonl"
    times_path = out / "times.jsonl"
    records = read_records(records_path) if records_path.exists() and not fresh else []
    if records:
        # Answers of float32 models do not depend on it (losses in their last bits), others' may.
        free = {*FREE, "batch_size"} if settings["dtype"] == "torch.float32" else FREE
        expect_same(path, settings, free, "evaluation")
    else:
        for name in (*PAGES, *FIGURES, records_path.name, times_path.name):
            (out / name).unlink(missing_ok=True)
    write_file(path, json.dumps(settings, indent=1) + "\n")
    known = {record["condition"] for record in records}
    times = read_records(times_path) if times_path.exists() else []
    return records, [time for time in times if time["condition"] in known]


def _judges(texts: Sequence[str] | str) -> dict[str, Path]:
    """Judge names and directories, checked before anything is measured."""
    from zo_kernels.robustness.judges import JUDGES

    judges = {}
    for text in [texts] if isinstance(texts, str) else texts:
        name, equals, directory = text.partition("=")
        if not equals or name not in JUDGES or not (Path(directory) / "config.json").is_file():
            raise ValueError(
                f"judge: expected NAME=DIR with a name out of {list(JUDGES)} and a Hugging Face "
                f"directory, got {text!r}"
            )
        judges[name] = Path(directory)
    return judges


def _judged(
    records: Sequence[dict[str, Any]],
    examples: Sequence[Any],
    name: str,
    directory: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Records with what one judge says of the answers; those that it has judged stay."""
    from zo_kernels.progress import progress_bar
    from zo_kernels.refine import checkpoint
    from zo_kernels.robustness.judges import JUDGES, judge_answers

    model, tokenizer = checkpoint.load(directory, dtype=options.judge_dtype, device=options.device)
    judge = JUDGES[name](model, tokenizer, checkpoint.fingerprint(model))
    todo = [r for r in records if r.get(f"{name}_model") != judge.fingerprint]
    with progress_bar(f"judge {name}") as progress:
        new = iter(judge_answers(todo, examples, judge, progress=progress))
    waiting = {record["condition"] for record in todo}
    return [next(new) if record["condition"] in waiting else record for record in records]
