"""Compiles combine_kernel for GPUs that this machine lacks; run by test_triton_compiled.py.

`python compile_kernels.py FOLDER` writes FOLDER/NAME.json per kernel (resources, counts of
instructions) and, for sm_90, FOLDER/NAME.ll. Runs in a process of its own: TRITON_INTERPRET must
not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zo_kernels.backends.triton import compile_options, perturb

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": (tl.bfloat16, 2), "fp16": (tl.float16, 2), "fp32": (tl.float32, 4)}
KERNELS = [("bf16", False), ("fp16", False), ("fp32", False), ("bf16", True)]
SIGNATURE = {
    "table": "*i64",
    "scales": "*fp32",
    "directions": "*i32",
    "tensors": "i32",
    "directions_count": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "src_scale": "fp32",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def compiled(dtype: str, stochastic: bool, target: GPUTarget):
    """One kernel, in place on one dtype, one direction."""
    kernel, (triton_dtype, itemsize) = perturb.combine_kernel, DTYPES[dtype]
    constants = {
        "SRC_DTYPE": triton_dtype,
        "DST_DTYPE": triton_dtype,
        "SRC_ITEMSIZE": itemsize,
        "DST_ITEMSIZE": itemsize,
        "STOCHASTIC": stochastic,
        "SCALE_SRC": False,
        "SINGLE": True,
        "LANES": perturb.LANES,
        "STEPS": perturb.STEPS,
    }
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: SIGNATURE.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index("table"),): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=target, options=compile_options(target.warp_size))


def facts(kernel, target: GPUTarget, folder: Path) -> dict:
    """What the tests look at."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        fields = ("vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size")
        numbers = {f: [int(n) for n in re.findall(rf"\.{f}:\s+(\d+)", text)] for f in fields}
        opcodes = Counter(re.findall(r"^\s+([vsgbd]\w+_\w+)", text, flags=re.M))
        return {**numbers, "opcodes": opcodes, "shared": kernel.metadata.shared}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    sass = subprocess.run(
        [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "opcodes": Counter(OPCODE.findall(sass)),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": int(re.search(r"SHARED:(\d+)", usage)[1]),
        "ptx": Counter(re.findall(r"\b[a-z][\w:]*(?:\.[\w:]+)+", ptx)),
    }


def main() -> None:
    """Compile everything into the folder named on the command line."""
    folder = Path(sys.argv[1])
    for (dtype, stochastic), (name, target) in ((k, t) for t in TARGETS.items() for k in KERNELS):
        kernel = compiled(dtype, stochastic, target)
        stem = f"{name}-{dtype}{'-stochastic' if stochastic else ''}"
        (folder / f"{stem}.json").write_text(json.dumps(facts(kernel, target, folder)))
        if name == "sm_90":
            (folder / f"{stem}.ll").write_text(kernel.asm["llir"])


if __name__ == "__main__":
    main()
