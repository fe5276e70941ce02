"""Ahead-of-time compilation of the package's kernels, for GPUs that need not be here.

Each kernel file offers ``variants()``: the specialisations that a user's call can reach. A process
that compiles must not have TRITON_INTERPRET set, because the interpreter replaces the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

#: The architectures that are checked: A100, H100/H200, B200, MI300X, RX 7900.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        name: op, dtypes and options in words, unique: "combine bf16 stochastic".
        kernel: the ``triton.jit`` function.
        signature: Triton type of each runtime argument: {"table": "*i64", "tensors": "i32"}.
        constants: value of each ``tl.constexpr`` argument.
        aligned: pointer arguments known to be multiples of 16 bytes.
        lanes: threads per program; num_warps is lanes / warp size.
        bytes_per_element: read and written in global memory for one element of dst.
        dst_itemsize: bytes of one element of dst, of all outputs if there are several.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    lanes: int
    bytes_per_element: float
    dst_itemsize: int


def options(lanes: int, warp_size: int) -> dict[str, Any]:
    """Compiler options of every kernel: nothing contracted, and one thread per lane.

    The noise contract has no multiply-add but explicit fma. More threads than lanes (4 warps of 64
    for 128 lanes) would narrow the accesses to 8 bytes and send them through shared memory.
    """
    return {"enable_fp_fusion": False, "num_warps": lanes // warp_size}


def compile_variant(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Triton's compiled kernel: ``asm`` has "llir", "ptx", "cubin" or "amdgcn"; ``metadata``.

    Raises:
        RuntimeError: if the interpreter has taken the kernels' place in this process.
    """
    kernel = variant.kernel
    if type(kernel).__name__ == "InterpretedFunction":
        raise RuntimeError(
            "compile_variant: expected kernels of Triton's compiler, got the interpreter's; "
            "unset TRITON_INTERPRET"
        )
    names = kernel.arg_names
    missing = set(names) - set(variant.signature) - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: no type and no value for {sorted(missing)}")
    source = ASTSource(
        fn=kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    return triton.compile(source, target=target, options=options(variant.lanes, target.warp_size))
