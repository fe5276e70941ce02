"""Checks the bits of a device's rooms, and times their kernels and their rivals in turns.

Everything comes as records, which zo_kernels/pipeline/verify.py describes.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zo_kernels import vectors
from zo_kernels.pipeline import rivals
from zo_kernels.pipeline.cases import (
    SCALE,
    SEED,
    Buffers,
    Case,
    Reference,
    buffers,
    check,
    difference,
)
from zo_kernels.pipeline.rooms import INTERPRETER, Room
from zo_kernels.pipeline.timing import EventTimer, Timer, interleave, median_ratio, wall_seconds

Record = dict[str, Any]
COPY, MEZO, COMPILED = "copy_", "MeZO's loop", "torch.compile"
#: The interpreter takes up to half a second for a line of the table. Every eleventh has all kinds
#: of lines, types and roundings.
INTERPRETED_STEP = 11
COMPILED_SHARE = 16  # of the elements, on a CPU, where it is slow


@dataclass(frozen=True)
class Timed:
    """A call that is timed: how many elements it works on, and its bytes for each of them."""

    run: Callable[[], object]
    elements: int
    traffic: int
    record: Record
    passes: int = 0


def timer_of(device: str) -> Timer:
    """How calls on a device are timed."""
    if device in ("cpu", INTERPRETER):
        return wall_seconds
    return EventTimer(torch.device(device), torch.get_device_module(device))


def failed(error: Exception) -> Record:
    """The verdict of a call that raised: whatever it was, it belongs in the report."""
    return {"verdict": "failed", **explained(error)}


def explained(error: Exception) -> Record:
    """An error in one line, and in full."""
    full = "".join(traceback.format_exception(error))
    return {"reason": rivals.reason_of(error), "traceback": full}


def check_vectors(room: Room) -> list[Record]:
    """One record for each operation in the table of published vectors."""
    step = INTERPRETED_STEP if room.device == INTERPRETER else 1
    listed: dict[str, list[tuple[vectors.Vector, vectors.Call, Tensor]]] = {}
    for vector in vectors.read()[::step]:
        for op, call, expected in vector.calls(room.backend, room.place):
            listed.setdefault(op, []).append((vector, call, expected))
    with room.selected():
        return [
            {"kind": "vectors", **room.label(), "op": op, "bits": _compare(rows)}
            for op, rows in listed.items()
        ]


def _compare(rows: Sequence[tuple[vectors.Vector, vectors.Call, Tensor]]) -> Record:
    wrong = []
    for vector, call, expected in rows:
        try:
            found = difference(call(), expected, vector.index)
        except Exception as error:
            return {**failed(error), "vector": str(vector)}
        if found:
            wrong.append({**found, "differing": 0, "vector": str(vector)})
    if wrong:
        return {"verdict": "wrong bits", **wrong[0], "differing": len(wrong), "compared": len(rows)}
    return {"verdict": "ok", "compared": len(rows)}


def measure(
    rooms: Sequence[Room],
    cases: Sequence[Case],
    elements: int,
    reference: Reference,
    *,
    rounds: int,
    seconds: float,
    compile_reason: str | None,
) -> list[Record]:
    """Check cases of one dtype in the rooms of one device, then time all of them with the rivals.

    Args:
        rooms: at least one.
        elements: of the device's full-size buffers.
        reference: what is right.
        rounds, seconds: at most so many rounds, and none after so many seconds (``interleave``).
        compile_reason: why torch.compile is not among the rivals.
    """
    dtype, device = cases[0].dtype, rooms[0].device
    name = str(dtype).removeprefix("torch.")
    timed: dict[str, Timed] = {}
    records: list[Record] = []
    for room in rooms:
        memory = buffers(dtype, room.elements, room.place, room.backend)
        for case in cases:
            with room.selected():
                verdict = _verdict(case, memory, reference)
            sizes = {"dtype": name, "elements": room.elements, "bytes_per_element": case.traffic}
            record = {"kind": "kernel", **room.label(), "case": case.name, **sizes, "bits": verdict}
            records.append({**record, "speed": None})
            if verdict["verdict"] != "failed":
                run = partial(_run, room, case, memory)
                entry = Timed(run, room.elements, case.traffic, records[-1], case.passes)
                timed[f"{room.backend} {room.isa} {case.name}"] = entry
    if device != INTERPRETER:
        for rival, entry, reason in _rivals(rooms[0].place, dtype, elements, compile_reason):
            label = {"kind": "rival", "device": device, "case": rival, "dtype": name}
            sizes = {"elements": entry.elements, "bytes_per_element": entry.traffic}
            entry.record.update({**label, **sizes, "speed": None, "reason": reason})
            records.append(entry.record)
            if reason is None:
                timed[rival] = entry
    calls = {key: entry.run for key, entry in timed.items()}
    # No warm-up: every call has been made once by now.
    times = interleave(calls, rounds, warmup=0, timer=timer_of(device), budget=seconds)
    for key, entry in timed.items():
        entry.record["speed"] = speed(key, timed, times)
    return records


def _verdict(case: Case, memory: Buffers, reference: Reference) -> Record:
    try:
        return check(case, memory, reference)
    except Exception as error:
        return failed(error)


def _run(room: Room, case: Case, memory: Buffers) -> None:
    with room.selected():
        case.run(memory)


def _rivals(
    place: str, dtype: torch.dtype, elements: int, compile_reason: str | None
) -> Iterator[tuple[str, Timed, str | None]]:
    """Name and call of each rival on a device, and why it cannot be timed."""
    memory = buffers(dtype, elements, place, "reference")
    memory.fill()
    weights, size = memory.weights, dtype.itemsize
    few = weights[: elements // COMPILED_SHARE] if place == "cpu" else weights
    compiled = rivals.compiled_perturb(SCALE) if compile_reason is None else None
    # MeZO's loop writes z, reads it and the weights, and writes them.
    for name, run, tensor, traffic, reason in (
        (COPY, lambda: memory.scratch.copy_(weights), weights, 2 * size, None),
        (MEZO, lambda: rivals.mezo_perturb_([weights], SCALE, SEED), weights, 4 * size, None),
        (COMPILED, lambda: compiled(few), few, 2 * size, compile_reason),
    ):
        if reason is None:
            try:
                run()
            except Exception as error:
                reason = rivals.reason_of(error)
        yield name, Timed(run, tensor.numel(), traffic, {}), reason


def speed(key: str, timed: Mapping[str, Timed], times: Mapping[str, list[float]]) -> Record:
    """What the times of one call say, alone and against the rivals of the same rounds.

    Ratios are medians over the rounds of a rival's time per element (per byte, for the copy) over
    this call's: above 1 this call is faster.
    """
    entry, own = timed[key], times[key]
    median = statistics.median(own)
    low, _, high = statistics.quantiles(own, n=4)
    per_element = {k: [t / timed[k].elements for t in row] for k, row in times.items()}
    per_byte = {k: [t / timed[k].traffic for t in row] for k, row in per_element.items()}

    def ratio(rates: Mapping[str, list[float]], rival: str) -> float | None:
        return median_ratio(rates, rival, key) if rival in rates else None

    result: Record = {
        "rounds": len(own),
        "seconds": {"median": median, "quartiles": [low, high], "range": [min(own), max(own)]},
        "elements_per_second": entry.elements / median,
        "gigabytes_per_second": entry.elements * entry.traffic / median / 1e9,
        "share_of_copy": ratio(per_byte, COPY),
    }
    for field, rival in (("times_mezo", MEZO), ("times_compiled", COMPILED)):
        one = ratio(per_element, rival) if entry.passes else None
        result[field] = None if one is None else one * entry.passes
    return result
