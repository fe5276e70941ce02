"""Refiners of tiny models, the losses of these, and what runs left, to compare."""

from __future__ import annotations

from dataclasses import replace

from tiny_models import EXAMPLES, tiny_model, tiny_tokenizer

from zo_kernels import chat
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.replay import read_log

HELD_OUT = EXAMPLES[1:3]


def loss_of(model, examples=EXAMPLES, size=4):
    """The loss over all of the examples, in batches of this size."""
    encoded = chat.encode(tiny_tokenizer(), examples)
    return Objective(model, fixed_batches(model, tiny_tokenizer(), encoded, size))


def refiner(model=None, **options):
    """Of a tiny Llama where no model is given."""
    model = tiny_model("llama") if model is None else model
    return ZORefiner(model, tiny_tokenizer(), RefineConfig(**options))


def untimed(records):
    """Records to compare by repr, which tells every bit of a number and holds NaN equal.

    Without the time, and the moments of the gradients that this process has seen.
    """
    left = ("seconds", "gradient_mean", "gradient_std")
    return [repr({k: v for k, v in record.items() if k not in left}) for record in records]


def logged(path):
    """What a log holds but for the time at which it was begun."""
    log = read_log(path)
    return log.steps.tobytes(), log.marks, log.torn, replace(log.header, created=None)
