"""The command that says what a run will hold in memory before anything is loaded."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


def add_commands(commands: Any, make: Any) -> None:
    """Add it to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(
        commands, "plan", _plan, "what a run will hold in memory, before anything is loaded"
    )
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        help="Hugging Face directory or config.json; weights are not read",
    )
    command.add_argument(
        "--mode",
        help="a mode of refine, or align-sgd, align-adamw, align-noise, dpo (default: a table of "
        "all)",
    )
    command.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16: as align and refine"
    )
    command.add_argument("--device", default="cuda", help="cuda or cpu; none has to be there")
    command.add_argument("--batch-size", type=int, default=8, help="sequences in one forward")
    command.add_argument("--length", type=int, default=512, help="tokens of the longest sequence")
    command.add_argument(
        "--completion",
        type=int,
        help="tokens of a sequence whose losses are taken (default: all but one)",
    )
    command.add_argument(
        "--micro-batches", type=int, default=1, help="forwards per evaluation of the loss"
    )
    command.add_argument("--queries", type=int, default=1, help="directions per step")
    command.add_argument(
        "--eps", type=float, default=0.1, help="perturbation, in each tensor's standard deviations"
    )
    command.add_argument("--distribution", default="normal", help="normal or rademacher")
    command.add_argument(
        "--parameters", default="linear", help="refined: linear, all, or patterns with commas"
    )
    command.add_argument(
        "--layers", type=int, nargs="+", help="refined: only these decoder blocks, from 0"
    )
    command.add_argument(
        "--quantized", metavar="SCHEME", help="the loss sees the blocks' linears as int4-g64, ..."
    )
    command.add_argument(
        "--budget",
        type=parse_bytes,
        metavar="SIZE",
        help="device memory, such as 24GB or 22GiB: say which modes fit and choose one; exit "
        "status 1 if none does",
    )
    command.add_argument("--json", action="store_true", help="machine-readable, in bytes")


def parse_bytes(text: str) -> int:
    """A number of bytes: "24GB" (powers of 1000), "22GiB" (powers of 1024), "500 M", "1000000".

    Raises:
        argparse.ArgumentTypeError: something else, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 22GiB, got {text!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _UNITS[match[2].upper()])


def _plan(options: argparse.Namespace) -> None:
    from zo_kernels.pipeline import plan as planner
    from zo_kernels.pipeline.workload import Workload

    names = [field.name for field in fields(Workload)]
    workload = {name: getattr(options, name) for name in names}
    if workload["layers"] is not None:
        workload["layers"] = tuple(workload["layers"])
    if options.mode is not None:
        found = planner.plans(options.model, [options.mode], **workload)
    else:
        found = planner.all_plans(options.model, **workload)
    chosen, refusal = None, None
    if options.budget is not None:
        try:
            chosen = planner.choose(found, options.budget)
        except ValueError as error:
            refusal = error
    if options.json:
        record = {"plans": [one.record() for one in found]}
        if options.budget is not None:
            record["budget"] = options.budget
            record["chosen"] = None if chosen is None else chosen.mode
        print(json.dumps(record, indent=1))
    elif options.mode is not None:
        _show_items(found[0])
    else:
        _show_table(found, options.budget)
    if refusal is not None:
        raise refusal
    if chosen is not None and not options.json:
        print(f"{chosen.mode}: fits into {size(options.budget)}, the first of its order that does")


def size(number: float) -> str:
    """Bytes to read, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _numbers(plan: Any) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{plan.parameters / 1e6:,.2f} M"),
        ("trained", f"{plan.selected / 1e6:,.2f} M"),
        ("normals per step", f"{plan.normals / 1e9:,.3f} G"),
        ("moved per step, beside forwards", size(plan.bytes_moved)),
    ]


def _show_items(plan: Any) -> None:
    """One plan, item by item."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    console.print(f"{plan.model}, {plan.mode}, {plan.dtype}, {plan.device}", highlight=False)
    table = Table("", Column("", justify="right"), show_header=False)
    for place in ("device", "host"):
        held = [item for item in plan.items if item.place == place]
        for item in held:
            table.add_row(item.name, size(item.bytes))
        if held:
            total = plan.total_device if place == "device" else plan.total_host
            where = plan.device if place == "device" else "host"
            table.add_row(f"[bold]{where} in all", f"[bold]{size(total)}", end_section=True)
    for name, text in _numbers(plan):
        table.add_row(name, text)
    console.print(table)


def _show_table(found: Sequence[Any], budget: int | None) -> None:
    """All modes side by side, in a terminal of 80 columns."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    first = found[0]
    dtypes = {one.dtype: None for one in found}
    console.print(
        f"{first.model} on {first.device}: {first.parameters / 1e6:,.2f} M parameters, refined "
        f"{first.selected / 1e6:,.2f} M; {', '.join(dtypes)} (the latter for training by gradients)"
        if len(dtypes) > 1
        else f"{first.model} on {first.device}, {first.dtype}: {first.parameters / 1e6:,.2f} M "
        f"parameters, refined {first.selected / 1e6:,.2f} M",
        highlight=False,
    )
    columns = ["weights", "extra", "active", "in all", "host", "normals", "moved"]
    fits = [] if budget is None else [f"<= {budget / 1e9:.2f}"]
    numbers = (Column(name, justify="right", no_wrap=True) for name in [*columns, *fits])
    table = Table(Column("GB", no_wrap=True), *numbers, padding=0, pad_edge=True)
    for plan in found:
        weights, activations = plan.bytes_of("weights"), plan.bytes_of("activations")
        held = [weights, plan.total_device - weights - activations, activations]
        held += [plan.total_device, plan.total_host]
        counts = [f"{plan.normals / 1e9:.2f} G", f"{plan.bytes_moved / 1e9:.1f}"]
        row = [plan.mode, *(f"{number / 1e9:.2f}" for number in held), *counts]
        if budget is not None:
            row.append("yes" if plan.total_device <= budget else "no")
        table.add_row(*row)
    console.print(table)
