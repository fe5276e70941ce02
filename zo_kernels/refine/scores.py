"""Layer scores: what Stage II is asked for, and what it finds.

    S(l) = S_noise(l) + lambda S_quant(l)                       (section 4.2 of arXiv 2605.29396)

    S_noise(l) = mean_r (f(theta + rho v_lr) + f(theta - rho v_lr)) / 2 - f(theta)   "antithetic"
    S_noise(l) = f(theta + rho v_l) - f(theta)                                       "one-sided"
    S_quant(l) = f(theta with block l quantised) - f(theta)

with v standard normal in block l and 0 elsewhere. Both estimate (rho^2 / 2) tr(H_l) up to
O(rho^4); the one-sided one, which the paper has with a single draw, has the slope's error of size
rho ||g_l|| besides, which cancels in the antithetic one. The latter gives for nothing the slope of
the loss along each v, (f(+) - f(-)) / (2 rho): two-point gradient estimates that Stage III can
begin with (``Scores.warm_start``). The forwards are in scoring.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_kernels import noise
from zo_kernels.chat import HARMFUL
from zo_kernels.files import write_file
from zo_kernels.robustness.conditions import check_weight_scheme

ESTIMATORS = {"antithetic": (1, -1), "one-sided": (1,)}
"""Name -> signs of the draws that are evaluated."""
NORMALIZATIONS = ("minmax", "none")
SEPARATION = 2.0
"""Standard errors between the worst block chosen and the best one left out, to call it settled."""


@dataclass(frozen=True)
class ScoreConfig:
    """How blocks are scored.

    Attributes:
        rho: noise scale; the scale of the noise to be survived.
        relative_rho: rho is a multiple of each tensor's standard deviation (absolute rho favours
            blocks of small weights; the paper has it).
        draws: noise draws per block, at the least. None: 4, or 1 of the one-sided estimator.
        max_draws: draws are doubled up to this many until the selection is settled. None: 16, or 1
            of the one-sided estimator, as in the paper.
        estimator: "antithetic" or "one-sided" (the paper's).
        quantization: scheme of S_quant as ``zo-kernels evaluate`` has it, such as "int4-g64"; or
            "none".
        quant_weight: lambda, the factor of S_quant.
        normalization: "none": the sum as it is, in nats; "minmax": both terms are scaled to 0..1
            over the blocks before they are added, also one that says nothing (a model that int4
            leaves as it is has rises of 1e-5 nats, which then weigh as much as the noise's).
        selected: m, how many blocks are chosen.
        kind: of the examples of the loss, "harmful" (the safety loss) or "all".
        examples: the first so many; None: all.
        batch_size: examples per forward.
        max_length: token limit of prompt plus completion.
        seconds: no further draws after this much wall time, if given.
        reuse_prefix: begin forwards behind the blocks that are as they were.
        seed: of the noise.
    """

    rho: float = 0.1
    relative_rho: bool = True
    draws: int | None = None
    max_draws: int | None = None
    estimator: str = "antithetic"
    quantization: str = "int4"
    quant_weight: float = 1.0
    normalization: str = "none"
    selected: int = 4
    kind: str = HARMFUL
    examples: int | None = 32
    batch_size: int = 8
    max_length: int = 512
    seconds: float | None = None
    reuse_prefix: bool = True
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the first option out of range."""
        for name, known in (
            ("estimator", tuple(ESTIMATORS)),
            ("normalization", NORMALIZATIONS),
            ("kind", (HARMFUL, "all")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"rho: expected a positive number, got {self.rho}")
        if not math.isfinite(self.quant_weight):
            raise ValueError(f"quant_weight: expected a finite number, got {self.quant_weight}")
        for name in ("selected", "batch_size", "examples", "draws", "max_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds}")
        least, most = self.draw_range()
        if not least <= most <= noise.RESERVED_RANGE:
            raise ValueError(
                f"max_draws: expected draws <= max_draws <= 2**28, got {least} and {most}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: expected 0 <= seed < 2**64, got {self.seed}")
        if self.quantization != "none":
            check_weight_scheme("quantization", self.quantization)

    def draw_range(self) -> tuple[int, int]:
        """The least and the greatest number of draws."""
        single = self.estimator == "one-sided"
        least = (1 if single else 4) if self.draws is None else self.draws
        return least, max(least, 1 if single else 16) if self.max_draws is None else self.max_draws


@dataclass(frozen=True)
class BlockScore:
    """One block's sensitivity; losses in nats per token.

    Attributes:
        number, block: of the decoder block, and its name.
        noise, noise_se: S_noise and its standard error over draws (None for one draw).
        quant: S_quant, None if not asked for. It has no draws: a single rounding.
        score, score_se: the combined score, in the normalization's unit.
        slope, slope_se: root mean square over draws of the loss's slope along v, which estimates
            the norm of the block's gradient, and its standard error. None of one-sided draws.
        slopes: the slope of each draw, per unit of rho.
        trace: 2 S_noise / rho^2, an estimate of tr(H_l) in rho's coordinates.
        selected: whether the block is among the m greatest scores.
    """

    number: int
    block: str
    noise: float
    noise_se: float | None
    quant: float | None
    score: float
    score_se: float | None
    slope: float | None
    slope_se: float | None
    slopes: tuple[float, ...]
    trace: float
    selected: bool


@dataclass(frozen=True)
class Scores:
    """All blocks' scores, and how they came about.

    Attributes:
        config: as asked for.
        blocks: in the model's order.
        loss: f(theta), nats per token.
        examples: how many the loss is over.
        draws: per block.
        settled: whether every block chosen is ahead of every other one by ``SEPARATION`` standard
            errors of the difference. Never of single draws. That is looked at after 4, 8 and 16
            draws, by default, and standard errors of few draws vary: of two blocks that are equal,
            16 % of scorings call one ahead.
        separation: the least such distance, in standard errors; None of single draws.
        forwards, naive_forwards: forwards over the examples, in units of a whole one, those of an
            interrupted call included; and what whole forwards would have taken.
        seconds: wall time.
        units: by parameter name, the factor of rho: its standard deviation, or 1.
    """

    config: ScoreConfig
    blocks: tuple[BlockScore, ...]
    loss: float
    examples: int
    draws: int
    settled: bool
    separation: float | None
    forwards: float
    naive_forwards: float
    seconds: float
    units: Mapping[str, float] = field(repr=False)

    def selected(self) -> tuple[int, ...]:
        """Numbers of the chosen blocks, ascending."""
        return tuple(score.number for score in self.blocks if score.selected)

    def settings(self) -> dict[str, Any]:
        """How they were measured, for a report (``robustness.scores.SETTINGS``)."""
        config = self.config
        scheme = None if config.quantization == "none" else config.quantization
        return {
            "rho": config.rho,
            "relative": config.relative_rho,
            "draws": self.draws,
            "quantization": scheme,
            "estimator": config.estimator,
            "prompts": self.examples,
            "settled": None if self.separation is None and not self.settled else self.settled,
            "loss": self.loss,
            "forwards": self.forwards,
            "naive_forwards": self.naive_forwards,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One dict per block, as ``plots.layer_scores`` takes them."""
        return [asdict(score) for score in self.blocks]

    def warm_start(
        self, names: Sequence[str], lr: float
    ) -> tuple[list[int], dict[str, list[float]]]:
        """The descent step that the scoring has measured, as further queries of a first step.

            theta_p <- theta_p - lr * mean_r(slope_lr * unit_p * v_lr)

        for each parameter p of block l; a second-hand gradient, estimated at theta.

        Args:
            names: of the parameters to move.
            lr: learning rate in rho's coordinates.

        Returns:
            The directions, and for each name that was scored one scale per direction.

        Raises:
            ValueError: one-sided draws, which have no slopes of their own.
        """
        self.check_slopes()
        directions = [noise.LAYER_SCORING + draw for draw in range(self.draws)]
        scales: dict[str, list[float]] = {}
        for score in self.blocks:
            for name in names:
                if name.startswith(f"{score.block}.") and name in self.units:
                    unit = self.units[name]
                    scales[name] = [-lr * unit * slope / self.draws for slope in score.slopes]
        return directions, scales

    def check_slopes(self) -> None:
        """Raise ValueError for one-sided draws, which have no slopes of their own."""
        if self.config.estimator != "antithetic":
            raise ValueError(
                "warm_start: expected antithetic scores, whose draws have slopes, got "
                f"{self.config.estimator!r} ones"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON."""
        record = asdict(self) | {"units": dict(self.units)}
        write_file(path, json.dumps(record, indent=1, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Scores:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is none of its; names it.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            blocks = tuple(
                BlockScore(**{**block, "slopes": tuple(block["slopes"])})
                for block in record.pop("blocks")
            )
            return Scores(config=ScoreConfig(**record.pop("config")), blocks=blocks, **record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: expected scores of zo-kernels score, got {error}") from error


def top(values: Sequence[float], count: int) -> tuple[int, ...]:
    """Places of the greatest values, ascending; of equal ones the first."""
    ordered = sorted(range(len(values)), key=lambda place: (-values[place], place))
    return tuple(sorted(ordered[:count]))
