"""What each stage cost, as shares of the first-order stage, beside what the paper states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PUBLISHED = {
    "source": "arXiv 2605.29396, Table 3",
    "seconds": 152.11,
    "memory_mib": 26421,
    "first_order_seconds": 1146.8,
    "first_order_memory_mib": 82024,
    "time_share": 0.133,
    "memory_share": 0.32,
}
"""The paper's zeroth-order stage against its first-order one, Llama-3-8B. Memory is all of the
GPU's, the weights included; it is said to be a share of 0.32, time one of 13.3 %."""
KEYS = ("stage", "arm", "steps", "seconds", "forwards", "peak_bytes", "model_bytes", "first_order")
_NEEDED = ("stage", "steps", "seconds", "forwards", "peak_bytes")
_HEAD = (
    *("stage", "steps", "time (s)", "forwards", "extra memory (MiB)"),
    *("time share", "extra memory share", "memory share, weights included"),
)
_MIB = 1 << 20


def with_shares(costs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add each stage's shares of the first-order one.

    Args:
        costs: a row a stage. stage: its name; steps; seconds; forwards: of one example (None: not
            counted); peak_bytes: extra over the loaded model (None:
            not measured). May be left out: arm (the arm that it trained), model_bytes (of the
            loaded model), first_order (true for the stage that shares are of).

    Returns:
        Rows with all of `KEYS` and time_share, extra_share (of peak_bytes) and memory_share (of
        model_bytes + peak_bytes, as the paper counts); None where something for it is missing.

    Raises:
        ValueError: no rows, a row that lacks a key or has an unknown one, or two first-order rows.
    """
    if not costs:
        raise ValueError("costs: expected a row for each stage, got none")
    for i, row in enumerate(costs):
        missing = [key for key in _NEEDED if key not in row]
        unknown = sorted(set(row) - set(KEYS))
        if missing or unknown:
            raise ValueError(
                f"costs, row {i}: expected {list(_NEEDED)} and perhaps "
                f"{[key for key in KEYS if key not in _NEEDED]}, "
                f"got no {missing} and also {unknown}"
            )
    rows = [
        {**dict.fromkeys(KEYS), **row, "first_order": bool(row.get("first_order"))} for row in costs
    ]
    first = [row for row in rows if row["first_order"]]
    if len(first) > 1:
        raise ValueError(
            f"costs: expected one first-order stage, got {[row['stage'] for row in first]}"
        )
    against = first[0] if first else dict.fromkeys(KEYS)
    for row in rows:
        row["time_share"] = _share(row["seconds"], against["seconds"])
        row["extra_share"] = _share(row["peak_bytes"], against["peak_bytes"])
        row["memory_share"] = _share(_total(row), _total(against))
    return rows


def costs_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Head and rows of texts, the paper's at the end."""
    cells = [
        [
            row["stage"] if row["arm"] is None else f"{row['arm']}: {row['stage']}",
            str(row["steps"]),
            f"{row['seconds']:,.1f}",
            "n/a" if row["forwards"] is None else f"{row['forwards']:,.1f}",
            "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / _MIB:,.1f}",
            _per_cent(row["time_share"]),
            _times(row["extra_share"]),
            _times(row["memory_share"]),
        ]
        for row in rows
    ]
    published = [
        f"zeroth order as published ({PUBLISHED['source']})",
        "10",
        f"{PUBLISHED['seconds']:,.1f}",
        *("n/a", "n/a"),
        _per_cent(PUBLISHED["time_share"]),
        "n/a",
        _times(PUBLISHED["memory_share"]),
    ]
    return {"head": list(_HEAD), "marked": False, "rows": [*cells, published]}


def costs_told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the costs are to be read."""
    first = next((row for row in rows if row["first_order"]), None)
    shares = (
        "No stage is marked as the first-order one, so there are no shares."
        if first is None
        else f'Shares are of the first-order stage, "{first["stage"]}".'
    )
    return [
        f"{shares} A forward is one example's without gradients, a backward counts as two, and "
        "choosing blocks is among the forwards of the arm that needs it, not in its time; extra "
        "memory is the peak over the loaded model.",
        f"The paper's stage of 10 zeroth-order steps took {PUBLISHED['seconds']:g} s of GPU time "
        f"and {PUBLISHED['memory_mib']:,} MiB in all, its 100 first-order steps "
        f"{PUBLISHED['first_order_seconds']:,} s and {PUBLISHED['first_order_memory_mib']:,} MiB "
        f"(Llama-3-8B, {PUBLISHED['source']}): other steps, another model and other hardware.",
    ]


def _total(row: Mapping[str, Any]) -> float | None:
    parts = (row["model_bytes"], row["peak_bytes"])
    return None if None in parts else sum(parts)


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _per_cent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f} %"


def _times(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.2f}x"
