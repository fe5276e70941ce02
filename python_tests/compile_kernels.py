"""Compiles kernels for sm_90 and writes what run_llir.py runs; called by the tests.

`python compile_kernels.py FOLDER SET` writes NAME.ll, the LLVM IR, and NAME.json, the other fields
of run_llir.Compiled, for each variant of a set, "combine" to "small" (main).
Runs in a process of its own: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llir_kernels
import torch

from zo_kernels.backends.triton import (
    holding,
    launch,
    perturb,
    perturb_quantize,
    quantize,
    updates,
)
from zo_kernels.backends.triton.compile import TARGETS, Variant, compile_variant

# dtypes of src and dst, steps per program and options of the variants of combine_kernel that
# test_triton_compiled.py runs: each takes seconds to compile, so each is there for several reasons.
_fp32, _bf16, _fp16 = torch.float32, torch.bfloat16, torch.float16
COMBINE = [
    (_fp32, _fp32, 16, {}),
    (_bf16, _bf16, 16, {"stochastic": True}),
    (_fp16, _fp16, 16, {"stochastic": True}),
    (_fp32, _bf16, 4, {}),
    (_bf16, _fp32, 1, {"single": False, "scale_src": True}),
    (_fp16, _fp16, 4, {"single": False}),
    (_bf16, _bf16, 16, {"stochastic": True, "rademacher": True}),
    (_fp32, _fp32, 4, {"single": False, "rademacher": True}),
    (_fp16, _bf16, 1, {"stochastic": True, "changes": True}),
]
# The same for pair_.
PAIR = [
    (_bf16, _bf16, 16, {"pair": True}),
    (_fp16, _fp16, 4, {"pair": True, "rademacher": True}),
    (_fp32, _fp32, 1, {"pair": True}),
]
# dtype, steps and options of the variants of advance_kernel.
ADVANCE = [
    (_bf16, 16, {"stochastic": True}),
    (_fp16, 4, {"rademacher": True, "stochastic": True, "single": False}),
    (_fp32, 1, {"scale_src": True, "single": False}),
    (_bf16, 4, {"rademacher": True, "scale_src": True}),
    (_bf16, 16, {"residuals": True, "scale_src": True, "single": False}),
    (_fp16, 1, {"residuals": True, "rademacher": True}),
    (_fp16, 4, {"changes": True, "scale_src": True, "single": False}),
]
# Pass, dtype and options of the variants of swap_kernel, all with 4 steps.
SWAP = [
    ("hold count", _bf16, {}),
    ("hold", _bf16, {}),
    ("swap", _bf16, {}),
    ("release", _bf16, {}),
    ("release update", _bf16, {"stochastic": True, "scale_src": True, "changes": True}),
    ("hold count", _fp32, {"rademacher": True}),
    ("hold", _fp32, {"rademacher": True}),
    ("release", _fp32, {"rademacher": True}),
]
# Kernels and kinds of formats, each on one dtype at least.
FAKE_QUANT = [
    "fake_quant fp32 int4 g128",
    "fake_quant bf16 int4 g128",
    "fake_quant fp16 int4 g128",
    "fake_quant bf16 int4 g32",
    "fake_quant bf16 int4 asymmetric g64",
    "fake_quant fp16 int8 row 4096",
    "fake_quant bf16 int4 row 11008",
    "fake_quant fp32 int4 asymmetric row 11008",
    "fake_quant bf16 int8 tensor",
    "fake_quant fp32 nf4 g64",
    "fake_quant bf16 fp8_e4m3 row 4096",
    "fake_quant fp16 fp8_e5m2 g128",
    "fake_quant bf16 mxfp4 g32",
    "fake_quant bf16 nvfp4 g16",
    "fake_quant fp32 nvfp4 g16",
    "fake_quant bf16 nf4 double g64",
]
# Both fused kernels, kinds of formats, and distributions.
PERTURB_QUANT = [
    "perturb_quant bf16 int4 g128",
    "perturb_quant fp32 int4 g128 rademacher",
    "perturb_quant fp16 int4 g128 rademacher",
    "perturb_quant fp16 int4 asymmetric g64",
    "perturb_quant fp32 int8 row 4096",
    "perturb_quant bf16 int8 row 11008",
    "perturb_quant fp32 int4 asymmetric row 11008 rademacher",
    "perturb_quant bf16 nf4 g64",
    "perturb_quant fp16 mxfp4 g32",
]


def combine_variant(src: torch.dtype, dst: torch.dtype, steps: int, options: dict) -> Variant:
    """A variant of combine_kernel with STEPS steps per program."""
    return with_steps(launch.variant(src, dst, **options), steps)


def advance_variant(dtype: torch.dtype, steps: int, options: dict) -> Variant:
    """A variant of advance_kernel with STEPS steps per program."""
    return with_steps(updates.variant(dtype, **options), steps)


def with_steps(base: Variant, steps: int) -> Variant:
    """A variant with STEPS steps per program."""
    return replace(
        base,
        name=f"{base.name} {steps} steps",
        constants={**base.constants, "STEPS": steps},
    )


def emit_variants() -> list[Variant]:
    """emit_kernel, whose elements' indices have 32 bits or 64."""
    result = []
    for what, size in (("normal", 32), ("normal", 64), ("rademacher", 64), ("random_words", 64)):
        signature = {"out": "*i32" if what == "random_words" else "*fp32"}
        signature |= {"begin": f"i{size}", "end": f"i{size}", "seed_lo": "i32", "seed_hi": "i32"}
        signature |= {"stream": "i32", "direction": "i32"}
        constants = {"WHAT": what, "LANES": perturb.LANES}
        name = f"emit {what} {size}"
        fields = (name, perturb.emit_kernel, signature, constants, ("out",), perturb.LANES, 4.0, 4)
        result.append(Variant(*fields))
    return result


def write_ir(variants: Sequence[Variant], folder: Path) -> None:
    """What run_llir.Compiled.read reads."""
    for variant in variants:
        kernel = compile_variant(variant, TARGETS["sm_90"])
        names = variant.kernel.arg_names
        fields = {
            "name": variant.name,
            "kernel": variant.kernel.__name__,
            "arguments": {n: variant.signature[n] for n in names if n in variant.signature},
            "constants": {n: str(value) for n, value in variant.constants.items()},
            "aligned": variant.aligned,
            "shared_bytes": kernel.metadata.shared,
        }
        path = folder / variant.name.replace(" ", "-")
        path.with_suffix(".json").write_text(json.dumps(fields))
        path.with_suffix(".ll").write_text(kernel.asm["llir"])


def main() -> None:
    """Compile a set into a folder, as the command line says."""
    sets = {
        "combine": [combine_variant(*case) for case in COMBINE] + emit_variants(),
        "fake_quant": [v for v in quantize.variants() if v.name in FAKE_QUANT],
        "perturb_quant": [v for v in perturb_quantize.variants() if v.name in PERTURB_QUANT],
        "updates": [
            *(combine_variant(*case) for case in PAIR),
            *(advance_variant(*case) for case in ADVANCE),
        ],
        "swap": [with_steps(holding.variant(n, d, **options), 4) for n, d, options in SWAP],
        "small": llir_kernels.variants(),
    }
    write_ir(sets[sys.argv[2]], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
