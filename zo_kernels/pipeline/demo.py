"""The main job: base -> aligned -> refined on a real model, with the controls that it needs.

Beside the refined model stand the aligned one it started from, one that got the same wall time of
further first-order steps, and one that took zeroth-order steps with lr = 0, which must be
bit-identical to the aligned one.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_kernels import chat
from zo_kernels.progress import progress_bar
from zo_kernels.refine import checkpoint
from zo_kernels.refine.align import AlignConfig, align
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.records import MetricsLog, read_records, write_records
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.robustness.conditions import EvaluationConfig
from zo_kernels.robustness.report import write_report
from zo_kernels.robustness.suite import Evaluation

BASE, ALIGNED, CONTROL, MORE_FO, REFINED = "base", "aligned", "lr0", "more_fo", "refined"
ARMS = {
    BASE: "base",
    ALIGNED: "aligned (FO)",
    CONTROL: "aligned + ZO with lr = 0 (control)",
    MORE_FO: "aligned + more FO, same time",
    REFINED: "aligned + ZO refinement",
}
CONTROL_STEPS = 3
# Shares of the time left after the first evaluation and what the other evaluations will take.
ALIGN_SHARE = 0.4
REFINE_SHARE = 0.25
MIN_SECONDS = 20.0


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    Attributes:
        minutes: wall time that all of it should take.
        align: alignment options; ``seconds`` is set from ``minutes``.
        refine: refinement options; ``seconds`` is set from ``minutes``.
        evaluation: conditions and prompts.
        max_length: token limit of prompt plus completion.
    """

    minutes: float = 14.0
    align: AlignConfig = field(default_factory=lambda: AlignConfig(steps=40, lr=1e-4))
    refine: RefineConfig = field(default_factory=lambda: RefineConfig(steps=10_000))
    evaluation: EvaluationConfig | None = None
    max_length: int = 256


def default_evaluation(noise: Sequence[float], eps: float) -> EvaluationConfig:
    """Noise scales with three draws each; text is generated clean, at scale eps and at int4."""
    return EvaluationConfig(
        noise=tuple(noise),
        draws=3,
        max_new_tokens=10,
        batch_size=16,
        max_prompts=16,
        perplexity_tokens=256,
        generate_under=("clean", *(f"w{level:g}" for level in noise if level == eps), "int4"),
        copy_weights=True,  # alignment takes more memory than that
    )


