"""What the kernels are compared with: MeZO's loop, torch.compile of it, and a copy's limit.

``python -m zo_kernels.pipeline.rivals DEVICE ELEMENTS DTYPE...`` compiles and runs the compiled
rival once, so that ``compile_reason`` can find out in a process of its own whether that works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

COMPILE_SECONDS = 180.0


@torch.no_grad()
def mezo_perturb_(parameters: Sequence[Tensor], scale: float, seed: int) -> None:
    """p += scale * z for every parameter, as MeZO does it (princeton-nlp/MeZO, trainer.py).

    One ``torch.normal`` and one ``add_`` per parameter, in its dtype. MeZO seeds torch's global
    generator; this seeds one of its own, which takes as long.

    Args:
        parameters: tensors of any shape on one device.
    """
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for p in parameters:
        z = torch.normal(
            mean=0.0, std=1.0, size=p.size(), device=p.device, dtype=p.dtype, generator=generator
        )
        p.add_(z, alpha=scale)


def compiled_perturb(scale: float) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of p += scale * randn_like(p). It draws from torch's global generator."""
    return torch.compile(lambda p: p.add_(torch.randn_like(p), alpha=scale), dynamic=False)


def compile_reason(
    device: str, elements: int, dtypes: Sequence[torch.dtype], seconds: float = COMPILE_SECONDS
) -> str | None:
    """Why ``compiled_perturb`` does not work here, or None if it does.

    Tried in a process of its own, whose compiled code stays in torch's cache: a compiler that
    crashes or hangs ends there.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    command = [sys.executable, "-m", "zo_kernels.pipeline.rivals", device, str(elements), *names]
    try:
        done = subprocess.run(
            command, env=worker_environment(), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"compiling took longer than {seconds:g} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"its process ended with status {done.returncode}"


def worker_environment(interpret: bool = False) -> dict[str, str]:
    """The environment of a process that imports this package and chooses its own Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    return env | {"TRITON_INTERPRET": "1"} if interpret else env


def reason_of(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _main() -> int:
    device, elements, *names = sys.argv[1:]
    try:
        for name in names:
            tensor = torch.zeros(int(elements), dtype=getattr(torch, name), device=device)
            compiled_perturb(1e-3)(tensor).cpu()
    except Exception as error:
        print(reason_of(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
