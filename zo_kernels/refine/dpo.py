"""First-order alignment on preference pairs: TRL's DPO trainer, driven by options of ours."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_kernels.chat import FALLBACK_FORMAT, render
from zo_kernels.files import write_file
from zo_kernels.progress import Progress
from zo_kernels.refine.align import PRECISIONS, SCHEDULES
from zo_kernels.refine.alignment_state import expect_same, run_identity
from zo_kernels.refine.checkpoint import fast_dtype
from zo_kernels.refine.preferences import Pair

_IDENTITY = "run.json"
_SECONDS = "zo_kernels_seconds"


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization with AdamW.

    Attributes:
        steps: optimizer steps.
        batch_size: pairs per forward (micro-batch).
        accumulation: micro-batches per step.
        lr: peak learning rate.
        beta: how much the model is held to the one it began as; more holds it more.
        warmup: share of the run over which lr rises linearly from 0, below 1.
        schedule: "constant" or "cosine" (to zero at the end of the run) after the warm-up.
        clip_norm: bound on the gradient's norm.
        precision: of matrix products: "auto" (bfloat16 by autocast on a device that multiplies it
            fast), "float32" or "bfloat16" (by autocast).
        seed: of the order of pairs.
        max_length: token limit of prompt plus answer; a longer answer is cut from the right.
    """

    steps: int = 100
    batch_size: int = 1
    accumulation: int = 8
    lr: float = 1e-6
    beta: float = 0.1
    warmup: float = 0.1
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "auto"
    seed: int = 0
    max_length: int = 512

    def check(self) -> None:
        """Raise ValueError naming the first option out of range."""
        lowest = {"steps": 1, "batch_size": 1, "accumulation": 1, "max_length": 2}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("beta", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.warmup >= 1:
            raise ValueError(f"warmup: expected a share below 1, got {self.warmup}")
        if not 0 <= self.seed < 1 << 32:  # NumPy's limit, whose generator TRL seeds
            raise ValueError(f"seed: expected 0 <= seed < 2**32, got {self.seed}")
        for name, known in {"schedule": SCHEDULES, "precision": PRECISIONS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")


def dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    config: DPOConfig,
    *,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 0,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train all parameters in place on preference pairs; the model is left in eval mode.

    With the log-probabilities of whole answers under the model and under the one that it is now,
    the loss is -log sigmoid(beta ((log p/p0)(chosen) - (log p/p0)(rejected))). Those of the model
    as it is now are computed once, before the first step, so no second model is held.

    Prompts and answers are rendered by the tokenizer's chat template, or, without one, in the
    plain format of ``chat.render``. Nothing is sent or fetched, and nothing reported but by
    ``on_step``. TRL seeds the global generators of Python, NumPy and torch with ``config.seed``;
    nothing here draws from them.

    Args:
        model: causal language model in float32.
        tokenizer: its tokenizer.
        pairs: from ``read_pairs``.
        config: see ``DPOConfig``.
        state: folder for TRL's own checkpoints, of which the last whole one stays.
        save_every: steps after which one is written; 0 for never.
        resume: go on from the last. The model is the one that the run began with.
        on_step: called with each step's record.
        progress: called as progress(text, done, total).

    Returns:
        One record per step taken: step, loss (before the update), lr, gradient_norm (before
        clipping), margin (of beta log p/p0, chosen over rejected), accuracy (share of pairs whose
        margin is positive), chosen_logp, rejected_logp (nats per answer), seconds since the start,
        without interruptions.

    Raises:
        ImportError: TRL is not installed.
        ValueError: an option out of range; 16-bit weights, in which TRL's steps would be lost; a
            prompt that leaves no room for an answer; a state of another run.
        FileNotFoundError: there is no state to resume from.
        FileExistsError: the state is one to resume from, and was not asked to be.
        FloatingPointError: the loss or gradient of a step is not finite. Only when that step has
            been taken does TRL tell, so the weights are of no use.
    """
    config.check()
    trl, datasets, transformers = _libraries()
    if save_every < 0 or ((save_every or resume) and state is None):
        raise ValueError(
            f"save_every, resume: expected a number of steps, and a state, got {save_every}, "
            f"{resume} with {state}"
        )
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"model: expected float32 weights, got {sorted(map(str, dtypes))}; load it in float32"
        )
    rows = _rows(tokenizer, pairs, config.max_length)
    checkpoint, before = None, 0.0
    if state is not None:
        identity = run_identity(model, pairs, config)
        if resume:
            checkpoint = last_checkpoint(state)
            expect_same(state, json.loads((Path(state) / _IDENTITY).read_text()), identity)
            before = _seconds(checkpoint)
        else:
            if whole_checkpoints(state):
                raise FileExistsError(
                    f"state: expected a folder without checkpoints, got {state}, which has some of "
                    "another run; resume it"
                )
            write_file(Path(state) / _IDENTITY, json.dumps(identity))
    model.eval()
    device = next(model.parameters()).device

    class Trainer(trl.DPOTrainer):
        def _send_telemetry(self) -> None:
            """Not: nobody asked for it."""

    class Records(transformers.TrainerCallback):
        """Turns TRL's logs into records."""

        def __init__(self) -> None:
            self.records: list[dict[str, Any]] = []
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **other: Any) -> None:
            if "loss" not in logs:  # the summary after the last step
                return
            record = _record(state.global_step - 1, logs, time.perf_counter() - self.started)
            state.log_history[-1][_SECONDS] = record["seconds"]  # which checkpoints have
            self.records.append(record)
            if on_step is not None:
                on_step(record)
            if progress is not None:
                text = f"step {state.global_step}, loss {record['loss']:.3f}"
                progress(text, state.global_step, config.steps)

    records = Records()
    with tempfile.TemporaryDirectory() as nowhere, _as_before(model), _quiet(datasets):
        arguments = trl.DPOConfig(
            output_dir=str(nowhere if state is None else state),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            learning_rate=config.lr,
            beta=config.beta,
            lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
            warmup_steps=math.ceil(config.warmup * config.steps),
            max_grad_norm=config.clip_norm,
            seed=config.seed,
            data_seed=config.seed,
            max_length=config.max_length,
            bf16=_bfloat16(config.precision, device),
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500,
            save_total_limit=1,
            report_to="none",
            push_to_hub=False,
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type != "cpu",
        )
        if arguments.device.type != device.type:
            raise ValueError(f"model: expected it on {arguments.device}, got {device}")
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
            callbacks=[records],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        records.started = time.perf_counter() - before
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return records.records


def whole_checkpoints(state: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints in a state's folder, if there is one, oldest first."""
    whole = []
    for folder in Path(state).glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            continue  # a kill came in between
        whole.append(folder)
    return sorted(whole, key=checkpoint_steps)


def last_checkpoint(state: str | os.PathLike[str]) -> Path:
    """The newest whole checkpoint in a state's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    whole = whole_checkpoints(state)
    if not whole or not (Path(state) / _IDENTITY).exists():
        raise FileNotFoundError(f"resume: expected an unfinished run's checkpoint in {state}")
    return whole[-1]


def checkpoint_steps(checkpoint: Path) -> int:
    """Steps taken before a checkpoint: the number in its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _seconds(checkpoint: Path) -> float:
    """Time spent before a checkpoint; 0 in those of older versions, which did not keep it."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return max((entry.get(_SECONDS, 0.0) for entry in history), default=0.0)


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import datasets
        import transformers
        import trl
    except ImportError as error:
        raise ImportError(
            f"DPO: expected TRL, got {error}: pip install 'zo_kernels[dpo]'"
        ) from error
    return trl, datasets, transformers


def _rows(tokenizer: Any, pairs: Sequence[Pair], max_length: int) -> list[dict[str, Any]]:
    """The pairs as TRL takes them: as turns of a chat, or as texts without a chat template."""
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")
    rows = []
    for number, pair in enumerate(pairs):
        length = len(render(tokenizer, pair.prompt))
        if not 0 < length < max_length:
            raise ValueError(
                f"pair {number}: expected a prompt of 1 to {max_length - 1} tokens "
                f"(max_length {max_length}), got {length}: {pair.prompt[:60]!r}"
            )
        if getattr(tokenizer, "chat_template", None):
            prompt: Any = [{"role": "user", "content": pair.prompt}]
            answers: Any = [
                [{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected)
            ]
        else:
            prompt = FALLBACK_FORMAT.format(prompt=pair.prompt)
            answers = [f" {text}" for text in (pair.chosen, pair.rejected)]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows


def _record(step: int, logs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A step's record from TRL's log of it."""
    record = {
        "step": step,
        "loss": logs["loss"],
        "lr": logs["learning_rate"],
        "gradient_norm": float(logs["grad_norm"]),
        "margin": logs["rewards/margins"],
        "accuracy": logs["rewards/accuracies"],
        "chosen_logp": logs["logps/chosen"],
        "rejected_logp": logs["logps/rejected"],
        "seconds": seconds,
    }
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"DPO step {step}: expected a finite {name}, got {record[name]}"
            )
    return record


def _bfloat16(precision: str, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and fast_dtype(device) == torch.bfloat16)


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Take off what trainers leave on a model: another forward, tags, padding, no dropout."""
    dropouts = {m: m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    attributes = dict(vars(model))
    configs = [model.config, model.generation_config]
    kept = [copy.deepcopy(vars(config)) for config in configs]
    try:
        yield
    finally:
        vars(model).clear()
        vars(model).update(attributes)
        for config, values in zip(configs, kept, strict=True):
            vars(config).clear()
            vars(config).update(values)
        for module, p in dropouts.items():
            module.p = p
        model.eval()
        model.zero_grad(set_to_none=True)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the bars of datasets, which flicker by, and TRL's notes to its own developers."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
