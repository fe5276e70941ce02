"""Many updates in one read and one write of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_kernels.checks import (
    check_changes,
    check_overlap,
    check_residual,
    expect_finite,
    expect_length,
    expect_tensors,
    expect_words,
    scale_table,
)
from zo_kernels.ops.arguments import check_lists, check_noise, rooms_of, stochastic


@dataclass(frozen=True, slots=True)
class Update:
    """One update of a list of tensors: theta = round(src_scale * theta + sum_k scales[k] z_k).

    Attributes:
        directions: in [0, 2^32), at least one.
        scales: one factor per direction, or one such list per tensor.
        src_scale: factor of theta, for weight decay.
    """

    directions: Sequence[int]
    scales: Sequence[float] | Sequence[Sequence[float]]
    src_scale: float = 1.0


@torch.no_grad()
def advance_(
    tensors: Sequence[Tensor],
    updates: Sequence[Update],
    *,
    seed: int,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    rounding: str = "nearest",
    residuals: Sequence[Tensor] | None = None,
    distribution: str = "normal",
    changes: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Apply updates one after the other, in place, in one pass over the weights.

    The bits are those of one call of ``combine_`` per update: the value is rounded to the tensor's
    dtype after each, by the rounding bits of that update's last direction if stochastic.

    With ``residuals`` a 16-bit weight has eight bits more: the value of an element is the float32
    whose pattern is

        bits(float32(tensor)) + residual * 2^s,   s = 8 for bfloat16, 5 for float16

    and each update rounds it to nearest (ties to even) among the patterns that are multiples of
    2^s; at the end the tensor is the value rounded to its dtype (half away from zero) and the
    residual, in [-128, 127], is the rest. Where the value is below 2^-14 in a float16 tensor, is
    rounded to infinity or is NaN, it is rounded to the tensor's dtype and the residual is 0. Lists
    may hold float32 tensors beside them: their residuals are empty.

    Args:
        tensors: contiguous float32, bfloat16 or float16 tensors that do not overlap.
        updates: in order; none does nothing.
        seed, streams, offsets, rounding, distribution, backend: as for ``combine_``.
        residuals: None, or one contiguous int8 tensor per tensor, of its shape (of shape (0,) for
            float32) and on its device. Then rounding must be "nearest".
        changes: as for ``combine_``, where src is the value before the first update, dst the one
            after the last, and acc the last one before rounding.

    Raises:
        TypeError, ValueError, RuntimeError: as ``combine_``; nothing has been written then.
    """
    tensors, updates = expect_tensors("tensors", tensors), list(updates)
    streams, offsets = check_lists("tensors", tensors, streams, offsets)
    noise = check_noise(seed, distribution)
    dithered = stochastic(rounding)
    if residuals is not None:
        residuals = expect_tensors("residuals", residuals)
        expect_length("residuals", residuals, len(tensors), "tensors")
        for i, (residual, tensor) in enumerate(zip(residuals, tensors, strict=True)):
            check_residual(f"residuals[{i}]", residual, tensor)
        if dithered:
            raise ValueError("rounding: expected 'nearest' with residuals, got 'stochastic'")
    if changes is not None:
        check_changes(changes, tensors)
    directions: list[int] = []
    scales: list[list[float]] = [[] for _ in tensors]
    for n, update in enumerate(updates):
        words = expect_words(f"updates[{n}].directions", update.directions)
        if not words:
            raise ValueError(f"updates[{n}].directions: expected at least one, got an empty list")
        rows = scale_table(update.scales, len(tensors), len(words), f"updates[{n}].scales")
        for row, more in zip(scales, rows, strict=True):
            row += more
        directions += words
    src_scales = [
        expect_finite(f"updates[{n}].src_scale", u.src_scale) for n, u in enumerate(updates)
    ]
    rooms = rooms_of(tensors, backend)
    check_overlap([*tensors, *(residuals or [])], [*tensors, *(residuals or [])])
    if not updates:
        if changes is not None:
            changes.zero_()
        return
    for room, _, members in rooms:
        room.advance_(
            [tensors[i] for i in members],
            None if residuals is None else [residuals[i] for i in members],
            [scales[i] for i in members],
            directions=directions,
            lengths=[len(update.directions) for update in updates],
            src_scales=src_scales,
            streams=[streams[i] for i in members],
            offsets=[offsets[i] for i in members],
            stochastic=dithered,
            changes=changes,
            **noise,
        )
