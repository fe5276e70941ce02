"""Zeroth-order optimizers."""

from zo_kernels.optim.groups import named_parameters
from zo_kernels.optim.record import StepRecord
from zo_kernels.optim.zosgd import ZOSGD

__all__ = ["ZOSGD", "StepRecord", "named_parameters"]
