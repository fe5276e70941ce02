"""Fake quantisation as a public operation: validate, dispatch by device, register with torch.

The formats and the arithmetic are stated in zo_kernels/formats.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.checks import check_tensor
from zo_kernels.ops import backend_for
from zo_kernels.ops.quant_arguments import (
    check_ends,
    check_format,
    check_scales,
    group_of,
    has_scales_of_scales,
)
from zo_kernels.scales import scales_of_scales


def fake_quant(
    tensor: Tensor,
    scheme: str,
    *,
    group_size: int | str | None = None,
    symmetric: bool = True,
    double_quant: bool = False,
    out: Tensor | None = None,
    check_finite: bool = True,
    name: str = "tensor",
    backend: str | None = None,
) -> Tensor:
    """Quantise a weight to a format and back: the values that a quantised model would use.

    Round to nearest, scales from the weight itself (absmax, or min and max), nothing calibrated.
    zo_kernels/formats.py has the formulas. All backends give the same bits.

    Args:
        tensor: (out, in), contiguous, float32, bfloat16 or float16. Not written, unless it is
            also ``out``. No gradient flows.
        scheme: "int2" to "int8", "nf4", "fp8_e4m3", "fp8_e5m2", "mxfp4" or "nvfp4".
        group_size: elements that share a scale: that many consecutive ones of a row, a divisor of
            the in dimension; "row" (one scale per output channel); "tensor" (one scale).
            None: 64 for nf4, 32 for mxfp4, 16 for nvfp4, "row" for the others.
        symmetric: of the integer schemes: False for a zero point and a range from min to max.
        double_quant: of nf4: the scales are quantised too, as QLoRA does.
        out: where the result goes: as tensor in shape, dtype and device, contiguous; the same
            tensor (in place) or memory apart from it. None: a new tensor.
        check_finite: False leaves out the look for NaN, infinity and a range too large, which on
            the CPU costs little; where there are any, the values of their groups are then
            undefined.
        name: what errors call the tensor.
        backend: None (by device: "triton" on a GPU, "native" on the CPU), "reference", "native"
            or "triton"; a named one never falls back.

    Returns:
        ``out``, or a new tensor of the shape and dtype of ``tensor``.

    Raises:
        TypeError, ValueError: naming the tensor or option, what was expected and what came. The
            tensor has its values then. Non-finite values are a ValueError, and so is a range so
            large that a value of the grid might overflow (asymmetric: max - min beyond the dtype);
            an ``out`` apart from the tensor has undefined values after these two, whose check is
            part of the one pass that "native" makes.
        RuntimeError: if the named backend is not available, with the reason.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_tensor(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape (out, in), got {tuple(tensor.shape)}")
    check_format(scheme, symmetric, double_quant, check_finite)
    group = group_of(tensor, scheme, group_size, name)
    if out is not None and out is not tensor:
        _check_out(out, tensor, name)
    backend_for(tensor.device, backend)  # refuse before anything is allocated
    options = (scheme, group, symmetric, double_quant, check_finite, name, backend or "")
    with torch.no_grad():
        if out is tensor:
            # An op of its own: a mutated argument must not alias another one.
            _in_place_op(tensor, *options)
            return tensor
        if out is None:
            out = torch.empty_like(tensor, requires_grad=False)
        _fake_quant_op(out, tensor, *options)
    return out


def _check_out(out: Tensor, tensor: Tensor, name: str) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor or None, got {type(out).__name__}")
    check_tensor("out", out)
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(tensor, what), getattr(out, what)
        if wanted != got:
            raise ValueError(f"out: expected {what} {wanted} as {name}, got {got}")


@torch.library.custom_op("zo_kernels::fake_quant", mutates_args={"out"})
def _fake_quant_op(
    out: Tensor,
    tensor: Tensor,
    scheme: str,
    group: int,
    symmetric: bool,
    double_quant: bool,
    check_finite: bool,
    name: str,
    backend: str,
) -> None:
    distance = abs(out.data_ptr() - tensor.data_ptr())
    if 0 < distance < tensor.numel() * tensor.element_size():
        raise ValueError(f"out: expected {name} itself or memory apart from it, got an overlap")
    _run(out, tensor, scheme, group, symmetric, double_quant, check_finite, name, backend)


@torch.library.custom_op("zo_kernels::fake_quant_", mutates_args={"tensor"})
def _in_place_op(
    tensor: Tensor,
    scheme: str,
    group: int,
    symmetric: bool,
    double_quant: bool,
    check_finite: bool,
    name: str,
    backend: str,
) -> None:
    _run(tensor, tensor, scheme, group, symmetric, double_quant, check_finite, name, backend)


def _run(
    out: Tensor,
    tensor: Tensor,
    scheme: str,
    group: int,
    symmetric: bool,
    double_quant: bool,
    check_finite: bool,
    name: str,
    backend: str,
) -> None:
    if tensor.numel() == 0:
        return
    room = backend_for(tensor.device, backend or None)
    scales, ends = None, None
    if has_scales_of_scales(scheme, double_quant):
        of_groups = room.group_ends(tensor, group=group).cpu()
        ends = of_groups[0].min().item(), of_groups[1].max().item()  # NaN wins
    elif check_finite and (out.data_ptr() == tensor.data_ptr() or not room.FAKE_QUANT_FINDS_ENDS):
        low, high = room.group_ends(tensor, group=tensor.numel()).flatten().tolist()
        ends = low, high
    if check_finite and ends is not None:
        check_ends(name, ends, tensor.dtype, scheme, symmetric)
    if has_scales_of_scales(scheme, double_quant):
        scales = scales_of_scales(scheme, of_groups)
        if check_finite:
            check_scales(name, scales, tensor.dtype, scheme)
        scales = scales.to(tensor.device)
    found = room.fake_quant(out, tensor, scheme, group=group, symmetric=symmetric, scales=scales)
    if check_finite and ends is None:
        check_ends(name, found, tensor.dtype, scheme, symmetric)


__all__ = ["fake_quant"]
