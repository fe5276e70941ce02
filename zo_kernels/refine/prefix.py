"""Forwards that start at a decoder block: what lies before it is computed once per batch.

Perturbing block l leaves the hidden states before it as they are. A ``PrefixCache`` keeps, for each
batch, the output of one block; while it is there, that block and those before it give it back
instead of computing. No architecture has to be known: the model's own forward runs, embeddings,
masks and positions included, and only the blocks that it calls are short-circuited.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.blocks import decoder_blocks


class _Reached(BaseException):
    """Ends a forward at the block whose output was wanted."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a batch left behind a block."""

    block: int
    output: Any
    versions: tuple[int, ...]


class _Current(threading.local):
    """The batch of this thread's forward; two threads may be at two forwards of one model."""

    key: Hashable = None


class PrefixCache:
    """Lets the forwards of a model begin behind a decoder block.

    A context manager: within it, forwards in ``batch(key)`` keep the output of block
    ``record`` (if that is not None) and begin behind it when it is there. Forwards outside of
    ``batch`` are as ever. What is kept is one block's output per batch, (batch, length, hidden) in
    the model's dtype.

    The weights before and in the kept block must not change while its output is kept (``clear``
    lets go of all), and a block's output must depend on nothing but its inputs: see ``check``.
    Forwards whose gradients are recorded are whole, as no gradient goes through what is kept.

    Args:
        model: has decoder blocks (``blocks.decoder_blocks``), called in order.
        record: number of the block whose output is kept.

    Attributes:
        checked: whether ``check`` has found that it works, which losses that are not finite do not
            tell.

    Raises:
        ValueError: no decoder blocks, or a number that is none of theirs.
    """

    def __init__(self, model: nn.Module, record: int | None = None) -> None:
        self.blocks = list(decoder_blocks(model).values())
        self._kept: dict[Hashable, _Kept] = {}
        self._current = _Current()
        self._stop = False
        self._before: list[Any] = []
        self.checked = False
        self.record = record

    @property
    def record(self) -> int | None:
        """Number of the block whose output is kept from now on."""
        return self._record

    @record.setter
    def record(self, block: int | None) -> None:
        if block is not None and not 0 <= block < len(self.blocks):
            raise ValueError(
                f"record: expected a decoder block from 0 to {len(self.blocks) - 1}, got {block}"
            )
        self._record = block

    def __enter__(self) -> PrefixCache:
        """Put the short cuts in place of the blocks' forwards."""
        # As accelerate's hooks do it: an instance attribute before the class's method.
        self._before = [block.__dict__.get("forward") for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.forward = self._short_cut(number, block.forward)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the blocks their own forwards back."""
        for block, forward in zip(self.blocks, self._before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
        self._before = []
        self.clear()

    @contextmanager
    def batch(self, key: Hashable) -> Iterator[None]:
        """Say which batch the forwards of this thread are of, for the length of a block."""
        before, self._current.key = self._current.key, key
        try:
            yield
        finally:
            self._current.key = before

    def advance(self, key: Hashable, forward: Callable[[], object]) -> None:
        """Run a forward of a batch only as far as block ``record``, and keep its output."""
        self._stop = True
        try:
            with self.batch(key), torch.no_grad():
                forward()
        except _Reached:
            return
        finally:
            self._stop = False
        raise RuntimeError(f"the forward did not reach decoder block {self.record}")

    def clear(self) -> None:
        """Let all outputs go."""
        self._kept.clear()

    @torch.no_grad()
    def check(self, forwards: Mapping[Hashable, Callable[[], Tensor]]) -> None:
        """Find out whether the model's forwards can begin behind a block.

        Args:
            forwards: by the key of a batch of which nothing is kept, what gives its loss. Of two
                batches a model that goes on with what the last whole forward left is found out.

        Raises:
            RuntimeError: the loss of a shortened forward has other bits than that of the whole, or
                it cannot be computed.
        """
        whole = {key: self._loss(key, forward) for key, forward in forwards.items()}
        for key, forward in forwards.items():
            try:
                shortened = self._loss(key, forward)
            except Exception as error:
                raise self._refusal(f"{type(error).__name__} ({error})") from error
            if key not in self._kept or not _same(whole[key], shortened):
                raise self._refusal(
                    f"a loss of {float(shortened)!r} instead of {float(whole[key])!r}"
                )
        self.checked = all(bool(loss.isfinite().all()) for loss in whole.values())

    def _loss(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        with self.batch(key):
            return forward()

    def _refusal(self, found: str) -> RuntimeError:
        return RuntimeError(
            "reuse_prefix: expected decoder blocks that depend on nothing but what the block "
            f"before them gives, got {found} from a forward that begins behind block "
            f"{self.record}; turn reuse_prefix off for this model"
        )

    def _short_cut(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            key = None if torch.is_grad_enabled() else self._current.key
            kept = None if key is None else self._kept.get(key)
            if kept is not None and number <= kept.block:
                if kept.versions != _versions(kept.output):
                    raise RuntimeError(
                        f"the output of decoder block {kept.block} was written in place by what "
                        "follows it; turn reuse_prefix off for this model"
                    )
                return kept.output
            output = forward(*args, **kwargs)
            if key is not None and number == self._record:
                self._kept[key] = _Kept(number, output, _versions(output))
                if self._stop:
                    raise _Reached
            return output

        return run


def _same(loss: Tensor, other: Tensor) -> bool:
    """Whether two losses are the same, NaN being the same as NaN."""
    return torch.allclose(loss, other, rtol=0.0, atol=0.0, equal_nan=True)


def _versions(output: Any) -> tuple[int, ...]:
    """How often each tensor of a block's output has been written."""
    tensors = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(0 if t.is_inference() else t._version for t in tensors if isinstance(t, Tensor))
