"""The loss that scoring and refinement take: the mean per completion token over some batches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from zo_kernels.chat import IGNORED, Encoded, collate, completion_loss, pad_id
from zo_kernels.refine.prefix import PrefixCache


class Objective:
    """A pure function of a model's weights: mean cross entropy per completion token.

    Batches are micro-batches of one: the mean is over the tokens of all of them, summed in
    float64, so k batches of b examples have the loss of one batch of k b up to rounding.

    Args:
        model: a causal language model in eval mode.
        batches: as of ``chat.collate``; at least one.
        prefix: lets forwards begin behind a block; the caller has entered it. None: whole forwards.
        view: a context within which the model's weights read as others, such as a
            ``QuantizedWeights``; entered for each batch. None: as they are.
        name: tells this objective's batches from others' in the prefix.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        prefix: PrefixCache | None = None,
        view: AbstractContextManager[Any] | None = None,
        name: Hashable = None,
    ) -> None:
        if not batches:
            raise ValueError("batches: expected at least one, got none")
        self.model, self.batches, self.prefix, self.view = model, list(batches), prefix, view
        counts = [int((batch["labels"] != IGNORED).sum()) for batch in self.batches]
        self.shares = [count / sum(counts) for count in counts]
        self.keys = [(name, number) for number in range(len(self.batches))]

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss in nats per token."""
        return sum(
            share * float(self.batch_loss(number)) for number, share in enumerate(self.shares)
        )

    def batch_loss(self, number: int) -> Tensor:
        """The loss of one batch: scalar, float32."""
        where = nullcontext() if self.prefix is None else self.prefix.batch(self.keys[number])
        with where, nullcontext() if self.view is None else self.view:
            return completion_loss(self.model, self.batches[number])

    def advance(self) -> None:
        """Take every batch's prefix as far as block ``prefix.record``."""
        for number, key in enumerate(self.keys):
            self.prefix.advance(key, lambda number=number: self.batch_loss(number))

    def check_prefix(self) -> None:
        """``PrefixCache.check`` of the first batches."""
        self.prefix.check(
            {
                key: lambda number=number: self.batch_loss(number)
                for number, key in enumerate(self.keys[:2])
            }
        )


def fixed_batches(
    model: Any, tokenizer: Any, encoded: Sequence[Encoded], batch_size: int
) -> list[dict[str, Tensor]]:
    """All examples in batches of like lengths, on the model's device."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    ordered = sorted(encoded, key=lambda one: -len(one.input_ids))
    device, pad = next(model.parameters()).device, pad_id(tokenizer)
    return [
        collate(ordered[start : start + batch_size], pad_id=pad, device=device)
        for start in range(0, len(ordered), batch_size)
    ]
