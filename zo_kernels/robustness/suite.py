"""The evaluation suite: one checkpoint under clean, noisy and quantised weights and activations.

`Evaluation.run` gives one record per condition. The same noise draw hits every checkpoint with the
same normals, so two checkpoints are compared draw by draw and prompt by prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from zo_kernels.activations import sequences
from zo_kernels.blocks import decoder_blocks
from zo_kernels.chat import Encoded, Example, collate, completion_losses, encode, pad_id
from zo_kernels.progress import Progress
from zo_kernels.robustness.answers import eval_mode, generate
from zo_kernels.robustness.conditions import QUANTIZED, Condition, EvaluationConfig
from zo_kernels.robustness.degenerate import DETECTOR, degenerate
from zo_kernels.robustness.metrics import METRICS
from zo_kernels.robustness.prompts import digest, text_digest
from zo_kernels.robustness.refusals import refusal_list
from zo_kernels.robustness.states import check_fits, within
from zo_kernels.robustness.utility import UtilityText

# Numbers of the sequences of each kind, for activation noise: none of them shares its noise.
_REFUSALS, _HELP, _WINDOWS, _HARMFUL_ANSWERS, _HARMLESS_ANSWERS = (i << 20 for i in range(5))
# What a record holds per prompt or window; None where it was not measured.
_ITEMS = (
    *(metric.items for metric in METRICS.values() if not metric.field.startswith("asr_")),
    *("harmful_answers", "harmless_answers", "harmful_prompts", "harmless_prompts"),
    *("degenerate", "harmless_degenerate", "surprise", "harmless_surprise"),
)
_STEPS_OF_A_UNIT = 8  # decoding steps of a prompt that take about the time of its forward


class Evaluation:
    """One checkpoint under every condition of a configuration.

    The model is evaluated in eval mode without gradients; its modes and the bits of its weights
    are as before when `run` returns or raises.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        examples: examples of both kinds; a harmful one's completion is a refusal. Those without a
            completion are answered; the loss of harmful ones is then that of `config.refusal`.
        utility_text: plain text for the perplexity.
        config: what to measure.

    Attributes:
        conditions: what is measured, in order.
        settings: what every record says of how it was measured (`comparison.SAME`).

    Raises:
        ValueError: an unusable config, no example of one kind, a prompt without room for a
            completion in `max_length` tokens, or groups that do not fit the model's weights: all
            that can be known before the work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        utility_text: str,
        config: EvaluationConfig,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.harmful = [e for e in examples if e.kind == "harmful"][: config.max_prompts]
        self.harmless = [e for e in examples if e.kind == "harmless"][: config.max_prompts]
        if not self.harmful or not self.harmless:
            raise ValueError(
                "expected examples of both kinds, "
                f"got {len(self.harmful)} harmful and {len(self.harmless)} harmless"
            )
        known = [e if e.completion else replace(e, completion=config.refusal) for e in self.harmful]
        self.refusals = self._encode(known)
        # Encoded with any completion, so that a prompt that is too long is found before the work.
        helped = [replace(e, completion=e.completion or config.refusal) for e in self.harmless]
        self.help: list[Encoded | None] = [
            encoded if example.completion else None
            for example, encoded in zip(self.harmless, self._encode(helped), strict=True)
        ]
        self.utility = UtilityText(
            tokenizer,
            utility_text,
            window=config.perplexity_window,
            max_tokens=config.perplexity_tokens,
        )
        self.settings = {
            "noise_seed": config.noise_seed,
            "noise_kind": config.noise_kind,
            "noise_on": config.noise_on,
            "refusal_list": config.refusal_list,
            "detector": DETECTOR,
            "refusal": config.refusal,
            "max_length": config.max_length,
            "max_new_tokens": config.max_new_tokens,
            "text": text_digest(utility_text),
            "perplexity_window": config.perplexity_window,
            "perplexity_tokens": config.perplexity_tokens,
            "prompts": digest([*self.harmful, *self.harmless]),
            "harmful_count": len(self.harmful),
            "harmless_count": len(self.harmless),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        self.conditions = config.conditions()
        for condition in self.conditions:
            if condition.kind == QUANTIZED:
                check_fits(model, condition)
        if config.layers:
            self.conditions += config.layer_conditions(len(decoder_blocks(model)))

    def run(
        self,
        label: str,
        *,
        finished: Sequence[dict[str, Any]] = (),
        on_result: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Measure.

        Args:
            label: the checkpoint's name in the records.
            finished: records of an earlier run of the same evaluation that was cut off; their
                conditions are not measured again.
            on_result: called with each new record as soon as it is there.
            progress: called while it goes on, in units of about one forward.

        Returns:
            One JSON-serialisable dict per condition, `finished` ones included: label, condition,
            family, state, kind, level, draw, block (its name, of conditions in one block),
            block_number; the `settings`; the fields of `metrics.METRICS` but judges', losses in
            nats per token and rates in 0..1; per prompt or window their `items`; prompts and
            answers (harmful_prompts, harmful_answers, ...), why each answer is degenerate
            (`degenerate`, harmless_degenerate) and its loss under the clean model (surprise,
            harmless_surprise); seconds. What was not measured is None. A number that came out NaN
            or infinite is None too and named in `non_finite`.
        """
        units = [self.units(condition) for condition in self.conditions]
        known = {record["condition"]: record for record in finished}
        records: list[dict[str, Any]] = []
        try:
            with eval_mode(self.model), torch.no_grad():
                if any(c.name not in known and c.block is None for c in self.conditions):
                    self.utility.keep_clean(self.model)
                for number, condition in enumerate(self.conditions):
                    if condition.name in known:
                        records.append(known[condition.name])
                        continue
                    before = sum(units[:number])

                    def advance(
                        stage: str, done: float, name: str = condition.name, start: float = before
                    ) -> None:
                        if progress is not None:
                            progress(f"{name}: {stage}", start + done, sum(units))

                    record = {"label": label, **self.measure(condition, advance)}
                    records.append(record)
                    if on_result is not None:
                        on_result(record)
        finally:
            self.utility.close()
        if progress is not None:
            progress("done", sum(units), sum(units))
        return records

    def units(self, condition: Condition) -> float:
        """About how many forwards a condition takes."""
        if condition.block is not None:
            return min(len(self.refusals), self.config.layer_prompts)
        prompts = len(self.harmful) + len(self.harmless)
        steps = self.config.max_new_tokens if self._generates(condition) else 0
        return prompts * (1 + steps / _STEPS_OF_A_UNIT) + len(self.utility.windows)

    def measure(
        self, condition: Condition, advance: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """The record of a condition, without the checkpoint's name."""
        started, config = time.perf_counter(), self.config
        record: dict[str, Any] = {
            "condition": condition.name,
            "family": condition.family,
            "state": condition.state,
            "kind": condition.kind,
            "level": condition.level,
            "draw": condition.draw,
            "block": None,
            "block_number": condition.block,
            **self.settings,
        }
        items: dict[str, Any] = dict.fromkeys(_ITEMS)
        advance("losses", 0)
        with within(self.model, condition, config):
            if condition.block is None:
                self._measure_whole(condition, items, advance)
            else:
                record["block"] = list(decoder_blocks(self.model))[condition.block]
                chosen = self.refusals[: config.layer_prompts]
                items["refusal_losses"] = self._losses(chosen, _REFUSALS)
        self._read_answers(items)
        numbers = {
            "refusal_loss": _mean(items["refusal_losses"]),
            "harmless_loss": _mean(items["harmless_losses"]),
            "perplexity": items.pop("perplexity", None),
            "divergence": items.pop("divergence", None),
            "refusal_rate": _mean(items["refused"]),
            "compliance_rate": _mean(items["complied"]),
            "over_refusal_rate": _mean(items["over_refused"]),
            "degenerate_rate": _mean(items["broken"]),
        }
        wrong = [k for k, v in numbers.items() if v is not None and not math.isfinite(v)]
        return {
            **record,
            **{key: _finite(value) for key, value in numbers.items()},
            "non_finite": wrong,
            **{key: value and [_finite(v) for v in value] for key, value in items.items()},
            "seconds": time.perf_counter() - started,
        }

    def _measure_whole(
        self, condition: Condition, items: dict[str, Any], advance: Callable[[str, float], None]
    ) -> None:
        """All that is measured with the model in its condition."""
        items["refusal_losses"] = self._losses(self.refusals, _REFUSALS)
        done = float(len(self.harmful))
        advance("losses", done)
        items["harmless_losses"] = self._losses(self.help, _HELP)
        done += len(self.harmless)
        advance("utility text", done)
        utility = self.utility.measure(self.model, first_number=_WINDOWS)
        items["utility_losses"], items["divergences"] = utility.losses, utility.divergences
        items["perplexity"], items["divergence"] = utility.perplexity, utility.divergence
        done += len(self.utility.windows)
        per_prompt = self.config.max_new_tokens / _STEPS_OF_A_UNIT
        for kind, group, number in (
            ("harmful", self.harmful, _HARMFUL_ANSWERS),
            ("harmless", self.harmless, _HARMLESS_ANSWERS),
        ):
            if self._generates(condition):
                advance(f"answers to {kind} prompts", done)
                items[f"{kind}_answers"] = self._answers(
                    condition,
                    group,
                    number,
                    lambda _, n, of, kind=kind, done=done: advance(
                        f"answers to {kind} prompts", done + per_prompt * n
                    ),
                )
                done += per_prompt * len(group)

    def _answers(
        self, condition: Condition, group: Sequence[Example], number: int, progress: Any
    ) -> list[str]:
        # Rounding makes jumps of what sums of another order move, so batches of one.
        quantized_inputs = condition.kind == QUANTIZED and condition.changes_activations
        return generate(
            self.model,
            self.tokenizer,
            [example.message for example in group],
            max_new_tokens=self.config.max_new_tokens,
            batch_size=1 if quantized_inputs else self.config.batch_size,
            first_number=number,
            progress=progress,
        )

    def _read_answers(self, items: dict[str, Any]) -> None:
        """What the answers say, read with the clean model."""
        rule = refusal_list(self.config.refusal_list)
        for prefix, name, group, flags in (
            ("", "harmful", self.harmful, "refused"),
            ("harmless_", "harmless", self.harmless, "over_refused"),
        ):
            answers = items[f"{name}_answers"]
            if answers is None:
                continue
            surprise = self._surprise(group, answers)
            items[f"{prefix}surprise"] = surprise
            items[f"{prefix}degenerate"] = list(map(degenerate, answers, surprise))
            items[flags] = [int(rule(text)) for text in answers]
        if items["harmful_answers"] is None:
            return
        items["complied"] = [
            int(not refused and why is None)
            for refused, why in zip(items["refused"], items["degenerate"], strict=True)
        ]
        reasons = [*items["degenerate"], *items["harmless_degenerate"]]
        items["broken"] = [int(why is not None) for why in reasons]
        items["harmful_prompts"] = [example.prompt for example in self.harmful]
        items["harmless_prompts"] = [example.prompt for example in self.harmless]

    def _surprise(self, group: Sequence[Example], answers: Sequence[str]) -> list[float | None]:
        """Mean loss of each answer under the model as it is; None for an empty one.

        Without the end token: an answer that reached its length limit has none.
        """
        told = [
            replace(example, completion=answer) if answer.strip() else None
            for example, answer in zip(group, answers, strict=True)
        ]
        # Another tokenisation of the answer's text may be longer than what was generated.
        length = self.config.max_length + 4 * self.config.max_new_tokens
        encoded = iter(encode(self.tokenizer, [e for e in told if e], max_length=length))
        texts = [None if e is None else next(encoded) for e in told]
        return self._losses([e and replace(e, input_ids=e.input_ids[:-1]) for e in texts], 0)

    def _losses(self, encoded: Sequence[Encoded | None], number: int) -> list[float | None]:
        """Mean completion loss of each example in nats per token; None where there is none."""
        # By length, as generate has them: less padding to compute on.
        places = [i for i, one in enumerate(encoded) if one is not None]
        places.sort(key=lambda i: -len(encoded[i].input_ids))
        losses: list[float | None] = [None] * len(encoded)
        device = next(self.model.parameters()).device
        pad = pad_id(self.tokenizer)
        for start in range(0, len(places), self.config.batch_size):
            chunk = places[start : start + self.config.batch_size]
            batch = collate([encoded[i] for i in chunk], pad_id=pad, device=device)
            with sequences([number + i for i in chunk], [0] * len(chunk)):
                for i, loss in zip(chunk, completion_losses(self.model, batch), strict=True):
                    losses[i] = loss.item()
        return losses

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        return encode(self.tokenizer, examples, max_length=self.config.max_length)

    def _generates(self, condition: Condition) -> bool:
        wanted = self.config.generate_under
        return condition.block is None and (wanted is None or condition.family in wanted)


def _mean(values: Sequence[float | None] | None) -> float | None:
    """Mean of those that there are, None if there is none."""
    known = [value for value in values or () if value is not None]
    return math.fsum(known) / len(known) if known else None


def _finite(value: Any) -> Any:
    """The value, or None for NaN and infinities, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
