"""AVX-512, AVX-512 with BF16, and NEON kernels on processors that lack them.

csrc/isa.cpp is compiled against python_tests/emulation/, where each intrinsic is a plain loop
written from its vendor's documentation. This proves what the wrappers say: lane orders, shuffles,
ternary-logic constants, masks, rounding paths, ragged ends. It does not prove what a compiler
makes of the real intrinsics, nor that the hardware follows its documentation; test_combine.py,
test_updates.py and test_swap.py do that on a machine that has the instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "emulation"
CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
EMULATED = {
    "avx512": ["-DZO_ISA_AVX512", f"-I{HERE / 'x86'}"],
    "avx512bf16": ["-DZO_ISA_AVX512BF16", "-DZO_BF16_HARDWARE", f"-I{HERE / 'x86'}"],
    "neon": ["-DZO_ISA_NEON", f"-I{HERE / 'arm'}"],
}
FLAGS = {"scalar": ["-DZO_ISA_SCALAR"], **EMULATED}
# -Og and ZO_INLINE: what is worth inlining as instructions is not as loops. At -O1 half of the
# tests' time went into compiling; this compiles in a third of that, and the tests run as fast.
OPTIONS = ["-std=c++17", "-Og", "-fPIC", "-shared", "-ffp-contract=off", f"-I{CSRC}"]
OPTIONS.append("-DZO_INLINE=inline")
RANGES = [
    *((0, 1), (3, 4), (1, 64), (0, 128), (61, 61 + 391), (2**34 - 40, 2**34)),
    *((4096 - 300, 4096 + 300), (2**61 - 77, 2**61), (2**61, 2**61 + 300)),
]
SEED, STREAM = 0xC0FFEE0123456789, 0xDEADBEEF


class Job(ctypes.Structure):
    """zo::Job of csrc/dispatch.h."""

    _fields_ = [
        ("src", ctypes.c_void_p),
        ("dst", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("directions", ctypes.c_int),
        ("direction", ctypes.POINTER(ctypes.c_uint32)),
        ("scale", ctypes.POINTER(ctypes.c_float)),
        ("src_scale", ctypes.c_float),
        ("changes", ctypes.c_void_p),
        ("updates", ctypes.c_int),
        ("lengths", ctypes.POINTER(ctypes.c_int)),
        ("src_scales", ctypes.POINTER(ctypes.c_float)),
        ("held", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("held_scale", ctypes.c_float),
    ]


class QuantJob(ctypes.Structure):
    """zo::QuantJob of csrc/dispatch.h."""

    _fields_ = [
        ("src", ctypes.c_void_p),
        ("dst", ctypes.c_void_p),
        ("groups", ctypes.c_uint64),
        ("group", ctypes.c_uint64),
        ("top", ctypes.c_float),
        ("mantissa", ctypes.c_int),
        ("min_exponent", ctypes.c_int),
        ("power_of_two", ctypes.c_bool),
        ("scales", ctypes.c_void_p),
        ("lows", ctypes.c_void_p),
        ("highs", ctypes.c_void_p),
    ]


def job_of(
    begin: int,
    count: int,
    directions: Sequence[int],
    scales: Sequence[float] | None = None,
    *,
    src_scale: float = 1.0,
    **tensors: Tensor | None,
) -> Job:
    """A job over elements [begin, begin + count); `tensors` are its addresses, by their names."""
    return Job(
        begin=begin,
        end=begin + count,
        seed=SEED,
        stream=STREAM,
        directions=len(directions),
        direction=(ctypes.c_uint32 * len(directions))(*directions),
        scale=None if scales is None else (ctypes.c_float * len(scales))(*scales),
        src_scale=src_scale,
        **{name: None if t is None else t.data_ptr() for name, t in tensors.items()},
    )


def compiled(source: str, options: Sequence[str]) -> ctypes.CDLL:
    """A file of python_tests/emulation/ as a loaded library."""
    if COMPILER is None:
        pytest.skip("no C++ compiler (g++, c++)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulated.so"
        command = [COMPILER, *OPTIONS, *options, str(HERE / source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))


@functools.cache
def kernels_of(isa: str) -> ctypes.CDLL:
    """The kernels of one instruction set, compiled against the emulation once per run."""
    loaded = compiled("driver.cpp", [f"-DZO_ISA={isa}", *FLAGS[isa], str(CSRC / "parallel.cpp")])
    loaded.isa_name.restype = ctypes.c_char_p
    assert loaded.isa_name().decode() == isa
    loaded.job_size.restype = ctypes.c_uint64
    assert loaded.job_size() == ctypes.sizeof(Job)
    loaded.quant_job_size.restype = ctypes.c_uint64
    assert loaded.quant_job_size() == ctypes.sizeof(QuantJob)
    for name in ("combine", "pair", "advance", "swap", "emit"):
        getattr(loaded, f"{name}_job").argtypes = [ctypes.POINTER(Job)]  # plain integers follow
    loaded.exceptions_new.restype = loaded.exceptions_data.restype = ctypes.c_void_p
    loaded.exceptions_bytes.restype = ctypes.c_uint64
    for name in ("delete", "bytes", "are_a_copy", "data"):
        getattr(loaded, f"exceptions_{name}").argtypes = [ctypes.c_void_p]
    return loaded


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def all_patterns(dtype: torch.dtype) -> Tensor:
    """The 65536 values of a 16-bit type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def rounding_patterns() -> Tensor:
    """float32 patterns of ties of both 16-bit types and their neighbours at every exponent."""
    exponents = torch.arange(256, dtype=torch.int64)[:, None] << 23
    mantissas = [
        kept << shift | low
        for shift in (13, 16)
        for kept in (0, 1, 2, (1 << (23 - shift)) - 1)
        for low in (0, 1, (1 << (shift - 1)) - 1, 1 << (shift - 1), (1 << (shift - 1)) + 1)
    ]
    patterns = (exponents | torch.tensor(mantissas)).flatten()
    return torch.cat([patterns, patterns | 1 << 31])
