"""The main job in a quarter of an hour: a small study of SmolLM2-135M-Instruct, or your model."""

from __future__ import annotations

from pathlib import Path

from zo_kernels.pipeline.study_config import ARMS, StudyConfig
from zo_kernels.refine.align import AlignConfig
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.robustness.conditions import EvaluationConfig

# Shares of the time asked for; evaluations take the rest.
ALIGN_SHARE = 0.18
ARM_SHARE = 0.07
SCORE_SHARE = 0.08
LEAST_SECONDS = 20.0


def demo_config(
    *,
    model: Path | None = None,
    data: Path | None = None,
    minutes: float = 14.0,
    eps: float = 0.1,
    lr: float | str = 1e-3,
    seed: int = 0,
    device: str = "cpu",
) -> StudyConfig:
    """A study that takes about so many minutes on two cores: one training seed, equal times.

    Args:
        model: Hugging Face directory; None: SmolLM2, which is fetched.
        data: JSON lines of examples; None: the built-in ones.
        minutes: wall time to aim for.
        eps: scale of the weight noise to be survived, in standard deviations.
        lr: learning rate of the refinement, or "auto".
        seed: training seed.
        device: torch device.

    Raises:
        ValueError: an option out of range; names it.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: expected a positive number, got {minutes}")

    def seconds(share: float) -> float:
        return max(LEAST_SECONDS, 60 * minutes * share)

    align = AlignConfig(steps=40, lr=1e-4, seconds=seconds(ALIGN_SHARE), seed=seed)
    config = StudyConfig(
        model="smollm2" if model is None else str(model),
        data=None if data is None else str(data),
        seeds=(seed,),
        arms=tuple(ARMS[name] for name in ("zo_full", "zo_robust", "more_fo", "walk_robust")),
        align=align,
        score=ScoreConfig(
            rho=eps, draws=2, max_draws=2, examples=8, seconds=seconds(SCORE_SHARE), max_length=256
        ),
        refine=RefineConfig(
            steps=10_000, seconds=seconds(ARM_SHARE), lr=lr, eps=eps, max_length=256
        ),
        first_order=AlignConfig(lr=1e-4, schedule="constant", warmup=0.0),
        # Six models are evaluated: few conditions, and text generated in two of them.
        evaluation=EvaluationConfig(
            noise=(eps,),
            draws=3,
            max_new_tokens=10,
            batch_size=16,
            max_prompts=16,
            perplexity_tokens=256,
            generate_under=("clean", "int4"),
            copy_weights=True,  # alignment takes more memory than that
        ),
        equal="seconds",
        device=device,
    )
    config.check()
    return config
