"""The C++ extension: loaded once, explained when it cannot be, called with tensors' addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_kernels.formats import FORMATS
from zo_kernels.places import places

#: combine_ takes ``scales`` and ``directions`` as lists only.
DEVICE_SCALES = False
#: fake_quant returns the ends of the tensor.
FAKE_QUANT_FINDS_ENDS = True

# csrc/dispatch.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DISTRIBUTION_CODES = {"normal": 0, "rademacher": 1}
FORMAT_CODES = {("int", True): 0, ("int", False): 1, ("float", True): 2, ("nf4", True): 3}

try:
    from zo_kernels import _C
except ImportError as error:
    _C = None
    _reason = (
        f"the C++ extension zo_kernels._C did not load ({error}); build it with "
        "`pip install .` or `python setup.py build_ext --inplace`"
    )
else:
    _reason = None


def unavailable_reason() -> str | None:
    """Why this backend cannot be used, or None if it can."""
    return _reason


def available_isas() -> list[str]:
    """Instruction sets this processor and build offer, fastest first; empty without extension."""
    return [] if _C is None else _C.available_isas()


def isa() -> str:
    """The instruction set in use: ``ZO_KERNELS_ISA`` if set, else the fastest available.

    Raises:
        RuntimeError: without extension, or if ZO_KERNELS_ISA names one this processor lacks.
    """
    if _C is None:
        raise RuntimeError(f"backend 'native': {_reason}")
    wanted = os.environ.get("ZO_KERNELS_ISA")
    names = _C.available_isas()
    if wanted and wanted not in names:
        raise RuntimeError(
            f"ZO_KERNELS_ISA: expected one of {', '.join(names)} on this processor, got '{wanted}'"
        )
    return wanted or names[0]


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[Sequence[float]],
    *,
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> None:
    """dst = round(src_scale * src + sum_k scales[.][k] z_k); see zo_kernels.ops.combine_."""
    pairs = places((s.dtype, d.dtype) for d, s in zip(dst, src, strict=True))
    for (src_dtype, dst_dtype), members in pairs.items():
        _C.combine(
            isa=isa(),
            dst=[dst[i].data_ptr() for i in members],
            src=[src[i].data_ptr() for i in members],
            numel=[dst[i].numel() for i in members],
            offset=[offsets[i] for i in members],
            stream=[streams[i] for i in members],
            direction=list(directions),
            scale=[c for i in members for c in scales[i]],
            src_scale=src_scale,
            seed=seed,
            src_dtype=DTYPE_CODES[src_dtype],
            dst_dtype=DTYPE_CODES[dst_dtype],
            stochastic=stochastic,
            distribution=DISTRIBUTION_CODES[distribution],
            changes=[] if changes is None else [changes[i].data_ptr() for i in members],
            threads=_threads(),
        )


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
    """plus, minus = round(src +- scales[.] z); see zo_kernels.ops.pair_."""
    for dtype, members in places(tensor.dtype for tensor in src).items():
        _C.pair(
            isa=isa(),
            plus=[plus[i].data_ptr() for i in members],
            minus=[minus[i].data_ptr() for i in members],
            src=[src[i].data_ptr() for i in members],
            numel=[src[i].numel() for i in members],
            offset=[offsets[i] for i in members],
            stream=[streams[i] for i in members],
            direction=direction,
            scale=[scales[i] for i in members],
            seed=seed,
            dtype=DTYPE_CODES[dtype],
            distribution=DISTRIBUTION_CODES[distribution],
            threads=_threads(),
        )


def advance_(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor] | None,
    scales: Sequence[Sequence[float]],
    *,
    seed: int,
    directions: Sequence[int],
    lengths: Sequence[int],
    src_scales: Sequence[float],
    streams: Sequence[int],
    offsets: Sequence[int],
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> None:
    """Updates of ``lengths`` directions each, one after the other; see zo_kernels.ops.advance_."""
    for dtype, members in places(tensor.dtype for tensor in tensors).items():
        joined = residuals is not None and dtype != torch.float32
        _C.advance(
            isa=isa(),
            dst=[tensors[i].data_ptr() for i in members],
            residual=[residuals[i].data_ptr() for i in members] if joined else [],
            numel=[tensors[i].numel() for i in members],
            offset=[offsets[i] for i in members],
            stream=[streams[i] for i in members],
            direction=directions,
            scale=[c for i in members for c in scales[i]],
            length=lengths,
            src_scale=src_scales,
            seed=seed,
            dtype=DTYPE_CODES[dtype],
            stochastic=stochastic,
            distribution=DISTRIBUTION_CODES[distribution],
            changes=[] if changes is None else [changes[i].data_ptr() for i in members],
            threads=_threads(),
        )


def swap_(
    tensors: Sequence[Tensor],
    store: _C.Store | None,
    held_scales: Sequence[float] | None,
    scales: Sequence[float] | None,
    *,
    keep: bool,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> _C.Store | None:
    """tensors = round(src_scale * w + scales[.] z), or w if scales is None; see ops/swap.py.

    Args:
        tensors: of one dtype, on one device.
        store, held_scales: what an earlier call returned and the scales that it was given, if the
            tensors hold w perturbed; None if they hold w.
        keep: whether to return what gives w back; src_scale is 1 then, rounding to nearest.

    After an exception the tensors hold w if there was no store; otherwise it still gives w back.
    """
    return _C.swap(
        isa=isa(),
        dst=[tensor.data_ptr() for tensor in tensors],
        numel=[tensor.numel() for tensor in tensors],
        offset=offsets,
        stream=streams,
        direction=direction,
        held=store,
        held_scale=[] if held_scales is None else held_scales,
        scale=[] if scales is None else scales,
        keep=keep,
        src_scale=src_scale,
        seed=seed,
        dtype=DTYPE_CODES[tensors[0].dtype],
        stochastic=stochastic,
        distribution=DISTRIBUTION_CODES[distribution],
        changes=[] if changes is None else [row.data_ptr() for row in changes],
        threads=_threads(),
    )


def fake_quant(
    out: Tensor,
    tensor: Tensor,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales: Tensor | None = None,
) -> tuple[float, float]:
    """out = tensor on the scheme's grid, a scale per group; see zo_kernels.quantize.fake_quant.

    Returns:
        The ends of all groups, found on the way: the least and the greatest element, 0 included;
        of symmetric schemes 0 and max|w|. NaN if there is one.
    """
    return _C.fake_quant(
        isa=isa(),
        dst=out.data_ptr(),
        src=tensor.data_ptr(),
        groups=tensor.numel() // group,
        group=group,
        dtype=DTYPE_CODES[tensor.dtype],
        format=_format(scheme, symmetric),
        scales=0 if scales is None else scales.data_ptr(),
        lows=0,
        highs=0,
        threads=_threads(),
    )


def _format(scheme: str, symmetric: bool) -> tuple[int, float, int, int, bool]:
    """Code, top, mantissa, min_exponent and power_of_two of a format, as bindings.cpp takes it."""
    form = FORMATS[scheme]
    code, top = FORMAT_CODES[form.kind, symmetric], form.top(symmetric)
    return code, top, form.mantissa, form.min_exponent, form.scale == "power_of_two"


#: Of whatever format, the least and the greatest element are found as for this one.
_ENDS = FORMAT_CODES["int", False], 1.0, 0, 0, False


def group_ends(tensor: Tensor, *, group: int) -> Tensor:
    """The least and the greatest element of each group, or 0; NaN wins: (2, groups) float32."""
    ends = torch.empty(2, tensor.numel() // group, dtype=torch.float32)
    _C.fake_quant(
        isa=isa(),
        dst=0,
        src=tensor.data_ptr(),
        groups=ends.shape[1],
        group=group,
        dtype=DTYPE_CODES[tensor.dtype],
        format=_ENDS,
        scales=0,
        lows=ends[0].data_ptr(),
        highs=ends[1].data_ptr(),
        threads=_threads(),
    )
    return ends


def perturb_quant(
    out: Tensor,
    src: Tensor,
    scale: float,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales_of: Callable[[Tensor], Tensor] | None,
    look: Callable[[tuple[float, float]], None] | None,
    seed: int,
    direction: int,
    stream: int,
    offset: int,
    distribution: str,
) -> None:
    """out = round(src + scale * z) on the scheme's grid; see zo_kernels.ops.perturb_quant.

    One pass over memory; two where scales_of is given, and for groups longer than 2^16. Arguments
    as in composed.py; the look is at what the pass has found.
    """
    ends = None if scales_of is None else torch.empty(2, src.numel() // group)
    found = _C.perturb_quant(
        isa=isa(),
        dst=out.data_ptr(),
        src=src.data_ptr(),
        groups=src.numel() // group,
        group=group,
        offset=offset,
        stream=stream,
        direction=direction,
        scale=scale,
        seed=seed,
        dtype=DTYPE_CODES[src.dtype],
        distribution=DISTRIBUTION_CODES[distribution],
        format=_format(scheme, symmetric) if ends is None else _ENDS,
        lows=0 if ends is None else ends[0].data_ptr(),
        highs=0 if ends is None else ends[1].data_ptr(),
        threads=_threads(),
    )
    if look is not None:
        look(found)
    if ends is not None:
        fake_quant(out, out, scheme, group=group, symmetric=symmetric, scales=scales_of(ends))


def normal(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z: (count,) float32."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    _C.normal(isa(), out.data_ptr(), count, offset, seed, direction, stream, _threads())
    return out


def rademacher(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z, +1 or -1: (count,) float32."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    _C.rademacher(isa(), out.data_ptr(), count, offset, seed, direction, stream, _threads())
    return out


def random_words(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Words of elements [offset, offset + count): (count,) int64 with values below 2^32."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    _C.random_words(isa(), out.data_ptr(), count, offset, seed, direction, stream, _threads())
    return out.long() & 0xFFFFFFFF


def _threads() -> int:
    return torch.get_num_threads()
