"""The kernels' compiled code as a table: resources, instructions, and the speed they allow."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from zo_kernels.backends.triton.inspect import Report

_MODULE = "zo_kernels.backends.triton.inspect"
_WIDTH = 400  # columns, more than the table needs; less -S scrolls where the terminal has fewer


def choose(
    targets: Sequence[str] | None = None, kernels: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """What to compile: target -> names of variants.

    Args:
        targets: architectures; None for all.
        kernels: patterns of names, as a shell's; None for all.

    Raises:
        ValueError: a target that is not known, or patterns that fit no name.
        RuntimeError: Triton is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed; pip install 'zo_kernels[gpu]' brings it")
    from zo_kernels.backends.triton.compile import TARGETS
    from zo_kernels.backends.triton.inspect import check_targets, select

    check_targets(targets or ())
    names = [variant.name for variant in select(kernels or ["*"])]
    return {target: names for target in targets or TARGETS}


def compile_reports(
    work: Mapping[str, Sequence[str]],
    progress: Callable[[str, float, float], None] | None = None,
) -> list[Report]:
    """Reports of kernels, compiled in a process of its own without TRITON_INTERPRET.

    Args:
        work: see ``choose``.
        progress: called with what was compiled last, how many are done, and of how many.

    Raises:
        RuntimeError: a kernel does not compile; with the compiler's words.
    """
    from zo_kernels.backends.triton.inspect import Report

    arguments = [f"{target}={','.join(names)}" for target, names in work.items()]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    command = [sys.executable, "-m", _MODULE, *arguments]
    reports = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as run,
    ):
        try:
            for line in run.stdout:
                found = json.loads(line)
                reports.append(Report(**found["report"]))
                if progress:
                    what = f"{reports[-1].variant} on {reports[-1].target}"
                    progress(what, found["done"], found["total"])
        except BaseException:
            run.kill()
            raise
        status = run.wait()
        errors.seek(0)
        text = errors.read().strip()
    if status:
        raise RuntimeError(f"the process that compiles stopped with status {status}:\n{text}")
    return reports


def record(reports: Sequence[Report]) -> dict[str, Any]:
    """All of it as JSON-serialisable values: versions, reports with predictions, broken promises,
    assumptions."""
    from zo_kernels.backends.triton.cost import ASSUMPTIONS
    from zo_kernels.backends.triton.inspect import broken_budgets

    return {
        "versions": {name: version(name) for name in ("triton", "torch")},
        "reports": [
            {
                **asdict(report),
                "contracted": report.contracted,
                "predictions": [asdict(p) for p in _predictions(report)],
            }
            for report in reports
        ],
        "broken": broken_budgets(reports),
        "assumptions": [{"statement": text, "source": url} for text, url in ASSUMPTIONS],
    }


def unchecked(reports: Sequence[Report]) -> list[str]:
    """Promises about kernels that are not among the reports."""
    from zo_kernels.backends.triton.inspect import BUDGETS

    return [
        f"{budget.variants} on {budget.targets}: {budget.limit:g} {budget.quantity}"
        for budget in BUDGETS
        if not any(budget.covers(report) for report in reports)
    ]


def _predictions(report: Report) -> list[Any]:
    from zo_kernels.backends.triton.cost import GPUS, predict

    if not report.pipes:
        return []
    return [predict(report, gpu) for gpu in GPUS if gpu.target == report.target]


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in values.items() if n) or "0"


def _widths(widths: Sequence[int]) -> str:
    return "+".join(f"{n}x{width}" for width, n in sorted(Counter(widths).items())) or "none"


def _pipes(report: Report) -> str:
    if not report.pipes:
        return "stores nothing in global memory"
    most_first = sorted(report.pipes.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name}\N{NO-BREAK SPACE}{n:.1f}" for name, n in most_first)
    if report.unknown:
        text += f"; unknown: {_counts(report.unknown)}"
    return text if report.region == "loop" else f"{text}; no loop, so all of the kernel"


def _speeds(report: Report) -> str:
    lines = []
    for p in _predictions(report):
        memory, compute = p.memory / 1e9, p.compute / 1e9
        if p.binds == "memory":
            text = f"memory binds at {memory:.0f}; {p.pipe} {compute / memory:.2f}x that"
        else:
            text = f"{p.pipe} binds at {compute:.0f}, {p.share:.0%} of memory's {memory:.0f}"
            if p.share_fast > p.share:
                text += f" (to {p.share_fast:.0%})"
        if p.further:
            text += f"; +1: {p.further / 1e9:.0f}"
        lines.append(f"{p.gpu}: {text}")
    return "\n".join(lines)


def table(reports: Sequence[Report]) -> Table:
    """One row per variant and target."""
    from rich.table import Table

    result = Table(title="Compiled kernels", title_justify="left")
    result.add_column("kernel", no_wrap=True)
    result.add_column("target", no_wrap=True)
    result.add_column("regis-\nters", justify="right", no_wrap=True)
    result.add_column("spills", justify="right")
    result.add_column("shared\nbytes", justify="right", no_wrap=True)
    result.add_column("a lane loads,\nstores (bytes)", no_wrap=True)
    result.add_column("instr. per\nelement", justify="right", no_wrap=True)
    result.add_column("other\nloops", justify="right", no_wrap=True)
    result.add_column("of them in each pipe", min_width=30, max_width=44)
    result.add_column("+1 direc-\ntion (+1)", justify="right", no_wrap=True)
    result.add_column("approx.", justify="right")
    result.add_column("fma: source,\nmachine", justify="right", no_wrap=True)
    result.add_column("predicted limits, G elements/s", no_wrap=True)
    before = None
    for report in reports:
        if before not in (None, report.target):
            result.add_section()
        before = report.target
        low, high = report.fma
        result.add_row(
            report.variant,
            report.target,
            str(report.registers),
            _counts(report.spills),
            str(report.shared),
            f"{_widths(report.loads)}, {_widths(report.stores)}",
            "-" if report.instructions is None else f"{report.instructions:.1f}",
            ", ".join(f"{cost:.1f}" for cost in report.others) or "-",
            _pipes(report),
            "-" if report.further is None else f"{report.further:.1f}",
            _counts(report.approximate),
            f"{low if low == high else f'{low}-{high}'}, {report.machine_fma}",
            _speeds(report),
        )
    return result


def show(reports: Sequence[Report]) -> None:
    """Print the table, what it assumes, and the promises that it says nothing about."""
    from rich.console import Console

    from zo_kernels.backends.triton.cost import ASSUMPTIONS

    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    console.print(table(reports))
    console.print("Predictions are upper bounds of a model, not measurements. It assumes:")
    for text, url in ASSUMPTIONS:
        console.print(f"  {text} [{url}]", soft_wrap=True, markup=False)
    for promise in unchecked(reports):
        console.print(f"Not checked, as nothing here was compiled for it: {promise}", markup=False)
