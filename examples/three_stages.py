"""Aligns a chat model, scores its decoder blocks, refines the sensitive ones: the three stages.

    python examples/three_stages.py --model DIR --out runs/three_stages
    python examples/three_stages.py --model DIR --data examples.jsonl --out runs/mine --noise 0.05

The loss on held-out refusals is printed before and after the refinement, on the weights as they
are and under weight noise of the scale that the refinement was for. `zo-kernels run` does the same
with controls, which tell whether a difference means anything.

Into --out go the aligned model, the refined one, and the replay log that makes the one the other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zo_kernels as zk
from zo_kernels import chat
from zo_kernels.blocks import decoder_blocks
from zo_kernels.refine import checkpoint
from zo_kernels.refine.objective import Objective, fixed_batches


def three_stages(
    model: Any, tokenizer: Any, examples: Sequence[chat.Example], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Align, score and refine a model in place; ``noisy_losses`` before and after the refinement.

    Args:
        model, tokenizer: a transformers causal language model in eval mode and its tokenizer.
        examples: of both splits; those to train on serve all three stages.
        options: of the command line.
    """
    noise = options.noise  # in standard deviations of each weight matrix
    align = zk.AlignConfig(steps=options.align_steps, batch_size=options.batch_size, lr=1e-4)
    score = zk.ScoreConfig(rho=noise, selected=options.blocks, draws=2, max_draws=4)
    refine = zk.RefineConfig(
        steps=options.steps, batch_size=options.batch_size, eps=f"match:{noise}", lr=options.lr
    )
    for config in (align, score, refine):
        config.check()  # before hours of work, not after
    blocks = len(decoder_blocks(model))
    if options.blocks > blocks:
        raise ValueError(f"--blocks: expected at most the model's {blocks}, got {options.blocks}")
    for split in (chat.TRAIN, chat.HELD_OUT):
        if not chat.select(examples, kind=chat.HARMFUL, split=split):
            raise ValueError(f"--data: expected refusals of split {split!r}, got none")
    train = chat.encode(tokenizer, chat.select(examples, split=chat.TRAIN), max_length=256)

    zk.align(model, tokenizer, train, align, progress=_say)
    checkpoint.save(model, tokenizer, options.out / "aligned")
    before = noisy_losses(model, tokenizer, examples, noise)

    scores = zk.score(model, tokenizer, train, score, progress=_say)
    print(f"sensitive blocks: {', '.join(map(str, scores.selected()))}")

    refine = replace(refine, layers=scores.selected())
    refiner = zk.ZORefiner(model, tokenizer, refine)
    refiner.run(train, log=options.out / "refined.zolog", progress=_say)
    checkpoint.save(model, tokenizer, options.out / "refined")
    return before, noisy_losses(model, tokenizer, examples, noise)


def noisy_losses(
    model: Any, tokenizer: Any, examples: Sequence[chat.Example], noise: float, draws: int = 3
) -> dict[str, float]:
    """Loss on held-out refusals in nats per token: "clean", and "noisy", the mean over draws."""
    refusals = chat.select(examples, kind=chat.HARMFUL, split=chat.HELD_OUT)
    encoded = chat.encode(tokenizer, refusals, max_length=256)
    loss = Objective(model, fixed_batches(model, tokenizer, encoded, 8))
    noisy = []
    for draw in range(draws):  # the same noise before and after, none that training has seen
        with zk.perturbed(model, sigma=noise, seed=0, draw=draw):
            noisy.append(loss())
    return {"clean": loss(), "noisy": statistics.mean(noisy)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, load, run, and print both losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, help="JSON lines: prompt, completion, kind")
    parser.add_argument("--out", type=Path, default=Path("runs/three_stages"), help="new folder")
    parser.add_argument("--noise", type=float, default=0.1, help="scale of the noise to survive")
    parser.add_argument("--blocks", type=int, default=4, help="how many blocks are refined")
    parser.add_argument("--align-steps", type=int, default=20, help="first-order steps")
    parser.add_argument("--steps", type=int, default=50, help="zeroth-order steps")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a step")
    parser.add_argument("--lr", type=_rate, default="auto", help="of zeroth-order steps, or auto")
    parser.add_argument("--device", default="cpu", help="torch device")
    options = parser.parse_args(arguments)

    if options.out.exists():
        parser.error(f"--out: expected a new folder, got {options.out}")
    examples = chat.read_examples(options.data) if options.data else chat.builtin_examples()
    model, tokenizer = checkpoint.load(options.model, dtype="float32", device=options.device)
    before, after = three_stages(model, tokenizer, examples, options)
    for name, text in (("clean", "as it is"), ("noisy", f"under noise of {options.noise}")):
        print(f"{text}: {before[name]:.4f} -> {after[name]:.4f} nats per token")


def _say(text: str, done: float, total: float) -> None:
    """One line that is written over again."""
    print(f"\r{text[:60]:60} {done:.0f}/{total:.0f}", end="\n" if done >= total else "", flush=True)


def _rate(text: str) -> float | str:
    """A learning rate: a number, or "auto"."""
    return text if text == "auto" else float(text)


if __name__ == "__main__":
    main()
