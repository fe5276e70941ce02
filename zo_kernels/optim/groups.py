"""Parameter groups: what they must be, and choosing a model's parameters by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from zo_kernels.checks import check_tensor
from zo_kernels.modes import Slot

# option -> (smallest value, whether it may be None)
_OPTIONS = {
    "lr": (0.0, False),
    "eps": (0.0, False),
    "weight_decay": (0.0, False),
    "clip_projected_gradient": (0.0, True),
    "update_norm": (0.0, True),
}


@dataclass(slots=True)
class Group:
    """A parameter group as one step sees it.

    Attributes:
        options: the group of torch's ``param_groups``.
        slots: its trainable parameters.
        units: their coordinate scales.
    """

    options: dict[str, Any]
    slots: list[Slot]
    units: list[float]


def check_group(group: dict[str, Any]) -> None:
    """TypeError or ValueError naming the parameter or option of a group that is wrong."""
    if "param_names" not in group:
        raise TypeError(
            "ZOSGD: expected named parameters (model.named_parameters()), got tensors without "
            "names: the name is the address of a parameter's noise"
        )
    for option, (low, optional) in _OPTIONS.items():
        value = group[option]
        if value is None and optional:
            continue
        if isinstance(value, Tensor):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{option}: expected a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{option}: expected a finite value of at least {low}, got {value}")
    for name, tensor in zip(group["param_names"], group["params"], strict=True):
        check_tensor(f"'{name}'", tensor)


def check_storage(groups: Sequence[dict[str, Any]]) -> None:
    """ValueError for two parameters over the same memory: they would be perturbed twice."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for group in groups
        for name, tensor in zip(group["param_names"], group["params"], strict=True)
        if tensor.numel()
    )
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"'{other}' and '{name}': expected parameters with memory of their own, got "
                "overlapping ones; tie them as one Parameter, or pass one of the two"
            )


def named_parameters(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[tuple[str, nn.Parameter]]:
    """A model's parameters whose names match, by shell patterns (``*.mlp.*``), tied ones once.

    Args:
        include: patterns of which one must match; empty means all.
        exclude: patterns of which none may match.

    Raises:
        ValueError: if nothing is left, or a pattern matches nothing.
    """
    everything = list(model.named_parameters())
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name, _ in everything):
            raise ValueError(f"named_parameters: pattern {pattern!r} matches no parameter")
    chosen = [
        (name, parameter)
        for name, parameter in everything
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude)
    ]
    if not chosen:
        raise ValueError("named_parameters: no parameter is left after include and exclude")
    return chosen
