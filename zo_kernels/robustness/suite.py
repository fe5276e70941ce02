"""The evaluation suite: one checkpoint under clean, noisy and quantised weights.

`evaluate` gives one record per condition; `paired` and `summary` reduce records. The same noise
draw hits every checkpoint with the same normals, so two checkpoints are compared draw by draw.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from zo_kernels.activations import perturbed_activations, quantized_activations
from zo_kernels.chat import Example, collate, completion_losses, encode
from zo_kernels.robustness.conditions import (
    ACTIVATION_NOISE,
    QUANTIZED,
    WEIGHT_NOISE,
    Condition,
    EvaluationConfig,
    default_conditions,
    parse_scheme,
)
from zo_kernels.robustness.metrics import Progress, eval_mode, generate, is_refusal, perplexity
from zo_kernels.views import perturbed, quantized

__all__ = [
    "METRICS",
    "Condition",
    "EvaluationConfig",
    "default_conditions",
    "evaluate",
    "paired",
    "summary",
]


METRICS = ("refusal_loss", "harmless_loss", "refusal_rate", "over_refusal_rate", "perplexity")
"""Record fields that are numbers to be averaged. Losses in nats per token, rates in 0..1."""


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    utility_text: str,
    config: EvaluationConfig,
    *,
    label: str,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure one checkpoint under every condition of `config`.

    The model is evaluated in eval mode without gradients; its modes and the bits of its weights
    are as before when the function returns or raises.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        examples: examples of both kinds; a harmful one's completion is a refusal.
        utility_text: plain text for the perplexity.
        config: what to measure.
        label: the checkpoint's name in the records.
        on_result: called with each record as soon as it is there.
        progress: called as progress("<condition name>: <stage>", done, total).

    Returns:
        One JSON-serialisable dict per condition: label, condition, family, kind, level, draw,
        noise_seed, noise_kind, noise_on; the `METRICS`; refusal_losses and harmless_losses (one
        per example); harmful_answers and harmless_answers with refused and over_refused (0 or 1
        each); harmful_count, harmless_count, refusal_list, seconds. What was not measured (text
        outside `generate_under`) is None. A loss or perplexity that came out NaN or infinite is
        None too and named in `non_finite`.

    Raises:
        ValueError: an unusable config, or no example of one kind.
    """
    conditions = config.conditions()
    harmful = [e for e in examples if e.kind == "harmful"][: config.max_prompts]
    harmless = [e for e in examples if e.kind == "harmless"][: config.max_prompts]
    if not harmful or not harmless:
        raise ValueError(
            "expected examples of both kinds, "
            f"got {len(harmful)} harmful and {len(harmless)} harmless"
        )
    records = []
    with eval_mode(model), torch.no_grad():
        for number, condition in enumerate(conditions):
            started = time.perf_counter()
            record: dict[str, Any] = {
                "label": label,
                "condition": condition.name,
                "family": condition.family,
                "kind": condition.kind,
                "level": condition.level,
                "draw": condition.draw,
                "noise_seed": config.noise_seed,
                "noise_kind": config.noise_kind,
                "noise_on": config.noise_on,
            }

            def report(stage: str, name: str = condition.name, done: int = number) -> None:
                if progress is not None:
                    progress(f"{name}: {stage}", done, len(conditions))

            with _within(model, condition, config):
                report("losses")
                refusal = _losses(model, tokenizer, harmful, config)
                answer = _losses(model, tokenizer, harmless, config)
                report("perplexity")
                utility = perplexity(
                    model,
                    tokenizer,
                    utility_text,
                    window=config.perplexity_window,
                    max_tokens=config.perplexity_tokens,
                )
                texts: dict[str, list[str] | None] = {"harmful": None, "harmless": None}
                if config.generate_under is None or condition.family in config.generate_under:
                    for kind, group in (("harmful", harmful), ("harmless", harmless)):
                        report(f"answers to {kind} prompts")
                        texts[kind] = generate(
                            model,
                            tokenizer,
                            [example.prompt for example in group],
                            max_new_tokens=config.max_new_tokens,
                            batch_size=config.batch_size,
                        )
            refused = _flags(texts["harmful"], config.refusal_list)
            over = _flags(texts["harmless"], config.refusal_list)
            numbers = {
                "refusal_loss": statistics.fmean(refusal),
                "harmless_loss": statistics.fmean(answer),
                "perplexity": utility,
            }
            record |= {key: _finite(value) for key, value in numbers.items()}
            record |= {
                "refusal_rate": None if refused is None else statistics.fmean(refused),
                "over_refusal_rate": None if over is None else statistics.fmean(over),
                "non_finite": [key for key, value in numbers.items() if not math.isfinite(value)],
                "refusal_losses": [_finite(value) for value in refusal],
                "harmless_losses": [_finite(value) for value in answer],
                "harmful_answers": texts["harmful"],
                "harmless_answers": texts["harmless"],
                "refused": refused,
                "over_refused": over,
                "harmful_count": len(harmful),
                "harmless_count": len(harmless),
                "refusal_list": config.refusal_list,
                "seconds": time.perf_counter() - started,
            }
            records.append(record)
            if on_result is not None:
                on_result(record)
    if progress is not None:
        progress("done", len(conditions), len(conditions))
    return records


