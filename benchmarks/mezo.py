"""The rival: MeZO's step as its users run it (princeton-nlp/MeZO, large_models/trainer.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_kernels.pipeline.rivals import mezo_perturb_


@torch.no_grad()
def step(
    parameters: Sequence[Tensor], closure: Callable[[], Tensor], eps: float, lr: float, seed: int
) -> float:
    """One MeZO step: four passes over the weights, two evaluations."""
    mezo_perturb_(parameters, eps, seed)
    plus = float(closure())
    mezo_perturb_(parameters, -2 * eps, seed)
    minus = float(closure())
    mezo_perturb_(parameters, eps, seed)
    mezo_perturb_(parameters, -lr * (plus - minus) / (2 * eps), seed)
    return plus
