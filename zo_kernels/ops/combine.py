"""The public operations: validate, dispatch by device, registered with torch.library.

One primitive does all the work:

    dst = round(src_scale * src + sum_k scales[k] * z_k),   z_k = normal(seed, directions[k], ...)

per element in binary32: ``acc = src_scale * float32(src)``, then ``acc = fma(scales[k], z_k, acc)``
for k in order, then one rounding to dst's dtype. All backends give the same bits.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from zo_kernels.backends import native, reference
from zo_kernels.checks import (
    DTYPES,
    INDEX_LIMIT,
    check_changes,
    check_device_scales,
    check_offset,
    check_overlap,
    check_pair,
    check_tensor,
    expect_finite,
    expect_int,
    expect_length,
    expect_numbers,
    expect_range,
    expect_tensors,
    expect_words,
    scale_table,
)
from zo_kernels.noise import DISTRIBUTIONS

BACKENDS = ("reference", "native", "triton")
_warned: set[str] = set()


def random_words(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Philox words of elements [offset, offset + count): (count,) int64 with values below 2^32.

    Args:
        count: number of words, at least 0.
        seed: 64-bit key, in [0, 2^64).
        direction: in [0, 2^32); training uses those below 2^31.
        stream: in [0, 2^32); ``stream_id(name)`` of a parameter.
        offset: first element's index in the full parameter.
        backend: None (by device), "reference", "native" or "triton".
        device: where the result lives.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _emit("random_words", count, seed, direction, stream, offset, backend, device)


def normal(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [offset, offset + count) of z: (count,) float32, for looking at and testing.

    Arguments and errors as for ``random_words``. Nothing in training calls it: z is never stored.
    """
    return _emit("normal", count, seed, direction, stream, offset, backend, device)


def rademacher(
    count: int,
    *,
    seed: int,
    direction: int,
    stream: int,
    offset: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [offset, offset + count) of a Rademacher z, +1 or -1: (count,) float32.

    Arguments and errors as for ``random_words``; nothing in training calls it.
    """
    return _emit("rademacher", count, seed, direction, stream, offset, backend, device)


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
    rows = expect_numbers("scale", scale) if not isinstance(scale, (int, float)) else scale
    per_tensor = [[c] for c in rows] if isinstance(rows, list) else [rows]
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
    streams = expect_words("streams", streams)
    expect_length("streams", streams, len(dst))
    offsets = [0] * len(dst) if offsets is None else [expect_int("offsets", o) for o in offsets]
    expect_length("offsets", offsets, len(dst))
    seed = expect_range("seed", seed, 1 << 64)
    src_scale = expect_finite("src_scale", src_scale)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {DISTRIBUTIONS}, got {distribution!r}")
    for i, (d, s, offset) in enumerate(zip(dst, src, offsets, strict=True)):
        check_tensor(f"dst[{i}]", d)
        if s is not d:
            check_tensor(f"src[{i}]", s)
            check_pair(i, d, s)
        check_offset(f"offsets[{i}]", offset, d.numel())
    devices = {d.device for d in dst}
    # Refuse before anything is written.
    rooms = {device: backend_for(device, backend) for device in devices}
    if changes is not None:
        check_changes(changes, dst)
    on_device = isinstance(scales, Tensor) or isinstance(directions, Tensor)
    if on_device:
        check_device_scales(scales, directions, dst, src)
        if not all(hasattr(room, "DEVICE_SCALES") for room in rooms.values()):
            scales, directions, on_device = scales.tolist(), directions.tolist(), False
    if not on_device:
        directions = expect_words("directions", directions)
        if not directions:
            raise ValueError("directions: expected at least one, got an empty list")
        table = scale_table(scales, len(dst), len(directions))
    # In-place pairs go to an op of their own: a mutated argument must not alias another one.
    for device in devices:
        for same in (True, False):
            picked = [
                i
                for i, (d, s) in enumerate(zip(dst, src, strict=True))
                if d.device == device and (s is d) == same
            ]
            if not picked:
                continue
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
                rounding == "stochastic",
                distribution,
                part,
                backend or "",
            )
            with torch.no_grad():
                if same:
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


def backend_reasons() -> dict[str, str | None]:
    """Why each backend cannot be used on this machine, or None if it can."""
    return {
        "reference": None,
        "native": native.unavailable_reason(),
        "triton": _triton_reason(),
    }


def _triton_reason() -> str | None:
    try:
        from zo_kernels.backends import triton as room
    except ImportError as error:
        return f"triton did not import ({error}); install zo_kernels[gpu]"
    return room.unavailable_reason()


def _triton() -> ModuleType:
    reason = _triton_reason()
    if reason:
        raise RuntimeError(f"backend 'triton': {reason}")
    from zo_kernels.backends import triton as room

    return room


def backend_for(device: torch.device, name: str | None) -> ModuleType:
    """The backend that works on a device: the named one, or by device.

    Raises:
        ValueError, RuntimeError: the name is unknown, or the backend cannot work there.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {name!r}")
    if name == "reference":
        return reference
    if name == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native': expected tensors on cpu, got {device}")
        if native.unavailable_reason():
            raise RuntimeError(f"backend 'native': {native.unavailable_reason()}")
        return native
    if name == "triton":
        room = _triton()
        if device.type == "cpu" and not room.interpreting():
            raise ValueError(
                "backend 'triton': expected tensors on a GPU, got cpu "
                "(TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU)"
            )
        return room
    if device.type != "cpu":
        return _triton()
    reason = native.unavailable_reason()
    if reason is None:
        return native
    if os.environ.get("ZO_KERNELS_STRICT") == "1":
        raise RuntimeError(f"ZO_KERNELS_STRICT=1 and {reason}")
    if "native" not in _warned:
        _warned.add("native")
        warnings.warn(f"zo_kernels uses its slow reference backend: {reason}", stacklevel=3)
    return reference


def _emit(
    what: str,
    count: int,
    seed: int,
    direction: int,
    stream: int,
    offset: int,
    backend: str | None,
    device: torch.device | str,
) -> Tensor:
    device = torch.device(device)
    count = expect_range("count", count, INDEX_LIMIT)
    address = {
        "seed": expect_range("seed", seed, 1 << 64),
        "direction": expect_range("direction", direction, 1 << 32),
        "stream": expect_range("stream", stream, 1 << 32),
        "offset": expect_int("offset", offset),
    }
    check_offset("offset", offset, count)
    room = backend_for(device, backend)
    if count == 0:
        dtype = torch.int64 if what == "random_words" else torch.float32
        return torch.empty(0, dtype=dtype, device=device)
    function: Callable[..., Tensor] = getattr(room, what)
    return function(count, **address, device=device)


__all__ = [
    "BACKENDS",
    "DTYPES",
    "backend_for",
    "backend_reasons",
    "combine_",
    "normal",
    "perturb_",
    "rademacher",
    "random_words",
]
