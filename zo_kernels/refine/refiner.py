"""Stage III: zeroth-order refinement of a Hugging Face model."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zo_kernels.blocks import linear_weights
from zo_kernels.chat import Encoded, Example, batch_stream, completion_loss, encode, pad_id
from zo_kernels.modes import MODES
from zo_kernels.optim import ZOSGD, named_parameters
from zo_kernels.progress import Progress
from zo_kernels.replay import read_log

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class RefineConfig:
    """Zeroth-order refinement.

    Attributes:
        steps: steps at most.
        seconds: stop after this much wall time, if given.
        batch_size: examples per loss evaluation.
        lr: learning rate; with ``relative_eps`` in units of each tensor's standard deviation.
        eps: perturbation scale. The default is the scale of the weight noise to be survived: at
            eps much below it, a converged alignment loss gives no signal about robustness.
        relative_eps: eps is a multiple of each tensor's standard deviation.
        queries: directions per step.
        weight_decay, clip_projected_gradient, update_norm: as in ``ZOSGD``.
        schedule: "constant" or "cosine" (over ``steps``).
        mode: who owns the weights during an evaluation: "streamed", "dual", "inplace",
            "snapshot", "master", "master8" or "mezo"; see ``zo_kernels.modes``.
        distribution: of the directions, "normal" or "rademacher".
        parameters: "linear" (weights of the decoder blocks' linears), "all", or shell patterns of
            parameter names separated by commas.
        seed: of the noise and the batch order.
        max_length: token limit of prompt plus completion.
        first_batch: number of the first batch.
    """

    steps: int = 200
    seconds: float | None = None
    batch_size: int = 8
    lr: float = 1e-3
    eps: float = 0.1
    relative_eps: bool = True
    queries: int = 1
    weight_decay: float = 0.0
    clip_projected_gradient: float | None = None
    update_norm: float | None = None
    schedule: str = "constant"
    mode: str = "streamed"
    distribution: str = "normal"
    parameters: str = "linear"
    seed: int = 0
    max_length: int = 512
    first_batch: int = 0

    def check(self) -> None:
        """Raise ValueError naming the first option out of range (ZOSGD checks its own)."""
        for name, low in (("steps", 1), ("batch_size", 1), ("first_batch", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {sorted(MODES)}, got {self.mode!r}")


class ZORefiner:
    """Refines a model in place on the loss of completions.

    Args:
        model: a transformers causal language model, put into eval mode.
        tokenizer: its tokenizer.
        config: see ``RefineConfig``.

    Attributes:
        optimizer: the ``ZOSGD`` that drives it.
    """

    def __init__(self, model: Any, tokenizer: Any, config: RefineConfig | None = None) -> None:
        self.config = RefineConfig() if config is None else config
        self.config.check()
        self.model, self.tokenizer = model.eval(), tokenizer
        options = {
            key: value
            for key, value in asdict(self.config).items()
            if key in ("lr", "eps", "relative_eps", "queries", "weight_decay", "mode", "seed")
            or key in ("clip_projected_gradient", "update_norm", "distribution")
        }
        self.optimizer = ZOSGD(select_parameters(model, self.config.parameters), **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: (
                0.5 * (1 + math.cos(math.pi * min(step, self.config.steps) / self.config.steps))
                if self.config.schedule == "cosine"
                else 1.0
            ),
        )

    def run(
        self,
        data: Sequence[Example] | Sequence[Encoded],
        *,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Take the configured steps.

        Args:
            data: examples, encoded or not.
            log: file for the replay log, from which ``zo-kernels replay`` rebuilds the weights.
            resume: go on where the log ends; the model is the one that the log began with, and
                the result is bit for bit that of an uninterrupted run.
            on_step: called with each step's record.
            progress: called as progress(text, done, total).

        Returns:
            One record per step taken: the fields of ``StepRecord``, loss (mean of the losses
            evaluated) and seconds since the start.

        Raises:
            ValueError: the log is of another run: other weights, options or data; names what.
        """
        config = self.config
        encoded = [e for e in data if isinstance(e, Encoded)]
        if len(encoded) != len(data):
            encoded = encode(self.tokenizer, list(data), max_length=config.max_length)
        done = self._open_log(Path(log), encoded, resume, progress) if log is not None else 0
        batches = batch_stream(
            encoded,
            batch_size=config.batch_size,
            seed=config.seed,
            pad_id=pad_id(self.tokenizer),
            device=next(self.model.parameters()).device,
            start=config.first_batch + done,
        )
        records = []
        started = time.perf_counter()
        for number in range(done, config.steps):
            batch = next(batches)
            self.optimizer.step(lambda batch=batch: completion_loss(self.model, batch))
            self.scheduler.step()
            last = self.optimizer.last_step
            elapsed = time.perf_counter() - started
            record = {**asdict(last), "loss": last.loss, "seconds": elapsed}
            records.append(record)
            if on_step is not None:
                on_step(record)
            over = config.seconds is not None and elapsed >= config.seconds
            if progress is not None:
                text = f"step {number + 1}, loss {last.loss:.3f}"
                share = elapsed / config.seconds if config.seconds is not None else 0.0
                if share > (number + 1) / config.steps:
                    progress(text, min(elapsed, config.seconds), config.seconds)
                else:
                    progress(text, number + 1, config.steps)
            if over:
                break
        if self.optimizer.log is not None:
            self.optimizer.end_log()
        return records

    def _open_log(
        self, path: Path, encoded: Sequence[Encoded], resume: bool, progress: Progress | None
    ) -> int:
        """Begin or continue the replay log; the number of steps that it has."""
        digest = hashlib.sha256(repr([asdict(item) for item in encoded]).encode()).hexdigest()
        free = ("steps", "seconds") if self.config.schedule == "constant" else ("seconds",)
        options = {k: v for k, v in asdict(self.config).items() if k not in free}
        user = {"options": options, "data": digest}
        if not resume:
            self.optimizer.start_log(path, user=user)
            return 0
        logged = read_log(path).header.user
        if not isinstance(logged, dict) or "options" not in logged:
            raise ValueError(f"{path}: expected the log of a refinement, got another one")
        for name, value in options.items():
            if logged["options"].get(name) != value:
                raise ValueError(
                    f"{name}: expected {logged['options'].get(name)!r} as in {path}, got {value!r}"
                )
        if logged["data"] != digest:
            raise ValueError(f"data: expected the examples with which {path} began, got others")
        done = self.optimizer.resume_log(path, progress=progress)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.last_epoch = done - 1
            self.scheduler.step()
        return done


def select_parameters(model: Any, parameters: str) -> list[tuple[str, Any]]:
    """The named parameters that "linear", "all" or comma-separated shell patterns choose.

    Raises:
        ValueError: nothing is chosen, or a pattern matches nothing.
    """
    if parameters == "linear":
        return list(linear_weights(model).items())
    patterns = [] if parameters == "all" else [p.strip() for p in parameters.split(",")]
    return named_parameters(model, include=patterns)
