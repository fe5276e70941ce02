"""Both points of a two-point estimate from one z."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.checks import (
    check_overlap,
    check_pair,
    check_tensor,
    expect_length,
    expect_numbers,
    expect_range,
    expect_tensors,
)
from zo_kernels.ops.arguments import check_lists, check_noise, rooms_of


@torch.no_grad()
def pair_(
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    distribution: str = "normal",
    backend: str | None = None,
) -> None:
    """plus[i] = round(src[i] + scales[i] * z_i) and minus[i] = round(src[i] - scales[i] * z_i).

    One draw of z and one read of src for both. The bits are those of two calls of ``combine_``
    with rounding to nearest.

    Args:
        plus, minus, src: equally many contiguous tensors, float32, bfloat16 or float16; the three
            of one place have one shape, dtype and device. plus and minus overlap nothing.
        scales: one factor per tensor; rounded to float32.
        seed, direction, streams, offsets, distribution, backend: as for ``combine_``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``combine_``; nothing has been written then.
    """
    plus, minus = expect_tensors("plus", plus), expect_tensors("minus", minus)
    src = expect_tensors("src", src)
    scales = expect_numbers("scales", scales)
    for name, values in (("plus", plus), ("minus", minus), ("scales", scales)):
        expect_length(name, values, len(src), "src")
    streams, offsets = check_lists("src", src, streams, offsets)
    noise = check_noise(seed, distribution)
    direction = expect_range("direction", direction, 1 << 32)
    for name, outputs in (("plus", plus), ("minus", minus)):
        for i, (tensor, s) in enumerate(zip(outputs, src, strict=True)):
            check_tensor(f"{name}[{i}]", tensor)
            check_pair(f"{name}[{i}]", tensor, s, "src")
            if tensor.dtype != s.dtype:
                raise TypeError(f"{name}[{i}]: expected {s.dtype} as src, got {tensor.dtype}")
    rooms = rooms_of(src, backend)
    check_overlap([*plus, *minus], [*src, *src], in_place=False)
    for room, _, members in rooms:
        room.pair_(
            [plus[i] for i in members],
            [minus[i] for i in members],
            [src[i] for i in members],
            [scales[i] for i in members],
            direction=direction,
            streams=[streams[i] for i in members],
            offsets=[offsets[i] for i in members],
            **noise,
        )
