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

from zo_kernels.backends.triton import perturb
from zo_kernels.backends.triton.compile import TARGETS, compile_variant

KERNELS = ["combine bf16", "combine fp16", "combine fp32", "combine bf16 stochastic"]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def facts(kernel, target, folder: Path) -> dict:
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
    for name in ("sm_80", "sm_90", "gfx942"):
        for variant in perturb.variants():
            if variant.name not in KERNELS:
                continue
            kernel = compile_variant(variant, TARGETS[name])
            stem = f"{name}-{variant.name.removeprefix('combine ').replace(' ', '-')}"
            (folder / f"{stem}.json").write_text(json.dumps(facts(kernel, TARGETS[name], folder)))
            if name == "sm_90":
                (folder / f"{stem}.ll").write_text(kernel.asm["llir"])


if __name__ == "__main__":
    main()
