"""The report of a study: every arm against the aligned model and against its controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_kernels.pipeline.arms import Trained
from zo_kernels.pipeline.study_config import RESERVED, TITLES, StudyConfig
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine.records import read_records, write_records
from zo_kernels.refine.scores import Scores
from zo_kernels.robustness.report import write_report

CONTROL_STEPS = 3
"""Steps of the lr = 0 control."""
_OVER = 1.2  # times the cost that arms should have, before a report says so


def write_study_report(
    folder: StudyFolder, config: StudyConfig, scores: Scores | None, model: str
) -> dict[str, Path]:
    """Gather the records of all arms in evaluation.jsonl, and write the report on them.

    Args:
        folder: of the study, whose arms are all evaluated.
        config: of the study.
        scores: of Stage II, if there was one.
        model: the base model's name.
    """
    names = [*RESERVED, *(arm.name for arm in config.arms)]
    titles = {name: TITLES.get(name, name) for name in names}
    records: list[dict[str, Any]] = []
    for name in names:
        for seed in (None,) if name in RESERVED else config.seeds:
            records += folder.records(name, seed)
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    write_records(folder.path / "evaluation.jsonl", records)
    first = config.seeds[0]
    logs = {
        f"{titles[arm.name]}, seed {first}": read_records(
            folder.training(arm.name, first, ".jsonl")
        )
        for arm in config.arms
        if arm.kind != "walk"
    }
    if config.align is not None:
        aligned = read_records(folder.training("aligned", None, ".jsonl"))
        logs = {"alignment (FO)": aligned} | logs
    return write_report(
        folder.path,
        records,
        title=f"Study of {model}",
        arms=titles,
        training_logs=logs,
        notes=_notes(folder, config, scores),
        compare=_pairs(config),
        costs=_costs(folder, config, scores),
        scores=scores and {"blocks": scores.rows(), "settings": scores.settings()},
    )


def _pairs(config: StudyConfig) -> list[tuple[str, str]]:
    """Every arm against the aligned model; zeroth-order arms against their controls."""
    names = {arm.name: arm for arm in config.arms}
    pairs = [("aligned", name) for name in names]
    walks = [(a.name, a.like) for a in config.arms if a.kind == "walk"]
    others = [("zo_random", "zo_robust"), ("fo_noise", "zo_full"), ("more_fo", "zo_full")]
    return pairs + walks + [pair for pair in others if set(pair) <= names.keys()]


def _notes(folder: StudyFolder, config: StudyConfig, scores: Scores | None) -> list[str]:
    alike = {
        "forwards": "as many forwards (a backward counts as two, scoring counts)",
        "seconds": "as much time as the first zeroth-order arm (choosing blocks is not counted)",
        "steps": f"{config.refine.steps} steps, at whatever cost (see the table of costs)",
    }[config.equal]
    notes = [
        f"Every arm starts from the aligned model and has {alike}; training seeds "
        f"{', '.join(map(str, config.seeds))}. Differences are paired over prompts, noise "
        "draws and training seeds, and a difference that is not significant is no evidence of "
        "none.",
        f"The lr = 0 control took {CONTROL_STEPS} steps and is bit-identical to the aligned "
        "model (by a fingerprint of all weights); its rows are the aligned model's."
        if config.refine.mode != "mezo"
        else "Mode mezo drifts: see the lr = 0 control.",
    ]
    for arm in config.arms:
        costs = [folder.trained(arm.name, seed).cost for seed in config.seeds]
        if config.equal == "forwards" and max(costs) > _OVER * config.forwards():
            notes.append(
                f"Not at equal cost: {TITLES.get(arm.name, arm.name)} took "
                f"{max(costs) / config.forwards():.1f} times as many forwards as the others, since "
                "choosing its blocks or its learning rate left less than a step of them."
            )
    if scores is not None:
        chosen = ", ".join(map(str, scores.selected()))
        notes.append(f"Focused ZO moves blocks {chosen}, the most sensitive ones by the scores.")
    if config.model == "smollm2":
        notes.append(
            "SmolLM2's weights come from a Q4_1 file: its linears lie on a 4-bit grid of "
            "blocks of 32, so the base model's quantised rows flatter it."
        )
    return notes


def _costs(folder: StudyFolder, config: StudyConfig, scores: Scores | None) -> list[dict[str, Any]]:
    """Rows of the report's table: means over training seeds."""
    rows = []
    aligned = folder.trained("aligned", None)
    if aligned is not None:
        row = _cost_row("Stage I: alignment (FO)", None, [aligned])
        rows.append(row | {"first_order": True})
    if scores is not None:
        peak = json.loads((folder.path / "scoring.json").read_text("utf-8"))["peak_bytes"]
        rows.append(
            {
                "stage": "Stage II: scoring",
                "steps": scores.draws,
                "seconds": scores.seconds,
                "forwards": scores.forwards * scores.examples,
                "peak_bytes": peak,
                "model_bytes": None if aligned is None else aligned.model_bytes,
            }
        )
    for arm in config.arms:
        if arm.kind != "walk":
            trained = [folder.trained(arm.name, seed) for seed in config.seeds]
            stage = "Stage III" if arm.kind == "zo" else "first-order steps"
            rows.append(_cost_row(stage, TITLES.get(arm.name, arm.name), trained))
    return rows


def _cost_row(stage: str, arm: str | None, trained: Sequence[Trained]) -> dict[str, Any]:
    """What training took, on the mean over training seeds; the peak is the highest of them."""
    count = len(trained)
    return {
        "stage": stage,
        "arm": arm,
        "steps": round(sum(t.steps for t in trained) / count),
        "seconds": sum(t.seconds for t in trained) / count,
        "forwards": sum(t.cost for t in trained) / count,
        "peak_bytes": max(t.peak_bytes for t in trained),
        "model_bytes": trained[0].model_bytes,
    }
