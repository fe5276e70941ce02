"""The command line: one function a command, in files by what they do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_kernels.cli import compare, evaluate, plan, replay, score, study, train

EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused or failed, 130 interrupted)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "suite", None):
            # What the file says are defaults: options on the command line win.
            options.command_parser.set_defaults(**evaluate.suite_defaults(options.suite))
            options = parser.parse_args(arguments)
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

    train.add_commands(commands, _command)
    score.add_commands(commands, _command)
    evaluate.add_commands(commands, _command)
    compare.add_commands(commands, _command)
    replay.add_commands(commands, _command)
    study.add_commands(commands, _command)
    plan.add_commands(commands, _command)

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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=_Help,
    )
    command.set_defaults(run=run, command_parser=command)
    return command


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
    from zo_kernels.progress import progress_bar

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
