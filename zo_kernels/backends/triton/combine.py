"""combine_ on a GPU: what the host does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zo_kernels.backends.triton import launch
from zo_kernels.places import places


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[Sequence[float]] | Tensor,
    **options: Any,
) -> None:
    """dst = round(src_scale * src + sum_k scales[.][k] z_k); see ``ready``."""
    ready(dst, src, scales, **options)()


def ready(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[Sequence[float]] | Tensor,
    *,
    seed: int,
    directions: Sequence[int] | Tensor,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> Callable[[], None]:
    """zo_kernels.ops.combine_ as a call that allocates nothing, but for ``changes``.

    One launch per pair of dtypes. scales, float32 (K,) or (tensors, K), and directions, int64
    (K,), may be tensors on the device.
    """
    device = dst[0].device
    count = len(directions)
    if not isinstance(scales, Tensor):
        scales, directions = launch.device_arguments(scales, directions, device)
    elif scales.dim() == 1:
        scales = scales.expand(len(dst), -1).contiguous()
    launches = []
    pairs = places((s.dtype, d.dtype) for d, s in zip(dst, src, strict=True))
    for (src_dtype, dst_dtype), members in pairs.items():
        table, grid = launch.device_table(
            [dst[i] for i in members],
            [src[i] for i in members],
            [streams[i] for i in members],
            [offsets[i] for i in members],
            members,
            device,
        )
        if grid == 0:
            continue
        constants = launch.constants(
            src_dtype,
            dst_dtype,
            stochastic=stochastic,
            rademacher=distribution == "rademacher",
            single=count == 1,
            scale_src=src_scale != 1.0,
            changes=changes is not None,
        )
        partials = launch.partial_sums(grid, changes is not None, device)
        launches.append((table, grid, partials, constants))

    def run() -> None:
        if changes is not None:
            changes.zero_()
        for table, grid, partials, constants in launches:
            with launch.on(device):
                launch.combine(
                    table,
                    grid,
                    scales,
                    directions,
                    partials,
                    seed,
                    src_scale,
                    launch.options(device),
                    constants,
                )
            if changes is not None:
                launch.sum_changes(partials, table, changes)

    return run
