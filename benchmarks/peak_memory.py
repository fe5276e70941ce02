"""Prints as JSON the resident peaks (MB) of a bare forward, of a ZOSGD step, of forwards under 5
noise scales x 3 draws and 6 formats, and of the whole evaluation suite (answers, judged text, KL)
under these beside the suite on the model as it is; and whether every bit of the model was kept.

Usage: python peak_memory.py MODEL_DIRECTORY DTYPE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

import zo_kernels as zk
from zo_kernels.chat import builtin_examples, builtin_utility_text
from zo_kernels.memory import PeakMemory
from zo_kernels.refine.checkpoint import load
from zo_kernels.replay import fingerprint
from zo_kernels.robustness.conditions import Condition, EvaluationConfig
from zo_kernels.robustness.states import within
from zo_kernels.robustness.suite import Evaluation

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)
SCHEMES = ("int8", "int4-g64", "int4-asym-g64", "int3-g64", "nf4", "fp8_e4m3")


def main() -> None:
    """Measure: three forwards, reset, three forwards (their peak); the same with steps."""
    directory, dtype = sys.argv[1:]
    model, tokenizer = load(directory, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 128), generator=generator)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def sweep() -> None:
        for sigma in LEVELS:
            for draw in range(3):
                with zk.perturbed(model, sigma=sigma, seed=0, draw=draw):
                    loss()
        for condition in map(Condition.quantized, SCHEMES):
            with within(model, condition, EvaluationConfig()):
                loss()

    def suite(**conditions: object) -> None:
        config = EvaluationConfig(
            max_prompts=8, max_new_tokens=8, perplexity_tokens=512, **conditions
        )
        texts = builtin_examples(), builtin_utility_text()
        Evaluation(model, tokenizer, *texts, config).run("x")

    def peak_of(run: Callable[[], object], times: int) -> float:
        with PeakMemory() as memory:
            for _ in range(times):
                run()
        return memory.peak / 2**20

    loss()
    peaks = {"forward": peak_of(loss, 2)}
    before = fingerprint(model.named_parameters())
    peaks["sweep"] = peak_of(sweep, 1)
    kept = fingerprint(model.named_parameters()) == before
    optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-9, eps=1e-3)
    optimizer.step(loss)
    peaks["step"] = peak_of(lambda: optimizer.step(loss), 2)
    if dtype == "float32":  # on a CPU without bfloat16 products the suite takes an hour
        before = fingerprint(model.named_parameters())
        suite(noise=(), quantization=())
        peaks["suite, clean"] = peak_of(lambda: suite(noise=(), quantization=()), 1)
        peaks["suite"] = peak_of(lambda: suite(noise=LEVELS, draws=3, quantization=SCHEMES), 1)
        kept = kept and fingerprint(model.named_parameters()) == before
    leaf = max(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    extra = {f"{name} - forward": peaks[name] - peaks["forward"] for name in ("step", "sweep")}
    if "suite" in peaks:
        extra["suite - suite, clean"] = peaks["suite"] - peaks["suite, clean"]
    print(json.dumps({**peaks, **extra, "largest leaf": leaf, "bits kept": kept}))


if __name__ == "__main__":
    main()
