"""What Triton compiles for GPUs that need not be here: bits; test_inspect.py looks at the code.

compile_kernels.py compiles for A100, H100 and MI300 in a process without the interpreter;
run_llir.py runs the H100 kernel's LLVM IR on this CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_borders_intact, assert_same_bits, bordered, weights

import zo_kernels as zk

pytest.importorskip("triton")
HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")
NAMES = ["bf16", "fp16", "fp32", "bf16-stochastic"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The compiled kernels' facts and IR."""
    path = tmp_path_factory.mktemp("compiled")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {"PYTHONPATH": str(HERE.parent), "TRITON_CACHE_DIR": str(path / "cache")}
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("name", NAMES)
def test_bits_of_the_compiled_code(folder, name):
    """The H100 kernel's IR, run here, gives the native backend's bits on a ragged list."""
    if COMPILER is None:
        pytest.skip("no C compiler (gcc, cc)")
    from run_llir import load

    from zo_kernels.backends.triton import perturb

    run = load(folder / f"sm_90-{name}.ll", COMPILER)
    dtype = DTYPES[name.partition("-")[0]]
    sizes, offsets = [40_003, 8192, 5, 1024], [3, 0, 2**34 - 2, 2**40]
    streams, scales = [1, 2**32 - 1, 3, 4], [[1e-3], [-2e-2], [1.0], [1e-5]]
    source = [weights(size, dtype, seed=size) for size in sizes]
    borders = [bordered(s, shift=i % 2 * 7) for i, s in enumerate(source)]
    tensors = [view for _, view in borders]
    table, programs = perturb.tile_table(tensors, tensors, streams, offsets)
    assert {t.data_ptr() % 16 for t in tensors} != {0}  # both paths are taken
    seed, direction = 0xFEDCBA9876543210, 2**32 - 5
    rows = torch.tensor(scales, dtype=torch.float32)
    words = torch.tensor([perturb.signed(direction)], dtype=torch.int32)
    run(
        programs,
        perturb.LANES,
        table.data_ptr(),
        rows.data_ptr(),
        words.data_ptr(),
        len(tensors),
        1,
        perturb.signed(seed & 0xFFFFFFFF),
        perturb.signed(seed >> 32),
        1.0,
    )
    expected = [s.clone() for s in source]
    zk.combine_(
        expected,
        expected,
        scales,
        seed=seed,
        directions=[direction],
        streams=streams,
        offsets=offsets,
        rounding="stochastic" if "stochastic" in name else "nearest",
        backend="native",
    )
    for (buffer, view), e, size in zip(borders, expected, sizes, strict=True):
        assert_same_bits(view, e, size)
        assert_borders_intact(buffer, view)
