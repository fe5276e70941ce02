"""Checks of arguments: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max
INDEX_LIMIT = 1 << 62  # element indices; the counter itself holds 2^66


def expect_tensors(name: str, value: object) -> list[Tensor]:
    """A list or tuple of tensors, as a list; TypeError otherwise."""
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    for i, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(item).__name__}")
    return list(value)


def expect_length(name: str, value: Sequence, length: int, of: str = "dst") -> None:
    """ValueError unless there is one entry per tensor of the list named ``of``."""
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} (one per tensor of {of}), got {len(value)}")


def expect_int(name: str, value: object) -> int:
    """An int that is not a bool; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    return value


def expect_device(name: str, value: torch.device | str) -> torch.device:
    """A device, which torch sees if it is a GPU of CUDA; ValueError otherwise."""
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a torch device, got {value!r} ({error})") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"{name}: expected a GPU out of the {count} that torch sees, got {value}"
            )
    return device


def expect_range(name: str, value: object, limit: int) -> int:
    """An int in [0, limit), limit a power of two; TypeError or ValueError otherwise."""
    number = expect_int(name, value)
    if not 0 <= number < limit:
        raise ValueError(f"{name}: expected 0 <= {name} < 2^{limit.bit_length() - 1}, got {number}")
    return number


def expect_words(name: str, value: object) -> list[int]:
    """A list of ints in [0, 2^32); TypeError or ValueError otherwise."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of ints, got {type(value).__name__}")
    return [expect_range(f"{name}[{i}]", item, 1 << 32) for i, item in enumerate(value)]


def expect_finite(name: str, value: object) -> float:
    """A finite number in float32's range, as float; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__} ({value!r})")
    if not math.isfinite(value) or abs(value) > FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite float32 value, got {value}")
    return float(value)


def expect_numbers(name: str, value: object) -> list[float]:
    """A list of such numbers."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of floats, got {type(value).__name__}")
    return [expect_finite(f"{name}[{i}]", item) for i, item in enumerate(value)]


def scale_table(
    scales: object, tensors: int, directions: int, name: str = "scales"
) -> list[list[float]]:
    """One row of factors per tensor, one factor per direction, from either form of scales."""
    if not isinstance(scales, (list, tuple)):
        raise TypeError(f"{name}: expected a list of floats, got {type(scales).__name__}")
    if any(isinstance(row, (list, tuple)) for row in scales):
        expect_length(name, scales, tensors)
        table = [expect_numbers(f"{name}[{i}]", row) for i, row in enumerate(scales)]
    else:
        table = [expect_numbers(name, scales)] * tensors
    for row in table:
        if len(row) != directions:
            raise ValueError(f"{name}: expected {directions} (one per direction), got {len(row)}")
    return table


def check_tensor(name: str, tensor: Tensor) -> None:
    """A strided, contiguous tensor of a supported dtype with data; TypeError or ValueError."""
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


def check_pair(name: str, tensor: Tensor, other: Tensor, of: str) -> None:
    """The shape and device of the other tensor, which is one of ``of``; ValueError otherwise."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(other.shape)} as {of}, got {tuple(tensor.shape)}"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {of}, got {tensor.device}")


def check_residual(name: str, residual: Tensor, tensor: Tensor) -> None:
    """Contiguous int8 of the tensor's shape, empty for float32, and on its device."""
    shape = (0,) if tensor.dtype == torch.float32 else tuple(tensor.shape)
    if residual.dtype != torch.int8 or not residual.is_contiguous():
        raise TypeError(
            f"{name}: expected contiguous int8, got {residual.dtype} with strides "
            f"{residual.stride()}"
        )
    if tuple(residual.shape) != shape or residual.device != tensor.device:
        raise ValueError(
            f"{name}: expected shape {shape} on {tensor.device}, got {tuple(residual.shape)} on "
            f"{residual.device}"
        )


def check_offset(name: str, offset: int, numel: int) -> None:
    """ValueError unless all element indices are in [0, 2^62)."""
    if not 0 <= offset <= INDEX_LIMIT - numel:
        raise ValueError(f"{name}: expected 0 <= offset <= 2^62 - {numel}, got {offset}")


def check_changes(changes: object, dst: Sequence[Tensor]) -> None:
    """A contiguous float64 tensor of shape (len(dst), 3) on dst's one device."""
    if not isinstance(changes, Tensor):
        raise TypeError(f"changes: expected a tensor, got {type(changes).__name__}")
    if changes.dtype != torch.float64 or changes.shape != (len(dst), 3):
        raise ValueError(
            f"changes: expected float64 of shape ({len(dst)}, 3), got {changes.dtype} of shape "
            f"{tuple(changes.shape)}"
        )
    if not changes.is_contiguous() or any(d.device != changes.device for d in dst):
        raise ValueError(
            f"changes: expected a contiguous tensor on the device of all dst, got one on "
            f"{changes.device} with strides {changes.stride()}"
        )


def check_device_scales(
    scales: object, directions: object, dst: Sequence[Tensor], src: Sequence[Tensor]
) -> None:
    """scales and directions as tensors on the one device of dst, for one launch of one op."""
    if not isinstance(scales, Tensor) or not isinstance(directions, Tensor):
        raise TypeError(
            "scales and directions: expected both as lists or both as tensors, got "
            f"{type(scales).__name__} and {type(directions).__name__}"
        )
    count = directions.numel()
    if directions.dtype != torch.int64 or directions.dim() != 1 or not count:
        raise ValueError(
            "directions: expected a list, or int64 of shape (K,) with K > 0, got "
            f"{directions.dtype} of shape {tuple(directions.shape)}"
        )
    shapes = [(count,), (len(dst), count)]
    if scales.dtype != torch.float32 or tuple(scales.shape) not in shapes:
        raise ValueError(
            f"scales: expected a list, or float32 of shape {shapes[0]} or {shapes[1]}, got "
            f"{scales.dtype} of shape {tuple(scales.shape)}"
        )
    for name, tensor in (("scales", scales), ("directions", directions)):
        if not tensor.is_contiguous() or any(d.device != tensor.device for d in dst):
            raise ValueError(
                f"{name}: expected a contiguous tensor on the device of all dst, got one on "
                f"{tensor.device} with strides {tensor.stride()}"
            )
    if len({s is d for d, s in zip(dst, src, strict=True)}) > 1:
        raise ValueError(
            "scales: expected a list where some pairs are in place and others are not, got a tensor"
        )


def check_overlap(dst: Sequence[Tensor], src: Sequence[Tensor], *, in_place: bool = True) -> None:
    """dst tensors are pairwise disjoint, and each src touches no dst or, in place, is its dst."""

    def span(tensor: Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        return start, start + tensor.numel() * tensor.element_size()

    spans = [(*span(d), "dst", i) for i, d in enumerate(dst) if d.numel()]
    for i, (d, s) in enumerate(zip(dst, src, strict=True)):
        same = s is d or (s.data_ptr() == d.data_ptr() and s.dtype == d.dtype)
        if s.numel() and not (in_place and same):
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
