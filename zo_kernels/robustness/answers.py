"""Answers of a model to prompts: greedy generation, and what can be told from an answer's text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from zo_kernels.activations import sequences
from zo_kernels.chat import render
from zo_kernels.progress import Progress

TIE = 2.0**-14
"""Two logits closer than this times the largest magnitude count as a tie, see `generate`."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a `with` block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    first_number: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Answer prompts by pure greedy decoding.

    Prompts go through the chat template (`chat.render`), are batched by length, padded on
    the left with mask 0 (positions count from the first real token), and answered without
    sampling, penalties or any other setting of `model.generation_config`, which is put back
    afterwards. The tokenizer's padding settings are neither used nor changed.

    A float32 model gives the same answers at every batch size: sums of another order move its
    logits by some 1e-6 of the largest, so an answer with a choice closer than `TIE` is thrown away
    and given again in a batch of its own, without padding. Logits of 16-bit models move by more
    than many choices differ: their answers may depend on the batch size, as those of any engine.
    Activation noise goes by prompt and position (`activations.sequences`).

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: answer length limit in tokens, >= 1.
        batch_size: prompts a forward, >= 1.
        first_number: of the first prompt, for activation noise; the others count on from it.
        progress: called as progress("generate", done, total) after each batch.

    Returns:
        The answers in the order of `prompts`, cut at the first end token, without special tokens.

    Raises:
        ValueError: a limit below 1, or a prompt that renders to no tokens.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            "expected max_new_tokens >= 1 and batch_size >= 1, "
            f"got {max_new_tokens} and {batch_size}"
        )
    encoded = [list(render(tokenizer, prompt)) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"expected a prompt of at least one token, got none for {prompt!r}")
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0  # masked out on the left, cut off on the right
    exact = next(model.parameters()).dtype == torch.float32
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    answers = [""] * len(encoded)
    done = 0
    previous = model.generation_config
    # A fresh config, not overrides: transformers fills gaps from the model's own, and a vendor's
    # repetition penalty would change greedy decoding too.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    try:
        with eval_mode(model), torch.no_grad():
            while chunks:
                chunk = chunks.pop(0)
                rows = [encoded[i] for i in chunk]
                numbers = [first_number + i for i in chunk]
                output, ties = _decode(model, rows, numbers, pad, ends)
                for i, new, tie in zip(chunk, output, ties, strict=True):
                    if exact and tie and len(chunk) > 1:
                        chunks.append([i])
                        continue
                    answers[i] = tokenizer.decode(new, skip_special_tokens=True)
                    done += 1
                if progress is not None:
                    progress("generate", done, len(order))
    finally:
        model.generation_config = previous
    return answers


def _decode(
    model: Any,
    rows: Sequence[list[int]],
    numbers: Sequence[int],
    pad: int,
    ends: Sequence[int],
) -> tuple[list[list[int]], list[bool]]:
    """New tokens of each row up to its end token, and whether a choice among them was a tie."""
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    ids = torch.tensor([[pad] * gap + row for gap, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in padding])
    device = next(model.parameters()).device
    watch = _Ties()
    with sequences(numbers, padding):
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), logits_processor=[watch]
        )
    answers, ties = [], []
    close = torch.stack(watch.close, dim=1).tolist()
    for new, marks in zip(output[:, width:].tolist(), close, strict=True):
        stop = next((k for k, token in enumerate(new) if token in ends), len(new))
        answers.append(new[:stop])
        ties.append(any(marks[: stop + 1]))  # the choice of the end token is one too
    return answers, ties


class _Ties(LogitsProcessor):
    """Watches the choices of greedy decoding without changing them."""

    def __init__(self) -> None:
        self.close: list[Tensor] = []  # of each step, bool [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().topk(2, dim=-1).values
        size = scores.abs().amax(dim=-1).float()
        # Not >=: NaN counts as a tie.
        self.close.append(~(best[:, 0] - best[:, 1] > TIE * size))
        return scores


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """List the end-of-answer ids: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(i) for i in (*configured, tokenizer.eos_token_id) if i is not None})
