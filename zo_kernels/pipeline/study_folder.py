"""The folder of a study: what lies where, and what is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo_kernels.files import changed_settings, write_file
from zo_kernels.pipeline.arms import Trained
from zo_kernels.refine.records import read_records


class StudyFolder:
    """Files by arm and training seed; a model that exists once has no seed.

    study.json, training/<name>.{json, jsonl, zolog, state, peak, model}, models/<name>,
    records/<name>.jsonl with <name> = arm or arm-seed; aligned/, scores.json, scores.jsonl and the
    report's files.

    Args:
        path: the folder; made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(
        self,
        settings: Mapping[str, Any],
        free: tuple[str, ...],
        asked: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> None:
        """Remember what the study is; refuse to go on with another one.

        Args:
            settings: as JSON can hold them.
            free: keys in which a study may change.
            asked: by arm and training seed what is asked for; what is trained must have been
                asked for the same.

        Raises:
            ValueError: the folder is of a study that differs, or of other arms of these names;
                names in what. The folder is as it was.
            FileExistsError: it holds something else.
        """
        wanted = json.loads(json.dumps(settings))
        path = self.path / "study.json"
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            if not isinstance(found, dict):
                raise FileExistsError(
                    f"{path}: expected the settings of a study, got {found!r:.80}"
                )
            changed = changed_settings(found, wanted, free)
            if changed:
                raise ValueError(
                    f"{self.path}: expected a new folder or a study with the same configuration, "
                    f"got one that differs in {', '.join(changed)}"
                )
            for (label, seed), now in asked.items():
                trained = self.trained(label, seed)
                if trained is not None:
                    self._expect_same(label, trained.asked, json.loads(json.dumps(now)))
        elif self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(f"{self.path}: expected a new or empty folder, or a study's")
        write_file(path, json.dumps(wanted, indent=1) + "\n")

    def _expect_same(self, label: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in now:
            if was.get(key) != now[key]:
                raise ValueError(
                    f"arms.{label}: expected {key} {was.get(key)!r}, with which {self.path} has "
                    f"trained it, got {now[key]!r}; give the changed arm another name"
                )

    @staticmethod
    def name(label: str, seed: int | None) -> str:
        """Of an arm with a training seed."""
        return label if seed is None else f"{label}-{seed}"

    def training(self, label: str, seed: int | None, end: str) -> Path:
        """A file of an arm's training."""
        return self.path / "training" / f"{self.name(label, seed)}{end}"

    def model(self, label: str, seed: int | None) -> Path:
        """Where an arm's checkpoint goes that is kept."""
        return self.path / "models" / self.name(label, seed)

    def records_path(self, label: str, seed: int | None) -> Path:
        """Where an arm's evaluation goes."""
        return self.path / "records" / f"{self.name(label, seed)}.jsonl"

    def records(self, label: str, seed: int | None) -> list[dict[str, Any]]:
        """An arm's evaluation as far as it is there."""
        path = self.records_path(label, seed)
        return read_records(path) if path.exists() else []

    def finish(self, label: str, seed: int | None, trained: Trained) -> None:
        """Note that an arm is trained."""
        text = json.dumps(asdict(trained), indent=1) + "\n"
        write_file(self.training(label, seed, ".json"), text)

    def trained(self, label: str, seed: int | None) -> Trained | None:
        """What an arm's training took; None if it is not finished."""
        path = self.training(label, seed, ".json")
        return Trained(**json.loads(path.read_text("utf-8"))) if path.exists() else None
