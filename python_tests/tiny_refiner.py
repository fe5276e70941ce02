"""Refiners of tiny models, and what their runs left, to compare."""

from __future__ import annotations

from dataclasses import replace

from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.replay import read_log


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
