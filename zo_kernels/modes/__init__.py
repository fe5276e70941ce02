"""Who owns the weights while a loss is evaluated.

A mode evaluates the two-point pair and applies updates; all of them are the one primitive
``ops.combine_``. Every mode but ``mezo`` leaves the weights bit-identical around an evaluation.
"""

from __future__ import annotations

from zo_kernels.modes.base import Closure, Mode, Slot
from zo_kernels.modes.mezo import MezoMode
from zo_kernels.modes.streamed import StreamedMode, StreamedWeights

MODES: dict[str, type[Mode]] = {mode.name: mode for mode in (StreamedMode, MezoMode)}

__all__ = ["MODES", "Closure", "MezoMode", "Mode", "Slot", "StreamedMode", "StreamedWeights"]
