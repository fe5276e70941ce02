"""The fake_quant kernels compiled for sm_90: their PTX, and their bits on this CPU.

Nothing approximate, 16-byte accesses; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from test_fake_quant import hard_weights

import zo_kernels as zk

pytest.importorskip("triton")
import run_llir
from compile_kernels import FAKE_QUANT
from compiled_route import Route, compile_set

from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import launch, quantize
from zo_kernels.scales import scales_of_scales

# One of each kernel and kind of format; the accesses of src and out in each.
WIDE = [
    "fake_quant bf16 int4 g128",
    "fake_quant bf16 int4 asymmetric g64",
    "fake_quant fp32 int8 row 4096",
    "fake_quant bf16 int4 row 11008",
    "fake_quant fp16 int8 tensor",
    "fake_quant bf16 nf4 g64",
    "fake_quant bf16 fp8_e4m3 row 4096",
    "fake_quant bf16 mxfp4 g32",
    "fake_quant bf16 nvfp4 g16",
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
    # One per element of a lane at least, and one for a scale that is a quotient.
    assert found["div.rn.f32"] >= (16 if "fp4" in name else 17)
    loads = {op: n for op, n in found.items() if op.startswith("ld.global")}
    stores = {op: n for op, n in found.items() if op.startswith("st.global")}
    ends = {"ld.global.b32": 2} if name.endswith("tensor") else {}
    if "nvfp4" in name:  # scales of groups
        ends = {op: n for op, n in loads.items() if op == "ld.global.b32"}
    assert loads.keys() - ends == {"ld.global.v4.b32"}
    assert stores.keys() == {"st.global.v4.b32"}
    assert {op: loads[op] for op in ends} == ends


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, run_llir.Compiled]:
    """The variants named in compile_kernels.FAKE_QUANT."""
    if reason := run_llir.unavailable_reason():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("fake_quant")
    compile_set("fake_quant", path)
    return run_llir.Compiled.read(path)


@pytest.mark.parametrize("name", FAKE_QUANT)
def test_bits_of_the_compiled_code(compiled, monkeypatch, name):
    """Into other memory and in place, in both orders of the threads."""
    for kernel in ("groups_kernel", "streamed_kernel", "spread_kernel"):
        monkeypatch.setattr(quantize, kernel, Route(getattr(quantize, kernel), compiled))
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    route = getattr(quantize, compiled[name].kernel)
    _, short, scheme, *words = name.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[short]
    group = int(words[-1].lstrip("g")) if words[-1] != "tensor" else 1 << 17
    weight = hard_weights({4096: 5, 11008: 3, 1 << 17: 2}.get(group, 133), group, dtype)
    options = {"symmetric": "asymmetric" not in words}
    expected = zk.fake_quant(
        weight,
        scheme,
        group_size="row",
        double_quant="double" in words,
        backend="reference",
        **options,
    )
    if "double" in words or scheme == "nvfp4":
        options["scales"] = scales_of_scales(scheme, room.group_ends(weight, group=group))
    out = torch.empty_like(weight)
    room.fake_quant(out, weight, scheme, group=group, **options)
    assert_same_bits(out, expected)
    route.backwards = True
    room.fake_quant(weight, weight, scheme, group=group, **options)
    assert_same_bits(weight, expected)
    assert route.launches == [name, name]
