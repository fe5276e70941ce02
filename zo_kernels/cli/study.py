"""The commands that run studies: run and demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zo_kernels.cli.options import number_or_word
from zo_kernels.cli.show import print_report


def add_commands(commands: Any, make: Any) -> None:
    """Add them to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "run", _run, "a study: align, score, refine, and every control")
    command.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    command.add_argument(
        "--out",
        type=Path,
        help="folder of the study (default: runs/<config>, with its folders below configs/)",
    )
    for name in ("model", "data", "text"):
        command.add_argument(f"--{name}", type=Path, help=f"instead of the file's {name}")
    command.add_argument("--device", help="torch device, instead of the file's (default: cpu)")
    command.add_argument("--threads", type=int, help="torch's threads, instead of the file's")
    command.add_argument(
        "--seeds", type=int, nargs="+", help="training seeds, instead of the file's"
    )

    command = make(commands, "demo", _demo, "a quarter of an hour's study of a small real model")
    command.add_argument("--model", type=Path, help="Hugging Face directory (default: SmolLM2)")
    command.add_argument("--data", type=Path, help="JSON lines: prompt, completion, kind")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the study")
    command.add_argument("--minutes", type=float, default=14.0, help="wall time to aim for")
    command.add_argument("--eps", type=float, default=0.1, help="scale of the noise to survive")
    command.add_argument(
        "--lr", type=number_or_word, default=1e-3, help="refinement learning rate, or auto"
    )
    command.add_argument("--seed", type=int, default=0, help="training seed")
    command.add_argument("--device", default="cpu", help="torch device")


def _run(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from zo_kernels.pipeline.study_file import read_study

    config = read_study(options.config)
    given = {name: getattr(options, name) for name in ("model", "data", "text")}
    changes = {name: str(path) for name, path in given.items() if path is not None}
    for name in ("device", "threads"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if options.seeds is not None:
        changes["seeds"] = tuple(options.seeds)
    _study(replace(config, **changes), options.out or _place(options.config))


def _place(config: Path) -> Path:
    """Where a study goes that nobody gave a folder.

    mine.yaml -> runs/mine, configs/qwen2-7b-instruct/ours.yaml -> runs/qwen2-7b-instruct-ours
    """
    folders = config.resolve().parent.parts
    below = folders[folders.index("configs") + 1 :] if "configs" in folders else ()
    return Path("runs") / "-".join([*below, config.stem])


def _demo(options: argparse.Namespace) -> None:
    from zo_kernels.pipeline.demo import demo_config

    names = ("model", "data", "minutes", "eps", "lr", "seed", "device")
    _study(demo_config(**{name: getattr(options, name) for name in names}), options.out)


def _study(config: Any, out: Path) -> None:
    from rich.console import Console

    from zo_kernels.pipeline.study import Study
    from zo_kernels.pipeline.study_config import TITLES
    from zo_kernels.refine.records import read_records

    files = Study(config, out, Console(stderr=True, highlight=False).print).run()
    records = read_records(out / "evaluation.jsonl")
    labels = dict.fromkeys(record["label"] for record in records)
    print_report(files, records, {label: TITLES.get(label, label) for label in labels})