class Demo:
    """One run in a directory; finished stages are kept and skipped when it is started again.

    Args:
        directory: where checkpoints, logs and the report go.
        model_directory: the base model.
        examples: both kinds, both splits.
        config: see ``DemoConfig``.
        say: prints one line.
        notes: sentences for the report.
    """

    def __init__(
        self,
        directory: Path,
        model_directory: Path,
        examples: Sequence[chat.Example],
        config: DemoConfig,
        say: Callable[[str], None],
        notes: Sequence[str] = (),
    ) -> None:
        self.directory, self.model_directory = directory, model_directory
        self.config, self.say, self.notes = config, say, notes
        self.evaluation = config.evaluation or default_evaluation((0.05, 0.1), config.refine.eps)
        if self.evaluation.layers:
            raise ValueError(f"layers: expected none in a demo, got {self.evaluation.layers}")
        self.held_out = chat.select(examples, split=chat.HELD_OUT)
        self.train = chat.select(examples, split=chat.TRAIN)
        self.text = chat.builtin_utility_text()
        self.started = time.monotonic()
        self.evaluation_seconds = 0.0

    def run(self) -> dict[str, Path]:
        """Do what is not done yet and write the report; returns its files."""
        self._open()
        self._evaluate(BASE, self.model_directory)
        left = max(0.0, 60 * self.config.minutes - self._elapsed() - 3 * self.evaluation_seconds)
        self._align(max(MIN_SECONDS, ALIGN_SHARE * left))
        self._evaluate(ALIGNED, self._path(ALIGNED))
        self._control()
        spent = self._refine(max(MIN_SECONDS, REFINE_SHARE * left))
        self._evaluate(REFINED, self._path(REFINED))
        self._more_first_order(spent)
        self._evaluate(MORE_FO, self._path(MORE_FO))
        return self._report()

    def _path(self, arm: str) -> Path:
        return self.directory / arm

    def _log(self, arm: str) -> Path:
        return self.directory / f"{arm}.jsonl"

    def _evaluation(self) -> Path:
        return self.directory / "evaluation.jsonl"

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _open(self) -> None:
        """Remember the configuration; refuse to continue a run of another one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(
            json.dumps(
                {
                    "model": str(self.model_directory),
                    "examples": [asdict(e) for e in self.train + self.held_out],
                    **asdict(replace(self.config, evaluation=self.evaluation)),
                }
            )
        )
        path = self.directory / "demo.json"
        if path.exists():
            found = json.loads(path.read_text())
            changed = sorted(key for key in wanted if found.get(key) != wanted[key])
            if changed:
                raise ValueError(
                    f"{self.directory}: expected a new directory or a run with the same "
                    f"configuration, got one that differs in {', '.join(changed)}"
                )
        elif any(self.directory.iterdir()):
            raise FileExistsError(f"{self.directory}: expected a new or empty directory")
        path.write_text(json.dumps(wanted, indent=1) + "\n")

    def _encode(self, tokenizer: Any) -> list[chat.Encoded]:
        return chat.encode(tokenizer, self.train, max_length=self.config.max_length)

    def _align(self, seconds: float) -> None:
        if self._path(ALIGNED).exists():
            return
        self.say(f"aligning: up to {self.config.align.steps} first-order steps")
        config = replace(self.config.align, seconds=seconds)
        model, tokenizer = checkpoint.load(self.model_directory, dtype="float32")
        self._train(ALIGNED, model, tokenizer, config)

    def _train(self, arm: str, model: Any, tokenizer: Any, config: AlignConfig) -> None:
        with MetricsLog(self._log(arm), fresh=True) as log, progress_bar(arm) as progress:
            encoded = self._encode(tokenizer)
            align(model, tokenizer, encoded, config, on_step=log.write, progress=progress)
        checkpoint.save(model, tokenizer, self._path(arm))

    def _refine(self, seconds: float) -> float:
        """Refine for so long; returns the time the steps took."""
        if not self._path(REFINED).exists():
            self.say(f"refining: zeroth-order steps for {seconds:.0f} s")
            model, tokenizer = checkpoint.load(self._path(ALIGNED))
            config = replace(self.config.refine, seconds=seconds)
            refiner = ZORefiner(model, tokenizer, config)
            replay_log = self.directory / f"{REFINED}.zolog" if config.mode != "mezo" else None
            if replay_log is not None:
                replay_log.unlink(missing_ok=True)  # of a refinement that was cut off
            with MetricsLog(self._log(REFINED), fresh=True) as log:
                with progress_bar(REFINED) as progress:
                    encoded = self._encode(tokenizer)
                    refiner.run(encoded, log=replay_log, on_step=log.write, progress=progress)
            checkpoint.save(model, tokenizer, self._path(REFINED))
            if replay_log is not None:
                size = replay_log.stat().st_size
                self.say(f"replay log: {replay_log}, {size} bytes; zo-kernels replay --help")
        return read_records(self._log(REFINED))[-1]["seconds"]

    def _more_first_order(self, seconds: float) -> None:
        if self._path(MORE_FO).exists():
            return
        self.say(f"control arm: more first-order steps for {seconds:.0f} s")
        before = read_records(self._log(ALIGNED))
        config = replace(self.config.align, steps=10_000, seconds=seconds, first_batch=len(before))
        model, tokenizer = checkpoint.load(self._path(ALIGNED), dtype="float32")
        self._train(MORE_FO, model, tokenizer, config)

    def _control(self) -> None:
        """Zeroth-order steps with lr = 0 leave every bit: the aligned records are its records."""
        if self._done(CONTROL):
            return
        self.say(f"control arm: {CONTROL_STEPS} zeroth-order steps with lr = 0")
        model, tokenizer = checkpoint.load(self._path(ALIGNED))
        before = checkpoint.fingerprint(model)
        config = replace(self.config.refine, steps=CONTROL_STEPS, seconds=None, lr=0.0)
        ZORefiner(model, tokenizer, config).run(self._encode(tokenizer))
        same = checkpoint.fingerprint(model) == before
        if not same and config.mode != "mezo":
            raise RuntimeError(f"mode '{config.mode}': weights changed in steps with lr = 0")
        if same:
            kept = [r for r in self._records() if r["label"] != CONTROL]
            own = [{**record, "label": CONTROL} for record in self._records(ALIGNED)]
            write_records(self._evaluation(), kept + own)
            return
        checkpoint.save(model, tokenizer, self._path(CONTROL))
        self._evaluate(CONTROL, self._path(CONTROL))

    def _records(self, label: str | None = None) -> list[dict[str, Any]]:
        path = self._evaluation()
        records = read_records(path) if path.exists() else []
        return [r for r in records if label in (None, r["label"])]

    def _done(self, label: str) -> bool:
        return len(self._records(label)) == len(self.evaluation.conditions())

    def _evaluate(self, label: str, directory: Path) -> None:
        if not self._done(label):
            kept = [r for r in self._records() if r["label"] != label]
            model, tokenizer = checkpoint.load(directory)
            with progress_bar(f"evaluating {label}") as progress:
                evaluation = Evaluation(model, tokenizer, self.held_out, self.text, self.evaluation)
                new = evaluation.run(label, progress=progress)
            write_records(self._evaluation(), kept + new)
            del model, evaluation
            gc.collect()
        self.evaluation_seconds = sum(r["seconds"] for r in self._records(label))

    def _report(self) -> dict[str, Path]:
        more, fewer = read_records(self._log(MORE_FO)), read_records(self._log(REFINED))
        notes = [
            f"{len(fewer)} zeroth-order steps took {fewer[-1]['seconds']:.0f} s; in "
            f"{more[-1]['seconds']:.0f} s the first-order control took {len(more)} steps. "
            f"Weights, gradients and optimizer state: the first-order steps hold 4 copies of the "
            "weights in float32, the zeroth-order ones the weights and one leaf.",
            "A run this short measures the machinery, not the method: read the differences with "
            "their intervals, over prompts and noise draws (one training seed).",
            *self.notes,
        ]
        if not self._path(CONTROL).exists():  # only a changed model is saved
            notes.append(
                f"The lr = 0 control took {CONTROL_STEPS} steps and is bit-identical to the "
                "aligned model (by a fingerprint of all weights); its rows are the aligned model's."
            )
        logs = {
            "alignment (FO)": read_records(self._log(ALIGNED)),
            "more FO": more,
            "ZO refinement (mean of l+ and l-)": fewer,
        }
        return write_report(
            self.directory,
            self._records(),
            title=f"Robustness of {self.model_directory.name}",
            arms=ARMS,
            training_logs=logs,
            notes=notes,
            compare=[(ALIGNED, MORE_FO), (ALIGNED, REFINED)],
        )
