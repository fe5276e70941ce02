"""What this machine has, and whether its backends work: the quick look."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zo_kernels import __version__, noise, ops
from zo_kernels.backends import native
from zo_kernels.pipeline import rooms
from zo_kernels.pipeline.cases import ALIGNMENT, CASES, Reference, buffers, check
from zo_kernels.pipeline.measure import failed
from zo_kernels.pipeline.rivals import mezo_perturb_
from zo_kernels.pipeline.timing import interleave, medians
from zo_kernels.pipeline.verify import describe

PACKAGES = ("torch", "triton", "transformers", "safetensors", "rich", "matplotlib")
VARIABLES = ("ZO_KERNELS_", "TRITON_", "OMP_", "CUDA_VISIBLE", "HIP_VISIBLE", "ROCR_VISIBLE")
#: A backend's state begins with it if the backend gives wrong bits or fails.
WRONG = "WRONG"
_QUICK = ("normal", "perturb_ fp32", "perturb_ bf16 stochastic", "perturb_ fp16 stochastic")
_TIMED = 1 << 22


def machine() -> dict[str, Any]:
    """What there is: versions, processor, memory, devices, environment. JSON-serialisable."""
    return {
        "noise_spec": noise.NOISE_SPEC,
        "versions": {"zo_kernels": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "isas": native.available_isas(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "devices": {name: gpu_facts(name) for name in rooms.gpus()},
        "toolkits": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def gpu_facts(name: str) -> dict[str, Any]:
    """What torch tells of a GPU, "cuda:0": name, architecture, units, cache and memory (bytes)."""
    found = torch.get_device_module(name).get_device_properties(name)
    fields = ("name", "major", "minor", "gcnArchName", "multi_processor_count", "warp_size",
              "L2_cache_size", "total_memory", "driver_version")  # fmt: skip
    return {field: getattr(found, field) for field in fields if hasattr(found, field)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int | None:
    """Bytes of main memory, where the system tells."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def examine() -> dict[str, Any]:
    """``machine``, with a quick check of each backend and a few speeds.

    Returns:
        A JSON-serialisable dict: as ``machine``, and backends (name -> "ok", or why not), speeds
        (elements/s of one in-place bfloat16 perturbation, of MeZO's loop, and of a copy; CPU).
    """
    return {
        **machine(),
        "backends": {name: why or _check(name) for name, why in ops.backend_reasons().items()},
        "speeds": _speeds() if native.unavailable_reason() is None else {},
    }


def _check(backend: str) -> str:
    """One word if a few cases are right on the backend's first device, else what is wrong."""
    gpus = rooms.gpus()
    device = gpus[0] if backend == "triton" and gpus else "cpu"
    for case in CASES:
        if case.name in _QUICK:
            try:
                memory = buffers(case.dtype, ALIGNMENT, device, backend)
                verdict = check(case, memory, Reference())
            except Exception as error:
                verdict = failed(error)
            if verdict["verdict"] != "ok":
                return f"{WRONG} in {case.name}: {describe(verdict)}"
    return "ok"


def _speeds() -> dict[str, float]:
    case = next(case for case in CASES if case.name == "perturb_ bf16")
    memory = buffers(case.dtype, _TIMED, "cpu", "native")
    memory.fill()
    calls = {
        "perturb_": lambda: case.run(memory),
        "MeZO loop": lambda: mezo_perturb_([memory.weights], 1e-3, 1),
        "copy": lambda: memory.scratch.copy_(memory.weights),
    }
    return {name: _TIMED / seconds for name, seconds in medians(interleave(calls, 5)).items()}


def text(found: dict[str, Any]) -> str:
    """What ``examine`` found, as lines to read."""
    lines = []
    for key, value in found.items():
        if value and isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name:14} {_shown(key, v)}" for name, v in value.items())]
        else:
            lines.append(f"{key}: {_shown(key, value) or 'none'}")
    return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    if key == "speeds":
        return f"{value / 1e6:,.0f} M elements/s"
    if key == "memory" and value is not None:
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if value is None:
        return "none"
    return ", ".join(value) if isinstance(value, list) else str(value)
