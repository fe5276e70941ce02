"""The report's figures: functions that take records and give the bytes of a PNG file."""

from zo_kernels.robustness.plots.blocks import layer_map, layer_scores
from zo_kernels.robustness.plots.conditions import metric_vs_noise, quantized_bars
from zo_kernels.robustness.plots.differences import differences
from zo_kernels.robustness.plots.training import loss_per_step

__all__ = [
    "differences",
    "layer_map",
    "layer_scores",
    "loss_per_step",
    "metric_vs_noise",
    "quantized_bars",
]
