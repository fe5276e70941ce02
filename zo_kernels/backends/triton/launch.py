"""What the host prepares for a launch: the table of tensors, kept on the device between calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import torch
import triton.language as tl
from torch import Tensor

from zo_kernels.backends.triton import compile as _compile
from zo_kernels.backends.triton import perturb
from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.tiles import FIRST_TILE, LANES, ROW, STEPS

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_KEPT = 4096  # tables; one takes 56 bytes per tensor, at least 512 on a GPU
_tables: OrderedDict[tuple, tuple[Tensor, int]] = OrderedDict()
# Tables that a captured CUDA graph reads at each replay, of which nobody tells the end.
_captured: dict[tuple, tuple[Tensor, int]] = {}


def interpreting() -> bool:
    """Whether the kernels of this process run in Triton's interpreter."""
    return type(perturb.combine_kernel).__name__ == "InterpretedFunction"


def on(device: torch.device) -> AbstractContextManager:
    """Make the device current: models may be split over several, and Triton launches on one."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


def options(device: torch.device, lanes: int = LANES) -> dict:
    """Compiler options of a launch on the device; see compile.options."""
    if interpreting():
        return {}
    # AMD's data centre GPUs have warps of 64; torch.xpu's Triton takes its own from 32.
    wide = device.type == "cuda" and torch.version.hip is not None
    warp_size = torch.cuda.get_device_properties(device).warp_size if wide else 32
    return _compile.options(lanes, warp_size)


def signed(word: int) -> int:
    """The int32 with the bit pattern of a u32 (Triton types integers by their value)."""
    return word - (1 << 32) if word >> 31 else word


def _address(tensor: Tensor, offset: int) -> int:
    """Where element 0 of the full parameter would lie, modulo 2^64 as pointer arithmetic is."""
    address = tensor.data_ptr() - offset * tensor.element_size()
    return (address + (1 << 63)) % (1 << 64) - (1 << 63)


def tile_table(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    others: Sequence[Tensor] = (),
    steps: int = STEPS,
) -> tuple[Tensor, int]:
    """The int64 table (rows, tensors that are not empty) on the CPU, and the number of programs.

    ``rows`` are the tensors' places in the scales; ``others`` are tensors for the row OTHER, one
    per tensor, or none. A tensor's tiles begin where its memory is aligned (tile_of's ``shift``).
    """
    tile = LANES * 8 * steps
    columns, programs = [], 0
    for i, d in enumerate(dst):
        if d.numel() == 0:
            continue
        offset = offsets[i]
        address = _address(d, offset)
        chunk = 16 // d.element_size()
        ahead = -(-address % 16 // d.element_size()) % chunk  # -shift
        begin, end = offset + ahead, offset + d.numel() + ahead
        columns.append(
            (
                programs,
                address,
                _address(src[i], offset),
                offset,
                offset + d.numel(),
                streams[i],
                rows[i],
                *(_address(other[i], offset) for other in (others,) if other),
            )
        )
        programs += -(-end // tile) - begin // tile
    return torch.tensor(columns, dtype=torch.int64).t().contiguous(), programs


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_table(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    device: torch.device,
    others: Sequence[Tensor] = (),
) -> tuple[Tensor, int]:
    """``tile_table`` on the device; made once for the same memory, streams and offsets.

    Raises:
        RuntimeError: while a CUDA graph is captured, if the table is not there yet.
    """
    key = (
        device,
        tuple((d.data_ptr(), d.numel(), d.dtype) for d in dst),
        tuple((s.data_ptr(), s.dtype) for s in src),
        tuple(o.data_ptr() for o in others),
        tuple(streams),
        tuple(offsets),
        tuple(rows),
    )
    found = _captured.get(key) or _tables.get(key)
    capturing = _capturing(device)
    if found is not None:
        if capturing:
            _captured[key] = found
        if key in _tables:
            _tables.move_to_end(key)
        return found
    if capturing:
        raise RuntimeError(
            "expected the same call once before the capture of a CUDA graph, got a list "
            "of tensors whose table is not on the device yet"
        )
    table, programs = tile_table(dst, src, streams, offsets, rows, others)
    _tables[key] = table.to(device), programs
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return _tables[key]


def in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors as flat ones on the device; the larger dtypes first."""
    both = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    parts = both.to(device, non_blocking=True).split([tensor.nbytes for tensor in tensors])
    return [part.view(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def device_arguments(
    scales: Sequence[Sequence[float]], directions: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """scales as float32 (tensors, K) and directions as int64 (K,) on the device, in one copy."""
    rows = torch.tensor(scales, dtype=torch.float32)
    words = torch.tensor(directions, dtype=torch.int64)
    words, rows = in_one_copy([words, rows], device)
    return rows, words


def partial_sums(grid: int, changes: bool, device: torch.device) -> Tensor:
    """Where the programs of a launch leave their sums for ``sum_changes``, if changes are asked."""
    shape = (3, grid, LANES) if changes else 1
    return torch.empty(shape, dtype=torch.float32, device=device)


def combine(
    table: Tensor,
    grid: int,
    scales: Tensor,
    directions: Tensor,
    partials: Tensor,
    seed: int,
    src_scale: float,
    options: dict,
    constants: dict,
) -> None:
    """Launch combine_kernel; the device is current."""
    perturb.combine_kernel[(grid,)](
        table,
        scales,
        directions,
        partials,
        table.shape[1],
        directions.numel(),
        signed(seed & 0xFFFFFFFF),
        signed(seed >> 32),
        float(src_scale),
        **constants,
        **options,
    )


def columns_of_tiles(table: Tensor, tiles: int) -> Tensor:
    """The column of each program's tile: int64 (tiles,), on the table's device."""
    programs = torch.arange(tiles, device=table.device)
    return torch.searchsorted(table[FIRST_TILE].contiguous(), programs, right=True) - 1


def sum_changes(partials: Tensor, table: Tensor, changes: Tensor) -> None:
    """Add the kernel's partial sums (3, programs, LANES) to the tensors' rows of ``changes``.

    All on the device: nothing waits for the host, and a CUDA graph can hold it.
    """
    sums = partials.double().sum(-1).t()
    changes.index_add_(0, table[ROW][columns_of_tiles(table, len(sums))], sums)


_SIGNATURE = {
    "table": "*i64",
    "scales": "*fp32",
    "directions": "*i64",
    "partials": "*fp32",
    "tensors": "i32",
    "directions_count": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "src_scale": "fp32",
}
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def constants(
    src_dtype: torch.dtype,
    dst_dtype: torch.dtype,
    *,
    stochastic: bool = False,
    rademacher: bool = False,
    single: bool = True,
    scale_src: bool = False,
    changes: bool = False,
    pair: bool = False,
) -> dict[str, object]:
    """The ``tl.constexpr`` arguments of combine_kernel."""
    return {
        "SRC_DTYPE": TRITON_DTYPES[src_dtype],
        "DST_DTYPE": TRITON_DTYPES[dst_dtype],
        "SRC_ITEMSIZE": src_dtype.itemsize,
        "DST_ITEMSIZE": dst_dtype.itemsize,
        "RADEMACHER": rademacher,
        "STOCHASTIC": stochastic and dst_dtype != torch.float32,
        "SCALE_SRC": scale_src,
        "SINGLE": single,
        "CHANGES": changes,
        "PAIR": pair,
        "LANES": LANES,
        "STEPS": STEPS,
    }


def variant(
    src_dtype: torch.dtype, dst_dtype: torch.dtype | None = None, **options: bool
) -> Variant:
    """One specialisation of combine_kernel; options as for ``constants``."""
    dst_dtype = src_dtype if dst_dtype is None else dst_dtype
    dtypes = list(dict.fromkeys((SHORT_NAMES[src_dtype], SHORT_NAMES[dst_dtype])))
    pair = options.get("pair", False)
    words = [name for name, on in options.items() if on and name not in ("single", "pair")]
    words += ["directions"] if options.get("single") is False else []
    return Variant(
        name=" ".join(["pair" if pair else "combine", "-".join(dtypes), *words]),
        kernel=perturb.combine_kernel,
        signature=_SIGNATURE,
        constants=constants(src_dtype, dst_dtype, **options),
        aligned=(),
        lanes=LANES,
        bytes_per_element=float(src_dtype.itemsize + dst_dtype.itemsize * (1 + pair)),
        dst_itemsize=dst_dtype.itemsize * (1 + pair),
    )


def variants() -> list[Variant]:
    """What the modes of ZOSGD launch, and pair_."""
    fp32, bf16, fp16 = TRITON_DTYPES
    in_place = [
        variant(dtype, stochastic=stochastic, rademacher=rademacher, single=single)
        for dtype, rademacher, single, stochastic in product(
            (bf16, fp16, fp32), (False, True), (True, False), (False, True)
        )
        if not (stochastic and dtype == fp32)
    ]
    others = [
        variant(fp32, bf16),
        variant(bf16, fp32),
        variant(bf16, stochastic=True, changes=True),
        variant(bf16, stochastic=True, scale_src=True),
    ]
    pairs = [
        variant(dtype, rademacher=rademacher, pair=True)
        for dtype, rademacher in product((bf16, fp16, fp32), (False, True))
    ]
    return in_place + others + pairs
