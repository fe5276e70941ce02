"""The paper's method with its controls: every arm from one aligned model, at equal cost.

    base -> aligned -> { lr = 0, more FO, FO with noise, random walks, full ZO, focused ZO ... }

Arms are trained with several seeds and evaluated under the same noise on the same prompts. All that
is finished is kept in the study's folder and skipped when it is started again; what was interrupted
goes on where it was, to the same bits.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zo_kernels import chat
from zo_kernels.checks import expect_device
from zo_kernels.files import write_file
from zo_kernels.pipeline.arms import (
    BACKWARD,
    Trained,
    align_arm,
    chosen_blocks,
    peak_of_all,
    refine_arm,
    refine_cost,
    replayed_fingerprint,
    starting_cost,
    walk_arm,
)
from zo_kernels.pipeline.smollm2 import prepare
from zo_kernels.pipeline.study_config import TITLES, Arm, StudyConfig, within
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.pipeline.study_report import CONTROL_STEPS, write_study_report
from zo_kernels.progress import progress_bar
from zo_kernels.refine import checkpoint
from zo_kernels.refine.records import MetricsLog, read_records, write_records
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.refine.scores import Scores
from zo_kernels.refine.scoring import score
from zo_kernels.replay import read_log
from zo_kernels.robustness.prompts import digest, text_digest
from zo_kernels.robustness.suite import Evaluation

FREE = ("seeds", "arms", "threads", "device", "keep_models", "files")
"""Options in which a study may be gone on with; a trained arm remembers what it was asked for."""
_FOREVER = 1_000_000  # steps of an arm that ends by its seconds


class ArmError(ValueError):
    """An arm that cannot be trained; says which, and why."""


class Study:
    """One study in a folder.

    Args:
        config: see ``StudyConfig``.
        directory: where everything goes.
        say: prints one line.
    """

    def __init__(self, config: StudyConfig, directory: Path, say: Callable[[str], None]) -> None:
        config.check()
        self.config, self.folder, self.say = config, StudyFolder(directory), say
        examples = chat.read_examples(config.data) if config.data else chat.builtin_examples()
        self.held_out = chat.select(examples, split=chat.HELD_OUT)
        self.train = chat.select(examples, split=chat.TRAIN)
        self.text = (
            Path(config.text).read_text("utf-8") if config.text else chat.builtin_utility_text()
        )
        if not self.train or not self.held_out:
            raise ValueError(
                f"data: expected examples to train on and some held out, got {len(self.train)} and "
                f"{len(self.held_out)}"
            )
        self.scores: Scores | None = None

    def run(self) -> dict[str, Path]:
        """Do what is not done yet, and write the report; returns its files."""
        threads = torch.get_num_threads()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        try:
            return self._run()
        finally:
            torch.set_num_threads(threads)

    def _run(self) -> dict[str, Path]:
        config = self.config
        if config.model == "smollm2":
            self.base = prepare(progress=self.say)
        else:
            self.base = checkpoint.expect(config.model)
        self._check()
        self._open()
        self._evaluate("base", None, lambda: self._load(self.base))
        self.aligned = self._align()
        self._evaluate("aligned", None, lambda: self._load(self.aligned))
        if any(arm.blocks == "robust" for arm in config.arms if arm.kind == "zo"):
            self.scores = self._score()
        self._control()
        failed: dict[str, str] = {}  # by arm, the first reason
        for seed in config.seeds:
            for arm in self._in_order():
                if arm.like in failed:
                    failed.setdefault(arm.name, f"it is like {arm.like}")
                    continue
                try:
                    self._arm(arm, seed)
                except ArmError as error:
                    if config.equal == "seconds" and arm == self._first():
                        raise  # others have its time
                    self.say(str(error))
                    failed.setdefault(arm.name, str(error))
        return self._report(failed)

    def _report(self, failed: Mapping[str, str]) -> dict[str, Path]:
        """The report on the arms that could be trained with every seed; its files.

        Raises:
            ArmError: some could not; after the report on the others is written.
        """
        config = self.config
        left = tuple(arm for arm in config.arms if arm.name not in failed)
        files = {}
        if left:
            reported = replace(config, arms=left)
            files = write_study_report(self.folder, reported, self.scores, self.base.name)
        if failed:
            told = "; ".join(failed.values())
            about = f"the report in {self.folder.path} is without" if left else "no report without"
            raise ArmError(f"{about} {', '.join(failed)}: {told}")
        return files

    def _check(self) -> None:
        """What stages would refuse later is refused before anything is trained."""
        config = self.config
        expect_device("device", config.device)
        model = checkpoint.skeleton(self.base)
        config.check_model(model)
        tokenizer = checkpoint.load_tokenizer(self.base)
        sections = ["refine"]
        if any(arm.blocks in ("robust", "snip") for arm in config.arms):
            sections.append("score")
        for section in sections:  # those of first-order arms are as long as refine's
            with within(section):
                chat.encode(tokenizer, self.train, max_length=getattr(config, section).max_length)

    def _open(self) -> None:
        # What files hold counts, not where they are.
        files = {name: getattr(self.config, name) for name in ("model", "data", "text")}
        data: dict[str, Any] = {
            "model": checkpoint.file_digest(self.base),
            "data": digest(self.train),
            "held_out": digest(self.held_out),
            "text": text_digest(self.text),
            "files": files,
        }
        if self.config.equal == "seconds":
            data["timed"] = self._first().name  # others have its time
        asked = {
            (arm.name, seed): self.config.asked(arm, seed)
            for seed in self.config.seeds
            for arm in self.config.arms
        }
        self.folder.open(self.config.record() | data, FREE, asked)

    def _align(self) -> Path:
        """Stage I; the folder of the aligned model."""
        config, path = self.config.align, self.folder.path / "aligned"
        if config is None:
            return self.base
        if not path.exists():
            self.say(f"Stage I: up to {config.steps} first-order steps")
            model, tokenizer = self._load(self.base, "float32")
            with progress_bar("aligning") as progress:
                trained = align_arm(
                    model, tokenizer, self._encoded(tokenizer, config), config,
                    self.folder.training("aligned", None, ""), progress=progress,
                )  # fmt: skip
            self.folder.finish("aligned", None, trained)
            checkpoint.save(model, tokenizer, path)
        self.folder.training("aligned", None, ".state").unlink(missing_ok=True)
        return path

    def _score(self) -> Scores:
        """Stage II."""
        path, losses = self.folder.path / "scores.json", self.folder.path / "scores.jsonl"
        if path.exists():
            return Scores.load(path)
        self.say("Stage II: scoring the decoder blocks")
        config = self.config.score
        model, tokenizer = self._load(self.aligned)
        encoded = chat.encode(tokenizer, self.train, max_length=config.max_length)
        finished = read_records(losses) if losses.exists() else []
        write_records(losses, finished)
        with ExitStack() as stack:
            log = stack.enter_context(MetricsLog(losses))
            progress = stack.enter_context(progress_bar("scoring"))
            kept = self.folder.path / "scoring.peak"
            peak = stack.enter_context(peak_of_all(kept, next(model.parameters()).device))
            scores = score(
                model, tokenizer, encoded, config,
                finished=finished, on_result=log.write, progress=progress,
            )  # fmt: skip
        noted = json.dumps({"peak_bytes": peak()}) + "\n"
        write_file(self.folder.path / "scoring.json", noted)
        scores.save(path)
        return scores

    def _control(self) -> None:
        """Zeroth-order steps with lr = 0 leave every bit: the aligned records are theirs."""
        path = self.folder.records_path("lr0", None)
        if self._evaluated("lr0", None):
            return
        self.say(f"control: {CONTROL_STEPS} zeroth-order steps with lr = 0")
        model, tokenizer = self._load(self.aligned)
        before = checkpoint.fingerprint(model)
        config = replace(
            self.config.refine, steps=CONTROL_STEPS, seconds=None, lr=0.0, held_out_every=0,
            patience=0,
        )  # fmt: skip
        ZORefiner(model, tokenizer, config).run(self._encoded(tokenizer, config))
        if checkpoint.fingerprint(model) == before:
            own = [record | {"label": "lr0"} for record in self.folder.records("aligned", None)]
            write_records(path, own)
            return
        if config.mode != "mezo":
            raise RuntimeError(f"mode '{config.mode}': weights changed in steps with lr = 0")
        self._evaluate("lr0", None, lambda: (model, tokenizer))

    def _in_order(self) -> list[Arm]:
        """Zeroth-order arms first, full ZO before them: others go by their time and their way."""
        order = {"zo": 0, "fo": 1, "walk": 2}
        return sorted(self.config.arms, key=lambda arm: (order[arm.kind], arm.blocks != "all"))

    def _first(self) -> Arm:
        """The first zeroth-order arm."""
        return next(arm for arm in self._in_order() if arm.kind == "zo")

    def _arm(self, arm: Arm, seed: int) -> None:
        """Train and evaluate one arm with one seed.

        Raises:
            ArmError: it cannot be trained.
        """
        name = self.folder.name(arm.name, seed)
        made = self.folder.training(arm.name, seed, ".model")  # until it is evaluated
        kept = self.folder.model(arm.name, seed)
        trained = self.folder.trained(arm.name, seed)
        if trained is None:
            dtype = "float32" if arm.kind == "fo" else None
            model, tokenizer = self._load(self.aligned, dtype)
            self.say(f"{TITLES.get(arm.name, arm.name)}, training seed {seed}")
            try:
                trained = self._train(arm, seed, model, tokenizer)
            except (ValueError, ArithmeticError) as error:
                raise ArmError(f"arms.{arm.name}, seed {seed}: {error}") from error
            trained = replace(trained, asked=self.config.asked(arm, seed))
            if _needs_checkpoint(arm, trained):
                checkpoint.save(model, tokenizer, made)
            self.folder.finish(arm.name, seed, trained)
            del model
            gc.collect()
        self.folder.training(arm.name, seed, ".state").unlink(missing_ok=True)

        def load() -> tuple[Any, Any]:
            for place in (kept, made):
                if place.exists():
                    return self._load(place)
            model, tokenizer = self._load(self.aligned)
            log = self.folder.training(arm.like or arm.name, seed, ".zolog")
            if arm.kind == "walk":
                found = walk_arm(model, read_log(log)).fingerprint
            else:
                found = replayed_fingerprint(model, log)
            if found != trained.fingerprint:
                raise RuntimeError(
                    f"{name}: expected the weights that training left, of fingerprint "
                    f"{trained.fingerprint}, got {found}"
                )
            return model, tokenizer

        self._evaluate(arm.name, seed, load)
        if self.config.keep_models and not kept.exists():
            if not _needs_checkpoint(arm, trained):
                checkpoint.save(*load(), kept)
            elif made.exists():
                kept.parent.mkdir(exist_ok=True)
                os.replace(made, kept)
            else:
                self.say(f"{name}: trained without keep_models, so that its model is gone")
        checkpoint.remove(made)

    def _train(self, arm: Arm, seed: int, model: Any, tokenizer: Any) -> Trained:
        if arm.kind == "walk":
            return walk_arm(model, read_log(self.folder.training(arm.like, seed, ".zolog")))
        seconds, cost = self._budget(arm, seed)
        stem = self.folder.training(arm.name, seed, "")
        with progress_bar(self.folder.name(arm.name, seed)) as progress:
            if arm.kind == "fo":
                config = self.config.first_order_steps(arm, seed, 1)
                per_step = config.batch_size * config.accumulation * (1 + BACKWARD)
                steps = self._steps(cost / per_step)
                config = replace(config, steps=steps, seconds=seconds)
                encoded = self._encoded(tokenizer, config)
                return align_arm(model, tokenizer, encoded, config, stem, progress=progress)
            layers, selection = chosen_blocks(
                arm.blocks, self.config.score, model, tokenizer, self.train,
                scores=self.scores, seed=seed,
            )  # fmt: skip
            config = self.config.refinement(arm, seed, 1, layers)
            encoded = self._encoded(tokenizer, config)
            left = cost - selection - starting_cost(config, encoded)
            steps = self._steps(left / refine_cost(model, config, encoded))
            config = replace(config, steps=steps, seconds=seconds)
            trained = refine_arm(model, tokenizer, encoded, config, stem, progress=progress)
            return replace(trained, cost=trained.cost + selection)

    def _steps(self, share: float) -> int:
        """Whole steps, at least one; the refinement's where arms have equal steps."""
        if self.config.equal == "steps":
            return self.config.refine.steps
        return max(1, round(min(share, _FOREVER)))

    def _budget(self, arm: Arm, seed: int) -> tuple[float | None, float]:
        """Seconds that an arm has, or None; and the forwards of one example, or infinity."""
        if self.config.equal != "seconds":
            return None, self.config.forwards()
        first = self._first()
        if arm == first:  # by its own seconds or its steps, whichever ends it
            return self.config.refine.seconds, self.config.forwards()
        return self.folder.trained(first.name, seed).seconds, math.inf

    def _evaluated(self, label: str, seed: int | None) -> bool:
        found = self.folder.records(label, seed)
        return len(found) == len(self.config.evaluation.conditions())

    def _evaluate(self, label: str, seed: int | None, load: Callable[[], tuple[Any, Any]]) -> None:
        """Measure a model under all conditions; finished ones are kept."""
        path = self.folder.records_path(label, seed)
        finished = self.folder.records(label, seed)
        if self._evaluated(label, seed):
            return
        write_records(path, finished)  # without the torn line of a kill
        model, tokenizer = load()
        extra = {} if seed is None else {"training_seed": seed}
        evaluation = Evaluation(model, tokenizer, self.held_out, self.text, self.config.evaluation)
        with MetricsLog(path) as log, progress_bar(f"evaluating {path.stem}") as progress:
            evaluation.run(
                label,
                finished=finished,
                on_result=lambda record: log.write(record | extra),
                progress=progress,
            )
        del model, evaluation
        gc.collect()

    def _load(self, directory: Path, dtype: str | None = None) -> tuple[Any, Any]:
        config = self.config
        return checkpoint.load(directory, dtype=dtype or config.dtype, device=config.device)

    def _encoded(self, tokenizer: Any, config: Any) -> list[chat.Encoded]:
        length = getattr(config, "max_length", self.config.refine.max_length)
        return chat.encode(tokenizer, self.train, max_length=length)


def _needs_checkpoint(arm: Arm, trained: Trained) -> bool:
    """Whether no replay log makes an arm's model."""
    return arm.kind == "fo" or trained.config.get("mode") == "mezo"
