"""Stage II: scores the decoder blocks of a model; the formulas are in scores.py.

Forwards for block l begin behind block l - 1, whose hidden states are as they were: with L blocks,
R draws and quantisation, about 1 + (2 R + 1) (L + 1) / 2 forwards instead of 1 + (2 R + 1) L. One
block's hidden states are kept at a time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from zo_kernels import noise
from zo_kernels.blocks import decoder_blocks, linear_weights
from zo_kernels.chat import Encoded
from zo_kernels.modes import Slot
from zo_kernels.modes.streamed import StreamedWeights
from zo_kernels.moments import standard_deviation
from zo_kernels.progress import Progress
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.prefix import PrefixCache
from zo_kernels.refine.scores import ESTIMATORS, SEPARATION, BlockScore, ScoreConfig, Scores, top
from zo_kernels.robustness.answers import eval_mode
from zo_kernels.robustness.conditions import parse_scheme
from zo_kernels.views import quantized


def score(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    config: ScoreConfig | None = None,
    *,
    finished: Sequence[Mapping[str, Any]] = (),
    on_result: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score the decoder blocks of a model, whose weights are never written.

    Args:
        model: a transformers causal language model.
        tokenizer: for its padding token.
        encoded: examples from ``chat.encode``; those of ``config.kind`` count.
        config: see ``ScoreConfig``.
        finished: what ``on_result`` got in an earlier call with the same arguments that was cut
            off; those losses are not computed again.
        on_result: called with each loss as it is there: a dict of block, what, loss and seconds
            since the start.
        progress: called as progress(text, done, total).

    Raises:
        ValueError: an option out of range, no examples of that kind, fewer blocks than are to be
            selected, or blocks without linear weights.
        RuntimeError: forwards cannot begin behind a block (``PrefixCache.check``).
        FloatingPointError: a loss is not finite; names the block and the draw.
    """
    config = ScoreConfig() if config is None else config
    config.check()
    chosen = [one for one in encoded if config.kind in (one.kind, "all")][: config.examples]
    if not chosen:
        raise ValueError(f"kind: expected examples that are {config.kind}, got none")
    with eval_mode(model), torch.no_grad():
        return _Scoring(model, tokenizer, chosen, config, finished, on_result, progress).run()


