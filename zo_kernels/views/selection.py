"""What the views share: which parameters they change, and what they refuse."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from zo_kernels.blocks import linear_weights
from zo_kernels.modes.base import changed_and_given_back
from zo_kernels.modes.reads import StreamedReads

#: What to change: parameters by name, or patterns of names; None for ``linear_weights``.
Selection = Mapping[str, Tensor] | str | Sequence[str] | None

_lock = threading.Lock()
#: By a tensor's id: the threads of the blocks that hold it changed in place.
_holders: dict[int, list[int]] = {}


def select(model: nn.Module, parameters: Selection = None) -> dict[str, Tensor]:
    """The parameters that a selection means, by name.

    Raises:
        TypeError: neither a mapping nor patterns.
        ValueError: nothing in it, a pattern that matches no name, and ``linear_weights``'.
    """
    if parameters is None:
        return linear_weights(model)
    if not isinstance(parameters, (str, Mapping, Sequence)):
        raise TypeError(
            "parameters: expected None, a mapping, a pattern or a list of patterns, got "
            f"{type(parameters).__name__} ({parameters!r})"
        )
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if not patterns:
        raise ValueError(f"parameters: expected at least one name or pattern, got {patterns!r}")
    if isinstance(patterns, Mapping):
        return dict(patterns)
    named = dict(model.named_parameters())
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"parameters: expected patterns as str, got {pattern!r}")
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise ValueError(
                f"parameters: expected patterns of model.named_parameters() such as "
                f"{next(iter(named), '')!r}, got {pattern!r}, which matches none"
            )
        found.update(matches)
    return {name: parameter for name, parameter in named.items() if name in found}


@contextmanager
def held_in_place(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hold tensors changed in place for the length of a block, in one thread, and tell autograd.

    Blocks of one thread end the last one first, so that each gives back what it found; one of
    another thread would take the changes for the weights, and might give them back last.

    Raises:
        RuntimeError: another thread holds one of them; or within a context that changes what
            weights read as.
    """
    expect_outermost()
    keys, thread = [id(tensor) for tensor in tensors], threading.get_ident()
    with _lock:
        if any(holder != thread for key in keys for holder in _holders.get(key, ())):
            raise RuntimeError(
                "in_place: expected no block of another thread that holds these weights changed "
                "in place, got one; leave that first, or give each thread a model of its own"
            )
        for key in keys:
            _holders.setdefault(key, []).append(thread)
    try:
        with changed_and_given_back(tensors):
            yield
    finally:
        with _lock:
            for key in keys:
                _holders[key].pop()
                if not _holders[key]:
                    del _holders[key]


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
