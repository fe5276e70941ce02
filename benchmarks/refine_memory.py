"""Prints as JSON the peak memory (MB) of one stage over what the loaded model takes.

Usage: python refine_memory.py MODEL_DIRECTORY DTYPE CASE

CASE is one of FIRST_ORDER or ZEROTH_ORDER, two steps of 8 x 128 tokens or a scoring of that batch
with one draw and int4 of each block; or FORWARD, its loss alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import zo_kernels as zk
from zo_kernels.chat import HARMFUL, Encoded
from zo_kernels.memory import PeakMemory
from zo_kernels.refine.checkpoint import load
from zo_kernels.refine.objective import Objective, fixed_batches

FIRST_ORDER = ("align-adamw", "align-sgd")
FOCUSED = ((10, 15, 20, 25), (26, 27, 28, 29))
FORWARD = "forward"
ZEROTH_ORDER = ("score", "focused streamed", "focused master", "full streamed")
LR = 1e-9
STEPS = 2


def random_examples(model: Any, rows: int = 8, length: int = 128) -> list[Encoded]:
    """Sequences of random tokens, of which the second half is the completion."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    return [Encoded(tuple(row), length // 2, HARMFUL) for row in ids.tolist()]


def work(model: Any, tokenizer: Any, case: str) -> Callable[[Sequence[Encoded]], Any]:
    """What is measured, as a function of the examples; it keeps nothing when it is done."""
    if case in FIRST_ORDER:
        optimizer = case.removeprefix("align-")
        config: Any = zk.AlignConfig(steps=STEPS, optimizer=optimizer, lr=LR)
        return partial(zk.align, model, tokenizer, config=config)
    if case == FORWARD:
        return lambda data: Objective(model, fixed_batches(model, tokenizer, data, len(data)))()
    if case == "score":
        config = zk.ScoreConfig(draws=1, max_draws=1)
        return lambda data: zk.score(model, tokenizer, data, config).blocks
    kind, mode = case.split()
    layers = FOCUSED[0] if kind == "focused" else None
    config = zk.RefineConfig(steps=STEPS, lr=LR, mode=mode, layers=layers)
    return lambda data: zk.ZORefiner(model, tokenizer, config).run(data)


def main() -> None:
    """Load, warm the libraries up on a few tokens, measure."""
    directory, dtype, case = sys.argv[1:]
    known = (*FIRST_ORDER, FORWARD, *ZEROTH_ORDER)
    if case not in known:
        raise ValueError(f"CASE: expected one of {known}, got {case!r}")
    model, tokenizer = load(directory, dtype=dtype)
    for parameter in model.parameters():
        parameter.detach().sum()  # mapped files count when they are touched
    run = work(model, tokenizer, case)
    run(random_examples(model, rows=1, length=8))
    data = random_examples(model)
    with PeakMemory() as memory:
        done = run(data)
    if case != FORWARD:
        assert len(done) == (model.config.num_hidden_layers if case == "score" else STEPS)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"model": weights / 2**20, "extra": (memory.peak - memory.before) / 2**20}))


if __name__ == "__main__":
    main()
