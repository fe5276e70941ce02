"""Stage I: first-order alignment, ordinary SFT on the completion tokens.

Also the strongest baseline of a robustness study, where gradients can be afforded: alignment at
weights that carry fresh noise in every step (``AlignConfig.noise``).
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zo_kernels.chat import Encoded, batch_stream, pad_id
from zo_kernels.progress import Progress
from zo_kernels.refine.alignment_state import read_state, run_identity, write_state
from zo_kernels.refine.first_order import FirstOrder

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class AlignConfig:
    """First-order training.

    Attributes:
        steps: optimizer steps at most.
        seconds: stop after this much wall time, if given.
        batch_size: examples per forward (micro-batch).
        accumulation: micro-batches per step. The step's loss is the mean over all their completion
            tokens, so k of b examples have the gradient of one of k * b, up to rounding.
        lr: peak learning rate.
        optimizer: "adamw" or "sgd" (plain, as in the paper).
        momentum: of sgd; the step is lr * (g + momentum * the step's direction before).
        weight_decay: decoupled for adamw, part of the gradient for sgd.
        warmup: share of the run over which lr rises linearly, below 1.
        schedule: "constant" or "cosine" (to zero at the end of the run, by steps or seconds,
            whichever ends it) after the warm-up.
        clip_norm: bound on the gradient's norm.
        precision: of matrix products: "auto" (bfloat16 by autocast for a float32 model on a device
            that multiplies it fast, else the model's own), "float32" or "bfloat16" (by autocast).
        noise: standard deviation of the noise under which gradients are taken, in units of that of
            each linear weight of the decoder blocks. One z per step, from (seed, step).
        seed: of the batch order and the noise.
    """

    steps: int = 120
    seconds: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 3e-5
    optimizer: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "auto"
    noise: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the first option out of range."""
        lowest = {"steps": 1, "batch_size": 1, "accumulation": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "warmup", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: expected 0 <= seed < 2**64, got {self.seed}")
        if self.momentum >= 1 or (self.momentum and self.optimizer != "sgd"):
            raise ValueError(
                f"momentum: expected a number below 1, and 0 unless the optimizer is sgd, got "
                f"{self.momentum} with {self.optimizer}"
            )
        if self.warmup >= 1:
            raise ValueError(f"warmup: expected a share below 1, got {self.warmup}")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm: expected a positive number, got {self.clip_norm}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds}")
        for name, known in {
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")


def learning_rate_factor(share: float, config: AlignConfig) -> float:
    """Factor of lr when this share (0 to 1) of the run lies behind.

    Linear over the warm-up, then constant or cosine to zero.
    """
    if share < config.warmup:
        return min(1.0, (share + 1 / config.steps) / config.warmup)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (share - config.warmup) / (1 - config.warmup)))


def align(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    config: AlignConfig,
    *,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 0,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train all parameters that require gradients, in place; the model is left in eval mode.

    Weights keep their dtype; 16-bit ones are the rounding of float32 masters that last as long as
    the call (``Masters``). Float16 gradients are scaled, and taken again at a smaller scale where
    they overflow. Dropout is off (eval mode), as small runs want it.

    With noise, step s takes its gradient at W + noise std(W) z(seed, s) and its update at W, which
    comes back bit for bit, also after an exception.

    Args:
        model: causal language model.
        tokenizer: for its padding token.
        encoded: examples from ``chat.encode``.
        config: see ``AlignConfig``.
        state: file that holds all it takes to go on: 4 bytes per weight, and what the optimizer
            keeps (8 bytes for adamw, 4 for sgd with momentum). It stays after the last step.
        save_every: steps after which it is replaced; 0 for never.
        resume: go on from ``state``. The model is the one that the run began with; the result is
            bit for bit that of an uninterrupted run, where the device's backward is reproducible.
            Time spent before counts for ``seconds``.
        on_step: called with each step's record.
        progress: called as progress(text, done, total).

    Returns:
        One record per step taken: step, loss (of the step's batch before the update and under the
        noise, nats per token), lr, gradient_norm (before clipping), tokens (of completions),
        loss_scale (of float16 models), seconds since the start.

    Raises:
        ValueError: an option out of range; nothing to train; a state of another run.
        FileNotFoundError: there is no state to resume from.
        FloatingPointError: the loss or the gradient is not finite; the weights are those of the
            step before.
        OSError: the state cannot be written; the one before is as it was.
    """
    config.check()
    if save_every < 0 or ((save_every or resume) and state is None):
        raise ValueError(
            f"save_every, resume: expected a number of steps, and a state, got {save_every}, "
            f"{resume} with {state}"
        )
    model.eval()
    earlier: list[dict[str, Any]] = []
    first_order = FirstOrder(model, config)
    try:
        identity = None if state is None else run_identity(model, encoded, config)
        if resume:
            earlier, kept = read_state(state, identity)
            first_order.load_state(kept)
        batches = batch_stream(
            encoded,
            batch_size=config.batch_size,
            seed=config.seed,
            pad_id=pad_id(tokenizer),
            device=next(model.parameters()).device,
            start=len(earlier) * config.accumulation,
        )
        records: list[dict[str, Any]] = []
        before = earlier[-1]["seconds"] if earlier else 0.0
        started = time.perf_counter() - before
        over = config.seconds is not None and before >= config.seconds
        for step in range(len(earlier), 0 if over else config.steps):
            share = step / config.steps
            if config.seconds is not None:
                share = max(share, min(1.0, (time.perf_counter() - started) / config.seconds))
            lr = config.lr * learning_rate_factor(share, config)
            micro = list(itertools.islice(batches, config.accumulation))
            taken = first_order.step(step, micro, lr)
            elapsed = time.perf_counter() - started
            record = {"step": step, **taken, "seconds": elapsed}
            records.append(record)
            if on_step is not None:
                on_step(record)
            over = config.seconds is not None and elapsed >= config.seconds
            if progress is not None:
                _report(progress, record, config.steps, config.seconds, over)
            if save_every and (step + 1) % save_every == 0:
                write_state(state, identity, [*earlier, *records], first_order.state())
            if over:
                break
        return records
    finally:
        first_order.close()


def _report(
    progress: Progress, record: dict[str, Any], steps: int, seconds: float | None, over: bool
) -> None:
    """Show the step, in the unit (seconds or steps) that will end the run first."""
    text = f"step {record['step'] + 1}, loss {record['loss']:.3f}"
    done = record["step"] + 1
    if seconds is not None and record["seconds"] / seconds > done / steps:
        progress(text, seconds if over else min(record["seconds"], seconds), seconds)
    else:
        progress(text, done, steps)
