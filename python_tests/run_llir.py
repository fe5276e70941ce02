"""Runs the LLVM IR that Triton makes for an NVIDIA GPU on this CPU, with every access checked.

llir/translate.py changes the IR's target, the LLVM inside libtriton compiles it, and llir/threads.h
runs the threads. A load or store outside the buffers of a launch, or not aligned to its width,
stops the launch. What stays unproved is ptxas and the GPU.
"""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from llir.translate import TRIPLE, translate
from torch import Tensor
from triton._C import libtriton
from triton._C.libtriton import llvm

RUNTIME = Path(__file__).parent / "llir" / "runtime.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")
#: What compiled code uses: LLVM's x86-64-v3, as /proc/cpuinfo names its parts.
FEATURES = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
#: Pointees by Triton's names of pointers.
DTYPES = {
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i16": torch.int16,
    "*i8": torch.int8,
    "*u8": torch.uint8,
}
#: LLVM type and eight bytes of a scalar argument, as struct writes them, by Triton's names.
SCALARS = {"i32": ("i32", "<i4x"), "i64": ("i64", "<q"), "fp32": ("float", "<f4x")}
#: What Triton appends to every kernel's parameters: pointers to scratch memory, null here.
SCRATCH = 2


class MemoryFault(RuntimeError):
    """An access outside the buffers of the launch, or misaligned."""


class LockstepFault(RuntimeError):
    """Threads that wait for each other at different places, or for one that has ended."""


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("entry", "arguments", "sites", "ranges")),
        ("site_count", ctypes.c_int64),
        ("range_count", ctypes.c_int64),
        ("grid", ctypes.c_int64 * 3),
        *((n, ctypes.c_int32) for n in ("threads", "cooperative", "backwards", "shared_bytes")),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "site", "thread", "width")),
        ("program", ctypes.c_int64 * 3),
        ("address", ctypes.c_uint64),
    ]


OUT_OF_BOUNDS, MISALIGNED, DIVERGENCE, DEADLOCK, UNSUPPORTED, NO_MEMORY = range(1, 7)


@dataclass(frozen=True)
class Compiled:
    """What compile_kernels.py wrote of one variant.

    Attributes:
        name: of the variant.
        kernel: name of the ``triton.jit`` function.
        arguments: Triton type of each runtime argument, in the kernel's order.
        constants: text of each constant.
        aligned: pointers that the compiler was told are multiples of 16.
        shared_bytes: shared memory per program.
        ir: Triton's LLVM IR.
    """

    name: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, str]
    aligned: Sequence[str]
    shared_bytes: int
    ir: str

    @staticmethod
    def read(folder: Path) -> dict[str, Compiled]:
        """All variants in a folder by their names."""
        found = {}
        for path in sorted(folder.glob("*.ll")):
            facts = json.loads(path.with_suffix(".json").read_text())
            found[facts["name"]] = Compiled(ir=path.read_text(), **facts)
        return found


def unavailable_reason() -> str | None:
    """Why kernels cannot be run here, or None."""
    if COMPILER is None:
        return "no C++ compiler (g++, c++)"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"expected Linux on x86_64, got {platform.system()} on {platform.machine()}"
    missing = FEATURES - set(Path("/proc/cpuinfo").read_text().split())
    return f"the processor lacks {sorted(missing)}" if missing else None