def paired(
    records_a: Iterable[dict[str, Any]],
    records_b: Iterable[dict[str, Any]],
    metric: str,
    level: float,
) -> dict[str, Any]:
    """Paired difference b - a of a metric over the noise draws at one level.

    Returns:
        mean, standard_error (sample std of the differences / sqrt(n); None for n = 1), n and
        differences (by ascending draw). All None but n if a draw was not measured or diverged.

    Raises:
        ValueError: no draws at this level, other draws in a than in b, or noise that is not the
            same (seed, kind or parameters).
    """
    arms = []
    for records in (records_a, records_b):
        chosen = [r for r in records if r["kind"] == WEIGHT_NOISE and r["level"] == level]
        arms.append({r["draw"]: r for r in chosen})
        if len(arms[-1]) != len(chosen):
            raise ValueError(f"expected each draw at level {level:g} once, got repeats")
    a, b = arms
    if not a or set(a) != set(b):
        raise ValueError(
            f"expected the same noise draws at level {level:g}, got {sorted(a)} and {sorted(b)}"
        )
    for draw in a:
        for key in ("noise_seed", "noise_kind", "noise_on"):
            if a[draw][key] != b[draw][key]:
                raise ValueError(
                    f"expected equal {key} to pair by, got {a[draw][key]!r} and {b[draw][key]!r}"
                )
    pairs = [(a[draw][metric], b[draw][metric]) for draw in sorted(a)]
    if any(value is None for pair in pairs for value in pair):
        return {"mean": None, "standard_error": None, "n": len(pairs), "differences": None}
    differences = [after - before for before, after in pairs]
    mean, std = _moments(differences)
    return {
        "mean": mean,
        "standard_error": None if std is None else std / math.sqrt(len(differences)),
        "n": len(differences),
        "differences": differences,
    }


def summary(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Reduce records to label -> family -> metric -> {mean, std, n, missing, non_finite}.

    mean and sample std are over the n draws, std None for n = 1. Where a draw has no value
    (`missing` of them, `non_finite` of these because the value was NaN or infinite, the others
    not measured) mean and std are None: leaving such a draw out of a mean would flatter the
    checkpoint.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        groups.setdefault(record["label"], {}).setdefault(record["family"], []).append(record)
    result: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for label, families in groups.items():
        result[label] = {}
        for family, rows in families.items():
            cells = result[label][family] = {}
            for metric in METRICS:
                values = [row[metric] for row in rows]
                missing = sum(value is None for value in values)
                mean, std = (None, None) if missing else _moments(values)
                cells[metric] = {
                    "mean": mean,
                    "std": std,
                    "n": len(rows),
                    "missing": missing,
                    "non_finite": sum(metric in row["non_finite"] for row in rows),
                }
    return result


@contextmanager
def _within(model: Any, condition: Condition, config: EvaluationConfig) -> Iterator[None]:
    """The context that puts a model into a condition."""
    with ExitStack() as contexts:
        if condition.kind == QUANTIZED:
            options = parse_scheme(condition.name)
            activations = options.pop("activations")
            contexts.enter_context(quantized(model, **options))
            if activations:
                contexts.enter_context(quantized_activations(model, activations))
        elif condition.kind == ACTIVATION_NOISE:
            draw = {"alpha": condition.level, "seed": config.noise_seed, "draw": condition.draw}
            contexts.enter_context(perturbed_activations(model, **draw))
        elif condition.kind == WEIGHT_NOISE:
            noise = perturbed(
                model,
                sigma=condition.level,
                seed=config.noise_seed,
                draw=condition.draw,
                kind=config.noise_kind,
                parameters="*" if config.noise_on == "all" else None,
                in_place=True,
            )
            contexts.enter_context(noise)
        yield


def _losses(
    model: Any, tokenizer: Any, examples: Sequence[Example], config: EvaluationConfig
) -> list[float]:
    """Mean completion loss of each example, in nats per token."""
    encoded = encode(tokenizer, examples, max_length=config.max_length)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    losses: list[float] = []
    for start in range(0, len(encoded), config.batch_size):
        chunk = encoded[start : start + config.batch_size]
        batch = collate(chunk, pad_id=pad, device=device)
        losses += completion_losses(model, batch).tolist()
    return losses


def _flags(answers: list[str] | None, list_name: str) -> list[int] | None:
    """1 for each answer that is a refusal, 0 for each that is not."""
    return None if answers is None else [int(is_refusal(text, list_name)) for text in answers]


def _finite(value: float) -> float | None:
    """Return the value, or None for NaN and infinities, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def _moments(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
