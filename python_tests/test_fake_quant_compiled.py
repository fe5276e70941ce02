"""The PTX of the fake_quant kernels: nothing approximate, 16-byte accesses. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# One of each kernel and kind of format; the accesses of src and out in each.
WIDE = [
    "fake_quant bf16 int4 g128",
    "fake_quant bf16 int4 asymmetric g64",
    "fake_quant fp32 int8 row 4096",
    "fake_quant bf16 int4 row 11008",
    "fake_quant fp16 int8 tensor",
    "fake_quant bf16 nf4 g64",
    "fake_quant bf16 fp8_e4m3 row 4096",
]
# In a process of its own: the interpreter takes the kernels' place in this one.
COMPILE = """
import json, re, sys
from collections import Counter
from zo_kernels.backends.triton import quantize
from zo_kernels.backends.triton.compile import TARGETS, compile_variant

found = {}
for variant in quantize.variants():
    if variant.name in sys.argv[1:]:
        ptx = compile_variant(variant, TARGETS["sm_90"]).asm["ptx"]
        found[variant.name] = Counter(re.findall(r"\\b[a-z][\\w:]*(?:\\.[\\w:]+)+", ptx))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def opcodes(tmp_path_factory) -> dict[str, dict[str, int]]:
    """How often each PTX opcode occurs, by variant."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    cache = str(tmp_path_factory.mktemp("cache"))
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", COMPILE, *WIDE]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", WIDE)
def test_ptx(opcodes, name):
    """Exact divisions, no contraction, no flush to zero; only the ends of groups are narrow."""
    found = opcodes[name]
    bad = (".approx", ".ftz", "div.full", "fma.", "mad.f", "rcp.", "ex2.", "lg2.", "sqrt.")
    assert not [op for op in found if any(b in op for b in bad)]
    assert found["div.rn.f32"] >= 17  # one per element of a lane at least, and one for the scale
    loads = {op: n for op, n in found.items() if op.startswith("ld.global")}
    stores = {op: n for op, n in found.items() if op.startswith("st.global")}
    ends = {"ld.global.b32": 2} if name.endswith("tensor") else {}
    assert loads.keys() - ends == {"ld.global.v4.b32"}
    assert stores.keys() == {"st.global.v4.b32"}
    assert {op: loads[op] for op in ends} == ends
