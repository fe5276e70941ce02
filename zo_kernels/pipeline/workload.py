"""What a run does, as far as memory goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zo_kernels.noise import DISTRIBUTIONS
from zo_kernels.refine.checkpoint import DTYPES
from zo_kernels.robustness.conditions import check_weight_scheme


@dataclass(frozen=True)
class Workload:
    """What a run does; see ``RefineConfig`` for options of the same name.

    Attributes:
        dtype: of the weights: "auto" (float32 for first-order training, else ``fast_dtype``),
            "float32", "bfloat16" or "float16".
        device: "cuda" or "cpu".
        batch_size: sequences in one forward; for "dpo" pairs, of two sequences each.
        length: tokens of the longest.
        completion: tokens of a sequence whose losses are taken, on average; None: all but one.
        micro_batches: forwards per evaluation, one after the other.
        queries: directions per step.
        eps: perturbation in units of each tensor's standard deviation; of "align-noise" the noise.
        distribution: of the directions.
        parameters: what is refined. First-order training takes all parameters.
        layers: only these decoder blocks; None: all.
        quantized: scheme of the grid on which the loss sees the blocks' linears, as
            ``zk.quantized`` does; None: none.
    """

    dtype: str = "auto"
    device: str = "cuda"
    batch_size: int = 8
    length: int = 512
    completion: int | None = None
    micro_batches: int = 1
    queries: int = 1
    eps: float = 0.1
    distribution: str = "normal"
    parameters: str = "linear"
    layers: tuple[int, ...] | None = None
    quantized: str | None = None

    def check(self) -> None:
        """Raise ValueError naming the first option out of range."""
        for name, low in (("batch_size", 1), ("length", 2), ("micro_batches", 1), ("queries", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if self.completion is not None and not 1 <= self.completion < self.length:
            raise ValueError(
                f"completion: expected 1 to {self.length - 1}, less than length, got "
                f"{self.completion}"
            )
        for name, known in (
            ("dtype", ("auto", *DTYPES)),
            ("device", ("cuda", "cpu")),
            ("distribution", DISTRIBUTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: expected a finite number of at least 0, got {self.eps}")
        if self.quantized is not None:
            check_weight_scheme("quantized", self.quantized)
