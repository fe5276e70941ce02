"""The two-point pair and logged updates: what the host does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from zo_kernels.backends.triton import advance, launch
from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.tiles import LANES, STEPS
from zo_kernels.places import places


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
    for dtype, members in places(tensor.dtype for tensor in src).items():
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


def _update_arguments(
    scales: Sequence[Sequence[float]],
    directions: Sequence[int],
    lengths: Sequence[int],
    src_scales: Sequence[float],
    device: torch.device,
) -> list[Tensor]:
    """directions, scales, factors and ends of advance_kernel on the device, in one copy."""
    last = torch.tensor(lengths).cumsum(0) - 1
    ends = torch.zeros(len(directions), dtype=torch.int32)
    ends[last] = 1
    factors = torch.ones(len(directions))
    factors[last + 1 - torch.tensor(lengths)] = torch.tensor(src_scales, dtype=torch.float32)
    words = torch.tensor(directions, dtype=torch.int64)
    rows = torch.tensor(scales, dtype=torch.float32)
    return launch.in_one_copy([words, rows, factors, ends], device)


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
    """Updates of ``lengths`` directions each; see zo_kernels.ops.advance_. One launch per dtype."""
    device = tensors[0].device
    words, rows, factors, ends = _update_arguments(scales, directions, lengths, src_scales, device)
    if changes is not None:
        changes.zero_()
    for dtype, members in places(tensor.dtype for tensor in tensors).items():
        joined = residuals is not None and dtype != torch.float32
        group = [tensors[i] for i in members]
        table, grid = launch.device_table(
            group,
            group,
            [streams[i] for i in members],
            [offsets[i] for i in members],
            members,
            device,
            [residuals[i] for i in members] if joined else (),
        )
        if grid == 0:
            continue
        partials = launch.partial_sums(grid, changes is not None, device)
        with launch.on(device):
            advance.advance_kernel[(grid,)](
                table,
                rows,
                words,
                factors,
                ends,
                partials,
                table.shape[1],
                len(directions),
                launch.signed(seed & 0xFFFFFFFF),
                launch.signed(seed >> 32),
                **_constants(
                    dtype,
                    stochastic=stochastic,
                    rademacher=distribution == "rademacher",
                    residuals=joined,
                    scale_src=any(factor != 1.0 for factor in src_scales),
                    single=all(length == 1 for length in lengths),
                    changes=changes is not None,
                ),
                **launch.options(device),
            )
        if changes is not None:
            launch.sum_changes(partials, table, changes)


def _constants(
    dtype: torch.dtype,
    *,
    stochastic: bool = False,
    rademacher: bool = False,
    residuals: bool = False,
    scale_src: bool = False,
    single: bool = True,
    changes: bool = False,
) -> dict[str, object]:
    """The ``tl.constexpr`` arguments of advance_kernel."""
    return {
        "DTYPE": launch.TRITON_DTYPES[dtype],
        "ITEMSIZE": dtype.itemsize,
        "RADEMACHER": rademacher,
        "STOCHASTIC": stochastic and dtype != torch.float32,
        "JOINED": residuals,
        "SCALE_SRC": scale_src,
        "SINGLE": single,
        "CHANGES": changes,
        "LANES": LANES,
        "STEPS": STEPS,
    }


_SIGNATURE = {
    "table": "*i64",
    "scales": "*fp32",
    "directions": "*i64",
    "factors": "*fp32",
    "ends": "*i32",
    "partials": "*fp32",
    "tensors": "i32",
    "directions_count": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
}


def variant(dtype: torch.dtype, **options: bool) -> Variant:
    """One specialisation of advance_kernel; options as for ``_constants``."""
    words = [name for name, on in options.items() if on and name != "single"]
    words += ["directions"] if options.get("single") is False else []
    residuals = options.get("residuals", False)
    return Variant(
        name=" ".join(["advance", launch.SHORT_NAMES[dtype], *words]),
        kernel=advance.advance_kernel,
        signature=_SIGNATURE,
        constants=_constants(dtype, **options),
        aligned=(),
        lanes=LANES,
        bytes_per_element=2.0 * (dtype.itemsize + residuals),
        dst_itemsize=dtype.itemsize,
    )


def variants() -> list[Variant]:
    """What the replay of a log launches."""
    fp32, bf16, fp16 = launch.TRITON_DTYPES
    plain = [
        variant(dtype, rademacher=rademacher, stochastic=stochastic)
        for dtype, rademacher, stochastic in product(
            (bf16, fp16, fp32), (False, True), (False, True)
        )
        if not (stochastic and dtype == fp32)
    ]
    others = [
        variant(bf16, residuals=True),
        variant(fp16, residuals=True),
        variant(bf16, rademacher=True, residuals=True),
        variant(bf16, stochastic=True, single=False),
        variant(bf16, stochastic=True, scale_src=True, single=False),
        variant(bf16, residuals=True, scale_src=True, single=False),
        variant(bf16, stochastic=True, changes=True),
    ]
    return plain + others
