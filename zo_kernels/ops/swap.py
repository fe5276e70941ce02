"""Perturbed weights in place, from which the unperturbed ones can be had back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zo_kernels.checks import (
    check_changes,
    check_overlap,
    expect_finite,
    expect_length,
    expect_numbers,
    expect_range,
    expect_tensors,
)
from zo_kernels.ops.arguments import check_lists, check_noise, rooms_of, stochastic
from zo_kernels.places import places


@dataclass
class _Part:
    """The tensors of one dtype on one device.

    Attributes:
        room, members: their backend and their places in the list.
        store, scales: what gives them back, and what they are perturbed by; None once they hold
            their own weights.
    """

    room: ModuleType
    members: list[int]
    store: Any = None
    scales: list[float] | None = None


class Held:
    """Tensors that hold round(w + scale * z), and what it takes to get w back exactly.

    One rounding lies between w and what the tensor holds, so round(v - scale * z) is w wherever
    the spacing of numbers around v is not wider than around w. Where it is (v has a larger
    exponent), the difference is kept: one byte for each such element, none for its place, which
    v and z tell. Elements that do not fit this are kept whole, and a piece of a tensor that would
    take more than its own bytes is copied.

    The tensors must not be written by others, moved or resized in between.

    Args:
        tensors: contiguous float32, bfloat16 or float16 tensors that do not overlap; perturbed in
            place on construction.
        scales: one factor per tensor; rounded to float32.
        seed, direction, streams, offsets, distribution, backend: as for ``combine_``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``combine_``; nothing has been written then.

    Whatever a backend raises while it works (out of memory) leaves w, or the way back to it: the
    tensors hold w after an exception on construction, and ``release_`` brings it after others.
    """

    @torch.no_grad()
    def __init__(
        self,
        tensors: Sequence[Tensor],
        scales: Sequence[float],
        *,
        seed: int,
        direction: int,
        streams: Sequence[int],
        offsets: Sequence[int] | None = None,
        distribution: str = "normal",
        backend: str | None = None,
    ) -> None:
        self.tensors = expect_tensors("tensors", tensors)
        self._streams, self._offsets = check_lists("tensors", self.tensors, streams, offsets)
        self._noise: dict[str, Any] = check_noise(seed, distribution)
        self._noise["direction"] = expect_range("direction", direction, 1 << 32)
        scales = self._check_scales(scales)
        self._parts = [
            _Part(room, [members[i] for i in same])
            for room, _, members in rooms_of(self.tensors, backend)
            for same in places(self.tensors[i].dtype for i in members).values()
        ]
        check_overlap(self.tensors, self.tensors)
        self._released = False
        try:
            for part in self._parts:
                self._pass(part, scales, keep=True)
        except BaseException:
            self.release_()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the tensors."""
        return sum(part.store.nbytes for part in self._parts if part.store is not None)

    @torch.no_grad()
    def swap_(self, scales: Sequence[float]) -> None:
        """Make the tensors hold round(w + scales * z) with the same z, in one pass.

        Raises:
            TypeError, ValueError: naming the option; the tensors are as before then.
            RuntimeError: they were released already, or some of them by a ``release_`` that failed.
        """
        numbers = self._check_scales(scales)
        if self._released or any(part.store is None for part in self._parts):
            raise RuntimeError("Held: expected tensors that are held, got released ones")
        for part in self._parts:
            self._pass(part, numbers, keep=True)

    @torch.no_grad()
    def release_(
        self,
        scales: Sequence[float] | None = None,
        *,
        src_scale: float = 1.0,
        rounding: str = "nearest",
        changes: Tensor | None = None,
    ) -> None:
        """Make the tensors hold w again or, in the same pass, round(src_scale * w + scales * z).

        Args:
            scales: None, or one factor per tensor.
            src_scale, rounding, changes: as for ``combine_`` with src = w; only with scales.

        Raises:
            TypeError, ValueError: naming the option; the tensors are as before then.
            RuntimeError: they were released already.

        After another exception the call can be made again, without arguments, for the tensors that
        it has not come to.
        """
        src_scale = expect_finite("src_scale", src_scale)
        dithered = stochastic(rounding)
        if scales is not None:
            scales = self._check_scales(scales)
        elif src_scale != 1.0 or dithered or changes is not None:
            raise ValueError(
                "scales: expected them together with src_scale, rounding or changes, got None"
            )
        if changes is not None:
            check_changes(changes, self.tensors)
        if self._released:
            raise RuntimeError("Held: expected tensors that are held, got released ones")
        for part in self._parts:
            if part.store is not None:
                self._pass(
                    part,
                    scales,
                    keep=False,
                    src_scale=src_scale,
                    stochastic=dithered,
                    changes=changes,
                )
        self._released = True

    def _check_scales(self, scales: Sequence[float]) -> list[float]:
        numbers = expect_numbers("scales", scales)
        expect_length("scales", numbers, len(self.tensors), "tensors")
        return numbers

    def _pass(
        self,
        part: _Part,
        scales: list[float] | None,
        *,
        keep: bool,
        src_scale: float = 1.0,
        stochastic: bool = False,
        changes: Tensor | None = None,
    ) -> None:
        members = part.members
        picked = None if scales is None else [scales[i] for i in members]
        whole = changes is None or len(members) == len(self.tensors)
        rows = changes if whole else changes.new_empty(len(members), 3)
        part.store = part.room.swap_(
            [self.tensors[i] for i in members],
            part.store,
            part.scales,
            picked,
            keep=keep,
            streams=[self._streams[i] for i in members],
            offsets=[self._offsets[i] for i in members],
            src_scale=src_scale,
            stochastic=stochastic,
            changes=rows,
            **self._noise,
        )
        part.scales = picked if keep else None
        if not whole:
            changes[members] = rows
