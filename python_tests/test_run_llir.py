"""The CPU that runs compiled GPU code: right where it runs, loud where it cannot.

Small Triton kernels compiled for sm_90 against torch; test_llir_instructions.py has single
instructions.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from compiled_route import compile_set
from helpers import assert_same_bits, special_values, weights

from zo_kernels.backends import reference

pytest.importorskip("triton")
import run_llir
from llir_kernels import TRANSPOSED
from run_llir import Compiled, Kernel, MemoryFault

if reason := run_llir.unavailable_reason():
    pytest.skip(reason, allow_module_level=True)
BOTH = pytest.mark.parametrize("backwards", [False, True])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """The kernels of llir_kernels.py by name."""
    folder = tmp_path_factory.mktemp("small")
    compile_set("small", folder)
    return Compiled.read(folder)


@BOTH
@pytest.mark.parametrize("group", [16, 128])
def test_group_scale(compiled, group, backwards):
    """A maximum over lanes by shuffles, and correctly rounded division."""
    kernel = Kernel(compiled[f"group scale {group}"])
    assert any(site.startswith("shfl") for site in kernel.code.sites)
    rows = 100
    x = torch.randn(rows, group, generator=torch.Generator().manual_seed(group)).bfloat16()
    x[7] = 0  # 0 / 0
    q, scales = torch.full((rows, group), 9.0), torch.full((rows,), 9.0)
    arguments = {"x": x, "q": q, "scales": scales, "rows": rows}
    kernel.run((math.ceil(rows * group / 1024),), arguments, backwards=backwards)
    expected = x.float().abs().amax(1) / torch.tensor(7.0)
    assert_same_bits(scales, expected)
    assert_same_bits(q, x.float() / expected[:, None])


@BOTH
@pytest.mark.parametrize("name", ["fp32", "i32"])
def test_block_statistics(compiled, name, backwards):
    """Reductions over a program's four warps, through shared memory; any order gives these sums."""
    kernel = Kernel(compiled[f"block statistics {name}"])
    n = 2500
    x = torch.randint(-1000, 1000, (n,), generator=torch.Generator().manual_seed(1))
    x = x.to(torch.int32 if name == "i32" else torch.float32)
    out = torch.zeros(3, 3, dtype=x.dtype)
    kernel.run((3,), {"x": x, "out": out, "n": n}, backwards=backwards)
    parts = torch.cat([x, torch.zeros(3 * 1024 - n, dtype=x.dtype)]).view(3, 1024)
    expected = torch.stack([parts.sum(1), parts.amin(1), parts.amax(1)], 1)
    assert torch.equal(out, expected.to(x.dtype))


@BOTH
@pytest.mark.parametrize(("name", "rows", "columns"), TRANSPOSED)
def test_transpose(compiled, name, rows, columns, backwards):
    """A change of layout: plain shared accesses, ldmatrix or stmatrix."""
    kernel = Kernel(compiled[f"transpose {name} {rows} {columns}"])
    x = weights((2, rows, columns), DTYPES[name], seed=rows)
    out = torch.empty(2, columns, rows, dtype=x.dtype)
    kernel.run((2,), {"x": x, "out": out}, backwards=backwards)
    assert_same_bits(out, x.transpose(1, 2).contiguous())


def test_transposes_cover_matrix_instructions(compiled):
    used = " ".join(compiled[f"transpose {n} {r} {c}"].ir for n, r, c in TRANSPOSED)
    for name in ("ldmatrix.sync.aligned.m8n8.x4.trans", "stmatrix.sync.aligned.m8n8.x4"):
        assert name in used


def test_missing_barrier_shows(compiled):
    """Without its barriers the reduction reads what is not there yet, in one of the two orders."""
    name = "block statistics fp32"
    ir, count = re.subn(r".*call void @llvm\.nvvm\.barrier.*\n", "", compiled[name].ir)
    assert count > 0
    kernel, sums = Kernel(replace(compiled[name], ir=ir)), []
    for backwards in (False, True):
        out = torch.zeros(3)
        kernel.run((1,), {"x": torch.ones(1024), "out": out, "n": 1024}, backwards=backwards)
        sums.append(out[0].item())
    assert sums != [1024, 1024]


def test_round(compiled):
    """float32 to bfloat16, float16 and FP8, which saturates, and back."""
    x = torch.cat([special_values(torch.float32), weights(5000, torch.float32)])
    fine = torch.linspace(-480, 480, 20_001)
    x = torch.cat([x, fine, fine / 2**14, fine / 2**40])
    n = x.numel()
    results = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    out = {name: torch.empty(n, dtype=dtype) for name, dtype in results.items()}
    out["back"] = torch.empty(n)
    Kernel(compiled["round"]).run((math.ceil(n / 1024),), {"x": x, "n": n} | out)
    assert_same_bits(out["bf16"], x.bfloat16())
    assert_same_bits(out["fp16"], x.half())
    fp8 = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    number = ~x.isnan()
    assert torch.equal(out["fp8"].view(torch.uint8)[number], fp8.view(torch.uint8)[number])
    assert_same_bits(out["back"], fp8.float())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_dither(compiled, name):
    x = weights(20_000, torch.float32, seed=3)
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(0, 1 << 16, (x.numel(),), generator=generator, dtype=torch.int32)
    out = torch.empty(x.numel(), dtype=DTYPES[name])
    arguments = {"x": x, "words": words, "out": out, "n": x.numel()}
    Kernel(compiled[f"dither {name}"]).run((20,), arguments)
    assert_same_bits(out, reference.round_stochastic(x, words.long(), DTYPES[name]))


def test_false_alignment_is_caught(compiled):
    """A view that the compiler was told is aligned, and is not."""
    x = weights(4000, torch.bfloat16)
    arguments = {"x": x[1:2049], "out": torch.empty(2048, dtype=x.dtype)}
    assert "ld.global.v4.b32" in Kernel(compiled["copy aligned"]).code.sites
    fault = r"misaligned: ld\.global\.v4\.b32, 16 bytes at.*offset 0 of x"
    with pytest.raises(MemoryFault, match=fault):
        Kernel(compiled["copy aligned"]).run((2,), arguments)
    Kernel(compiled["copy"]).run((2,), arguments)
    assert_same_bits(arguments["out"], arguments["x"])


def test_arguments(compiled):
    kernel, x = Kernel(compiled["round"]), torch.zeros(16)
    with pytest.raises(TypeError, match=r"expected arguments \['back', .*, 'x'\], got \['x'\]"):
        kernel.run((1,), {"x": x})
    given = {"x": x, "bf16": x.bfloat16(), "fp16": x.half(), "fp8": x.to(torch.float8_e4m3fn)}
    given |= {"back": x.clone(), "n": 16}
    with pytest.raises(TypeError, match=r"fp16: expected a tensor of torch\.float16"):
        kernel.run((1,), given | {"fp16": x})
    with pytest.raises(ValueError, match="n: expected i32, got 4294967296"):
        kernel.run((1,), given | {"n": 1 << 32})
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        kernel.run((1,), given | {"x": x[::2]})
    with pytest.raises(ValueError, match="expected parameters"):
        Kernel(replace(compiled["copy"], arguments={"x": "*bf16", "n": "i32"}))
