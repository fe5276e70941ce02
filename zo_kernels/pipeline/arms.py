"""Training one arm of a study from the aligned model, and what that cost.

Cost is counted in forwards of one example: a backward is two more, blocks that are not computed
again are not counted, and choosing blocks counts for the arm that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_kernels import noise, ops
from zo_kernels.blocks import decoder_blocks
from zo_kernels.chat import Encoded, Example, encode
from zo_kernels.memory import PeakMemory
from zo_kernels.progress import Progress
from zo_kernels.refine import checkpoint
from zo_kernels.refine.align import AlignConfig, align
from zo_kernels.refine.alignment_state import read_state
from zo_kernels.refine.config import RefineConfig, first_block, select_parameters
from zo_kernels.refine.held_out import held_out_part
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.records import MetricsLog, logged_records, write_records
from zo_kernels.refine.refiner import CALIBRATION_BATCHES, ZORefiner
from zo_kernels.refine.scores import ScoreConfig, Scores
from zo_kernels.refine.selection import select_blocks
from zo_kernels.replay import Log, read_log

BACKWARD = 2
"""Forwards that a backward takes the time of."""
_SAVE_EVERY = 50  # first-order steps between two files to resume from


@dataclass(frozen=True)
class Trained:
    """One arm with one training seed, trained.

    Attributes:
        config: as it was asked for: a ``RefineConfig`` or ``AlignConfig`` as JSON has it, or the
            walk's length.
        steps: taken.
        seconds: of the steps.
        cost: in forwards of one example.
        per_step: examples of a step, the unit of a report's forwards.
        peak_bytes: at most in use over what the loaded model takes.
        model_bytes: of its weights.
        fingerprint: of the weights that came out.
        lr: learning rate before the schedule.
        asked: what a study asked for (``StudyConfig.asked``).
    """

    config: dict[str, Any]
    steps: int
    seconds: float
    cost: float
    per_step: int
    peak_bytes: int
    model_bytes: int
    fingerprint: str
    lr: float | None
    asked: dict[str, Any] = field(default_factory=dict)


def refine_arm(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    config: RefineConfig,
    stem: Path,
    *,
    scores: Scores | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Refine a model, going on where an interrupted call stopped.

    Args:
        model: the aligned one; refined in place.
        tokenizer, encoded: as for ``ZORefiner.run``.
        config: of the arm.
        stem: path of the records and of the replay log, without .jsonl and .zolog.
        scores: for a warm start.
        progress: as ever.
    """
    # "mezo" drifts, which no log can hold.
    log = stem.with_name(f"{stem.name}.zolog") if config.mode != "mezo" else None
    path = stem.with_name(f"{stem.name}.jsonl")
    resume = log is not None and log.exists()
    earlier = logged_records(path, log) if resume else []
    write_records(path, earlier)
    device = next(model.parameters()).device
    with MetricsLog(path) as records, PeakMemory(device) as memory:
        refiner = ZORefiner(model, tokenizer, config)
        new = refiner.run(
            encoded,
            scores=scores,
            log=log,
            resume=resume,
            earlier=earlier,
            on_step=records.write,
            progress=progress,
        )
    taken = [*earlier, *new]
    return Trained(
        config=asdict(config),
        steps=len(taken),
        seconds=taken[-1]["seconds"],
        cost=len(taken) * refine_cost(model, config, encoded) + calibration_cost(config),
        per_step=config.batch_size * config.accumulation,
        peak_bytes=memory.peak - memory.before,
        model_bytes=_bytes(model),
        fingerprint=checkpoint.fingerprint(model),
        lr=float(refiner.optimizer.param_groups[0]["initial_lr"]),
    )


def align_arm(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    config: AlignConfig,
    stem: Path,
    *,
    progress: Progress | None = None,
) -> Trained:
    """Take first-order steps, going on where an interrupted call stopped.

    Args:
        model: trained in place.
        tokenizer, encoded: as for ``align``.
        config: of the arm.
        stem: path of the records and of what resumption needs, without .jsonl and .state.
        progress: as ever.
    """
    state, path = (stem.with_name(f"{stem.name}{end}") for end in (".state", ".jsonl"))
    earlier = read_state(state)[0] if state.exists() else []
    device = next(model.parameters()).device
    with PeakMemory(device) as memory:
        new = align(
            model,
            tokenizer,
            encoded,
            config,
            state=state,
            save_every=_SAVE_EVERY,
            resume=state.exists(),
            progress=progress,
        )
    records = [*earlier, *new]
    write_records(path, records)
    per_step = config.batch_size * config.accumulation
    return Trained(
        config=asdict(config),
        steps=len(records),
        seconds=records[-1]["seconds"],
        cost=float(len(records) * (1 + BACKWARD) * per_step),
        per_step=per_step,
        peak_bytes=memory.peak - memory.before,
        model_bytes=_bytes(model),
        fingerprint=checkpoint.fingerprint(model),
        lr=config.lr,
    )


