"""Small kernels for test_run_llir.py: what warps and blocks do together, exact conversions."""

from __future__ import annotations

import triton
import triton.language as tl

from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.noise import round_stochastic

#: Type, rows and columns, each of which moves through shared memory in another way.
TRANSPOSED = [("fp32", 64, 64), ("bf16", 64, 64), ("bf16", 256, 8), ("fp32", 16, 128)]


@triton.jit
def group_scale_kernel(x, q, scales, rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Per row of GROUP: scale = max |x| / 7; q = x / scale, to the nearest integer."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = row < rows
    v = tl.load(x + at, mask=mask[:, None], other=0.0).to(tl.float32)
    scale = tl.math.div_rn(tl.max(tl.abs(v), axis=1), 7.0)
    tl.store(scales + row, scale, mask=mask)
    tl.store(q + at, tl.math.div_rn(v, scale[:, None]), mask=mask[:, None])


@triton.jit
def block_statistics_kernel(x, out, n, BLOCK: tl.constexpr):
    """Sum, smallest and largest of each program's BLOCK elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    row = out + tl.program_id(0) * 3
    tl.store(row, tl.sum(v))
    tl.store(row + 1, tl.min(v))
    tl.store(row + 2, tl.max(v))


@triton.jit
def transpose_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x transposed, (ROWS, COLUMNS) per program."""
    base = tl.program_id(0) * ROWS * COLUMNS
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    v = tl.load(x + base + r[:, None] * COLUMNS + c[None, :])
    tl.store(out + base + c[:, None] * ROWS + r[None, :], tl.trans(v))


@triton.jit
def copy_kernel(x, out, BLOCK: tl.constexpr):
    """out = x, in accesses as wide as the pointers' alignment allows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def round_kernel(x, bf16, fp16, fp8, back, n, BLOCK: tl.constexpr):
    """x rounded to 16 and 8 bits, and the 8 bits as float32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0.0)
    tl.store(bf16 + i, v.to(tl.bfloat16), mask=mask)
    tl.store(fp16 + i, v.to(tl.float16), mask=mask)
    small = v.to(tl.float8e4nv)
    tl.store(fp8 + i, small, mask=mask)
    tl.store(back + i, small.to(tl.float32), mask=mask)


@triton.jit
def dither_kernel(x, words, out, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """x rounded stochastically by the low 16 bits of words."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0.0)
    bits = tl.load(words + i, mask=mask, other=0).to(tl.uint32, bitcast=True) & 0xFFFF
    tl.store(out + i, round_stochastic(v, bits, DTYPE), mask=mask)


def variants() -> list[Variant]:
    """One of each kernel, and more where the dtype changes how data moves."""
    result = []

    def add(name, kernel, signature, constants, aligned=None) -> None:
        pointers = [n for n, kind in signature.items() if kind.startswith("*")]
        aligned = tuple(pointers if aligned is None else aligned)
        result.append(Variant(name, kernel, signature, constants, aligned, 128, 0.0, 0))

    groups = {"x": "*bf16", "q": "*fp32", "scales": "*fp32", "rows": "i32"}
    for group in (16, 128):
        constants = {"GROUP": group, "ROWS": 1024 // group}
        add(f"group scale {group}", group_scale_kernel, groups, constants)
    for name in ("fp32", "i32"):
        signature = {"x": f"*{name}", "out": f"*{name}", "n": "i32"}
        add(f"block statistics {name}", block_statistics_kernel, signature, {"BLOCK": 1024})
    for name, rows, columns in TRANSPOSED:
        signature = {"x": f"*{name}", "out": f"*{name}"}
        constants = {"ROWS": rows, "COLUMNS": columns}
        add(f"transpose {name} {rows} {columns}", transpose_kernel, signature, constants)
    copied = {"x": "*bf16", "out": "*bf16"}
    add("copy aligned", copy_kernel, copied, {"BLOCK": 1024})
    add("copy", copy_kernel, copied, {"BLOCK": 1024}, aligned=())
    rounded = {"x": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp8": "*fp8e4nv"}
    add("round", round_kernel, rounded | {"back": "*fp32", "n": "i32"}, {"BLOCK": 1024})
    for name, dtype in (("bf16", tl.bfloat16), ("fp16", tl.float16)):
        signature = {"x": "*fp32", "words": "*i32", "out": f"*{name}", "n": "i32"}
        constants = {"DTYPE": dtype, "BLOCK": 1024}
        add(f"dither {name}", dither_kernel, signature, constants)
    return result
