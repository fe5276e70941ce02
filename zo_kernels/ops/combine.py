"""dst = round(src_scale * src + sum_k scales[k] * z_k) over lists of tensors: the primitive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.checks import (
    check_changes,
    check_device_scales,
    check_overlap,
    check_pair,
    check_tensor,
    expect_finite,
    expect_length,
    expect_numbers,
    expect_tensors,
    expect_words,
    scale_table,
)
from zo_kernels.ops.arguments import check_lists, check_noise, stochastic
from zo_kernels.ops.dispatch import backend_for


def perturb_(
    tensors: Sequence[Tensor],
    scale: float | Sequence[float],
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    rounding: str = "nearest",
    distribution: str = "normal",
    backend: str | None = None,
) -> None:
    """tensors[i] += scale * z_i, in place, without storing z.

    Equivalent to ``combine_(tensors, tensors, [scale], directions=[direction], ...)``.

    Args:
        tensors: contiguous float32, bfloat16 or float16 tensors of any shape that do not overlap.
        scale: one factor for all, or one per tensor.
        seed, direction, streams, offsets, rounding, distribution, backend: as for ``combine_``.
    """
    if not isinstance(scale, (int, float, list, tuple)):
        raise TypeError(f"scale: expected a float or a list of floats, got {type(scale).__name__}")
    if isinstance(scale, (int, float)):
        per_tensor = [expect_finite("scale", scale)]
    else:
        per_tensor = [[c] for c in expect_numbers("scale", scale)]
    combine_(
        tensors,
        tensors,
        per_tensor,
        seed=seed,
        directions=[direction],
        streams=streams,
        offsets=offsets,
        rounding=rounding,
        distribution=distribution,
        backend=backend,
    )


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    *,
    seed: int,
    directions: Sequence[int] | Tensor,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    rounding: str = "nearest",
    src_scale: float = 1.0,
    distribution: str = "normal",
    changes: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """dst[i] = round(src_scale * src[i] + sum_k scales[k] * z_k), over lists of tensors.

    dst[i] and src[i] are the same tensor (in place) or do not overlap; their dtypes may differ.
    K directions in one pass give the bits of ``fma`` in float32 for k in order and one rounding.

    Args:
        dst, src: lists of equally many contiguous tensors, float32, bfloat16 or float16, of equal
            shapes pairwise and on one device pairwise. An empty list does nothing.
        scales: one factor per direction, or one such list per tensor; rounded to float32. Or, with
            ``directions``, a float32 tensor of shape (K,) or (len(dst), K) on the device of all
            dst: then the Triton backend reads both when the kernel runs, nothing is copied from
            the host, and a captured CUDA graph sees new values at each replay (make the same call
            once before the capture). Values on a GPU are not checked.
        seed: 64-bit key, in [0, 2^64).
        directions: in [0, 2^32), at least one; or an int64 tensor of shape (K,), see ``scales``.
        streams: one per tensor, in [0, 2^32).
        offsets: index of each tensor's first element in the full parameter (default 0), for
            shards and rows.
        rounding: "nearest" (ties to even) or "stochastic": into bfloat16 and float16 by the 16
            rounding bits that the last direction gives each element, so an update far below half
            an ulp arrives in expectation; into float32 to nearest.
        src_scale: factor of src, for weight decay.
        distribution: of z, "normal" or "rademacher" (+1 or -1; 128 signs per Philox call).
        changes: None, or a contiguous float64 tensor of shape (len(dst), 3) on dst's device that
            is overwritten with what the pass did to each tensor, in float32 values: the sum of
            (dst - src)^2, the sum of (acc - src)^2 where acc is the value before rounding, and the
            number of elements lost to rounding (dst = src although acc is not). The sums have a
            relative error below 1e-5; the count is exact.
        backend: None (by device), "reference", "native" or "triton"; a named one never falls back.

    Raises:
        TypeError, ValueError: naming the tensor or option, what was expected and what came;
            nothing has been written then.
        RuntimeError: if the named backend is not available, with the reason.
    """
    dst, src = expect_tensors("dst", dst), expect_tensors("src", src)
    expect_length("src", src, len(dst))
    streams, offsets = check_lists("dst", dst, streams, offsets)
    seed = check_noise(seed, distribution)["seed"]
    src_scale = expect_finite("src_scale", src_scale)
    dithered = stochastic(rounding)
    for i, (d, s) in enumerate(zip(dst, src, strict=True)):
        if s is not d:
            check_tensor(f"src[{i}]", s)
            check_pair(f"src[{i}]", s, d, "dst")
    devices = {d.device for d in dst}
    # Refuse before anything is written.
    rooms = {device: backend_for(device, backend) for device in devices}
    if changes is not None:
        check_changes(changes, dst)
    on_device = isinstance(scales, Tensor) or isinstance(directions, Tensor)
    if on_device:
        check_device_scales(scales, directions, dst, src)
        if not all(room.DEVICE_SCALES for room in rooms.values()):
            scales, directions, on_device = scales.tolist(), directions.tolist(), False
    if not on_device:
        directions = expect_words("directions", directions)
        if not directions:
            raise ValueError("directions: expected at least one, got an empty list")
        table = scale_table(scales, len(dst), len(directions))
    # In-place pairs go to an op of their own: a mutated argument must not alias another one.
    pairs = list(zip(dst, src, strict=True))
    groups = [
        [i for i, (d, s) in enumerate(pairs) if d.device == device and (s is d) == same]
        for device in devices
        for same in (True, False)
    ]
    groups = [picked for picked in groups if picked]
    # Each op checks its own; all of a device together before the first of several is called.
    # Under torch.compile there are no addresses yet.
    if len(groups) > 1 and not torch.compiler.is_compiling():
        for device in devices:
            here = [i for i, d in enumerate(dst) if d.device == device]
            check_overlap([dst[i] for i in here], [src[i] for i in here])
    for picked in groups:
        whole = len(picked) == len(dst)
        part = changes if changes is None or whole else changes.new_empty(len(picked), 3)
        common = (
            [] if on_device else [c for i in picked for c in table[i]],
            [] if on_device else directions,
            scales if on_device else None,
            directions if on_device else None,
            seed - (1 << 64) if seed >> 63 else seed,  # the schema's int is signed
            [streams[i] for i in picked],
            [offsets[i] for i in picked],
            src_scale,
            dithered,
            distribution,
            part,
            backend or "",
        )
        with torch.no_grad():
            if src[picked[0]] is dst[picked[0]]:
                _perturb_op([dst[i] for i in picked], *common)
            else:
                _combine_op([dst[i] for i in picked], [src[i] for i in picked], *common)
            if part is not None and not whole:
                changes[picked] = part


@torch.library.custom_op("zo_kernels::perturb_", mutates_args={"tensors", "changes"})
def _perturb_op(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    directions: Sequence[int],
    device_scales: Tensor | None,
    device_directions: Tensor | None,
    seed: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
    backend: str,
) -> None:
    _run_combine(
        tensors, tensors, scales, directions, device_scales, device_directions, seed, streams,
        offsets, src_scale, stochastic, distribution, changes, backend,
    )  # fmt: skip


@torch.library.custom_op("zo_kernels::combine_", mutates_args={"dst", "changes"})
def _combine_op(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    directions: Sequence[int],
    device_scales: Tensor | None,
    device_directions: Tensor | None,
    seed: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
    backend: str,
) -> None:
    _run_combine(
        dst, src, scales, directions, device_scales, device_directions, seed, streams,
        offsets, src_scale, stochastic, distribution, changes, backend,
    )  # fmt: skip


def _run_combine(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    directions: Sequence[int],
    device_scales: Tensor | None,
    device_directions: Tensor | None,
    seed: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
    backend: str,
) -> None:
    check_overlap(dst, src)
    k = len(directions)
    rows = [scales[i * k : (i + 1) * k] for i in range(len(dst))]
    backend_for(dst[0].device, backend or None).combine_(
        dst,
        src,
        rows if device_scales is None else device_scales,
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        directions=directions if device_directions is None else device_directions,
        streams=streams,
        offsets=offsets,
        src_scale=src_scale,
        stochastic=stochastic,
        distribution=distribution,
        changes=changes,
    )
