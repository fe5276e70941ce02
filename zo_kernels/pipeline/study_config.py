"""What a study is asked for; study_file.py reads it from YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from zo_kernels.blocks import decoder_blocks, is_conv1d, linear_weights
from zo_kernels.ops.quant_arguments import group_of
from zo_kernels.optim import ZOSGD
from zo_kernels.refine.align import AlignConfig
from zo_kernels.refine.config import RefineConfig, select_parameters
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.refine.selection import RULES
from zo_kernels.robustness.conditions import EvaluationConfig, parse_scheme

KINDS = ("zo", "fo", "walk")
EQUAL = ("forwards", "seconds", "steps")
RESERVED = ("base", "aligned", "lr0")
OWN = {
    "refine": ("seed", "layers"),
    "first_order": ("seed", "steps", "seconds"),
    "arm": ("seed", "steps", "seconds"),
}
"""Options that a study says itself: by its seeds, the arms' blocks and their equal cost."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Arm:
    """One way to go on from the aligned model.

    Attributes:
        name: in files and the report: letters, digits and _ . + -
        kind: "zo" (zeroth-order refinement), "fo" (further first-order steps) or "walk" (one random
            step as long as another arm's way).
        blocks: of "zo", the rule by which decoder blocks are chosen, out of ``selection.RULES``.
        like: of "walk", the "zo" arm whose blocks and whose distance it takes.
        options: fields of ``RefineConfig`` ("zo") or ``AlignConfig`` ("fo") that differ from the
            study's.
    """

    name: str
    kind: str
    blocks: str = "all"
    like: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("more_fo", "fo"),
        Arm("fo_noise", "fo", options={"noise": "eps"}),
        Arm("walk", "walk", like="zo_full"),
        Arm("walk_robust", "walk", like="zo_robust"),
        Arm("zo_full", "zo"),
        *(Arm(f"zo_{rule}", "zo", blocks=rule) for rule in RULES if rule != "all"),
    )
}
"""Arms by name. The noise of "fo_noise" is at the scale of the refinement's eps."""
TITLES = {
    "base": "base",
    "aligned": "aligned (FO)",
    "lr0": "ZO with lr = 0 (control)",
    "more_fo": "more FO",
    "fo_noise": "FO with noise injection",
    "walk": "random walk as long as full ZO",
    "walk_robust": "random walk as long as focused ZO",
    "zo_full": "full ZO",
    "zo_robust": "focused ZO, robust blocks",
    "zo_snip": "focused ZO, SNIP blocks",
    "zo_magnitude": "focused ZO, top-magnitude blocks",
    "zo_random": "focused ZO, random blocks",
}


