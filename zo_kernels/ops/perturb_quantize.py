"""Perturbed weights through the quantizer that they will be deployed with, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
from zo_kernels.ops.quant_arguments import (
    check_ends,
    check_format,
    check_scales,
    group_of,
    has_scales_of_scales,
)
from zo_kernels.scales import scales_of_scales


@torch.no_grad()
def perturb_quant(
    out: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    scheme: str,
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int] | None = None,
    group_size: int | str | None = None,
    symmetric: bool = True,
    double_quant: bool = False,
    distribution: str = "normal",
    check_finite: bool = True,
    names: Sequence[str] | None = None,
    backend: str | None = None,
) -> None:
    """out[i] = fake_quant(round(src[i] + scales[i] * z_i)), over lists of matrices.

    The bits are those of ``combine_`` into out with rounding to nearest, and ``fake_quant`` of that
    in place. One read of src and one write of out, but for two kinds of formats:

    - those whose scales need the whole tensor (nf4 with double quantisation, nvfp4) and groups of
      more than 2^16 elements (``group_size="tensor"``) take two walks on the CPU;
    - on a GPU those are separate kernels; so are groups that no program walks over alone, that
      have no multiple of 16 bytes or begin at no multiple of that in the full parameter, and
      everything with ``check_finite``, which waits for the device.

    Args:
        out, src: equally many contiguous matrices (out, in), float32, bfloat16 or float16; the two
            of one place have one shape, dtype and device. out overlaps nothing; src is not
            written.
        scales: one factor per tensor; rounded to float32.
        scheme, group_size, symmetric, double_quant: as for ``zk.fake_quant``.
        seed, direction, streams, offsets, distribution, backend: as for ``combine_``.
        check_finite: False leaves out the look for NaN, infinity and a range too large among the
            perturbed weights, which on the CPU costs nothing; where there are any, the values of
            their groups are then undefined.
        names: what errors call the tensors; default "src[0]" and on.

    Raises:
        TypeError, ValueError, RuntimeError: as ``combine_`` and ``zk.fake_quant``; nothing has been
            written then, but for perturbed weights that are not finite, or a range of them that
            is too large: out has undefined values after these.
    """
    out, src = expect_tensors("out", out), expect_tensors("src", src)
    scales = expect_numbers("scales", scales)
    for name, values in (("out", out), ("scales", scales)):
        expect_length(name, values, len(src), "src")
    names = [f"src[{i}]" for i in range(len(src))] if names is None else list(names)
    expect_length("names", names, len(src), "src")
    streams, offsets = check_lists("src", src, streams, offsets)
    noise = check_noise(seed, distribution)
    direction = expect_range("direction", direction, 1 << 32)
    check_format(scheme, symmetric, double_quant, check_finite)
    groups = []
    for i, (tensor, s) in enumerate(zip(out, src, strict=True)):
        check_tensor(f"out[{i}]", tensor)
        check_pair(f"out[{i}]", tensor, s, "src")
        if tensor.dtype != s.dtype:
            raise TypeError(f"out[{i}]: expected {s.dtype} as src, got {tensor.dtype}")
        if s.dim() != 2:
            raise ValueError(f"{names[i]}: expected shape (out, in), got {tuple(s.shape)}")
        groups.append(group_of(s, scheme, group_size, names[i]))
    rooms = rooms_of(src, backend)
    check_overlap(out, src, in_place=False)
    whole = has_scales_of_scales(scheme, double_quant)
    for room, _, members in rooms:
        for i in members:
            if src[i].numel() == 0:
                continue
            look = partial(
                check_ends, names[i], dtype=src[i].dtype, scheme=scheme, symmetric=symmetric
            )

            def scales_of(ends: Tensor, i: int = i) -> Tensor:
                scales = scales_of_scales(scheme, ends)
                if check_finite:
                    check_scales(names[i], scales, src[i].dtype, scheme)
                return scales

            room.perturb_quant(
                out[i],
                src[i],
                scales[i],
                scheme,
                group=groups[i],
                symmetric=symmetric,
                scales_of=scales_of if whole else None,
                look=look if check_finite else None,
                direction=direction,
                stream=streams[i],
                offset=offsets[i],
                **noise,
            )
