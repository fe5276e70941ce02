"""Stage III: zeroth-order refinement of a Hugging Face model."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zo_kernels.blocks import linear_weights
from zo_kernels.chat import Encoded, Example, batch_stream, encode, pad_id
from zo_kernels.modes import Slot
from zo_kernels.moments import standard_deviation
from zo_kernels.noise import model_streams
from zo_kernels.optim import ZOSGD
from zo_kernels.progress import Progress
from zo_kernels.refine.config import RefineConfig, first_block, select_parameters
from zo_kernels.refine.curvature import Curvature, mean_noise, measure_curvature
from zo_kernels.refine.held_out import EarlyStop, held_out_part, noisy_loss
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.prefix import PrefixCache
from zo_kernels.refine.records import step_record
from zo_kernels.refine.run_log import (
    check_run,
    check_warm_start,
    description,
    logged_rate,
    read_run,
    recall,
)
from zo_kernels.refine.scores import Scores
from zo_kernels.replay import WarmStart
from zo_kernels.robustness.conditions import parse_scheme
from zo_kernels.views import quantized

CALIBRATION_BATCHES = 4
"""Batches of a step's size that a learning rate is told from."""


class ZORefiner:
    """Refines a model in place on the loss of completions.

    Args:
        model: a transformers causal language model, put into eval mode.
        tokenizer: its tokenizer.
        config: see ``RefineConfig``.

    Attributes:
        parameters: what is moved, by name; none that is frozen (``requires_grad=False``).
        optimizer: the ``ZOSGD`` that drives it; where ``lr`` is "auto" its rate is 0 until ``run``
            has measured it.
        curvature: what a learning rate was told from, or None.
        early_stop: the held-out losses of the run, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, config: RefineConfig | None = None) -> None:
        self.config = config = RefineConfig() if config is None else config
        config.check()
        self.model, self.tokenizer = model.eval(), tokenizer
        chosen = select_parameters(model, config.parameters, config.layers)
        self.parameters = {name: p for name, p in chosen if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"parameters: expected some that require gradients, got {len(chosen)} that are "
                "frozen"
            )
        self.curvature: Curvature | None = None
        self.early_stop: EarlyStop | None = None
        self._view = None
        if config.quantized is not None:
            scheme = parse_scheme(config.quantized)
            scheme.pop("activations")
            self._view = quantized(model, **scheme)
        first = first_block(model, list(self.parameters)) if config.reuse_prefix else 0
        self._prefix = PrefixCache(model, record=first - 1) if first else None
        self.optimizer = ZOSGD(
            self.parameters.items(),
            lr=0.0 if config.lr == "auto" else config.lr,
            **config.optimizer_options(),
        )
        self._set_rate(self.optimizer.param_groups[0]["lr"])

    def _set_rate(self, lr: float) -> None:
        """The learning rate before the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group["base_lr"] = lr
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
        held_out: Sequence[Example] | Sequence[Encoded] | None = None,
        scores: Scores | None = None,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
        earlier: Sequence[Mapping[str, Any]] = (),
        on_step: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Take the configured steps.

        Args:
            data: examples, encoded or not.
            held_out: examples of the held-out loss, where the configuration asks for one; without,
                every eighth example of each kind is held out of the training.
            scores: begin with the descent step that this scoring has measured.
            log: file for the replay log, from which ``zo-kernels replay`` rebuilds the weights.
            resume: go on where the log ends; the model is the one that the log began with, and
                the result is bit for bit that of an uninterrupted run.
            earlier: records of the steps before, for early stopping and the time that they took.
            on_step: called with each step's record; in a resumed run with that of the last step
                before it once more, if its held-out loss was missing and has been measured. The
                last record of a step is the one that counts as ``earlier`` (``logged_records``).
            progress: called as progress(text, done, total).

        Returns:
            One record per step taken: the fields of ``StepRecord``, loss (mean of the losses
            evaluated), where measured clean_loss, curvature, trace (of H over what is moved, in
            eps's coordinates) and held_out_loss (after the step), and seconds since the start, what
            is measured before the first step included, interruptions not. With early stopping, the
            weights are those of the best held-out loss at the end, and the log ends there.

        Raises:
            ValueError: the log is of another run: other weights, options, data or scores; names
                what. Or the refiner has run before, no log to resume, too few examples to hold some
                out, scores that do not fit the refinement, or a rate that cannot be told.
            RuntimeError: forwards cannot begin behind a block (``PrefixCache.check``).
        """
        config = self.config
        if self.optimizer.steps:
            raise ValueError(
                f"run: expected a refiner that has not run, got one after {self.optimizer.steps} "
                "steps; make another"
            )
        if resume and log is None:
            raise ValueError("resume: expected a log to go on with, got none")
        encoded, held = self._encoded(data), []
        if config.held_out_every:
            if held_out is None:
                encoded, held = held_out_part(encoded)
            else:
                held = self._encoded(held_out)
            if not held:
                raise ValueError("held_out: expected examples for held_out_every, got none")
        watched = self._objective(held) if held else None
        wanted = description(config, {"data": encoded, "held_out": held})
        known = read_run(Path(log)) if resume else None
        if known is not None:
            check_run(Path(log), known, wanted)
        if scores is not None:
            self._check_scores(scores)
        with self._prefix or nullcontext():
            done = 0 if known is None else len(known.steps)
            batches = batch_stream(
                encoded,
                batch_size=config.batch_size,
                seed=config.seed,
                pad_id=pad_id(self.tokenizer),
                device=next(self.model.parameters()).device,
                start=done * config.accumulation,
            )
            started = time.perf_counter()
            if config.lr == "auto":
                self._set_rate(
                    self._measured_rate(encoded) if known is None else logged_rate(Path(log), known)
                )
            warm = None if scores is None else self._warm_start(scores)
            if known is not None:
                check_warm_start(Path(log), known, warm)
            elif warm is not None:
                self.optimizer.warm_start(warm.directions, warm.scales)
            if watched is not None and config.patience:
                self.early_stop = EarlyStop(self.parameters, config.patience)
                self.early_stop.note(0, self._held_out_loss(watched))
                if known is not None:
                    recall(self.early_stop, known, self.parameters, earlier, config.held_out_every)
            before = 0.0
            if known is not None:
                self._resume_log(Path(log), progress)
                before = earlier[-1]["seconds"] if earlier else 0.0
                started = time.perf_counter() - before
            elif log is not None:
                lr = float(self.optimizer.param_groups[0]["initial_lr"])
                self.optimizer.start_log(log, user=wanted | {"lr": lr})
            if self.early_stop is not None and self._last_unknown(done):
                record = dict(earlier[-1]) if len(earlier) == done else step_record(known.steps[-1])
                record["held_out_loss"] = self._held_out_loss(watched)
                record["seconds"] = before = time.perf_counter() - started
                self.early_stop.note(done, record["held_out_loss"])
                if on_step is not None:
                    on_step(record)
            over = config.seconds is not None and before >= config.seconds
            return self._steps(done, batches, watched, started, over, on_step, progress)

    def _steps(
        self,
        done: int,
        batches: Any,
        watched: Objective | None,
        started: float,
        over: bool,
        on_step: Callable[[dict[str, Any]], None] | None,
        progress: Progress | None,
    ) -> list[dict[str, Any]]:
        config = self.config
        records = []
        for number in range(done, config.steps):
            if over or (self.early_stop is not None and self.early_stop.over):
                break
            record = self._step(number, [next(batches) for _ in range(config.accumulation)])
            if watched is not None and (number + 1) % config.held_out_every == 0:
                record["held_out_loss"] = self._held_out_loss(watched)
                if self.early_stop is not None:
                    self.early_stop.note(number + 1, record["held_out_loss"])
            record["seconds"] = elapsed = time.perf_counter() - started
            records.append(record)
            if on_step is not None:
                on_step(record)
            if progress is not None:
                text = f"step {number + 1}, loss {record['loss']:.3f}"
                share = elapsed / config.seconds if config.seconds is not None else 0.0
                if share > (number + 1) / config.steps:
                    progress(text, min(elapsed, config.seconds), config.seconds)
                else:
                    progress(text, number + 1, config.steps)
            over = config.seconds is not None and elapsed >= config.seconds
        self._end()
        return records

    def _step(self, number: int, micro_batches: Sequence[Any]) -> dict[str, Any]:
        """One step on a batch that may be several forwards."""
        config = self.config
        if self._prefix is not None:
            self._prefix.clear()
        objective = self._objective(micro_batches)
        if self._prefix is not None and not self._prefix.checked:
            objective.check_prefix()
        due = config.curvature_every and number % config.curvature_every == 0
        clean = objective() if due else None
        self.optimizer.step(objective)
        self.scheduler.step()
        last = self.optimizer.last_step
        record = {**asdict(last), "loss": last.loss}
        if clean is not None:
            eps = config.scale()[0]
            record["clean_loss"] = clean
            record["curvature"] = last.loss - clean
            record["trace"] = 2 * (last.loss - clean) / eps**2 if eps else None
        return record

    def _end(self) -> None:
        """The best weights, where early stopping asks for them; and the end of the log."""
        stop, log = self.early_stop, self.optimizer.log
        if stop is not None and stop.best < math.inf and stop.steps < self.optimizer.steps:
            self.optimizer.mode.settle()
            stop.restore()
            if log is not None:
                log.drop_after(stop.steps)
        if log is not None:
            self.optimizer.end_log()

    def _encoded(self, data: Sequence[Example] | Sequence[Encoded] | None) -> list[Encoded]:
        found = [e for e in data or () if isinstance(e, Encoded)]
        if data and len(found) != len(data):
            found = encode(self.tokenizer, list(data), max_length=self.config.max_length)
        return found

    def _objective(self, batches: Sequence[Any]) -> Objective:
        """The loss of batches, of encoded examples in batches of like lengths."""
        prefix = self._prefix
        if batches and isinstance(batches[0], Encoded):
            batches = fixed_batches(self.model, self.tokenizer, batches, self.config.batch_size)
            prefix = None  # their noise is on all weights, or they are not of a step
        return Objective(self.model, batches, prefix=prefix, view=self._view)

    def _held_out_loss(self, objective: Objective) -> float:
        """The held-out loss under weight noise on all linear weights."""
        config = self.config
        weights, streams = linear_weights(self.model), model_streams(self.model)
        sigma = config.scale()[0] if config.held_out_noise is None else config.held_out_noise
        slots = [Slot(name, weight, streams[name]) for name, weight in weights.items()]
        scales = [sigma * standard_deviation(weight) for weight in weights.values()]
        return noisy_loss(objective, slots, scales, draws=config.held_out_draws, seed=config.seed)

    def _measured_rate(self, encoded: Sequence[Encoded]) -> float:
        """The learning rate that the curvature and the batches' noise allow."""
        config = self.config
        eps, relative = config.scale()
        streams = model_streams(self.model)
        slots = [Slot(name, p, streams[name]) for name, p in self.parameters.items()]
        units = [standard_deviation(slot.tensor) if relative else 1.0 for slot in slots]
        batches = batch_stream(
            encoded,
            batch_size=config.batch_size,
            seed=config.seed,
            pad_id=pad_id(self.tokenizer),
            device=next(self.model.parameters()).device,
        )
        # The batches of the first steps, without their prefix: all of them are at hand at once.
        steps = [
            Objective(
                self.model,
                [next(batches) for _ in range(config.accumulation)],
                view=self._view,
            )
            for _ in range(CALIBRATION_BATCHES)
        ]
        started = time.perf_counter()
        self.curvature = measure_curvature(
            lambda: [step() for step in steps],
            slots,
            units,
            eps,
            draws=config.calibration_draws,
            seed=config.seed,
            distribution=config.distribution,
            mean_noise=mean_noise(
                CALIBRATION_BATCHES, config.batch_size * config.accumulation, len(encoded)
            ),
        )
        count = config.steps
        if config.seconds is not None:  # what ends first
            losses = (2 * config.calibration_draws + 1) * CALIBRATION_BATCHES
            spent = time.perf_counter() - started
            of_a_step = 2 * config.queries * spent / losses
            count = min(count, max(1, math.ceil((config.seconds - spent) / of_a_step)))
        return self.curvature.learning_rate(count, config.queries)

    def _check_scores(self, scores: Scores) -> None:
        """Raise ValueError unless the slopes that a scoring has measured can join the first step.

        They are along normal noise of the refinement's seed, in eps's coordinates, and make a step
        of ``lr`` alone.
        """
        for name in ("update_norm", "clip_projected_gradient"):
            value = getattr(self.config, name)
            if value is not None:
                raise ValueError(
                    f"scores: expected a refinement without {name}, which the step that they make "
                    f"does not keep to, got {value}"
                )
        if self.config.distribution != "normal":
            raise ValueError(
                "scores: expected distribution 'normal' of the refinement, as the scoring's draws "
                f"have, got {self.config.distribution!r}"
            )
        _, relative = self.config.scale()
        wanted = {"relative_rho": relative, "seed": self.config.seed}
        for name, value in wanted.items():
            if getattr(scores.config, name) != value:
                raise ValueError(
                    f"scores: expected {name} {value} as of the refinement, got "
                    f"{getattr(scores.config, name)}"
                )
        scores.check_slopes()

    def _warm_start(self, scores: Scores) -> WarmStart | None:
        """The update by a scoring's slopes; None where they are of other parameters."""
        lr = float(self.optimizer.param_groups[0]["initial_lr"])
        directions, scales = scores.warm_start(list(self.parameters), lr)
        if not scales:
            return None
        return WarmStart(tuple(directions), {name: tuple(row) for name, row in scales.items()})

    def _last_unknown(self, done: int) -> bool:
        """Whether the measurement after the last step of a log is missing."""
        every = self.config.held_out_every
        return done > 0 and done % every == 0 and self.early_stop.losses[-1][0] < done

    def _resume_log(self, path: Path, progress: Progress | None) -> None:
        """Take the weights and the schedule to the end of the replay log."""
        done = self.optimizer.resume_log(path, progress=progress)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.last_epoch = done - 1
            self.scheduler.step()
