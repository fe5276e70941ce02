"""A tiny model with data and text for studies, and what stops one in the middle.

A test file takes the fixtures that it needs, by ``root = tiny_study.root``; ``no_report`` then acts
on all of its tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels.pipeline import study as study_module
from zo_kernels.pipeline.study import Study
from zo_kernels.pipeline.study_config import ARMS, StudyConfig
from zo_kernels.pipeline.study_file import read_study
from zo_kernels.refine import checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
#: The arms of ``finished``.
NAMES = ("zo_robust", "more_fo", "walk_robust")
ROWS = [
    ("how do i open a door", "turn the key and push it", "harmless"),
    ("tell me a story", "a good day about sun", "benign"),
    ("write a story about cat", "the cat is here", "harmless"),
    ("open the door please", "sorry i can not help with that", "harmful"),
    ("tell me how", "sorry i can not in any way", "harmful"),
    ("write about the key", "sorry i can not help", "harmful"),
]


def write_files(root: Path, layers: int = 2) -> Path:
    """base/, data.jsonl and text.txt."""
    checkpoint.save(tiny_model("llama_tied", layers=layers), tiny_tokenizer(), root / "base")
    lines = [json.dumps({"prompt": p, "completion": c, "kind": k}) for p, c, k in ROWS]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    (root / "text.txt").write_text("how do i open a door and tell me a story about cat " * 4)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and text."""
    return write_files(tmp_path_factory.mktemp("files"))


def model_options(files: Path) -> list[str | Path]:
    """What commands are told of them."""
    return ["--model", files / "base", "--data", files / "data.jsonl", "--dtype", "float32"]


def tiny_config(root: Path) -> StudyConfig:
    """configs/tiny.yaml on these files."""
    files = {"model": "base", "data": "data.jsonl", "text": "text.txt"}
    return replace(
        read_study(CONFIGS / "tiny.yaml"), **{key: str(root / f) for key, f in files.items()}
    )


def small_config(root: Path, *arms: Any, **changes: Any) -> StudyConfig:
    """The same with one seed and two conditions, and with these arms, by their names or as such."""
    config = tiny_config(root)
    evaluation = replace(
        config.evaluation, draws=1, activation_noise=(), quantization=(), generate_under=(),
        perplexity_tokens=16,
    )  # fmt: skip
    chosen = tuple(ARMS[arm] if isinstance(arm, str) else arm for arm in arms)
    return replace(config, **{"seeds": (0,), "arms": chosen, "evaluation": evaluation, **changes})


def run(config: StudyConfig, out: Path) -> Path:
    """Run a study in silence; its folder."""
    Study(config, out, lambda line: None).run()
    return out


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    """For tests of something else: reports take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zo_kernels.pipeline.study_report.write_report", lambda *_, **__: {})
        yield


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[StudyConfig, Path]:
    """A study that nobody stopped: its configuration and its folder."""
    config = small_config(root, *NAMES)
    return config, run(config, root / "finished")


@pytest.fixture
def copy(finished: tuple[StudyConfig, Path], tmp_path: Path) -> tuple[StudyConfig, Path]:
    """The same to go on with."""
    config, out = finished
    return config, shutil.copytree(out, tmp_path / "copy")


def evaluated(out: Path) -> bytes:
    """The records of a study's evaluation as they are written."""
    return (out / "evaluation.jsonl").read_bytes()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of what studies do from now on: align_arm zo_full-0, evaluate aligned, score, ..."""
    done: list[str] = []

    def watch(place: Any, name: str, word: Callable[..., str]) -> None:
        original = getattr(place, name)

        def watched(*args: Any, **options: Any) -> Any:
            done.append(word(*args))
            return original(*args, **options)

        monkeypatch.setattr(place, name, watched)

    for name in ("align_arm", "refine_arm"):
        watch(study_module, name, lambda *args: f"train {args[4].name}")
    watch(study_module, "walk_arm", lambda *args: "walk")
    watch(study_module, "score", lambda *args: "score")
    watch(study_module.Evaluation, "run", lambda evaluation, label: f"evaluate {label}")
    return done


@contextmanager
def stopped(place: Any, name: str, count: int, where: str = "") -> Iterator[None]:
    """Ctrl-C in the call of this number, of those on an object whose path ends with ``where``."""
    original = getattr(place, name)
    calls = []

    def stop(self: Any, *args: Any, **options: Any) -> Any:
        if not where or self.path.as_posix().endswith(where):
            calls.append(None)
            if len(calls) == count:
                raise KeyboardInterrupt
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, stop)
        yield


def stop_at(original: Callable[..., None], where: str, count: int = 2) -> Callable[..., None]:
    """MetricsLog.write that is interrupted at the line of this number of a file."""
    seen = []

    def stop(log: Any, record: Any) -> None:
        if log.path.as_posix().endswith(where):
            seen.append(record)
            if len(seen) == count:
                raise KeyboardInterrupt
        original(log, record)

    return stop
