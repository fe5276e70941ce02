"""The Triton backend on this CPU with its kernels as compiled for sm_90.

The backend's own host code prepares each launch; only the launch itself goes to run_llir.py. So
nothing here knows a kernel's arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from run_llir import Compiled, Kernel
from torch import Tensor

HERE = Path(__file__).parent
KEPT = ("TRITON_CACHE_DIR", "TRITON_HOME")

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TYPES |= {"int64": "i64", "int32": "i32", "int8": "i8"}


def compile_set(name: str, folder: Path) -> None:
    """compile_kernels.py into the folder, in a process without the interpreter.

    What Triton's cache has, of the same sources, is not compiled again.
    """
    env = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(folder), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def triton_type(value: Tensor | int | float) -> str:
    """What Triton's just-in-time compiler would take an argument for."""
    if isinstance(value, Tensor):
        return "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


class Route:
    """Stands in for a ``triton.jit`` kernel: ``route[grid](...)`` runs the variant that fits.

    Attributes:
        memory: tensors that kernels may access besides their arguments, by name.
        backwards: as for ``Kernel.run``.
        launches: names of the variants launched so far.
    """

    def __init__(self, kernel: object, compiled: Mapping[str, Compiled]) -> None:
        self._names = kernel.arg_names
        self._compiled = [c for c in compiled.values() if c.kernel == kernel.__name__]
        self._loaded: dict[str, Kernel] = {}
        self.memory: dict[str, Tensor] = {}
        self.backwards = False
        self.launches: list[str] = []

    def __getitem__(self, grid: Sequence[int]) -> object:
        def launch(*positional, num_warps: int, enable_fp_fusion: bool, **named) -> None:
            given = dict(zip(self._names, positional, strict=False)) | named
            variant = self._fitting(given)
            kernel = self._loaded.get(variant.name) or Kernel(variant)
            self._loaded[variant.name] = kernel
            assert not enable_fp_fusion and kernel.code.threads == 32 * num_warps
            arguments = {name: given[name] for name in variant.arguments}
            for name in variant.aligned:
                value = arguments[name]
                value = value.data_ptr() if isinstance(value, Tensor) else value
                assert value % 16 == 0, f"{name}: {value} is no multiple of 16"
            self.launches.append(variant.name)
            kernel.run(grid, arguments, self.memory, self.backwards)

        return launch

    def _fitting(self, given: Mapping[str, object]) -> Compiled:
        """The variant with the types and constants of a launch.

        Raises:
            LookupError: compile_kernels.py made none.
        """
        for variant in self._compiled:
            constants = {n: str(given[n]) for n in given if n in variant.constants}
            types = {n: triton_type(given[n]) for n in given if n in variant.arguments}
            if (constants, types) == (variant.constants, variant.arguments):
                return variant
        raise LookupError(f"no compiled variant for {given}")
