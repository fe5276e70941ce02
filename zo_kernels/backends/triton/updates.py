"""The two-point pair and logged updates: what the host does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.backends.triton import launch


def by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """The places of the tensors of each dtype: one launch for each."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(i)
    return groups


def pair_(
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
) -> None:
    """plus, minus = round(src +- scales[.] z); see zo_kernels.ops.pair_. One launch per dtype."""
    device = src[0].device
    factors, directions = launch.device_arguments([[c] for c in scales], [direction], device)
    for dtype, members in by_dtype(src).items():
        table, grid = launch.device_table(
            [plus[i] for i in members],
            [src[i] for i in members],
            [streams[i] for i in members],
            [offsets[i] for i in members],
            members,
            device,
            [minus[i] for i in members],
        )
        if grid == 0:
            continue
        with launch.on(device):
            launch.combine(
                table,
                grid,
                factors,
                directions,
                launch.partial_sums(grid, False, device),
                seed,
                1.0,
                launch.options(device),
                launch.constants(dtype, dtype, rademacher=distribution == "rademacher", pair=True),
            )
