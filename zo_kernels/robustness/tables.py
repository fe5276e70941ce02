"""The report's tables and the sentences on how to read them, as texts for any page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_kernels.robustness.comparison import compare_records, difference, p_text, verdict
from zo_kernels.robustness.degenerate import COMPRESSION, SURPRISE
from zo_kernels.robustness.metrics import METRICS, Metric, whole
from zo_kernels.robustness.refusals import refusal_list

COMPARED = ("condition", "metric", "difference [95 %]", "effect", "p", "adjusted p", "significant")
"""Head of a comparison's table."""


def metric_table(
    metric: Metric,
    names: Mapping[str, str],
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
) -> dict[str, Any]:
    """A metric's table: what there is more of, arms or conditions, goes down the page.

    Conditions in which no arm was measured are left out.
    """
    families = [
        family
        for family in dict.fromkeys(family for cells in table.values() for family in cells)
        if any(_known(cells.get(family, {}).get(metric.field)) for cells in table.values())
    ]
    rows, columns = list(names.items()), [(family, family) for family in families]
    turned = len(rows) < len(columns)
    if turned:
        rows, columns = columns, rows
    cells = [
        [name, *(_cell(metric, table, *((b, a) if turned else (a, b))) for b, _ in columns)]
        for a, name in rows
    ]
    return {"title": metric.title, "head": ["", *(name for _, name in columns)], "rows": cells}


def _known(entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and (entry["mean"] is not None or entry["non_finite"] > 0)


def _cell(metric: Metric, table: Mapping[str, Any], label: str, family: str) -> str:
    """One table cell: the mean with its interval."""
    entry = table[label].get(family, {}).get(metric.field)
    if entry is not None and entry["non_finite"]:
        return f"not finite in {entry['non_finite']} of {entry['n']}"
    if entry is None or entry["mean"] is None:
        return "n/a"
    mean = metric.text(entry["mean"])
    if entry["low"] is None:
        return mean
    return f"{mean} [{metric.text(entry['low'])}, {metric.text(entry['high'])}]"


def compared(
    records: Sequence[dict[str, Any]], names: Mapping[str, str], reference: str, other: str
) -> dict[str, Any]:
    """One comparison: its rows as numbers and as they are shown, and a verdict."""
    a, b = ([r for r in whole(records) if r["label"] == label] for label in (reference, other))
    rows = compare_records(a, b)
    return {
        "reference": reference,
        "other": other,
        "title": f"{names[other]} against {names[reference]}",
        "verdict": verdict(rows, names),
        "rows": rows,
        "cells": [
            [
                row["family"],
                METRICS[row["metric"]].compared,
                difference(row),
                "n/a" if row["effect"] is None else f"{row['effect']:+.2f}",
                p_text(row["p_value"]),
                p_text(row["adjusted_p"]),
                {True: "yes", False: "no", None: "n/a"}[row["significant"]],
            ]
            for row in rows
        ],
    }


def explained(
    settings: Mapping[str, Any],
    names: Mapping[str, str],
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
) -> list[str]:
    """How the numbers are to be read.

    Args:
        settings: what all records share.
        names: label -> displayed name.
        table: `metrics.summary` of the records.
    """
    return [
        f"{settings['harmful_count']} harmful and {settings['harmless_count']} harmless prompts "
        f'(digest {settings["prompts"]}); refusals by the string list "{settings["refusal_list"]}" '
        f"({refusal_list(settings['refusal_list']).source});"
        f" weight noise {settings['noise_kind']} on {settings['noise_on']} weights, seed "
        f"{settings['noise_seed']}. w0.05: weight noise of scale 0.05; a0.05: noise on the decoder "
        "blocks' outputs in units of each token's standard deviation; int4 and the like: "
        "round-to-nearest fake quantisation, -a8 with 8-bit activations.",
        "In brackets: 95 % intervals over prompts (windows of text for perplexity and divergence) "
        "and, where there are noise draws, over these too: of a few draws they are wide. Without "
        "draws: exact for rates, else by the bootstrap; another rounding of the same checkpoint "
        "may fall elsewhere.",
        f'An answer is degenerate ("{settings["detector"]}") if it is empty, compresses more than '
        f"{COMPRESSION:g} times, or costs the clean model more than {SURPRISE:g} nats per token. A "
        "string list takes such answers for compliance; the compliance rate leaves them out.",
        *_seeds_told(names, table),
    ]


def _seeds_told(
    names: Mapping[str, str],
    table: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
) -> list[str]:
    """Which arms were trained with several seeds, and what that means; nothing without them."""
    counts = {
        label: max(
            cell["training_seeds"] for cells in table[label].values() for cell in cells.values()
        )
        for label in names
        if table.get(label)
    }
    several = [f"{names[label]} ({count})" for label, count in counts.items() if count > 1]
    if not several:
        return []
    once = [names[label] for label, count in counts.items() if count == 1]
    texts = [
        f"Trained with several seeds: {'; '.join(several)}. Their means, intervals and tests are "
        "over these seeds too, and two such arms are paired seed by seed. In simulations in which "
        "training seeds alone move a model, 4.7 % of pure chance came out significant at a nominal "
        "5 %, less where draws and prompts matter as well; a shift of two standard deviations of "
        "the seeds was found by 3 seeds in 46 % of cases, by 5 in 89 %."
    ]
    if once:
        texts.append(
            f"One model each: {'; '.join(once)}. A difference to such an arm is one to this very "
            "model; another one of its kind may lie elsewhere."
        )
    return texts