def walk_arm(model: Any, log: Log, seed: int) -> Trained:
    """Take one random step as long as the way of a logged refinement, over the same weights.

        theta_i <- round(theta_i + r unit_i z),    r = sqrt(sum of all steps' squared coefficients)

    Steps of a refinement have independent directions, so after them ||dtheta_i / unit_i|| is
    r sqrt(number of weights) to within a part in the square root of that number.

    Args:
        model: moved in place.
        log: of the refinement.
        seed: of the noise; the direction is ``noise.RANDOM_WALK``.
    """
    length = walked(log)
    parameters = dict(model.named_parameters())
    for group in log.header.groups:
        tensors = [parameters[parameter.name].detach() for parameter in group]
        ops.combine_(
            tensors,
            tensors,
            [[length * float(parameter.unit)] for parameter in group],
            seed=seed,
            directions=[noise.RANDOM_WALK],
            streams=[parameter.stream for parameter in group],
            rounding="stochastic",
        )
    return Trained(
        config={"length": length, "seed": seed},
        steps=1,
        seconds=0.0,
        cost=0.0,
        per_step=1,
        peak_bytes=0,
        model_bytes=_bytes(model),
        fingerprint=checkpoint.fingerprint(model),
        lr=None,
    )


def walked(log: Log) -> float:
    """Root mean square change that a logged refinement made to its weights, in their units."""
    taken = log.steps["coefficients"][~log.skipped]
    squares = float((taken**2).sum())
    warm = log.header.warm_start
    if warm is not None and len(taken):
        units = {p.name: float(p.unit) for p in log.header.parameters()}
        sizes = {p.name: p.numel for p in log.header.parameters()}
        moved = sum(
            sizes[name] * sum((scale / units[name]) ** 2 for scale in scales)
            for name, scales in warm.scales.items()
            if units[name]
        )
        squares += moved / sum(sizes.values())
    return math.sqrt(squares)


def chosen_blocks(
    rule: str,
    config: ScoreConfig,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    scores: Scores | None,
    seed: int,
) -> tuple[tuple[int, ...] | None, float]:
    """The blocks of a zeroth-order arm (None: all weights), and what choosing them cost.

    Args:
        rule: out of ``selection.RULES``.
        config: of the scoring, whose number of blocks and examples other rules take.
        model, tokenizer: the aligned ones.
        examples: to train on.
        scores: for "robust".
        seed: for "random".
    """
    if rule == "all":
        return None, 0.0
    objective, cost = None, 0.0
    if rule == "robust":
        cost = scores.forwards * scores.examples
    if rule == "snip":
        encoded = encode(tokenizer, examples, max_length=config.max_length)
        chosen = [e for e in encoded if config.kind in (e.kind, "all")][: config.examples]
        objective = Objective(model, fixed_batches(model, tokenizer, chosen, config.batch_size))
        cost = float((1 + BACKWARD) * len(chosen))
    blocks = select_blocks(
        model, rule, config.selected, scores=scores, objective=objective, seed=seed
    )
    return blocks, cost


def refine_cost(model: Any, config: RefineConfig, encoded: Sequence[Encoded]) -> float:
    """Forwards of one example that a step takes, its share of held-out losses included."""
    blocks = len(decoder_blocks(model))
    names = [name for name, _ in select_parameters(model, config.parameters, config.layers)]
    shared = first_block(model, names) / blocks if config.reuse_prefix else 0.0
    losses = 2 * config.queries + (1 / config.curvature_every if config.curvature_every else 0.0)
    own = (shared + losses * (1 - shared)) * config.batch_size * config.accumulation
    if not config.held_out_every:
        return own
    held = len(held_out_part(encoded)[1])
    return own + held * config.held_out_draws / config.held_out_every


def calibration_cost(config: RefineConfig) -> float:
    """Forwards of one example that telling the learning rate takes."""
    if config.lr != "auto":
        return 0.0
    examples = CALIBRATION_BATCHES * config.batch_size * config.accumulation
    return float((1 + 2 * config.calibration_draws) * examples)


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def replayed_fingerprint(model: Any, path: Path) -> str:
    """Take an aligned model to the end of a replay log; the fingerprint of all its weights."""
    from zo_kernels.replay import check_base, replay_

    log = read_log(path)
    tensors = dict(model.named_parameters())
    check_base(tensors, log.header)
    replay_(tensors, log)
    return checkpoint.fingerprint(model)
