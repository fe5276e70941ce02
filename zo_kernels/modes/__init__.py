"""Who owns the weights while a loss is evaluated.

A mode evaluates the two-point pair and applies updates; all of them are the one primitive of
``ops``. Every mode but ``mezo`` leaves the weights bit-identical around an evaluation.
"""

from __future__ import annotations

from zo_kernels.modes.base import Closure, GroupUpdate, Mode, Slot, uninterrupted
from zo_kernels.modes.dual import DualMode
from zo_kernels.modes.held import InplaceMode, MasterMode, SnapshotMode
from zo_kernels.modes.master8 import Master8Mode
from zo_kernels.modes.mezo import MezoMode
from zo_kernels.modes.streamed import StreamedMode, StreamedWeights

MODES: dict[str, type[Mode]] = {
    mode.name: mode
    for mode in (
        StreamedMode,
        DualMode,
        InplaceMode,
        SnapshotMode,
        MasterMode,
        Master8Mode,
        MezoMode,
    )
}

__all__ = [
    "MODES",
    "Closure",
    "DualMode",
    "GroupUpdate",
    "InplaceMode",
    "Master8Mode",
    "MasterMode",
    "MezoMode",
    "Mode",
    "Slot",
    "SnapshotMode",
    "StreamedMode",
    "StreamedWeights",
    "uninterrupted",
]
