"""The rival: MeZO's loop as its users run it (princeton-nlp/MeZO, large_models/trainer.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def perturb(parameters: Sequence[Tensor], scale: float, seed: int) -> None:
    """p += scale * z for every parameter, z redrawn from the global generator's seed."""
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
        p.add_(z, alpha=scale)


@torch.no_grad()
def step(
    parameters: Sequence[Tensor], closure: Callable[[], Tensor], eps: float, lr: float, seed: int
) -> float:
    """One MeZO step: four passes over the weights, two evaluations."""
    perturb(parameters, eps, seed)
    plus = float(closure())
    perturb(parameters, -2 * eps, seed)
    minus = float(closure())
    perturb(parameters, eps, seed)
    perturb(parameters, -lr * (plus - minus) / (2 * eps), seed)
    return plus
