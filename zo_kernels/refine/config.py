"""What a zeroth-order refinement is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zo_kernels.blocks import decoder_blocks, linear_weights
from zo_kernels.modes import MODES
from zo_kernels.optim import named_parameters
from zo_kernels.robustness.conditions import check_weight_scheme

SCHEDULES = ("constant", "cosine")
RETIRED = {"first_batch": 0}
"""Options of older versions, with the value at which this version can go on with their runs."""
_OPTIMIZER = (
    *("queries", "weight_decay", "mode", "seed"),
    *("clip_projected_gradient", "update_norm", "distribution"),
)


@dataclass(frozen=True)
class RefineConfig:
    """Zeroth-order refinement.

    Attributes:
        steps: steps at most.
        seconds: stop after this much wall time, if given; what is measured before the first step
            counts.
        batch_size: examples per forward.
        accumulation: forwards whose batches make one loss evaluation.
        lr: learning rate; with ``relative_eps`` in units of each tensor's standard deviation.
            "auto": told from the curvature and the batches' noise, measured before the first step
            (``curvature.Curvature``).
        calibration_draws: noise draws that it is told from.
        eps: perturbation scale, a number; or "match:0.1", the scale of weight noise of 0.1 standard
            deviations, "match:abs:0.002" of absolute noise: at the scale of the noise to be
            survived, as at eps much below it a converged loss tells nothing of robustness.
        relative_eps: a number for eps is a multiple of each tensor's standard deviation.
        queries: directions per step.
        weight_decay, clip_projected_gradient, update_norm: as in ``ZOSGD``.
        schedule: "constant" or "cosine" (over ``steps``).
        mode: who owns the weights during an evaluation: "streamed", "dual", "inplace",
            "snapshot", "master", "master8" or "mezo"; see ``zo_kernels.modes``.
        distribution: of the directions, "normal" or "rademacher".
        parameters: "linear" (weights of the decoder blocks' linears), "all", or shell patterns of
            parameter names separated by commas.
        layers: numbers of the decoder blocks to which these are confined; None: no confinement.
        quantized: take losses through a quantizer, named as in ``zo-kernels evaluate``: of the
            weights fake_quant(w +- eps z); None: through the weights as they are.
        reuse_prefix: compute what lies before the first selected block once per step.
        curvature_every: steps between two measurements of the loss at the unperturbed weights, for
            the log's curvature (l+ + l-) / 2 - l0; 0: never.
        held_out_every: steps between two measurements of the held-out loss under weight noise; 0:
            never.
        held_out_noise: its scale, in standard deviations; None: eps, which is relative then.
        held_out_draws: noise draws of each.
        patience: end the run when so many such measurements in a row have brought no new best, and
            go back to the best, which may be the weights before the first step: they are measured
            too; 0: never.
        seed: of the noise and the batch order.
        max_length: token limit of prompt plus completion.
    """

    steps: int = 200
    seconds: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    lr: float | str = 1e-3
    calibration_draws: int = 8
    eps: float | str = 0.1
    relative_eps: bool = True
    queries: int = 1
    weight_decay: float = 0.0
    clip_projected_gradient: float | None = None
    update_norm: float | None = None
    schedule: str = "constant"
    mode: str = "streamed"
    distribution: str = "normal"
    parameters: str = "linear"
    layers: tuple[int, ...] | None = None
    quantized: str | None = None
    reuse_prefix: bool = True
    curvature_every: int = 0
    held_out_every: int = 0
    held_out_noise: float | None = None
    held_out_draws: int = 4
    patience: int = 0
    seed: int = 0
    max_length: int = 512

    def check(self) -> None:
        """Raise ValueError naming the first option out of range (ZOSGD checks its own)."""
        least = {"steps": 1, "batch_size": 1, "accumulation": 1}
        least |= {"curvature_every": 0, "held_out_every": 0, "held_out_draws": 1, "patience": 0}
        least |= {"calibration_draws": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {sorted(MODES)}, got {self.mode!r}")
        if isinstance(self.lr, str) and self.lr != "auto":
            raise ValueError(f"lr: expected a number or 'auto', got {self.lr!r}")
        eps, relative = self.scale()
        if self.lr == "auto" and not eps > 0:
            raise ValueError(f"lr: expected a number where eps is 0, got {self.lr!r}")
        if self.lr == "auto" and self.update_norm is not None:
            raise ValueError(
                "lr: expected a number with update_norm, which sets the steps' length, got "
                f"{self.lr!r}"
            )
        if self.quantized is not None:
            check_weight_scheme("quantized", self.quantized)
        if self.patience and not self.held_out_every:
            raise ValueError("patience: expected held_out_every with it, got 0")
        noise = self.held_out_noise
        if noise is not None and not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"held_out_noise: expected a finite number of at least 0, got {noise}")
        if self.held_out_every and noise is None and not relative:
            raise ValueError("held_out_noise: expected a number where eps is absolute, got none")
        if self.layers is not None and not self.layers:
            raise ValueError("layers: expected at least one decoder block, got none")

    def scale(self) -> tuple[float, bool]:
        """eps as a number, and whether it is relative to each tensor's standard deviation.

        Raises:
            ValueError: neither a number nor "match:<scale>" nor "match:abs:<scale>".
        """
        if not isinstance(self.eps, str):
            return float(self.eps), self.relative_eps
        word, _, text = self.eps.partition(":")
        relative = not text.startswith("abs:")
        try:
            value = float(text.removeprefix("abs:"))
        except ValueError:
            value = math.nan
        if word != "match" or not (math.isfinite(value) and value > 0):
            raise ValueError(
                "eps: expected a number, 'match:<noise scale>' or 'match:abs:<noise scale>', got "
                f"{self.eps!r}"
            )
        return value, relative

    def optimizer_options(self) -> dict[str, Any]:
        """The arguments of ``ZOSGD`` but for its learning rate."""
        eps, relative = self.scale()
        own = {key: value for key, value in asdict(self).items() if key in _OPTIMIZER}
        return own | {"eps": eps, "relative_eps": relative}


def select_parameters(
    model: Any, parameters: str, layers: Sequence[int] | None = None
) -> list[tuple[str, Any]]:
    """The named parameters that "linear", "all" or comma-separated shell patterns choose.

    Args:
        model: with decoder blocks.
        parameters: see above.
        layers: numbers of the decoder blocks that they have to be in; None: anywhere.

    Raises:
        ValueError: nothing is chosen, a pattern matches nothing, or no such block.
    """
    if parameters == "linear":
        chosen = list(linear_weights(model).items())
    else:
        patterns = [] if parameters == "all" else [p.strip() for p in parameters.split(",")]
        try:
            chosen = named_parameters(model, include=patterns)
        except ValueError as error:
            raise ValueError(
                "parameters: expected 'linear', 'all' or patterns that each match a name, got "
                f"{parameters!r} ({error})"
            ) from error
    if layers is None:
        return chosen
    blocks = list(decoder_blocks(model))
    wrong = [number for number in layers if not 0 <= number < len(blocks)]
    if wrong:
        raise ValueError(f"layers: expected 0 to {len(blocks) - 1}, got {wrong[0]}")
    starts = tuple(f"{blocks[number]}." for number in layers)
    confined = [(name, parameter) for name, parameter in chosen if name.startswith(starts)]
    if not confined:
        raise ValueError(f"layers: expected some of '{parameters}' in {list(layers)}, got none")
    return confined


def first_block(model: Any, names: Sequence[str]) -> int:
    """Number of the first decoder block that may read one of these parameters.

    0 if one is outside the blocks and may be read before them.
    """
    blocks = list(decoder_blocks(model))
    found = len(blocks)
    for name in names:
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        found = min(found, inside[0] if inside else 0)
    return found
