"""The paper's method with its controls: every arm from one aligned model, at equal cost.

    base -> aligned -> { lr = 0, more FO, FO with noise, random walks, full ZO, focused ZO ... }

Arms are trained with several seeds and evaluated under the same noise on the same prompts. All that
is finished is kept in the study's folder and skipped when it is started again; what was interrupted
goes on where it was, to the same bits.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from zo_kernels import chat
from zo_kernels.files import write_file
from zo_kernels.memory import PeakMemory
from zo_kernels.pipeline.arms import (
    BACKWARD,
    Trained,
    align_arm,
    refine_arm,
    refine_cost,
    replayed_fingerprint,
    walk_arm,
)
from zo_kernels.pipeline.smollm2 import prepare
from zo_kernels.pipeline.study_config import TITLES, Arm, StudyConfig
from zo_kernels.progress import progress_bar
from zo_kernels.refine import checkpoint
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.records import MetricsLog, read_records, write_records
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.refine.scores import Scores
from zo_kernels.refine.scoring import score
from zo_kernels.refine.selection import select_blocks
from zo_kernels.replay import read_log
from zo_kernels.robustness.prompts import digest, text_digest
from zo_kernels.robustness.report import write_report
from zo_kernels.robustness.suite import Evaluation

CONTROL_STEPS = 3
FREE = ("seeds", "arms", "threads", "keep_models")
"""Options in which a study may be gone on with; each arm remembers its own."""
_FOREVER = 1_000_000  # steps of an arm that ends by its seconds


class Study:
    """One study in a folder.

    Args:
        config: see ``StudyConfig``.
        directory: where everything goes.
        say: prints one line.
    """

    def __init__(self, config: StudyConfig, directory: Path, say: Callable[[str], None]) -> None:
        config.check()
        self.config, self.directory, self.say = config, directory, say
        examples = chat.read_examples(config.data) if config.data else chat.builtin_examples()
        self.held_out = chat.select(examples, split=chat.HELD_OUT)
        self.train = chat.select(examples, split=chat.TRAIN)
        self.text = (
            Path(config.text).read_text("utf-8") if config.text else chat.builtin_utility_text()
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
        self.base = prepare(progress=self.say) if config.model == "smollm2" else Path(config.model)
        self._open()
        self._evaluate("base", None, lambda: checkpoint.load(self.base, dtype=config.dtype))
        self.aligned = self._align()
        self._evaluate("aligned", None, self._load)
        if any(arm.blocks == "robust" for arm in config.arms if arm.kind == "zo"):
            self.scores = self._score()
        self._control()
        for seed in config.seeds:
            for arm in self._in_order():
                self._arm(arm, seed)
        return self._report()

    # Stages

    def _open(self) -> None:
        """Remember the configuration; refuse to go on with a study of another one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(
            json.dumps(
                self.config.record()
                | {"examples": digest(self.train + self.held_out), "text": text_digest(self.text)}
            )
        )
        path = self.directory / "study.json"
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            changed = sorted(k for k in wanted if k not in FREE and found.get(k) != wanted[k])
            if changed:
                raise ValueError(
                    f"{self.directory}: expected a new folder or a study with the same "
                    f"configuration, got one that differs in {', '.join(changed)}"
                )
        elif any(self.directory.iterdir()):
            raise FileExistsError(f"{self.directory}: expected a new or empty folder")
        write_file(path, json.dumps(wanted, indent=1) + "\n")

    def _align(self) -> Path:
        """Stage I; the folder of the aligned model."""
        config, path = self.config.align, self.directory / "aligned"
        if config is None:
            return self.base
        if not path.exists():
            self.say(f"Stage I: up to {config.steps} first-order steps")
            model, tokenizer = checkpoint.load(self.base, dtype="float32")
            with progress_bar("aligning") as progress:
                trained = align_arm(
                    model, tokenizer, self._encoded(tokenizer, config), config,
                    self._stem("aligned", None), progress=progress,
                )  # fmt: skip
            self._done("aligned", None, trained)
            checkpoint.save(model, tokenizer, path)
            self._stem("aligned", None).with_suffix(".state").unlink(missing_ok=True)
        return path

    def _score(self) -> Scores:
        """Stage II."""
        path, losses = self.directory / "scores.json", self.directory / "scores.jsonl"
        if path.exists():
            return Scores.load(path)
        self.say("Stage II: scoring the decoder blocks")
        config = self.config.score
        model, tokenizer = self._load()
        encoded = chat.encode(tokenizer, self.train, max_length=config.max_length)
        finished = read_records(losses) if losses.exists() else []
        write_records(losses, finished)
        with ExitStack() as stack:
            log = stack.enter_context(MetricsLog(losses))
            progress = stack.enter_context(progress_bar("scoring"))
            memory = stack.enter_context(PeakMemory(next(model.parameters()).device))
            scores = score(
                model, tokenizer, encoded, config,
                finished=finished, on_result=log.write, progress=progress,
            )  # fmt: skip
        peak = {"peak_bytes": memory.peak - memory.before}
        write_file(self.directory / "scoring.json", json.dumps(peak) + "\n")
        scores.save(path)
        return scores

    def _control(self) -> None:
        """Zeroth-order steps with lr = 0 leave every bit: the aligned records are theirs."""
        path = self._records_path("lr0", None)
        if path.exists():
            return
        self.say(f"control: {CONTROL_STEPS} zeroth-order steps with lr = 0")
        model, tokenizer = self._load()
        before = checkpoint.fingerprint(model)
        config = replace(
            self.config.refine, steps=CONTROL_STEPS, seconds=None, lr=0.0, held_out_every=0,
            patience=0,
        )  # fmt: skip
        ZORefiner(model, tokenizer, config).run(self._encoded(tokenizer, config))
        if checkpoint.fingerprint(model) == before:
            own = [record | {"label": "lr0"} for record in self._records("aligned", None)]
            write_records(path, own)
            return
        if config.mode != "mezo":
            raise RuntimeError(f"mode '{config.mode}': weights changed in steps with lr = 0")
        self._evaluate("lr0", None, lambda: (model, tokenizer))

    def _in_order(self) -> list[Arm]:
        """Zeroth-order arms first, full ZO before them: others go by their time and their way."""
        order = {"zo": 0, "fo": 1, "walk": 2}
        return sorted(self.config.arms, key=lambda arm: (order[arm.kind], arm.blocks != "all"))

    def _arm(self, arm: Arm, seed: int) -> None:
        """Train and evaluate one arm with one seed."""
        name = self._name(arm.name, seed)
        made = self.directory / "models" / name
        trained = self._trained(arm.name, seed)
        if trained is None:
            model, tokenizer = self._load("float32" if arm.kind == "fo" else None)
            self.say(f"{TITLES.get(arm.name, arm.name)}, training seed {seed}")
            trained = self._train(arm, seed, model, tokenizer)
            if arm.kind == "fo" or self.config.keep_models or trained.config.get("mode") == "mezo":
                checkpoint.save(model, tokenizer, made)
            self._done(arm.name, seed, trained)
            self._stem(arm.name, seed).with_suffix(".state").unlink(missing_ok=True)
            del model
            gc.collect()

        def load() -> tuple[Any, Any]:
            if made.exists():
                return checkpoint.load(made, dtype=self.config.dtype)
            model, tokenizer = self._load()
            if arm.kind == "walk":
                found = self._walk(arm, seed, model).fingerprint
            else:
                log = self._stem(arm.name, seed).with_suffix(".zolog")
                found = replayed_fingerprint(model, log)
            if found != trained.fingerprint:
                raise RuntimeError(
                    f"{name}: expected the weights that training left, of fingerprint "
                    f"{trained.fingerprint}, got {found}"
                )
            return model, tokenizer

        self._evaluate(arm.name, seed, load)
        if made.exists() and not self.config.keep_models:
            checkpoint.remove(made)

    def _train(self, arm: Arm, seed: int, model: Any, tokenizer: Any) -> Trained:
        if arm.kind == "walk":
            return self._walk(arm, seed, model)
        seconds, cost = self._budget(arm, seed, model)
        stem = self._stem(arm.name, seed)
        with progress_bar(self._name(arm.name, seed)) as progress:
            if arm.kind == "fo":
                config = self.config.first_order_steps(arm, seed, 1)
                per_step = config.batch_size * config.accumulation * (1 + BACKWARD)
                steps = _FOREVER if seconds is not None else max(1, round(cost / per_step))
                config = replace(config, steps=steps, seconds=seconds)
                encoded = self._encoded(tokenizer, config)
                return align_arm(model, tokenizer, encoded, config, stem, progress=progress)
            layers, selection = self._blocks(arm, seed, model, tokenizer)
            config = self.config.refinement(arm, seed, 1, layers)
            per_step = refine_cost(model, config)
            left = max(cost - selection, per_step)
            steps = _FOREVER if seconds is not None else max(1, round(left / per_step))
            config = replace(config, steps=steps, seconds=seconds)
            encoded = self._encoded(tokenizer, config)
            trained = refine_arm(model, tokenizer, encoded, config, stem, progress=progress)
            return replace(trained, cost=trained.cost + selection)

    def _budget(self, arm: Arm, seed: int, model: Any) -> tuple[float | None, float]:
        """Seconds that an arm has, or None; and its cost in forwards of one example."""
        refine = self.config.refine
        cost = 2.0 * refine.queries * refine.steps * refine.batch_size * refine.accumulation
        first = next((a for a in self._in_order() if a.kind == "zo"), None)
        if self.config.equal == "forwards" or first is None or arm == first:
            return None, cost
        return self._trained(first.name, seed).seconds, cost

    def _blocks(
        self, arm: Arm, seed: int, model: Any, tokenizer: Any
    ) -> tuple[tuple[int, ...] | None, float]:
        """The blocks of a zeroth-order arm (None: all weights), and what choosing them cost."""
        if arm.blocks == "all":
            return None, 0.0
        scoring, objective, cost = self.config.score, None, 0.0
        if arm.blocks == "robust":
            cost = self.scores.forwards * self.scores.examples
        if arm.blocks == "snip":
            encoded = chat.encode(tokenizer, self.train, max_length=scoring.max_length)
            chosen = [e for e in encoded if scoring.kind in (e.kind, "all")][: scoring.examples]
            batches = fixed_batches(model, tokenizer, chosen, scoring.batch_size)
            objective = Objective(model, batches)
            cost = float((1 + BACKWARD) * len(chosen))
        blocks = select_blocks(
            model, arm.blocks, scoring.selected,
            scores=self.scores, objective=objective, seed=seed,
        )  # fmt: skip
        return blocks, cost

    def _walk(self, arm: Arm, seed: int, model: Any) -> Trained:
        return walk_arm(model, read_log(self._stem(arm.like, seed).with_suffix(".zolog")), seed)

    def _evaluate(self, label: str, seed: int | None, load: Callable[[], tuple[Any, Any]]) -> None:
        """Measure a model under all conditions; finished ones are kept."""
        path = self._records_path(label, seed)
        finished = read_records(path) if path.exists() else []
        if len(finished) == len(self.config.evaluation.conditions()):
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

    def _report(self) -> dict[str, Path]:
        """The records of all arms in one file, and the report on them."""
        config = self.config
        names = ["base", "aligned", "lr0", *(arm.name for arm in config.arms)]
        titles = {name: TITLES.get(name, name) for name in names}
        records: list[dict[str, Any]] = []
        for name in names:
            seeds = [None] if name in ("base", "aligned", "lr0") else config.seeds
            records += [record for seed in seeds for record in self._records(name, seed)]
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        write_records(self.directory / "evaluation.jsonl", records)
        logs = {
            f"{titles[arm.name]}, seed {config.seeds[0]}": read_records(
                self._stem(arm.name, config.seeds[0]).with_suffix(".jsonl")
            )
            for arm in config.arms
            if arm.kind != "walk"
        }
        if config.align is not None:
            aligned = read_records(self._stem("aligned", None).with_suffix(".jsonl"))
            logs = {"alignment (FO)": aligned} | logs
        scores = None
        if self.scores is not None:
            scores = {"blocks": self.scores.rows(), "settings": self.scores.settings()}
        return write_report(
            self.directory,
            records,
            title=f"Study of {self.base.name}",
            arms=titles,
            training_logs=logs,
            notes=self._notes(),
            compare=self._pairs(),
            costs=self._costs(),
            scores=scores,
        )

    def _pairs(self) -> list[tuple[str, str]]:
        """Every arm against the aligned model; zeroth-order arms against their controls."""
        names = {arm.name: arm for arm in self.config.arms}
        pairs = [("aligned", name) for name in names]
        walks = [(a.name, a.like) for a in self.config.arms if a.kind == "walk"]
        others = [("zo_random", "zo_robust"), ("fo_noise", "zo_full"), ("more_fo", "zo_full")]
        return pairs + walks + [pair for pair in others if set(pair) <= names.keys()]

    def _notes(self) -> list[str]:
        config = self.config
        alike = (
            "as many forwards (a backward counts as two, scoring counts)"
            if config.equal == "forwards"
            else "as much time as full ZO"
        )
        notes = [
            f"Every arm starts from the aligned model and has {alike}; training seeds "
            f"{', '.join(map(str, config.seeds))}. Differences are paired over prompts, noise "
            "draws and training seeds, and a difference that is not significant is no evidence of "
            "none.",
            f"The lr = 0 control took {CONTROL_STEPS} steps and is bit-identical to the aligned "
            "model (by a fingerprint of all weights); its rows are the aligned model's."
            if config.refine.mode != "mezo"
            else "Mode mezo drifts: see the lr = 0 control.",
        ]
        if self.scores is not None:
            chosen = ", ".join(map(str, self.scores.selected()))
            notes.append(
                f"Focused ZO moves blocks {chosen}, the most sensitive ones by the scores."
            )
        if config.model == "smollm2":
            notes.append(
                "SmolLM2's weights come from a Q4_1 file: its linears lie on a 4-bit grid of "
                "blocks of 32, so the base model's quantised rows flatter it."
            )
        return notes

    def _costs(self) -> list[dict[str, Any]]:
        """Rows of the report's table: means over training seeds."""
        rows = []
        aligned = self._trained("aligned", None)
        if aligned is not None:
            row = _cost_row("Stage I: alignment (FO)", None, [aligned])
            rows.append(row | {"first_order": True})
        if self.scores is not None:
            peak = json.loads((self.directory / "scoring.json").read_text("utf-8"))["peak_bytes"]
            rows.append(
                {
                    "stage": "Stage II: scoring",
                    "steps": self.scores.draws,
                    "seconds": self.scores.seconds,
                    "forwards": self.scores.forwards,
                    "peak_bytes": peak,
                    "model_bytes": None if aligned is None else aligned.model_bytes,
                }
            )
        for arm in self.config.arms:
            if arm.kind != "walk":
                trained = [self._trained(arm.name, seed) for seed in self.config.seeds]
                stage = "Stage III" if arm.kind == "zo" else "first-order steps"
                rows.append(_cost_row(stage, TITLES.get(arm.name, arm.name), trained))
        return rows

    # Files

    def _name(self, label: str, seed: int | None) -> str:
        return label if seed is None else f"{label}-{seed}"

    def _stem(self, label: str, seed: int | None) -> Path:
        """Path of an arm's training files, without their ends."""
        folder = self.directory / "training"
        folder.mkdir(exist_ok=True)
        return folder / self._name(label, seed)

    def _records_path(self, label: str, seed: int | None) -> Path:
        return self.directory / "records" / f"{self._name(label, seed)}.jsonl"

    def _records(self, label: str, seed: int | None) -> list[dict[str, Any]]:
        return read_records(self._records_path(label, seed))

    def _done(self, label: str, seed: int | None, trained: Trained) -> None:
        text = json.dumps(asdict(trained), indent=1) + "\n"
        write_file(self._stem(label, seed).with_suffix(".json"), text)

    def _trained(self, label: str, seed: int | None) -> Trained | None:
        path = self._stem(label, seed).with_suffix(".json")
        return Trained(**json.loads(path.read_text("utf-8"))) if path.exists() else None

    def _load(self, dtype: str | None = None) -> tuple[Any, Any]:
        return checkpoint.load(self.aligned, dtype=dtype or self.config.dtype)

    def _encoded(self, tokenizer: Any, config: Any) -> list[chat.Encoded]:
        length = getattr(config, "max_length", self.config.refine.max_length)
        return chat.encode(tokenizer, self.train, max_length=length)


def _cost_row(stage: str, arm: str | None, trained: Sequence[Trained]) -> dict[str, Any]:
    """What training took, on the mean over training seeds; the peak is the highest of them."""
    count = len(trained)
    return {
        "stage": stage,
        "arm": arm,
        "steps": round(sum(t.steps for t in trained) / count),
        "seconds": sum(t.seconds for t in trained) / count,
        "forwards": sum(t.cost / t.per_step for t in trained) / count,
        "peak_bytes": max(t.peak_bytes for t in trained),
        "model_bytes": trained[0].model_bytes,
    }
