"""The report as one HTML file that needs no other: figures inside, answers side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from zo_kernels.robustness.metrics import JUDGE_TITLES, whole
from zo_kernels.robustness.seeds import by_seed

EXAMPLES = 12
"""Prompts of each kind whose answers are shown."""
_CAPTIONS = {
    "differences.png": "Paired differences with 95 % intervals, each panel on its own scale. "
    "Filled: significant after adjustment for all differences of its pair. Arrows: further out.",
    "metric_vs_noise.png": "Lines are means over noise draws and training seeds; points are the "
    "seeds where an arm has several, else the draws; bands or whiskers are 95 %.",
    "quantization.png": "Quantised weights and activations; whiskers are 95 % over prompts and "
    "training seeds, points the seeds.",
    "layers.png": "Which block's disturbance alone raises the loss on refusals.",
    "scores.png": "Scores that select the decoder blocks to refine: strong bars and triangles are "
    "the selected ones, whiskers two standard errors.",
    "loss_per_step.png": "Training.",
}


def page(
    document: Mapping[str, Any],
    explained: Sequence[str],
    tables: Sequence[Mapping[str, Any]],
    compared: Sequence[str],
    sections: Sequence[Mapping[str, Any]],
    figures: Mapping[str, bytes],
    records: Sequence[dict[str, Any]],
) -> str:
    """Render the page.

    Args:
        document: what `summary.json` holds.
        explained: sentences on how to read the numbers.
        tables: title, head and rows of texts, one a metric.
        compared: head of the comparison tables.
        sections: title, texts, head, rows and marked (whether a row's last cell is its class) of
            what follows the metrics' tables.
        figures: file name -> PNG.
        records: `Evaluation.run` records, for the answers.
    """
    import jinja2

    source = (resources.files("zo_kernels") / "data" / "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    images = [
        {"data": base64.b64encode(data).decode(), "caption": _CAPTIONS[name]}
        for name, data in figures.items()
    ]
    return environment.from_string(source).render(
        document=document,
        explained=explained,
        tables=tables,
        compared=compared,
        sections=sections,
        images=images,
        examples=[
            (kind, answers(records, document["arms"], kind)) for kind in ("harmful", "harmless")
        ],
    )


def answers(
    records: Sequence[dict[str, Any]], names: Mapping[str, str], kind: str, most: int = EXAMPLES
) -> list[dict[str, Any]]:
    """Answers to one kind of prompts, those first whose outcome changes most between conditions.

    Args:
        records: of all arms; of several training seeds and draws the first are shown.
        names: label -> displayed name.
        kind: "harmful" or "harmless".
        most: prompts.

    Returns:
        prompt, and its answers: condition, arm, text, marks (what was found about it).
    """
    first = {
        label: next(iter(by_seed(r for r in records if r["label"] == label))) for label in names
    }
    shown = [
        r
        for r in whole(records)
        if not r["draw"]
        and r.get("training_seed") == first[r["label"]]
        and r.get(f"{kind}_answers") is not None
    ]
    if not shown:
        return []
    prefix, flags = ("", "refused") if kind == "harmful" else ("harmless_", "over_refused")
    found = []
    for i, prompt in enumerate(shown[0][f"{kind}_prompts"]):
        cards, outcomes = [], set()
        for r in shown:
            why = r[f"{prefix}degenerate"][i]
            outcome = why or ("refused" if r[flags][i] else "answered")
            outcomes.add("degenerate" if why else outcome)
            marks = [outcome]
            for judge, title in JUDGE_TITLES.items():
                scores = r.get(f"{judge}_scores") if kind == "harmful" else None
                if scores is not None and scores[i] is not None:
                    marks.append(f"{title} {scores[i]:.2f}")
            text = r[f"{kind}_answers"][i]
            cards.append(
                {"condition": r["family"], "arm": names[r["label"]], "text": text, "marks": marks}
            )
        found.append((len(outcomes), {"prompt": prompt, "answers": cards}))
    ranked = sorted(enumerate(found), key=lambda item: (-item[1][0], item[0]))
    return [example for _, (_, example) in ranked[:most]]
