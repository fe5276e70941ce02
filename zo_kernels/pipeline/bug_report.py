"""The file to attach to a bug report: what the machine has, which bits are right, all speeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from zo_kernels.files import check_writable, write_file
from zo_kernels.pipeline import rooms
from zo_kernels.pipeline.doctor import machine
from zo_kernels.pipeline.rivals import reason_of
from zo_kernels.pipeline.verify import Record, Settings, Tell, describe, problems, verify

FORMAT = 1
_COLUMNS = ("bits", "G elem/s", "GB/s", "of copy", "MeZO", "compiled")
_SHORT = {"ok": "ok", "wrong bits": "WRONG", "failed": "FAILED"}
_WIDTHS = (6, 9, 9, 8, 8, 8)
_HOW = {
    "bits": "compared with the published vectors, or with the reference backend on the CPU",
    "seconds": "of one call; CPU: wall clock; GPU: between two events on its stream, after 256 MiB "
    "were cleared; all calls of a device and dtype in turns",
    "gigabytes_per_second": "elements * bytes_per_element / median seconds / 1e9; the bytes are "
    "those that the pass must read and write, for MeZO's loop with z written and read",
    "share_of_copy": "bytes per second over those of copy_ on the device's full-size buffers",
    "times_mezo": "time per element of MeZO's loop (torch.normal, add_) over this call's; for K "
    "directions, of K of its passes",
    "times_compiled": "the same for torch.compile of p.add_(torch.randn_like(p), alpha=scale)",
    "ratios": "medians over the rounds, each ratio from one round",
}


def write_report(
    path: Path, wanted: Sequence[str] | None, settings: Settings, tell: Tell
) -> dict[str, Any]:
    """Check and time this machine's devices (``verify``), and write what was found to a file.

    Args:
        path: the JSON file; replaced in one step, when everything is done.
        wanted: devices, "cpu", "interpreter", "cuda:0", ...; None: as ``rooms.devices`` has it.
        tell: takes lines of progress; the devices' processes write theirs to standard error.

    Returns:
        The report: tool, format, started, seconds, problems (sentences, none if all is well), how
        (what the numbers mean), settings, machine, and results (kind of record -> records).

    Raises:
        ValueError: an unknown device, or a setting that makes no sense.
        OSError: the file cannot be written; nothing has been measured then.
    """
    settings.check()
    names = rooms.devices(wanted)
    check_writable(path)
    started, begin = datetime.now(timezone.utc), time.monotonic()
    tell("looking at this machine")
    found = {**machine(), **_torch_facts()}
    records = verify(names, settings)
    report = {
        "tool": "zo-kernels doctor --verify",
        "format": FORMAT,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "problems": problems(records),
        "how": _HOW,
        "settings": {"devices": names, **vars(settings)},
        "machine": found,
        "results": _by_kind(records),
    }
    write_file(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def _by_kind(records: Sequence[Record]) -> dict[str, list[Record]]:
    kinds: dict[str, list[Record]] = {}
    for record in records:
        rest = {key: value for key, value in record.items() if key != "kind"}
        kinds.setdefault(record["kind"], []).append(rest)
    return kinds


def _torch_facts() -> dict[str, Any]:
    """torch's build, and its own report for bug reports: drivers, toolkits, compilers."""
    from torch.utils import collect_env

    try:
        facts = {k: str(v) for k, v in collect_env.get_env_info()._asdict().items()}
    except Exception as error:  # it runs the system's tools, and any of them may fail
        facts = {"failed": reason_of(error)}
    build = {"build": torch.__config__.show(), "parallel": torch.__config__.parallel_info()}
    return {"torch": build, "collect_env": facts}


def table(report: dict[str, Any]) -> str:
    """Verdicts and speeds, to read in a terminal: a block of lines for each device and dtype."""
    results = report["results"]
    lines = [f"{r['device']} {r['backend']}: {r['reason']}" for r in results.get("unavailable", [])]
    for record in results.get("vectors", []):
        bits = record["bits"]
        count = f"{bits['compared']} published vectors" if "compared" in bits else ""
        lines.append(f"{record['device']:12} {_room(record):18} {record['op']:14} {count:>24}  "
                     f"{describe(bits)}")  # fmt: skip
    blocks: dict[tuple[str, str], list[str]] = {}
    for record in [*results.get("kernel", []), *results.get("rival", [])]:
        block = blocks.setdefault((record["device"], record["dtype"]), [])
        block.append(f"{_room(record):18} {record['case']:28} {_cells(record)}")
    head = " ".join(f"{name:>{width}}" for name, width in zip(_COLUMNS, _WIDTHS, strict=True))
    for (device, dtype), block in blocks.items():
        lines += ["", f"{f'{device}, {dtype}':47} {head}", *block]
    return "\n".join([*lines, *([""] if report["problems"] else []), *report["problems"]])


def _room(record: Record) -> str:
    return " ".join(filter(None, (record.get("backend"), record.get("isa"))))


def _cells(record: Record) -> str:
    verdict = _SHORT[record["bits"]["verdict"]] if "bits" in record else ""
    speed = record["speed"]
    if speed is None:
        return verdict or f"not timed: {record['reason']}"
    share, mezo, compiled = speed["share_of_copy"], speed["times_mezo"], speed["times_compiled"]
    cells = (
        verdict,
        f"{speed['elements_per_second'] / 1e9:.3g}",
        f"{speed['gigabytes_per_second']:.3g}",
        "" if share is None else f"{share:.1%}",
        "" if mezo is None else f"{mezo:.3g}x",
        "" if compiled is None else f"{compiled:.3g}x",
    )
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
