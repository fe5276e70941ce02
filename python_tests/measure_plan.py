"""Prints how much memory a run takes at its peak beyond the weights, in bytes; a process each.

Usage: python measure_plan.py MODEL MODE ROWS LENGTH COMPLETION DTYPE

MODEL is a Hugging Face directory, or one with a config.json alone, whose weights are then random.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from zo_kernels.chat import HARMLESS, Encoded, collate, completion_loss
from zo_kernels.memory import PeakMemory
from zo_kernels.refine.align import AlignConfig, align
from zo_kernels.refine.refiner import RefineConfig, ZORefiner


def examples(rows: int, length: int, completion: int) -> list[Encoded]:
    """Two batches of random tokens; all but one sequence of each are padded."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(2 * rows):
        size = length if row % rows == 0 else length - 1
        ids = torch.randint(3, 40, (size,), generator=generator).tolist()
        found.append(Encoded(tuple(ids), length - completion, HARMLESS))
    return found


def run(model: Any, mode: str, data: list[Encoded], rows: int) -> None:
    """Two steps."""
    if mode == "forward":
        with torch.no_grad():
            completion_loss(model, collate(data[:rows], pad_id=0))
    elif mode.startswith("align-"):
        config = AlignConfig(steps=2, batch_size=rows, optimizer=mode.removeprefix("align-"))
        align(model, tiny_tokenizer(), data, config)
    else:
        config = RefineConfig(steps=2, batch_size=rows, mode=mode, relative_eps=False, eps=2e-3)
        ZORefiner(model, tiny_tokenizer(), config).run(data)


def main() -> None:
    """Load, warm the libraries up on a tiny model, measure."""
    directory, mode, rows, length, completion, dtype = sys.argv[1:]
    kind = getattr(torch, dtype)
    if list(Path(directory).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind).eval()
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=kind)
        model.eval()
    for parameter in model.parameters():
        parameter.detach().sum()  # mapped files count when they are touched
    run(tiny_model("llama", kind), mode, examples(2, 20, 5), 2)
    data = examples(int(rows), int(length), int(completion))
    with PeakMemory() as memory:
        run(model, mode, data, int(rows))
    print(memory.peak - memory.before)


if __name__ == "__main__":
    main()