@dataclass(frozen=True)
class StudyConfig:
    """A study: every arm from one aligned model, at equal cost, with several training seeds.

    Attributes:
        model: Hugging Face directory, or "smollm2" for the small real model that the package
            fetches.
        data: JSON lines of examples (``chat.read_examples``); None: the built-in ones.
        text: plain text for perplexity; None: the built-in one.
        seeds: training seeds: of the noise and the batch order of every arm.
        arms: what is compared; see ``ARMS``.
        align: Stage I; None: the model is aligned already.
        score: Stage II.
        refine: Stage III. Where arms have equal forwards, those of the losses of its steps are what
            each arm has: what a rate, a curvature and held-out losses take comes out of it. Its
            seconds are those of the first zeroth-order arm where arms have equal ones.
        first_order: of the arms of further first-order steps.
        evaluation: conditions and prompts.
        equal: what arms have alike: "forwards" (a backward counts as two; scoring counts),
            "seconds" (of full ZO, or of the first zeroth-order arm; choosing blocks is left out) or
            "steps" (refine's, whatever they cost).
        threads: torch's threads; None: as they are.
        device: torch device of training and evaluation.
        keep_models: keep every arm's checkpoint. A zeroth-order arm always keeps its replay log,
            from which ``zo-kernels replay`` makes it.
        dtype: of the weights after alignment, as --dtype has it.
    """

    model: str
    data: str | None = None
    text: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[Arm, ...] = tuple(ARMS.values())
    align: AlignConfig | None = field(default_factory=AlignConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    first_order: AlignConfig = field(default_factory=AlignConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    equal: str = "forwards"
    threads: int | None = None
    device: str = "cpu"
    keep_models: bool = False
    dtype: str = "auto"

    def check(self) -> None:
        """Raise ValueError naming the first section and option out of range."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected some, each once, got {list(self.seeds)}")
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names) or set(names) & set(RESERVED):
            raise ValueError(
                f"arms: expected some, each once, with other names than {RESERVED}, got {names}"
            )
        wrong = [seed for seed in self.seeds if not 0 <= seed < 1 << 64]
        if wrong:
            raise ValueError(f"seeds: expected 0 <= seed < 2**64, got {wrong[0]}")
        if self.equal not in EQUAL:
            raise ValueError(f"equal: expected one of {EQUAL}, got {self.equal!r}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {self.threads}")
        for name in ("align", "score", "refine", "first_order"):
            section = getattr(self, name)
            if section is not None:
                with within(name):
                    section.check()
            for option in OWN.get(name, ()):
                if getattr(section, option) != getattr(type(section), option):
                    raise ValueError(
                        f"{name}.{option}: expected no such option in a study, which says it "
                        f"itself, got {getattr(section, option)!r}"
                    )
        with within("evaluation"):
            self.evaluation.conditions()
        if self.evaluation.layers:
            raise ValueError(
                f"evaluation.layers: expected none in a study, got {self.evaluation.layers}"
            )
        self._check_equal()
        for arm in self.arms:
            self._check_arm(arm)

    def _check_equal(self) -> None:
        if self.equal != "seconds":
            if self.refine.seconds is not None:
                raise ValueError(
                    f"refine.seconds: expected none where arms have equal {self.equal}, got "
                    f"{self.refine.seconds}"
                )
            return
        refined = [arm for arm in self.arms if arm.kind == "zo"]
        if not refined:
            raise ValueError("equal: expected a zeroth-order arm whose seconds count, got none")
        schedules = [arm.options.get("schedule", self.refine.schedule) for arm in refined]
        if set(schedules) != {"constant"}:
            raise ValueError(
                "refine.schedule: expected 'constant' where arms end by their time, got 'cosine'"
            )

    def _check_arm(self, arm: Arm) -> None:
        where = f"arms.{arm.name}"
        if not _NAME.fullmatch(arm.name):
            raise ValueError(f"arms: expected names of letters, digits and _.+-, got {arm.name!r}")
        if arm.kind not in KINDS:
            raise ValueError(f"{where}: expected a kind of {KINDS}, got {arm.kind!r}")
        if arm.blocks not in RULES or (arm.kind != "zo" and arm.blocks != "all"):
            raise ValueError(
                f"{where}: expected blocks out of {RULES}, or none unless kind is zo, got "
                f"{arm.blocks!r}"
            )
        if arm.kind != "walk" and arm.like is not None:
            raise ValueError(f"{where}: expected like: of a walk only, got {arm.like!r}")
        own = [name for name in OWN["arm"] if name in arm.options]
        if arm.blocks != "all" and "layers" in arm.options:
            own.append("layers")
        if own:
            raise ValueError(
                f"{where}.options.{own[0]}: expected no such option in a study, which says it "
                f"itself, got {arm.options[own[0]]!r}"
            )
        if arm.kind == "zo":
            with within(where):
                _check_refinement(self.refinement(arm, 0, 1, None))
        elif arm.kind == "fo":
            with within(where):
                self.first_order_steps(arm, 0, 1).check()
        else:
            like = next((other for other in self.arms if other.name == arm.like), None)
            if like is None or like.kind != "zo":
                raise ValueError(
                    f"{where}: expected like: a zeroth-order arm of this study, got {arm.like!r}"
                )
            if self.refinement(like, 0, 1, None).mode == "mezo":
                raise ValueError(
                    f"{where}: expected like: an arm with a replay log, got {arm.like!r} in mode "
                    "'mezo'"
                )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for blocks or parameters that a model does not have.

        Args:
            model: may be on the meta device.
        """
        blocks = len(decoder_blocks(model))
        if any(arm.blocks == "robust" for arm in self.arms):
            with within("score.quantization"):
                _check_scheme(model, self.score.quantization)
        for scheme in self.evaluation.quantization:
            with within("evaluation.quantization"):
                _check_scheme(model, scheme)
        for arm in self.arms:
            if arm.kind != "zo":
                continue
            if arm.blocks != "all" and self.score.selected > blocks:
                raise ValueError(
                    f"score.selected: expected at most the model's {blocks} decoder blocks, got "
                    f"{self.score.selected}"
                )
            config = self.refinement(arm, 0, 1, None)
            with within(f"arms.{arm.name}"):
                select_parameters(model, config.parameters, config.layers)
                _check_scheme(model, config.quantized)

    def forwards(self) -> float:
        """The cost that every arm has, in forwards of one example, where they have equal ones."""
        refine = self.refine
        return 2.0 * refine.queries * refine.steps * refine.batch_size * refine.accumulation

    def asked(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What makes an arm with a training seed what it is, for whatever cost."""
        found: dict[str, Any] = {"kind": arm.kind, "blocks": arm.blocks, "like": arm.like}
        if arm.kind == "walk":
            return found
        if arm.kind == "zo":
            options = asdict(self.refinement(arm, seed, 1, None))
        else:
            options = asdict(self.first_order_steps(arm, seed, 1))
        return found | {k: v for k, v in options.items() if k not in ("steps", "seconds")}

    def refinement(
        self, arm: Arm, seed: int, steps: int, layers: tuple[int, ...] | None
    ) -> RefineConfig:
        """The configuration of a zeroth-order arm."""
        options = {"seed": seed, "steps": steps, "layers": layers, **arm.options}
        return replace(self.refine, **options)

    def first_order_steps(self, arm: Arm, seed: int, steps: int) -> AlignConfig:
        """The configuration of a first-order arm."""
        options = dict(arm.options)
        if options.get("noise") == "eps":
            eps, relative = self.refine.scale()
            if not relative:
                raise ValueError(
                    f"arms.{arm.name}: expected a relative eps, whose scale noise injection takes, "
                    f"got {self.refine.eps!r}; give its noise as a number"
                )
            options["noise"] = eps
        return replace(self.first_order, **{"seed": seed, "steps": steps, **options})

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def _check_refinement(config: RefineConfig) -> None:
    """What ``ZOSGD`` would refuse is refused before the alignment, not after it."""
    config.check()
    lr = 0.0 if config.lr == "auto" else config.lr
    options = config.optimizer_options() | {"mode": "streamed"}  # the mode is checked
    ZOSGD([("weight", nn.Parameter(torch.ones(2)))], lr=lr, **options)


def _check_scheme(model: nn.Module, name: str | None) -> None:
    """Raise ValueError if a scheme's groups do not divide the rows of a model's linears."""
    if name in (None, "none"):
        return
    scheme = parse_scheme(name)
    stored_across = {id(module.weight) for module in model.modules() if is_conv1d(module)}
    for weight_name, weight in linear_weights(model).items():
        matrix = weight.t() if id(weight) in stored_across else weight.flatten(0, -2)
        group_of(matrix, scheme["scheme"], scheme["group_size"], f"'{weight_name}'")


@contextmanager
def within(where: str) -> Iterator[None]:
    """Let errors of a section's check say which section it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