class _Scoring:
    """One call of ``score``."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        encoded: Sequence[Encoded],
        config: ScoreConfig,
        finished: Sequence[Mapping[str, Any]],
        on_result: Callable[[dict[str, Any]], None] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.config = model, config
        self.names = list(decoder_blocks(model))
        if config.selected > len(self.names):
            raise ValueError(
                f"selected: expected at most the model's {len(self.names)} decoder blocks, got "
                f"{config.selected}"
            )
        streams = noise.model_streams(model)
        weights = linear_weights(model)
        self.units = {
            name: standard_deviation(weight) if config.relative_rho else 1.0
            for name, weight in weights.items()
        }
        self.slots = [
            [Slot(n, w, streams[n]) for n, w in weights.items() if n.startswith(f"{block}.")]
            for block in self.names
        ]
        empty = [name for name, slots in zip(self.names, self.slots, strict=True) if not slots]
        if empty:
            raise ValueError(f"'{empty[0]}': expected linear weights in each block, got none")
        self.prefix = PrefixCache(model) if config.reuse_prefix else None
        batches = fixed_batches(model, tokenizer, encoded, config.batch_size)
        self.objective = Objective(model, batches, prefix=self.prefix)
        self.examples = len(encoded)
        self.losses = {(r["block"], r["what"]): float(r["loss"]) for r in finished}
        self.on_result, self.progress = on_result, progress
        self.started = time.perf_counter()
        if finished:  # seconds go on where they were
            self.started -= float(finished[-1].get("seconds", 0.0))
        self.forwards = 1.0

    def run(self) -> Scores:
        """Sweeps over the blocks until the selection is settled."""
        draws, most = self.config.draw_range()
        with self.prefix or nullcontext():
            if self.prefix is not None:
                self.prefix.record = (len(self.slots) - 1) // 2
                self.objective.check_prefix()
                self.prefix.record = None
                self.prefix.clear()
            self.loss = self._loss(None, "clean")
            before = 0
            while True:
                self._sweep(draws)
                self.forwards += self._cost(before, draws)
                before = draws
                found = self._scores(draws)
                late = (
                    self.config.seconds is not None
                    and time.perf_counter() - self.started >= self.config.seconds
                )
                if found.settled or draws >= most or late:
                    break
                draws = min(2 * draws, most)
        if self.progress is not None:
            self.progress(f"{draws} draws", 1, 1)
        return found

    def _sweep(self, draws: int) -> None:
        """All losses of so many draws that are not there yet, block after block."""
        signs = {"+": 1, "-": -1}
        wanted = [
            f"{draw}{mark}" for draw in range(draws) for mark in signs if signs[mark] in self.signs
        ]
        if self.config.quantization != "none":
            wanted.append("quant")
        missing = [[w for w in wanted if (n, w) not in self.losses] for n in range(len(self.slots))]
        total = sum(map(len, missing))
        done = 0
        for number, todo in enumerate(missing):
            if not any(missing[number:]):
                break
            if self.prefix is not None and number:
                self.prefix.record = number - 1
                self.objective.advance()
                self.prefix.record = None
            for what in todo:
                if self.progress is not None:
                    self.progress(f"{self.names[number]}, {draws} draws", done, total)
                self._loss(number, what)
                done += 1
        if self.prefix is not None:
            self.prefix.clear()

    def _cost(self, before: int, draws: int) -> float:
        """Forwards of the sweep from so many draws to so many, whatever of it was finished."""
        blocks = len(self.slots)
        losses = (draws - before) * len(self.signs)
        if not before and self.config.quantization != "none":
            losses += 1
        if self.prefix is None:
            return float(losses * blocks)
        return (blocks - 1 + losses * sum(range(1, blocks + 1))) / blocks

    @property
    def signs(self) -> tuple[int, ...]:
        return ESTIMATORS[self.config.estimator]

    def _loss(self, number: int | None, what: str) -> float:
        """One loss, computed unless it is there."""
        if (number, what) in self.losses:
            return self.losses[number, what]
        if number is None:
            loss = self.objective()
        elif what == "quant":
            options = parse_scheme(self.config.quantization)
            options.pop("activations")
            own = {slot.name: slot.tensor for slot in self.slots[number]}
            with quantized(self.model, parameters=own, **options):
                loss = self.objective()
        else:
            sign = 1 if what.endswith("+") else -1
            slots = self.slots[number]
            scales = [sign * self.config.rho * self.units[slot.name] for slot in slots]
            direction = noise.LAYER_SCORING + int(what[:-1])
            with StreamedWeights(slots, scales, seed=self.config.seed, direction=direction):
                loss = self.objective()
        if not math.isfinite(loss):
            where = "the model as it is" if number is None else f"'{self.names[number]}', {what}"
            raise FloatingPointError(f"{where}: expected a finite loss, got {loss}")
        self.losses[number, what] = loss
        if self.on_result is not None:
            seconds = time.perf_counter() - self.started
            self.on_result({"block": number, "what": what, "loss": loss, "seconds": seconds})
        return loss

    def _scores(self, draws: int) -> Scores:
        rho, terms = self.config.rho, []
        for number in range(len(self.names)):
            values = [
                [self.losses[number, f"{draw}{'+' if s > 0 else '-'}"] for s in self.signs]
                for draw in range(draws)
            ]
            rises = [sum(pair) / len(pair) - self.loss for pair in values]
            slopes = tuple((pair[0] - pair[1]) / (2 * rho) for pair in values if len(pair) == 2)
            quant = self.losses.get((number, "quant"))
            terms.append((rises, slopes, None if quant is None else quant - self.loss))
        means = [sum(rises) / draws for rises, _, _ in terms]
        errors = [_standard_error(rises) for rises, _, _ in terms]
        noises, factor = self._normal(means)
        quants, _ = self._normal([quant or 0.0 for _, _, quant in terms])
        weight = self.config.quant_weight
        totals = [a + weight * b for a, b in zip(noises, quants, strict=True)]
        total_errors = [None if error is None else factor * error for error in errors]
        chosen = set(top(totals, self.config.selected))
        separation = _separation(totals, total_errors, chosen)
        blocks = tuple(
            BlockScore(
                number=number,
                block=name,
                noise=means[number],
                noise_se=errors[number],
                quant=terms[number][2],
                score=totals[number],
                score_se=total_errors[number],
                **_slope(terms[number][1]),
                slopes=terms[number][1],
                trace=2 * means[number] / rho**2,
                selected=number in chosen,
            )
            for number, name in enumerate(self.names)
        )
        per_block = len(self.signs) * draws + (self.config.quantization != "none")
        return Scores(
            config=self.config,
            blocks=blocks,
            loss=self.loss,
            examples=self.examples,
            draws=draws,
            settled=separation is not None and separation >= SEPARATION,
            separation=None if separation in (None, math.inf) else separation,
            forwards=self.forwards,
            naive_forwards=1.0 + per_block * len(self.names),
            seconds=time.perf_counter() - self.started,
            units=self.units,
        )

    def _normal(self, values: Sequence[float]) -> tuple[list[float], float]:
        """A term in the normalization's unit, and the factor that took it there."""
        low, high = min(values), max(values)
        if self.config.normalization == "none" or high == low:
            return list(values), 1.0
        return [(value - low) / (high - low) for value in values], 1 / (high - low)


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _slope(slopes: Sequence[float]) -> dict[str, float | None]:
    """Root mean square and, by the delta method, its standard error."""
    if not slopes:
        return {"slope": None, "slope_se": None}
    squares = [slope**2 for slope in slopes]
    size = math.sqrt(sum(squares) / len(squares))
    error = _standard_error(squares)
    return {"slope": size, "slope_se": error / (2 * size) if error is not None and size else None}


def _separation(
    scores: Sequence[float], errors: Sequence[float | None], chosen: set[int]
) -> float | None:
    """The least distance of a chosen block from another, in standard errors of the difference."""
    if len(chosen) == len(scores):
        return math.inf
    if any(error is None for error in errors):
        return None
    least = math.inf
    for i in chosen:
        for j in set(range(len(scores))) - chosen:
            spread = math.hypot(errors[i], errors[j])
            gap = scores[i] - scores[j]
            least = min(least, gap / spread if spread else (math.inf if gap else 0.0))
    return least
