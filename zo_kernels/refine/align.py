"""Stage I: first-order alignment, ordinary SFT on the completion tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from zo_kernels.chat import Encoded, batch_stream, completion_loss, pad_id
from zo_kernels.progress import Progress
from zo_kernels.refine.checkpoint import fast_dtype

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class AlignConfig:
    """First-order training.

    Attributes:
        steps: optimizer steps at most.
        seconds: stop after this much wall time, if given.
        batch_size: examples per step.
        lr: peak learning rate.
        optimizer: "adamw" or "sgd" (plain, as in the paper).
        weight_decay: decoupled for adamw.
        warmup: share of the run over which lr rises linearly, below 1.
        schedule: "constant" or "cosine" (to zero at the end of the run, by steps or seconds,
            whichever ends it) after the warm-up.
        clip_norm: bound on the gradient's norm.
        seed: of the batch order.
        first_batch: number of the first batch, to continue where another run ended.
    """

    steps: int = 120
    seconds: float | None = None
    batch_size: int = 8
    lr: float = 3e-5
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: float = 0.1
    schedule: str = "cosine"
    clip_norm: float = 1.0
    seed: int = 0
    first_batch: int = 0

    def check(self) -> None:
        """Raise ValueError naming the first option out of range."""
        for name, low in (("steps", 1), ("batch_size", 1), ("first_batch", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.warmup >= 1:
            raise ValueError(f"warmup: expected a share below 1, got {self.warmup}")
        if self.clip_norm <= 0 or (self.seconds is not None and self.seconds <= 0):
            raise ValueError("clip_norm, seconds: expected positive numbers")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
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
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train all parameters in place; the model is left in eval mode.

    Weights keep their dtype; on devices that multiply bfloat16 fast, a float32 model's matrix
    products run in it under autocast. Dropout is off (eval mode), as small runs want it.

    Args:
        model: causal language model.
        tokenizer: for its padding token.
        encoded: examples from ``chat.encode``.
        config: see ``AlignConfig``.
        on_step: called with each step's record.
        progress: called as progress(text, done, total).

    Returns:
        One record per step: step, loss (of the batch before the update, nats per token), lr,
        gradient_norm, seconds since the start.

    Raises:
        ValueError: an option out of range.
        FloatingPointError: the loss is not finite; the weights are those of the step before.
    """
    config.check()
    device = next(model.parameters()).device
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
    # fused: no temporaries of the weights' size, which the other implementations make.
    optimizer = kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    half = fast_dtype(device)
    mixed = (
        torch.autocast(device.type, dtype=half)
        if half != torch.float32 and parameters[0].dtype == torch.float32
        else nullcontext()
    )
    batches = batch_stream(
        encoded,
        batch_size=config.batch_size,
        seed=config.seed,
        pad_id=pad_id(tokenizer),
        device=device,
        start=config.first_batch,
    )
    records = []
    started = time.perf_counter()
    for step in range(config.steps):
        with mixed:
            loss = completion_loss(model, next(batches))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"alignment step {step}: expected a finite loss, got {loss}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        share = step / config.steps
        if config.seconds is not None:
            share = max(share, min(1.0, (time.perf_counter() - started) / config.seconds))
        lr = config.lr * learning_rate_factor(share, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        record = {
            "step": step,
            "loss": loss.item(),
            "lr": lr,
            "gradient_norm": float(norm),
            "seconds": elapsed,
        }
        records.append(record)
        if on_step is not None:
            on_step(record)
        over = config.seconds is not None and elapsed >= config.seconds
        if progress is not None:
            _report(progress, record, config.steps, config.seconds, over)
        if over:
            break
    return records


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
