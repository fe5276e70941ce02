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
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
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
