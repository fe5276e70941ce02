"""The command line: align, refine, evaluate, replay, log, demo, doctor, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from zo_kernels import replay_cli

EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed, 130 interrupted)."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except EXPECTED_ERRORS as error:
        if options.traceback:
            raise
        print(f"zo-kernels {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"zo-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="zo-kernels", description="Zeroth-order refinement of large language models."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "align", _align, "first-order SFT on the completion tokens")
    _add_training(command)
    _add_options(command, "zo_kernels.refine.align", "AlignConfig", skip=("first_batch",))

    command = _command(commands, "refine", _refine, "zeroth-order refinement")
    _add_training(command)
    command.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run of the same --out"
    )
    _add_options(
        command, "zo_kernels.refine.refiner", "RefineConfig", skip=("first_batch", "max_length")
    )

    command = _command(commands, "evaluate", _evaluate, "measure alignment under perturbations")
    _add_model(command)
    command.add_argument("--out", type=Path, required=True, help="folder for records and report")
    command.add_argument("--split", choices=("held_out", "train", "all"), default="held_out")
    command.add_argument("--text", type=Path, help="plain text for perplexity (default: built in)")
    _add_options(command, "zo_kernels.robustness.suite", "EvaluationConfig", skip=("max_length",))

    replay_cli.add_commands(commands, _command)

    command = _command(commands, "demo", _demo, "base -> aligned -> refined, with its controls")
    command.add_argument("--model", type=Path, help="Hugging Face directory (default: SmolLM2)")
    command.add_argument("--data", type=Path, help="JSON lines: prompt, completion, kind")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run")
    command.add_argument("--minutes", type=float, default=14.0, help="wall time to aim for")
    command.add_argument("--eps", type=float, default=0.1, help="scale of the noise to survive")
    command.add_argument("--lr", type=float, default=1e-3, help="refinement learning rate")
    command.add_argument("--seed", type=int, default=0)

    command = _command(commands, "doctor", _doctor, "what this machine has, and whether it works")
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.add_argument(
        "--verify", action="store_true", help="check all bits, time all kernels, write a report"
    )
    command.add_argument(
        "--out", type=Path, help="--verify: the report (without: zo-kernels-report.json)"
    )
    command.add_argument(
        "--device", nargs="+", help="--verify: cpu, interpreter, cuda:0, ... (without: all)"
    )
    command.add_argument("--elements", type=int, help="--verify: of each buffer, to time on")

    command = _command(
        commands, "inspect", _inspect, "what the GPU kernels compile to, without a GPU"
    )
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.add_argument(
        "--target",
        nargs="+",
        action="extend",
        help="sm_80, sm_90, sm_100, gfx942, gfx1100 (default: all)",
    )
    command.add_argument(
        "--kernel",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="names such as 'combine*' (default: all)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here as well")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    command.add_argument(
        "--data", type=Path, help="JSON lines: prompt, completion, kind (default: built in)"
    )
    command.add_argument(
        "--dtype", default="auto", help="auto (fast on the device), float32, bfloat16, float16"
    )
    command.add_argument("--device", default="cpu", help="torch device")
    command.add_argument("--max-length", type=int, default=512, help="tokens of one example")


def _add_training(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--out", type=Path, required=True, help="folder for the new model")


def _add_options(
    command: argparse.ArgumentParser, module: str, name: str, skip: Sequence[str]
) -> None:
    """One option per field of a configuration class, with its default and its documentation."""
    kind = _configuration(module, name)
    texts = _attribute_texts(kind.__doc__ or "")
    for field in fields(kind):
        if field.name in skip:
            continue
        default = None if field.default is MISSING else field.default
        flag = "--" + field.name.replace("_", "-")
        text = texts.get(field.name, "").replace("%", "%%")
        if isinstance(default, bool):
            command.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, help=text
            )
        elif "tuple" in str(field.type):
            item = float if "float" in str(field.type) else str
            command.add_argument(flag, nargs="*", type=item, default=default, help=text)
        else:
            words = str(field.type)
            item = int if "int" in words else float if "float" in words else str
            command.add_argument(flag, type=item, default=default, help=text)


def _configuration(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(module), name)


def _attribute_texts(doc: str) -> dict[str, str]:
    """name -> text of the "Attributes:" section of a docstring."""
    texts: dict[str, str] = {}
    current = None
    for line in doc.partition("Attributes:")[2].splitlines():
        name, colon, rest = line.strip().partition(": ")
        if colon and all(part.strip().isidentifier() for part in name.split(",")):
            for part in name.split(","):
                current = part.strip()
                texts[current] = rest
        elif current and line.strip():
            texts[current] += " " + line.strip()
    return texts


def _read(options: argparse.Namespace, module: str, name: str) -> Any:
    kind = _configuration(module, name)
    values = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _examples(options: argparse.Namespace, split: str) -> list[Any]:
    from zo_kernels import chat

    examples = chat.read_examples(options.data) if options.data else chat.builtin_examples()
    return examples if split == "all" else chat.select(examples, split=split)


def _train(options: argparse.Namespace, run: Any, earlier: Sequence[dict[str, Any]] = ()) -> None:
    """What align and refine share: check, load, run with a log and a bar, save, say.

    ``earlier`` are the records of the steps that a resumed run took before.
    """
    from zo_kernels import chat
    from zo_kernels.files import check_replaceable
    from zo_kernels.refine import checkpoint
    from zo_kernels.refine.records import MetricsLog, progress_bar, write_records

    check_replaceable(options.out)
    examples = _examples(options, "train")
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype, device=options.device)
    encoded = chat.encode(tokenizer, examples, max_length=options.max_length)
    log_path = options.out.parent / f"{options.out.name}.jsonl"
    partial = log_path.with_suffix(".partial.jsonl")  # an earlier run's log stays until the end
    write_records(partial, earlier)
    with MetricsLog(partial) as log, progress_bar(options.command) as progress:
        records = [*earlier, *run(model, tokenizer, encoded, log.write, progress)]
    checkpoint.save(model, tokenizer, options.out)
    partial.replace(log_path)
    from zo_kernels.robustness.plots import loss_per_step

    plot = options.out.parent / f"{options.out.name}.png"
    plot.write_bytes(loss_per_step({options.command: records}))
    print(
        f"{len(records)} steps in {records[-1]['seconds']:.1f} s, loss {records[0]['loss']:.4f} -> "
        f"{records[-1]['loss']:.4f}; model {options.out}, log {log_path}, plot {plot}"
    )


def _align(options: argparse.Namespace) -> None:
    from zo_kernels.refine.align import align

    config = _read(options, "zo_kernels.refine.align", "AlignConfig")
    config.check()
    if options.dtype == "auto":
        options.dtype = "float32"  # a first-order update is lost in 16-bit weights
    _train(
        options,
        lambda model, tokenizer, encoded, on_step, progress: align(
            model, tokenizer, encoded, config, on_step=on_step, progress=progress
        ),
    )


def _refine(options: argparse.Namespace) -> None:
    from zo_kernels.refine.refiner import ZORefiner

    config = _read(options, "zo_kernels.refine.refiner", "RefineConfig")
    config.check()
    final = options.out.parent / f"{options.out.name}.zolog"
    unfinished = final.with_suffix(".partial.zolog")
    if options.resume and not unfinished.exists():
        raise ValueError(f"resume: expected an unfinished run's log {unfinished}, found none")
    if unfinished.exists() and not options.resume:
        raise FileExistsError(
            f"out: {unfinished} is of an unfinished run; go on with it by --resume, or delete it"
        )
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    log = unfinished if config.mode != "mezo" else None  # whose drift no log can hold
    _train(
        options,
        lambda model, tokenizer, encoded, on_step, progress: ZORefiner(
            model, tokenizer, config
        ).run(encoded, log=log, resume=options.resume, on_step=on_step, progress=progress),
        _earlier(options, unfinished) if options.resume else (),
    )
    if log is not None:
        unfinished.replace(final)
        print(f"replay log {final}: {final.stat().st_size} bytes")


def _earlier(options: argparse.Namespace, unfinished: Path) -> list[dict[str, Any]]:
    """The records of the steps in an unfinished run's log, of which a kill may have cost the last.

    The log is ahead of the records: it is written before the weights change.
    """
    from zo_kernels.refine.records import read_records
    from zo_kernels.replay import read_log

    path = options.out.parent / f"{options.out.name}.partial.jsonl"
    known = {r["step"]: r for r in read_records(path)} if path.exists() else {}
    records = []
    for row in read_log(unfinished).steps:
        number, plus, minus = int(row["step"]), list(row["losses_plus"]), list(row["losses_minus"])
        seconds = records[-1]["seconds"] if records else 0.0
        logged = {
            "step": number,
            "losses_plus": [float(loss) for loss in plus],
            "losses_minus": [float(loss) for loss in minus],
            "lr": [float(lr) for lr in row["lr"]],
            "loss": float(sum(plus + minus) / len(plus + minus)),
            "seconds": seconds,
        }
        records.append(known.get(number, logged))
    return records


def _evaluate(options: argparse.Namespace) -> None:
    from zo_kernels import chat
    from zo_kernels.refine import checkpoint
    from zo_kernels.refine.records import MetricsLog, progress_bar
    from zo_kernels.robustness.report import write_report
    from zo_kernels.robustness.suite import evaluate

    config = _read(options, "zo_kernels.robustness.suite", "EvaluationConfig")
    config.conditions()
    examples = _examples(options, options.split)
    text = options.text.read_text() if options.text else chat.builtin_utility_text()
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype, device=options.device)
    label = options.model.name
    with (
        MetricsLog(options.out / "evaluation.partial.jsonl", fresh=True) as log,
        progress_bar("evaluate") as progress,
    ):
        records = evaluate(
            model, tokenizer, examples, text, config,
            label=label, on_result=log.write, progress=progress,
        )  # fmt: skip
    (options.out / "evaluation.partial.jsonl").replace(options.out / "evaluation.jsonl")
    files = write_report(options.out, records, title=f"Robustness of {label}", arms=[label])
    _print_report(files, records, {label: label})


def _demo(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from rich.console import Console

    from zo_kernels.pipeline.demo import ARMS, Demo, DemoConfig
    from zo_kernels.pipeline.smollm2 import prepare
    from zo_kernels.refine.records import read_records

    console = Console(stderr=True, highlight=False)
    notes = []
    if options.model is None:
        model = prepare(progress=console.print)
        notes.append(
            "SmolLM2's weights come from a Q4_1 file: its linears lie on a 4-bit grid of blocks "
            "of 32, so the base model's int8 and int4 rows flatter it."
        )
    else:
        model = options.model
    if options.minutes <= 0:
        raise ValueError(f"minutes: expected a positive number, got {options.minutes}")
    config = DemoConfig(minutes=options.minutes)
    config = replace(
        config,
        align=replace(config.align, seed=options.seed),
        refine=replace(config.refine, eps=options.eps, lr=options.lr, seed=options.seed),
    )
    demo = Demo(options.out, model, _examples(options, "all"), config, console.print, notes)
    files = demo.run()
    _print_report(files, read_records(options.out / "evaluation.jsonl"), ARMS)


def _print_report(
    files: dict[str, Path], records: list[dict[str, Any]], arms: dict[str, str]
) -> None:
    """The main numbers as tables in the terminal, and where the rest is."""
    from rich.console import Console
    from rich.table import Table

    from zo_kernels.robustness.suite import summary

    console = Console()
    cells = summary(records)
    families = list(dict.fromkeys(record["family"] for record in records))
    for metric, title, digits in (
        ("refusal_loss", "loss on refusals of harmful prompts (nats per token)", 3),
        ("refusal_rate", "refusal rate on harmful prompts", 2),
        ("over_refusal_rate", "refusal rate on harmless prompts", 2),
        ("perplexity", "perplexity of the utility text", 2),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("arm")
        for family in families:
            table.add_column(family, justify="right")
        for label, name in arms.items():
            row = []
            for family in families:
                cell = cells[label][family][metric]
                text = "-" if cell["mean"] is None else f"{cell['mean']:.{digits}f}"
                row.append(f"{text} ± {cell['std']:.{digits}f}" if cell["std"] else text)
            table.add_row(name, *row)
        console.print(table)
    for name, path in files.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def _doctor(options: argparse.Namespace) -> None:
    if options.verify:
        _verify(options)
        return
    for name in ("out", "device", "elements"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected together with --verify, got it alone")
    from zo_kernels.pipeline import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=1) if options.json else doctor.text(found))
    wrong = [name for name, state in found["backends"].items() if state.startswith(doctor.WRONG)]
    if wrong:
        raise RuntimeError(f"backend {', '.join(wrong)} does not work; see --verify")


def _verify(options: argparse.Namespace) -> None:
    from zo_kernels.pipeline import bug_report
    from zo_kernels.pipeline.verify import Settings, line_writer

    path = options.out or Path("zo-kernels-report.json")
    settings = Settings(elements=options.elements)
    report = bug_report.write_report(path, options.device, settings, line_writer())
    print(json.dumps(report, indent=1) if options.json else bug_report.table(report))
    print(f"report: {path} ({report['seconds']:.0f} s)", file=sys.stderr)
    wrong = report["problems"]
    if wrong:
        more = f" (and {len(wrong) - 1} more in the report)" if len(wrong) > 1 else ""
        raise RuntimeError(f"{wrong[0]}{more}; please attach {path} to a bug report")


def _inspect(options: argparse.Namespace) -> None:
    from zo_kernels.files import check_writable, write_file
    from zo_kernels.pipeline import inspection
    from zo_kernels.refine.records import progress_bar

    work = inspection.choose(options.target, options.kernel)
    if options.out:
        check_writable(options.out)
    with progress_bar("inspect") as progress:
        reports = inspection.compile_reports(work, progress)
    record = inspection.record(reports)
    text = json.dumps(record, indent=1)
    if options.out:
        write_file(options.out, text + "\n")
    if options.json:
        print(text)
    else:
        inspection.show(reports)
    if record["broken"]:
        raise RuntimeError("; ".join(record["broken"]))


if __name__ == "__main__":
    sys.exit(main())
