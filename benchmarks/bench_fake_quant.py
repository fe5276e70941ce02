"""Fake quantisation of a 4096 x 4096 matrix against a copy and against torch's operations.

Run: python -m pytest benchmarks/bench_fake_quant.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels.formats import NF4_LEVELS, NF4_MIDPOINTS
from zo_kernels.pipeline.timing import interleave, median_ratio, medians

SIZE = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = [
    *((f"int{bits}", {"group_size": 128}) for bits in (8, 4, 3, 2)),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": "row"}),
    ("int4", {"group_size": "tensor"}),
    ("int4", {"group_size": 128, "symmetric": False}),
    ("int4", {"group_size": 32, "symmetric": False}),
    ("nf4", {}),
    ("nf4", {"double_quant": True}),
    ("fp8_e4m3", {"group_size": "row"}),
    ("fp8_e5m2", {"group_size": "row"}),
    ("mxfp4", {}),
    ("nvfp4", {}),
]


def name_of(scheme: str, options: dict[str, object]) -> str:
    """As in the tables: "int4 128 asymmetric"."""
    words = {"symmetric": "asymmetric", "double_quant": "double"}
    return " ".join([scheme, *(words.get(k, str(v)) for k, v in options.items())])


def matrix(dtype: torch.dtype) -> Tensor:
    """A linear layer's weights."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SIZE, SIZE, generator=generator) * 0.02).to(dtype)


def by_torch(scheme: str, options: dict[str, object]) -> Callable[[Tensor], Tensor] | None:
    """What one writes in torch for the scheme, in the tensor's dtype; None where nobody does."""
    size = options.get("group_size", 64)

    def integers(w: Tensor) -> Tensor:
        groups = w.view(-1, w.shape[1] if size == "row" else size)
        top = 2 ** (int(scheme[3:]) - 1) - 1
        scale = groups.abs().amax(1, keepdim=True) / top
        return (groups / scale).round().clamp(-top, top).mul(scale).view(w.shape)

    def asymmetric(w: Tensor) -> Tensor:
        groups = w.view(-1, size)
        top = 2 ** int(scheme[3:]) - 1
        low = groups.amin(1, keepdim=True).clamp(max=0)
        scale = (groups.amax(1, keepdim=True).clamp(min=0) - low) / top
        zero = (-low / scale).round()
        return (groups / scale).round().add(zero).clamp(0, top).sub(zero).mul(scale).view(w.shape)

    def nf4(w: Tensor) -> Tensor:
        groups = w.view(-1, size)
        most = groups.abs().amax(1, keepdim=True)
        levels = torch.tensor(NF4_LEVELS, dtype=w.dtype)
        places = torch.bucketize(groups / most, torch.tensor(NF4_MIDPOINTS, dtype=w.dtype))
        return (levels[places] * most).view(w.shape)

    def fp8(w: Tensor) -> Tensor:
        form = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[scheme]
        scale = w.abs().amax(1, keepdim=True) / torch.finfo(form).max
        return (w / scale).to(form).to(w.dtype) * scale

    if scheme.startswith("int"):
        if size == "tensor":
            return None
        return integers if options.get("symmetric", True) else asymmetric
    if scheme == "nf4" and not options.get("double_quant"):
        return nf4
    return fp8 if scheme.startswith("fp8") else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme, options", SCHEMES, ids=[name_of(*s) for s in SCHEMES])
def test_fake_quant(benchmark, report, rounds, scheme, options, dtype):
    """One thread: into a buffer, in place, torch's operations, and a copy."""
    tensor = matrix(dtype)
    buffer = torch.empty_like(tensor)
    rounded = zk.fake_quant(tensor, scheme, **options)  # which in place stays as it is
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {
        "copy_": lambda: buffer.copy_(tensor),
        "zk.fake_quant": lambda: zk.fake_quant(tensor, scheme, out=buffer, **options),
        "zk.fake_quant in place": lambda: zk.fake_quant(rounded, scheme, out=rounded, **options),
    }
    rival = by_torch(scheme, options)
    if rival:
        cases["torch's operations"] = lambda: rival(tensor)
    times = interleave(cases, rounds(9))
    torch.set_num_threads(before)
    ratios = {
        f"{name} / copy_": median_ratio(times, name, "copy_") for name in cases if name[0] == "z"
    }
    if rival:
        ratios["torch's / zk.fake_quant"] = median_ratio(
            times, "torch's operations", "zk.fake_quant"
        )
    rates = {f"{name} (G/s)": SIZE**2 / t / 1e9 for name, t in medians(times).items()}
    report(f"{name_of(scheme, options)}, {dtype}", rates, ratios)
    benchmark.pedantic(cases["zk.fake_quant"], rounds=3)
