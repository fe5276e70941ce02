"""Which backend works where: the rooms of every device that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zo_kernels import ops
from zo_kernels.backends import native
from zo_kernels.pipeline.cases import ALIGNMENT

#: Triton's interpreter on the CPU, as the name of a device.
INTERPRETER = "interpreter"
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 24, 1 << 28
# Slow ones work on fewer elements: plain torch, the interpreter, C++ without SIMD.
REFERENCE_ELEMENTS, INTERPRETED_ELEMENTS = 1 << 14, 1 << 12
SCALAR_SHARE = 16
_BYTES_PER_ELEMENT = 64  # of free memory: more than any table of times takes


@dataclass(frozen=True)
class Room:
    """A backend at work on a device.

    Attributes:
        backend: "native", "triton" or "reference".
        device: "cpu", "interpreter", "cuda:0", ...
        elements: of the buffers it is timed on.
        isa: instruction set of the native backend.
    """

    backend: str
    device: str
    elements: int
    isa: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.device, self.backend, self.isa)))

    @property
    def place(self) -> str:
        """The torch device."""
        return "cpu" if self.device == INTERPRETER else self.device

    def label(self) -> dict[str, str | None]:
        """What tells this room's records from others."""
        return {"backend": self.backend, "isa": self.isa, "device": self.device}

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Inside, the native backend uses this room's instruction set."""
        before = os.environ.get("ZO_KERNELS_ISA")
        if self.isa:
            os.environ["ZO_KERNELS_ISA"] = self.isa
        try:
            yield
        finally:
            if before is not None:
                os.environ["ZO_KERNELS_ISA"] = before
            elif self.isa:
                del os.environ["ZO_KERNELS_ISA"]


def gpus() -> list[str]:
    """Names of the GPUs that torch sees: "cuda:0" (CUDA and ROCm), "xpu:0", ..."""
    kinds = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    return [f"{kind}:{i}" for kind in kinds for i in range(getattr(torch, kind).device_count())]


def devices(wanted: Sequence[str] | None = None) -> list[str]:
    """The CPU and every GPU, or without a GPU the interpreter; or those wanted of all of them.

    Raises:
        ValueError: a device that this machine lacks, naming those it has.
    """
    found = ["cpu", INTERPRETER, *gpus()]
    if wanted is None:
        return [name for name in found if name != INTERPRETER or len(found) == 2]
    for name in wanted:
        if name not in found:
            raise ValueError(f"device: expected one of {', '.join(found)}, got {name!r}")
    return list(dict.fromkeys(wanted))


def full_elements(device: str) -> int:
    """Elements of a device's full-size buffers: beyond its caches, within its free memory."""
    if device == INTERPRETER:
        return INTERPRETED_ELEMENTS
    if device == "cpu":
        return CPU_ELEMENTS
    free, _ = torch.get_device_module(device).mem_get_info(device)
    most = free // _BYTES_PER_ELEMENT
    return max(ALIGNMENT, min(GPU_ELEMENTS, 1 << most.bit_length() >> 1))


def rooms_of(device: str, elements: int) -> tuple[list[Room], dict[str, str]]:
    """The rooms of a device, and backend -> why it is not among them.

    Args:
        elements: of the device's full-size buffers.
    """
    few = min(elements, REFERENCE_ELEMENTS)
    if device == INTERPRETER:
        rooms = [Room("triton", device, elements)]
    elif device == "cpu":
        shares = {isa: SCALAR_SHARE if isa == "scalar" else 1 for isa in native.available_isas()}
        rooms = [
            Room("native", device, max(few, elements // share), isa)
            for isa, share in shares.items()
        ] or [Room("native", device, elements)]
        rooms.append(Room("reference", device, few))
    else:
        rooms = [Room("triton", device, elements), Room("reference", device, few)]
    reasons = {name: why for name, why in ops.backend_reasons().items() if why}
    here = [room for room in rooms if room.backend not in reasons]
    return here, {room.backend: reasons[room.backend] for room in rooms if room not in here}
