"""The commands that train a model: align, dpo and refine."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zo_kernels.cli.options import add_model, add_options, examples_of, read


def add_commands(commands: Any, make: Any) -> None:
    """Add them to the parser.

    Args:
        commands: what ``add_subparsers`` gave.
        make: makes one: make(commands, name, run, text).
    """
    command = make(commands, "align", _align, "first-order SFT on the completion tokens")
    _add_training(command, auto="float32")
    _add_saving(command)
    add_options(command, "zo_kernels.refine.align", "AlignConfig")

    command = make(commands, "dpo", _dpo, "first-order alignment on preference pairs, by TRL")
    pairs = "JSON lines: prompt, chosen, rejected, or PKU-SafeRLHF's columns"
    _add_training(command, pairs, auto="float32")
    command.add_argument(
        "--preferred", default="safer", help="which judgement of PKU-SafeRLHF: safer or better"
    )
    _add_saving(command)
    add_options(command, "zo_kernels.refine.dpo", "DPOConfig", skip=("max_length",))

    command = make(commands, "refine", _refine, "zeroth-order refinement")
    _add_training(command, auto="fast on the device")
    _add_resume(command)
    command.add_argument(
        "--scores", type=Path, metavar="FILE",
        help="scores.json of zo-kernels score: move the blocks that it chose, unless --layers says "
        "which",
    )  # fmt: skip
    command.add_argument(
        "--warm-start", action="store_true",
        help="--scores: begin with the descent step that the scoring has measured",
    )  # fmt: skip
    add_options(command, "zo_kernels.refine.config", "RefineConfig", skip=("max_length",))


def _add_training(command: argparse.ArgumentParser, data: str = "", *, auto: str) -> None:
    add_model(command, data, auto=auto)
    command.add_argument("--out", type=Path, required=True, help="folder for the new model")


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run of the same --out"
    )


def _add_saving(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--save-every",
        type=int,
        default=50,
        metavar="STEPS",
        help="keep what --resume needs, beside --out, after so many steps; 0 for never",
    )
    _add_resume(command)


def _train(
    options: argparse.Namespace,
    run: Any,
    finish: Callable[[], Any],
    earlier: Sequence[dict[str, Any]] = (),
    pairs: Sequence[Any] = (),
) -> None:
    """What these commands share: check, load, run with a log and a bar, save, draw, say.

    ``finish`` is called once the model is saved, and puts away what ``--resume`` goes by. It comes
    before the records get their name, and they before the figure: whatever stops the command in
    between, the run is finished. ``earlier`` are the records of the steps that a resumed run took
    before; ``pairs`` are what ``run`` gets instead of encoded examples.
    """
    from zo_kernels import chat
    from zo_kernels.files import check_replaceable
    from zo_kernels.progress import progress_bar
    from zo_kernels.refine import checkpoint
    from zo_kernels.refine.records import MetricsLog, write_records
    from zo_kernels.robustness.plots import loss_per_step
    from zo_kernels.robustness.plots.canvas import load_matplotlib

    check_replaceable(options.out)
    load_matplotlib()  # that it is missing comes up before the work
    examples = [] if pairs else examples_of(options, "train")
    model, tokenizer = checkpoint.load(options.model, dtype=options.dtype, device=options.device)
    encoded = pairs or chat.encode(tokenizer, examples, max_length=options.max_length)
    log_path = options.out.parent / f"{options.out.name}.jsonl"
    partial = log_path.with_suffix(".partial.jsonl")  # an earlier run's log stays until the end
    write_records(partial, earlier)
    with MetricsLog(partial) as log, progress_bar(options.command) as progress:
        records = [*earlier, *run(model, tokenizer, encoded, log.write, progress)]
    checkpoint.save(model, tokenizer, options.out)
    finish()
    partial.replace(log_path)
    plot = options.out.parent / f"{options.out.name}.png"
    plot.write_bytes(loss_per_step({options.command: records}))
    print(
        f"{len(records)} steps in {records[-1]['seconds']:.1f} s, loss {records[0]['loss']:.4f} -> "
        f"{records[-1]['loss']:.4f}; model {options.out}, log {log_path}, plot {plot}"
    )


def _align(options: argparse.Namespace) -> None:
    from zo_kernels.refine.align import align
    from zo_kernels.refine.alignment_state import read_state

    config = read(options, "zo_kernels.refine.align", "AlignConfig")
    config.check()
    if options.dtype == "auto":
        options.dtype = "float32"  # no masters beside the weights, and products in bfloat16
    state = options.out.parent / f"{options.out.name}.partial.state"
    _check_unfinished(state, state.exists(), options.resume)
    _train(
        options,
        lambda model, tokenizer, encoded, on_step, progress: align(
            model, tokenizer, encoded, config,
            state=state, save_every=options.save_every, resume=options.resume,
            on_step=on_step, progress=progress,
        ),
        lambda: state.unlink(missing_ok=True),
        read_state(state)[0] if options.resume else (),
    )  # fmt: skip


def _dpo(options: argparse.Namespace) -> None:
    from zo_kernels.refine import dpo
    from zo_kernels.refine.preferences import read_pairs
    from zo_kernels.refine.records import read_records

    config = read(options, "zo_kernels.refine.dpo", "DPOConfig")
    config.check()
    pairs = read_pairs(options.data, preferred=options.preferred)
    if options.dtype == "auto":
        options.dtype = "float32"  # the only one in which TRL's steps arrive
    state = options.out.parent / f"{options.out.name}.partial.trl"
    _check_unfinished(state, bool(dpo.whole_checkpoints(state)), options.resume)
    earlier: list[dict[str, Any]] = []
    if options.resume:
        done = dpo.checkpoint_steps(dpo.last_checkpoint(state))
        records = read_records(options.out.parent / f"{options.out.name}.partial.jsonl")
        earlier = [record for record in records if record["step"] < done]
    elif state.exists():
        shutil.rmtree(state)  # of a run that was stopped before it had a whole checkpoint
    _train(
        options,
        lambda model, tokenizer, pairs, on_step, progress: dpo.dpo(
            model, tokenizer, pairs, config,
            state=state if options.save_every or options.resume else None,
            save_every=options.save_every, resume=options.resume,
            on_step=on_step, progress=progress,
        ),
        lambda: shutil.rmtree(state, ignore_errors=True),
        earlier,
        pairs,
    )  # fmt: skip


def _check_unfinished(path: Path, unfinished: bool, resume: bool) -> None:
    """What an unfinished run left must be there to resume it, and must not be overwritten."""
    if resume and not unfinished:
        raise ValueError(f"resume: expected what an unfinished run leaves, {path}, found none")
    if unfinished and not resume:
        raise FileExistsError(
            f"out: {path} is of an unfinished run; go on with it by --resume, or delete it"
        )


def _refine(options: argparse.Namespace) -> None:
    from zo_kernels.refine.records import logged_records
    from zo_kernels.refine.refiner import ZORefiner
    from zo_kernels.refine.scores import Scores

    scores = None if options.scores is None else Scores.load(options.scores)
    if options.warm_start and scores is None:
        raise ValueError("warm-start: expected --scores with it, got none")
    if scores is not None and options.layers is None:
        options.layers = list(scores.selected())
    config = read(options, "zo_kernels.refine.config", "RefineConfig")
    config.check()
    final = options.out.parent / f"{options.out.name}.zolog"
    unfinished = final.with_suffix(".partial.zolog")
    _check_unfinished(unfinished, unfinished.exists(), options.resume)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.parent / f"{options.out.name}.partial.jsonl"
    log = unfinished if config.mode != "mezo" else None  # whose drift no log can hold
    earlier = logged_records(partial, unfinished) if options.resume else ()

    def finish() -> None:
        if log is not None:
            unfinished.replace(final)

    _train(
        options,
        lambda model, tokenizer, encoded, on_step, progress: ZORefiner(
            model, tokenizer, config
        ).run(
            encoded,
            scores=scores if options.warm_start else None,
            log=log,
            resume=options.resume,
            earlier=earlier,
            on_step=on_step,
            progress=progress,
        ),
        finish,
        earlier,
    )
    if log is not None:
        print(f"replay log {final}: {final.stat().st_size} bytes")
