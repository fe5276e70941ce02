"""Training one arm of a study from the aligned model, and what that cost.

Cost is counted in forwards of one example: a backward is two more, blocks that are not computed
again are not counted, and choosing blocks counts for the arm that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_kernels import noise
from zo_kernels.blocks import decoder_blocks
from zo_kernels.chat import Encoded, Example, encode
from zo_kernels.files import write_file
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
from zo_kernels.replay import Log, check_base, read_log, replay_
from zo_kernels.replay.apply import CHUNK, Replica, chunks
from zo_kernels.replay.updates import logged_updates

BACKWARD = 2
"""Forwards that a backward takes the time of."""
_SAVE_EVERY = 50  # first-order steps between two files to resume from


@dataclass(frozen=True)
class Trained:
    """One arm with one training seed, trained.

    Attributes:
        config: as it was asked for: a ``RefineConfig`` or ``AlignConfig`` as JSON has it, or the
            walk's seed.
        steps: taken.
        seconds: of the steps.
        cost: in forwards of one example.
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
    peak_bytes: int
    model_bytes: int
    fingerprint: str
    lr: float | None
    asked: dict[str, Any] = field(default_factory=dict)


@contextmanager
def peak_of_all(path: Path, device: Any) -> Iterator[Callable[[], int]]:
    """Measure the peak over what was in use before, those of earlier calls that broke off included.

    Args:
        path: file in which a peak is kept when the block ends in an exception.
        device: of the model.

    Yields:
        What gives the peak in bytes, after the block. A call that was killed has left none.
    """
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else 0
    memory = PeakMemory(device)

    def peak() -> int:
        return max(earlier, memory.peak - memory.before)

    try:
        with memory:
            yield peak
    except BaseException:
        write_file(path, f"{peak()}\n")
        raise
    path.unlink(missing_ok=True)


def refine_arm(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    config: RefineConfig,
    stem: Path,
    *,
    progress: Progress | None = None,
) -> Trained:
    """Refine a model, going on where an interrupted call stopped.

    Args:
        model: the aligned one; refined in place.
        tokenizer, encoded: as for ``ZORefiner.run``.
        config: of the arm.
        stem: path of the records and of the replay log, without .jsonl and .zolog.
        progress: as ever.
    """
    # "mezo" drifts, which no log can hold.
    log = stem.with_name(f"{stem.name}.zolog") if config.mode != "mezo" else None
    path = stem.with_name(f"{stem.name}.jsonl")
    resume = log is not None and log.exists()
    earlier = logged_records(path, log) if resume else []
    write_records(path, earlier)
    device = next(model.parameters()).device
    peaks = stem.with_name(f"{stem.name}.peak")
    with MetricsLog(path) as records, peak_of_all(peaks, device) as peak:
        refiner = ZORefiner(model, tokenizer, config)
        new = refiner.run(
            encoded,
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
        cost=len(taken) * refine_cost(model, config, encoded) + starting_cost(config, encoded),
        peak_bytes=peak(),
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
    with peak_of_all(stem.with_name(f"{stem.name}.peak"), device) as peak:
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
    return Trained(
        config=asdict(config),
        steps=len(records),
        seconds=records[-1]["seconds"],
        cost=float(len(records) * (1 + BACKWARD) * config.batch_size * config.accumulation),
        peak_bytes=peak(),
        model_bytes=_bytes(model),
        fingerprint=checkpoint.fingerprint(model),
        lr=config.lr,
    )


def walk_arm(model: Any, log: Log) -> Trained:
    """Take a logged refinement's steps in other directions, which no loss has chosen.

    Each update has the size, the decay and the rounding of the logged one, over the same weights;
    its directions are ``noise.RANDOM_WALK`` and those that follow, of the log's seed.

    Args:
        model: moved in place.
        log: of the refinement.
    """
    parameters = dict(model.named_parameters())
    for number, group in enumerate(log.header.groups):
        tensors = [parameters[parameter.name].detach() for parameter in group]
        replica = Replica(log.header, tensors, group)
        taken = noise.RANDOM_WALK
        updates = []
        for _, update in logged_updates(log, number, 0, len(log.steps)):
            directions = list(range(taken, taken + len(update.directions)))
            taken += len(directions)
            updates.append(replace(update, directions=directions))
        for part in chunks(updates, CHUNK):
            replica.advance_(part)
        replica.settle_()
    return Trained(
        config={"seed": log.header.seed},
        steps=len(log.steps),
        seconds=0.0,
        cost=0.0,
        peak_bytes=0,
        model_bytes=_bytes(model),
        fingerprint=checkpoint.fingerprint(model),
        lr=None,
    )


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


def starting_cost(config: RefineConfig, encoded: Sequence[Encoded]) -> float:
    """Forwards of one example before the first step: to tell the rate, and the held-out loss."""
    cost = 0
    if config.lr == "auto":
        examples = CALIBRATION_BATCHES * config.batch_size * config.accumulation
        cost += (1 + 2 * config.calibration_draws) * examples
    if config.patience:
        cost += len(held_out_part(encoded)[1]) * config.held_out_draws
    return float(cost)


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def replayed_fingerprint(model: Any, path: Path) -> str:
    """Take an aligned model to the end of a replay log; the fingerprint of all its weights."""
    log = read_log(path)
    tensors = dict(model.named_parameters())
    check_base(tensors, log.header)
    replay_(tensors, log)
    return checkpoint.fingerprint(model)
