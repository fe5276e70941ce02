"""A study's configuration from a YAML file."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zo_kernels.pipeline.settings import configured
from zo_kernels.pipeline.study_config import ARMS, Arm, StudyConfig
from zo_kernels.refine.align import AlignConfig
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.robustness.conditions import EvaluationConfig


def read_study(path: str | os.PathLike[str]) -> StudyConfig:
    """Read a study from a YAML file; ``configs/`` has some.

    Sections align, score, refine, first_order and evaluation are mappings of their classes' fields
    ("align: none", or nothing, for a model that is aligned already). Arms are names out of
    ``ARMS``, or mappings of an ``Arm``'s fields; one of a name and kind out of ``ARMS`` takes what
    it does not say from there. Model, data and text are relative to the YAML file, but for the
    model "smollm2".

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
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
    sections: dict[str, Any] = {}
    for name, kind in (
        ("align", AlignConfig),
        ("score", ScoreConfig),
        ("refine", RefineConfig),
        ("first_order", AlignConfig),
        ("evaluation", EvaluationConfig),
    ):
        if name not in found:
            continue
        given = found.pop(name)
        if name == "align" and given in (None, "none"):
            sections[name] = None
        else:
            sections[name] = configured(kind, given, f"{path}: {name}")
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
    given = values.pop("options", None)
    known = ARMS.get(values["name"])
    if known is not None and values.get("kind", known.kind) != known.kind:
        known = None  # it has but the name
    base = asdict(known) if known is not None else {}
    base.pop("options", None)
    arm = configured(Arm, base | values, f"{path}: arms.{values['name']}")
    inherited = dict(known.options) if known is not None else {}
    return replace(arm, options=inherited | _options(arm, given, f"{path}: arms.{arm.name}"))


def _options(arm: Arm, given: Any, where: str) -> dict[str, Any]:
    """Those that a file gives an arm: fields of its kind's class."""
    if given in (None, {}):
        return {}
    kind = {"zo": RefineConfig, "fo": AlignConfig}.get(arm.kind)
    if kind is None:
        raise ValueError(f"{where}: expected no options of a {arm.kind}, got some")
    where = f"{where}.options"
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a mapping of options, got {given!r}")
    named = {str(key).replace("-", "_"): value for key, value in given.items()}
    taken = {}
    if arm.kind == "fo" and named.get("noise") == "eps":
        taken["noise"] = named.pop("noise")  # StudyConfig.first_order_steps makes it a number
    parsed = configured(kind, named, where)
    return taken | {key: getattr(parsed, key) for key in named}
