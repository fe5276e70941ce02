"""What this machine has, and whether every backend that runs here gives the same bits."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from zo_kernels import noise, ops
from zo_kernels.backends import native

PACKAGES = ("zo_kernels", "torch", "triton", "transformers", "safetensors", "rich", "matplotlib")
_CHECKED = 4096  # elements compared between the backends
_TIMED = 1 << 22


def examine() -> dict[str, Any]:
    """Versions, devices, backends with the reason where one is missing, bit checks and speeds.

    Returns:
        A JSON-serialisable dict: versions, python, machine, threads, isas, devices, noise_spec,
        backends (name -> "ok", or why not), speeds (elements/s of one in-place bfloat16
        perturbation, of MeZO's normal-and-add, and of a copy; CPU).
    """
    return {
        "noise_spec": noise.NOISE_SPEC,
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "isas": native.available_isas(),
        "devices": _devices(),
        "backends": {name: _check(name, why) for name, why in ops.backend_reasons().items()},
        "speeds": _speeds() if native.unavailable_reason() is None else {},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    count = torch.cuda.device_count()
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))]


def _check(name: str, reason: str | None) -> str:
    """Compare a backend's normals and stochastic updates with the reference, bit for bit."""
    if reason is not None:
        return reason
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    address = {"seed": 0x0123456789ABCDEF, "direction": 5, "stream": 0xDEADBEEF, "offset": 61}
    expected = ops.normal(_CHECKED, **address, backend="reference")
    got = ops.normal(_CHECKED, **address, backend=name, device=device).cpu()
    if not torch.equal(expected.view(torch.int32), got.view(torch.int32)):
        return "WRONG BITS in normal: please report this"
    for dtype in ops.DTYPES:
        results = []
        for backend, place in (("reference", "cpu"), (name, device)):
            tensor = torch.full((_CHECKED,), 0.02, dtype=dtype, device=place)
            ops.perturb_(
                [tensor], 1e-3, seed=1, direction=2, streams=[3], rounding="stochastic",
                backend=backend,
            )  # fmt: skip
            results.append(tensor.cpu().view(torch.uint8))
        if not torch.equal(*results):
            return f"WRONG BITS in perturb_ of {dtype}: please report this"
    return "ok"


def _speeds() -> dict[str, float]:
    weights = torch.full((_TIMED,), 0.02, dtype=torch.bfloat16)
    copy = torch.empty_like(weights)

    def ours() -> None:
        ops.perturb_([weights], 1e-3, seed=1, direction=2, streams=[3], backend="native")

    def mezo() -> None:
        generator = torch.Generator().manual_seed(1)
        z = torch.normal(
            mean=0.0, std=1.0, size=weights.shape, dtype=weights.dtype, generator=generator
        )
        weights.add_(z, alpha=1e-3)

    def clone() -> None:
        copy.copy_(weights)

    cases: dict[str, Callable[[], None]] = {"perturb_": ours, "MeZO loop": mezo, "copy": clone}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(5):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: _TIMED / sorted(values)[2] for name, values in times.items()}
