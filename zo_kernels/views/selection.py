"""What the views share: which parameters they change, and what they refuse."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from zo_kernels.blocks import linear_weights
from zo_kernels.modes.reads import StreamedReads

#: What to change: parameters by name, or patterns of names; None for ``linear_weights``.
Selection = Mapping[str, Tensor] | str | Sequence[str] | None


def select(model: nn.Module, parameters: Selection = None) -> dict[str, Tensor]:
    """The parameters that a selection means, by name.

    Raises:
        ValueError: a pattern that matches no name, and ``linear_weights``'.
    """
    if parameters is None:
        return linear_weights(model)
    if isinstance(parameters, Mapping):
        return dict(parameters)
    named = dict(model.named_parameters())
    found: set[str] = set()
    for pattern in [parameters] if isinstance(parameters, str) else parameters:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise ValueError(
                f"parameters: expected patterns of model.named_parameters() such as "
                f"{next(iter(named), '')!r}, got {pattern!r}, which matches none"
            )
        found.update(matches)
    return {name: parameter for name, parameter in named.items() if name in found}


def expect_outermost() -> None:
    """RuntimeError within a context that changes what weights read as."""
    if StreamedReads.active():
        raise RuntimeError(
            "in_place: expected False within another zk.perturbed or zk.quantized, whose changes "
            "these would precede; enter the context with in_place first"
        )


def expect_used(view: StreamedReads, what: str, names: Sequence[str]) -> None:
    """RuntimeError unless an operation within the view read one of its weights."""
    if not view.used:
        raise RuntimeError(
            f"zk.{what}: expected the block to run a model that has '{names[0]}' "
            f"({len(names)} weights in all), but no torch function read one of them; a model "
            "compiled by torch.compile does not go through torch functions"
        )
