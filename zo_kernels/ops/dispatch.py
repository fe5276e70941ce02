"""Which backend works on a device, and why one cannot."""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from zo_kernels.backends import native, reference

BACKENDS = ("reference", "native", "triton")
_warned: set[str] = set()


def backend_reasons() -> dict[str, str | None]:
    """Why each backend cannot be used on this machine, or None if it can."""
    return {
        "reference": None,
        "native": native.unavailable_reason(),
        "triton": _triton_reason(),
    }


def _triton_reason() -> str | None:
    try:
        from zo_kernels.backends import triton as room
    except ImportError as error:
        return f"triton did not import ({error}); install zo_kernels[gpu]"
    return room.unavailable_reason()


def _triton() -> ModuleType:
    reason = _triton_reason()
    if reason:
        raise RuntimeError(f"backend 'triton': {reason}")
    from zo_kernels.backends import triton as room

    return room


def backend_for(device: torch.device, name: str | None) -> ModuleType:
    """The backend that works on a device: the named one, or by device.

    Raises:
        ValueError, RuntimeError: the name is unknown, or the backend cannot work there.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {name!r}")
    if name == "reference":
        return reference
    if name == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native': expected tensors on cpu, got {device}")
        if native.unavailable_reason():
            raise RuntimeError(f"backend 'native': {native.unavailable_reason()}")
        return native
    if name == "triton":
        room = _triton()
        if device.type == "cpu" and not room.interpreting():
            raise ValueError(
                "backend 'triton': expected tensors on a GPU, got cpu "
                "(TRITON_INTERPRET=1, set before triton is imported, runs it on the CPU)"
            )
        return room
    if device.type != "cpu":
        return _triton()
    reason = native.unavailable_reason()
    if reason is None:
        return native
    if os.environ.get("ZO_KERNELS_STRICT") == "1":
        raise RuntimeError(f"ZO_KERNELS_STRICT=1 and {reason}")
    if "native" not in _warned:
        _warned.add("native")
        warnings.warn(f"zo_kernels uses its slow reference backend: {reason}", stacklevel=3)
    return reference
