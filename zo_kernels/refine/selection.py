"""Which decoder blocks a focused refinement moves: by robustness scores, or by the controls' rules.

"robust" takes the blocks of the greatest scores (Stage II of arXiv 2605.29396). The controls
know nothing of robustness: "snip" the greatest sum of |w df/dw| (as SNIP ranks weights,
https://arxiv.org/abs/1810.02340; needs gradients), "magnitude" the greatest mean |w|, "random" an
addressed choice, "all" every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zo_kernels.blocks import decoder_blocks, linear_weights
from zo_kernels.chat import batch_order
from zo_kernels.refine.objective import Objective
from zo_kernels.refine.scores import Scores, top

RULES = ("robust", "snip", "magnitude", "random", "all")


def select_blocks(
    model: Any,
    rule: str,
    count: int,
    *,
    scores: Scores | None = None,
    objective: Objective | None = None,
    seed: int = 0,
) -> tuple[int, ...]:
    """Numbers of the decoder blocks that a rule chooses, ascending.

    Args:
        model: has decoder blocks.
        rule: one of ``RULES``.
        count: how many, from 1 to the number of blocks; of no account to "all".
        scores: for "robust".
        objective: for "snip": the loss whose gradient counts.
        seed: for "random".

    Raises:
        ValueError: an unknown rule, a count out of range, or what the rule needs is missing.
    """
    blocks = list(decoder_blocks(model))
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
    if rule == "all":
        return tuple(range(len(blocks)))
    if not 1 <= count <= len(blocks):
        raise ValueError(f"count: expected 1 to {len(blocks)} decoder blocks, got {count}")
    if rule == "random":
        return tuple(sorted(batch_order(len(blocks), seed=seed, epoch=0)[:count]))
    if rule == "magnitude":
        return top(_magnitudes(model, blocks), count)
    if rule == "snip":
        if objective is None:
            raise ValueError("rule: expected an objective for 'snip', got none")
        return top(saliencies(model, objective), count)
    if scores is None or len(scores.blocks) != len(blocks):
        raise ValueError(
            f"scores: expected those of {len(blocks)} decoder blocks for 'robust', got "
            f"{'none' if scores is None else len(scores.blocks)}"
        )
    return top([block.score for block in scores.blocks], count)


def saliencies(model: Any, objective: Objective) -> list[float]:
    """Sum of |w df/dw| over the linear weights of each decoder block.

    Holds the gradients of these weights for a while: 4 bytes per weight in float32.
    """
    weights = linear_weights(model)
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in weights)
        with torch.enable_grad():
            for number, share in enumerate(objective.shares):
                loss = share * objective.batch_loss(number)
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for total, part in zip(gradients, found, strict=True):
                    if part is not None:
                        total += part
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
    values = {
        name: float((weight.detach().float() * gradient).abs().sum(dtype=torch.float64))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    return _by_block(list(decoder_blocks(model)), values)


def _magnitudes(model: Any, blocks: Sequence[str]) -> list[float]:
    """Mean |w| over the linear weights of each decoder block."""
    weights = linear_weights(model)
    sums = {n: float(w.detach().abs().sum(dtype=torch.float64)) for n, w in weights.items()}
    sizes = {name: float(weight.numel()) for name, weight in weights.items()}
    totals = zip(_by_block(blocks, sums), _by_block(blocks, sizes), strict=True)
    return [total / size if size else 0.0 for total, size in totals]


def _by_block(blocks: Sequence[str], values: dict[str, float]) -> list[float]:
    return [
        sum(value for name, value in values.items() if name.startswith(f"{block}."))
        for block in blocks
    ]
