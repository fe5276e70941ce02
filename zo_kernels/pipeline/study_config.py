"""What a study is asked for: a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_kernels.pipeline.settings import configured
from zo_kernels.refine.align import AlignConfig
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.refine.selection import RULES
from zo_kernels.robustness.conditions import EvaluationConfig

KINDS = ("zo", "fo", "walk")
EQUAL = ("forwards", "seconds")
RESERVED = ("base", "aligned", "lr0")


@dataclass(frozen=True)
class Arm:
    """One way to go on from the aligned model.

    Attributes:
        name: in files and the report.
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
    "more_fo": "more FO, equal cost",
    "fo_noise": "FO with noise injection, equal cost",
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
        refine: Stage III; its steps are those of full ZO with one query and count the cost that
            every arm has.
        first_order: of the arms of further first-order steps.
        evaluation: conditions and prompts.
        equal: what arms have alike: "forwards" (a backward counts as two; scoring counts) or
            "seconds" (of full ZO, or of the first zeroth-order arm).
        threads: torch's threads; None: as they are.
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
        if self.equal not in EQUAL:
            raise ValueError(f"equal: expected one of {EQUAL}, got {self.equal!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {self.threads}")
        by_name = {arm.name: arm for arm in self.arms}
        for arm in self.arms:
            if arm.kind not in KINDS:
                raise ValueError(f"arms.{arm.name}: expected a kind of {KINDS}, got {arm.kind!r}")
            if arm.blocks not in RULES:
                raise ValueError(
                    f"arms.{arm.name}: expected blocks out of {RULES}, got {arm.blocks!r}"
                )
            like = by_name.get(arm.like or "")
            if arm.kind == "walk" and (like is None or like.kind != "zo"):
                raise ValueError(
                    f"arms.{arm.name}: expected like: a zeroth-order arm of this study, got "
                    f"{arm.like!r}"
                )
            if arm.kind == "zo":
                self.refinement(arm, 0, 1, None).check()
            elif arm.kind == "fo":
                self.first_order_steps(arm, 0, 1).check()
        if self.equal == "seconds" and not any(arm.kind == "zo" for arm in self.arms):
            raise ValueError("equal: expected a zeroth-order arm whose seconds count, got none")
        if self.align is not None:
            self.align.check()
        self.score.check()
        self.evaluation.conditions()
        if self.evaluation.layers:
            raise ValueError(
                f"evaluation.layers: expected none in a study, got {self.evaluation.layers}"
            )

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


def read_study(path: str | os.PathLike[str]) -> StudyConfig:
    """Read a study from a YAML file; ``configs/`` has some.

    Sections align, score, refine, first_order and evaluation are mappings of their classes' fields
    ("align: none" for a model that is aligned already). Arms are names out of ``ARMS``, or mappings
    of an ``Arm``'s fields. Files are relative to the YAML file, but for a model that is a word.

    Raises:
        ValueError: not YAML, or an unknown or impossible option; names it.
        OSError: the file cannot be read.
    """
    import yaml

    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    if not isinstance(found, dict) or "model" not in found:
        raise ValueError(f"{path}: expected a mapping of options with a model, got {found!r:.80}")
    sections: dict[str, Any] = {}
    for name, kind in (
        ("align", AlignConfig),
        ("score", ScoreConfig),
        ("refine", RefineConfig),
        ("first_order", AlignConfig),
        ("evaluation", EvaluationConfig),
    ):
        if name == "align" and found.get(name) == "none":
            sections[name] = None
            del found[name]
        elif name in found:
            sections[name] = configured(kind, found.pop(name), f"{path}: {name}")
    if "arms" in found:
        sections["arms"] = tuple(_arm(arm, path) for arm in _listed(found.pop("arms"), path))
    plain = configured(StudyConfig, found, str(path))
    for name in ("model", "data", "text"):
        value = getattr(plain, name)
        if value is not None and not (name == "model" and value == "smollm2"):
            sections[name] = str(path.parent / value)
    config = replace(plain, **sections)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _listed(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: arms: expected a list, got {value!r}")
    return value


def _arm(value: Any, path: Path) -> Arm:
    if isinstance(value, str):
        if value not in ARMS:
            raise ValueError(f"{path}: arms: expected names out of {list(ARMS)}, got {value!r}")
        return ARMS[value]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{path}: arms: expected names or mappings with a name, got {value!r}")
    values = dict(value)
    options = values.pop("options", {})
    known = ARMS.get(values["name"])
    base = asdict(known) if known is not None else {}
    base.pop("options", None)
    arm = configured(Arm, base | values, f"{path}: arms.{values['name']}")
    kind = {"zo": RefineConfig, "fo": AlignConfig}.get(arm.kind)
    if options and kind is None:
        raise ValueError(f"{path}: arms.{arm.name}: expected no options of a {arm.kind}, got some")
    if options:
        parsed = configured(kind, options, f"{path}: arms.{arm.name}.options")
        options = {str(key).replace("-", "_"): None for key in options}
        options = {key: getattr(parsed, key) for key in options}
    inherited = dict(known.options) if known is not None else {}
    return replace(arm, options=inherited | options)
