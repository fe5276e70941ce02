"""Perturbed weights in place, from which the unperturbed ones can be had back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._rooms = rooms_of(self.tensors, backend)
        check_overlap(self.tensors, self.tensors)
        self._stores: list[Any] | None = [None] * len(self._rooms)
        self._scales: list[float] | None = None
        self._pass(scales, keep=True)

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the tensors."""
        return sum(store.nbytes for store in self._stores or ())

    @torch.no_grad()
    def swap_(self, scales: Sequence[float]) -> None:
        """Make the tensors hold round(w + scales * z) with the same z, in one pass."""
        self._pass(self._check_scales(scales), keep=True)

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
        self._pass(scales, keep=False, src_scale=src_scale, stochastic=dithered, changes=changes)
        self._stores = None

    def _check_scales(self, scales: Sequence[float]) -> list[float]:
        numbers = expect_numbers("scales", scales)
        expect_length("scales", numbers, len(self.tensors), "tensors")
        return numbers

    def _pass(
        self,
        scales: list[float] | None,
        *,
        keep: bool,
        src_scale: float = 1.0,
        stochastic: bool = False,
        changes: Tensor | None = None,
    ) -> None:
        if self._stores is None:
            raise RuntimeError("Held: expected tensors that are held, got released ones")
        for place, (room, _, members) in enumerate(self._rooms):
            self._stores[place] = room.swap_(
                [self.tensors[i] for i in members],
                self._stores[place],
                None if self._scales is None else [self._scales[i] for i in members],
                None if scales is None else [scales[i] for i in members],
                keep=keep,
                streams=[self._streams[i] for i in members],
                offsets=[self._offsets[i] for i in members],
                src_scale=src_scale,
                stochastic=stochastic,
                changes=changes,
                **self._noise,
            )
        self._scales = scales