@cache
def _runtime() -> ctypes.CDLL:
    """What kernels call, visible to those loaded later; and LLVM's part for x86, registered."""
    llvm.init_targets()
    triton = ctypes.CDLL(libtriton.__file__)  # x86 is linked into it but not registered
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        getattr(triton, f"LLVMInitializeX86{part}")()
    # glibc's fortified longjmp takes a switch between stacks for an error.
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "runtime.so"
        subprocess.run([COMPILER, *options, RUNTIME, "-o", library], check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Kernel:
    """A compiled variant, ready to run on this CPU; several may be loaded."""

    def __init__(self, compiled: Compiled) -> None:
        """Translates, compiles and loads.

        Raises:
            NotImplementedError: the IR has something that is not known to be exact; it is named.
            ValueError: the IR's parameters are not those of ``compiled.arguments``.
        """
        runtime = _runtime()
        self.compiled = compiled
        self.code = translate(
            compiled.ir, compiled.shared_bytes, lambda symbol: hasattr(runtime, symbol)
        )
        kinds = compiled.arguments.values()
        expected = ["ptr" if kind in DTYPES else SCALARS[kind][0] for kind in kinds]
        if self.code.parameters != (*expected, *["ptr"] * SCRATCH):
            raise ValueError(
                f"{compiled.name}: expected parameters {expected} and {SCRATCH} pointers to "
                f"scratch memory, got {list(self.code.parameters)}"
            )
        flags = ["", [], False, True]  # features, options, contract, object
        if "canonicalize_gep" in llvm.translate_to_asm.__doc__:  # not in Triton 3.7
            flags.append(False)
        with tempfile.TemporaryDirectory() as folder:
            code, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
            code.write_bytes(llvm.translate_to_asm(self.code.ir, TRIPLE, "x86-64-v3", *flags))
            subprocess.run([COMPILER, "-shared", code, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.llir_sites_address.restype = ctypes.c_void_p

    def run(
        self,
        grid: Sequence[int],
        arguments: Mapping[str, Tensor | int | float],
        memory: Mapping[str, Tensor] | None = None,
        backwards: bool = False,
    ) -> None:
        """Runs all threads of all programs.

        Args:
            grid: number of programs, in one to three dimensions.
            arguments: by name; tensors for pointers.
            memory: further tensors that the kernel may access, by names for messages.
            backwards: last program and last thread first. Results must not depend on it.

        Raises:
            TypeError, ValueError: arguments that the kernel lacks or cannot take.
            MemoryFault, LockstepFault: naming the program, thread and access; what the kernel has
                written by then stays.
        """
        slots, buffers = self._arguments(arguments)
        buffers |= memory or {}
        for name, tensor in buffers.items():
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"{name}: expected a contiguous tensor on the CPU, got {tensor}")
        spans = {n: (t.data_ptr(), t.numel() * t.element_size()) for n, t in buffers.items()}
        ranges = (_Range * max(len(spans), 1))(*spans.values())
        launch = _Launch(
            entry=ctypes.cast(self._library.llir_entry, ctypes.c_void_p),
            arguments=ctypes.cast(slots, ctypes.c_void_p),
            sites=self._library.llir_sites_address(),
            ranges=ctypes.cast(ranges, ctypes.c_void_p),
            site_count=len(self.code.sites),
            range_count=len(spans),
            grid=(*grid, *[1] * (3 - len(grid))),
            threads=self.code.threads,
            cooperative=self.code.cooperative,
            backwards=backwards,
            shared_bytes=self.compiled.shared_bytes,
        )
        fault = _Fault()
        if _runtime().llir_run(ctypes.byref(launch), ctypes.byref(fault)):
            raise self._error(fault, spans)

    def _arguments(self, given: Mapping) -> tuple[ctypes.Array, dict[str, Tensor]]:
        """Eight bytes for each parameter, and the tensors by name."""
        wanted = self.compiled.arguments
        if set(given) != set(wanted):
            raise TypeError(
                f"{self.compiled.name}: expected arguments {sorted(wanted)}, got {sorted(given)}"
            )
        slots, buffers = b"", {}
        for name, kind in wanted.items():
            value = given[name]
            if kind in DTYPES:
                if not isinstance(value, Tensor) or value.dtype != DTYPES[kind]:
                    raise TypeError(f"{name}: expected a tensor of {DTYPES[kind]}, got {value!r}")
                buffers[name] = value
                slots += struct.pack("<Q", value.data_ptr())
            else:
                try:
                    slots += struct.pack(SCALARS[kind][1], value)
                except struct.error as error:
                    raise ValueError(f"{name}: expected {kind}, got {value!r}: {error}") from error
        return ctypes.create_string_buffer(slots + bytes(8 * SCRATCH)), buffers

    def _error(self, fault: _Fault, spans: Mapping[str, tuple[int, int]]) -> RuntimeError:
        name, shared = self.compiled.name, self.compiled.shared_bytes
        if fault.kind == NO_MEMORY:
            return RuntimeError(f"{name}: no room for stacks and {shared} bytes of shared memory")
        doing = self.code.sites[fault.site]
        where = f"{name}, program {tuple(fault.program)}, thread {fault.thread}"
        if fault.kind == DIVERGENCE:
            return LockstepFault(f"{where}: at {doing} while others wait elsewhere")
        if fault.kind == DEADLOCK:
            return LockstepFault(f"{where}: waits at {doing} for threads that do not come")
        if fault.kind == UNSUPPORTED:
            return LockstepFault(f"{where}: {doing} of some threads only ({fault.address:#x})")
        kind = "misaligned" if fault.kind == MISALIGNED else "out of bounds"
        message = f"{where}: {kind}: {doing}, {fault.width} bytes at {fault.address:#x}; "
        if "global" not in doing:
            return MemoryFault(f"{message}the program has {shared} bytes of shared memory")

        def distance(name: str) -> int:
            base, size = spans[name]
            return max(base - fault.address, fault.address + fault.width - base - size, 0)

        nearest = min(spans, key=distance)
        base, size = spans[nearest]
        place = f"offset {fault.address - base} of {nearest}, which has {size} bytes"
        return MemoryFault(message + place)
