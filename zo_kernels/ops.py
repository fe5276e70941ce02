"""The public operations: validate, dispatch by device, registered with torch.library.

One primitive does all the work:

    dst = round(src_scale * src + sum_k scales[k] * z_k),   z_k = normal(seed, directions[k], ...)

per element in binary32: ``acc = src_scale * float32(src)``, then ``acc = fma(scales[k], z_k, acc)``
for k in order, then one rounding to dst's dtype. All backends give the same bits.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from zo_kernels import noise
from zo_kernels.backends import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native", "triton")
_FLOAT32_MAX = torch.finfo(torch.float32).max
_INDEX_LIMIT = 1 << 62  # element indices; the counter itself holds 2^66
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


def perturb_(
    tensors: Sequence[Tensor],
    scale: float | Sequence[float],
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    rounding: str = "nearest",
    backend: str | None = None,
) -> None:
    """tensors[i] += scale * z_i, in place, without storing z.

    Equivalent to ``combine_(tensors, tensors, [scale], directions=[direction], ...)``.

    Args:
        tensors: contiguous float32, bfloat16 or float16 tensors of any shape that do not overlap.
        scale: one factor for all, or one per tensor.
        seed, direction, streams, offsets, rounding, backend: as for ``combine_``.
    """
    rows = _expect_numbers("scale", scale) if not isinstance(scale, (int, float)) else scale
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
        backend=backend,
    )


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float] | Sequence[Sequence[float]],
    *,
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    rounding: str = "nearest",
    src_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """dst[i] = round(src_scale * src[i] + sum_k scales[k] * z_k), over lists of tensors.

    dst[i] and src[i] are the same tensor (in place) or do not overlap; their dtypes may differ.
    K directions in one pass give the bits of ``fma`` in float32 for k in order and one rounding.

    Args:
        dst, src: lists of equally many contiguous tensors, float32, bfloat16 or float16, of equal
            shapes pairwise and on one device pairwise. An empty list does nothing.
        scales: one factor per direction, or one such list per tensor; rounded to float32.
        seed: 64-bit key, in [0, 2^64).
        directions: in [0, 2^32), at least one.
        streams: one per tensor, in [0, 2^32).
        offsets: index of each tensor's first element in the full parameter (default 0), for
            shards and rows.
        rounding: "nearest" (ties to even) or "stochastic": into bfloat16 and float16 by the 16
            rounding bits that the last direction gives each element, so an update far below half
            an ulp arrives in expectation; into float32 to nearest.
        src_scale: factor of src, for weight decay.
        backend: None (by device), "reference", "native" or "triton"; a named one never falls back.

    Raises:
        TypeError, ValueError: naming the tensor or option, what was expected and what came;
            nothing has been written then.
        RuntimeError: if the named backend is not available, with the reason.
    """
    dst, src = _expect_tensors("dst", dst), _expect_tensors("src", src)
    _expect_length("src", src, len(dst))
    streams = _expect_words("streams", streams)
    _expect_length("streams", streams, len(dst))
    directions = _expect_words("directions", directions)
    if not directions:
        raise ValueError("directions: expected at least one, got an empty list")
    offsets = [0] * len(dst) if offsets is None else [_expect_int("offsets", o) for o in offsets]
    _expect_length("offsets", offsets, len(dst))
    seed = _expect_range("seed", seed, 1 << 64)
    src_scale = _expect_finite("src_scale", src_scale)
    table = _scale_table(scales, len(dst), len(directions))
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    for i, (d, s, offset) in enumerate(zip(dst, src, offsets, strict=True)):
        _check_tensor(f"dst[{i}]", d)
        if s is not d:
            _check_tensor(f"src[{i}]", s)
            _check_pair(i, d, s)
        _check_offset(f"offsets[{i}]", offset, d.numel())
    devices = {d.device for d in dst}
    for device in devices:
        _backend_for(device, backend)  # refuse before anything is written
    name = backend or ""
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
            common = (
                [c for i in picked for c in table[i]],
                seed - (1 << 64) if seed >> 63 else seed,  # the schema's int is signed
                directions,
                [streams[i] for i in picked],
                [offsets[i] for i in picked],
                src_scale,
                rounding == "stochastic",
                name,
            )
            with torch.no_grad():
                if same:
                    _perturb_op([dst[i] for i in picked], *common)
                else:
                    _combine_op([dst[i] for i in picked], [src[i] for i in picked], *common)


@torch.library.custom_op("zo_kernels::perturb_", mutates_args={"tensors"})
def _perturb_op(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    backend: str,
) -> None:
    arguments = (scales, seed, directions, streams, offsets, src_scale, stochastic, backend)
    _run_combine(tensors, tensors, *arguments)


@torch.library.custom_op("zo_kernels::combine_", mutates_args={"dst"})
def _combine_op(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    backend: str,
) -> None:
    arguments = (scales, seed, directions, streams, offsets, src_scale, stochastic, backend)
    _run_combine(dst, src, *arguments)


def _run_combine(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    backend: str,
) -> None:
    _check_overlap(dst, src)
    k = len(directions)
    _backend_for(dst[0].device, backend or None).combine_(
        dst,
        src,
        [scales[i * k : (i + 1) * k] for i in range(len(dst))],
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        directions=directions,
        streams=streams,
        offsets=offsets,
        src_scale=src_scale,
        stochastic=stochastic,
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


def _backend_for(device: torch.device, name: str | None) -> ModuleType:
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
    count = _expect_range("count", count, _INDEX_LIMIT)
    address = {
        "seed": _expect_range("seed", seed, 1 << 64),
        "direction": _expect_range("direction", direction, 1 << 32),
        "stream": _expect_range("stream", stream, 1 << 32),
        "offset": _expect_int("offset", offset),
    }
    _check_offset("offset", offset, count)
    room = _backend_for(device, backend)
    if count == 0:
        dtype = torch.float32 if what == "normal" else torch.int64
        return torch.empty(0, dtype=dtype, device=device)
    function: Callable[..., Tensor] = getattr(room, what)
    return function(count, **address, device=device)


def _expect_tensors(name: str, value: object) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(item).__name__}")
    return list(value)


def _expect_length(name: str, value: Sequence, length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} (one per tensor of dst), got {len(value)}")


def _expect_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    return value


def _expect_range(name: str, value: object, limit: int) -> int:
    number = _expect_int(name, value)
    if not 0 <= number < limit:
        raise ValueError(f"{name}: expected 0 <= {name} < 2^{limit.bit_length() - 1}, got {number}")
    return number


def _expect_words(name: str, value: object) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of ints, got {type(value).__name__}")
    return [_expect_range(f"{name}[{i}]", item, 1 << 32) for i, item in enumerate(value)]


def _expect_finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} ({value!r})")
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite float32 value, got {value}")
    return float(value)


def _expect_numbers(name: str, value: object) -> list[float]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a float or a list, got {type(value).__name__}")
    return [_expect_finite(f"{name}[{i}]", item) for i, item in enumerate(value)]


def _scale_table(scales: object, tensors: int, directions: int) -> list[list[float]]:
    if not isinstance(scales, (list, tuple)):
        raise TypeError(f"scales: expected a list of floats, got {type(scales).__name__}")
    if any(isinstance(row, (list, tuple)) for row in scales):
        _expect_length("scales", scales, tensors)
        table = [_expect_numbers(f"scales[{i}]", row) for i, row in enumerate(scales)]
    else:
        table = [_expect_numbers("scales", scales)] * tensors
    for row in table:
        if len(row) != directions:
            raise ValueError(f"scales: expected {directions} (one per direction), got {len(row)}")
    return table


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor (elements are addressed in row-major order), "
            f"got shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())}"
        )


def _check_pair(i: int, d: Tensor, s: Tensor) -> None:
    if d.shape != s.shape:
        raise ValueError(f"src[{i}]: expected shape {tuple(d.shape)} as dst, got {tuple(s.shape)}")
    if d.device != s.device:
        raise ValueError(f"src[{i}]: expected device {d.device} as dst, got {s.device}")


def _check_offset(name: str, offset: int, numel: int) -> None:
    if not 0 <= offset <= _INDEX_LIMIT - numel:
        raise ValueError(f"{name}: expected 0 <= offset <= 2^62 - {numel}, got {offset}")


def _check_overlap(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """dst tensors are pairwise disjoint, and each src is its dst exactly or touches no dst."""

    def span(tensor: Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        return start, start + tensor.numel() * tensor.element_size()

    spans = [(*span(d), "dst", i) for i, d in enumerate(dst) if d.numel()]
    for i, (d, s) in enumerate(zip(dst, src, strict=True)):
        exact = s is d or (s.data_ptr() == d.data_ptr() and s.dtype == d.dtype)
        if s.numel() and not exact:
            spans.append((*span(s), "src", i))
    spans.sort()
    # Sources may overlap each other; a written range may touch nothing else.
    end, owner = -1, ""
    written_end, written_owner = -1, ""
    for low, high, kind, i in spans:
        clash = (end, owner) if kind == "dst" else (written_end, written_owner)
        if low < clash[0]:
            raise ValueError(
                f"{kind}[{i}]: expected memory apart from all written tensors, "
                f"got one that overlaps {clash[1]}"
            )
        if high > end:
            end, owner = high, f"{kind}[{i}]"
        if kind == "dst" and high > written_end:
            written_end, written_owner = high, f"{kind}[{i}]"


__all__ = ["backend_reasons", "combine_", "noise", "normal", "perturb_", "random_words"]
