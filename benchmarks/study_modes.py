"""What arrives of a thousand small updates, in every mode and in MeZO's loop; with a plot.

    python benchmarks/study_modes.py --out runs/study      (needs the demo extra)

On weights of a real model's layers, over T steps with g_t ~ N(0, g^2) given, each mode evaluates
(and so perturbs and restores) and updates by -lr g_t z_t. With U the sum of the updates in float64,

    gain  = <theta_T - theta_0, U> / <U, U>        1: the update arrived
    noise = rms(theta_T - theta_0 - U) / rms(U)    0: nothing else did

The standard error of the gain over N weights is noise / sqrt(N). Both depend on how large the
updates are beside the spacing of numbers at the weights; --std S takes normal weights of that
standard deviation instead of a model's.

theta is what the mode keeps: the weights, with their residuals, or the float32 master.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels.backends.reference_updates import join
from zo_kernels.files import write_file
from zo_kernels.modes import MODES, GroupUpdate, Slot
from zo_kernels.noise import stream_id
from zo_kernels.pipeline.rivals import mezo_perturb_
from zo_kernels.pipeline.smollm2 import prepare
from zo_kernels.progress import progress_bar
from zo_kernels.refine.checkpoint import DTYPES, load

LOOP = "MeZO's loop"
SEED = 11


def sample(directory: Path, count: int) -> dict[str, Tensor]:
    """Weights of four kinds of layers in the middle of the model, float32, about ``count``."""
    model, _ = load(directory, dtype="float32")
    named = dict(model.named_parameters())
    middle = model.config.num_hidden_layers // 2
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{middle}.{kind}.weight" for kind in kinds]
    return {name: named[name].detach().flatten()[: count // 4].clone() for name in names}


def normal_weights(std: float, count: int) -> dict[str, Tensor]:
    """float32 N(0, std^2)."""
    return {"normal": std * zk.normal(count, seed=SEED, direction=1 << 31, stream=0)}


def gradients(steps: int) -> list[float]:
    """g_t / g, the same for all runs."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(steps, generator=generator, dtype=torch.float64).tolist()


def unit_update(weights: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """U for lr g = 1, in float64."""
    total = {name: torch.zeros(w.numel(), dtype=torch.float64) for name, w in weights.items()}
    for step, g in enumerate(gradients(steps)):
        for name, sums in total.items():
            z = zk.normal(sums.numel(), seed=SEED, direction=step, stream=stream_id(name))
            sums.sub_(z, alpha=g)
    return total


def run_mode(
    name: str, weights: dict[str, Tensor], dtype: torch.dtype, steps: int, lr_g: float, eps: float
) -> dict[str, Tensor]:
    """What the mode keeps in the end, float64."""
    slots = [
        Slot(n, nn.Parameter(w.to(dtype), requires_grad=False), stream_id(n))
        for n, w in weights.items()
    ]
    mode = MODES[name](seed=SEED)
    for step, g in enumerate(gradients(steps)):
        mode.evaluate_pair(slots, [eps] * len(slots), step, lambda: _read(slots))
        update = GroupUpdate(slots, [[-lr_g * g]] * len(slots), 1.0)
        mode.update([update], [step], None)
    kept = mode.state()
    found = {}
    for slot in slots:
        value = slot.tensor.detach()
        if name == "master":
            value = kept[slot.name]
        elif name == "master8" and dtype != torch.float32:
            value = join(value, kept[slot.name])
        found[slot.name] = value.double()
    return found


def _read(slots: list[Slot]) -> float:
    """An evaluation that reads every weight, as a forward does."""
    return sum(float((slot.tensor * 1.0)[0]) for slot in slots)


def run_loop(
    weights: dict[str, Tensor], dtype: torch.dtype, steps: int, lr_g: float, eps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """MeZO's four passes with torch's generator; the final weights and U for its z, float64."""
    tensors = [w.to(dtype) for w in weights.values()]
    intended = [torch.zeros(w.numel(), dtype=torch.float64) for w in tensors]
    for step, g in enumerate(gradients(steps)):
        for scale in (eps, -2 * eps, eps, -lr_g * g):
            mezo_perturb_(tensors, scale, step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            for tensor, sums in zip(tensors, intended, strict=True):
                z = torch.normal(mean=0, std=1, size=tensor.size(), dtype=tensor.dtype)
                sums.sub_(z.double(), alpha=lr_g * g)
    final = {name: t.double() for name, t in zip(weights, tensors, strict=True)}
    return final, dict(zip(weights, intended, strict=True))


def measure(
    final: dict[str, Tensor], start: dict[str, Tensor], intended: dict[str, Tensor]
) -> dict[str, float]:
    """gain and noise over all weights."""
    moved = torch.cat([final[n] - start[n] for n in start])
    u = torch.cat([intended[n] for n in start])
    return {
        "gain": float(moved @ u / (u @ u)),
        "gain_error": float((moved - u).norm() / u.norm()) / math.sqrt(len(u)),
        "noise": float((moved - u).norm() / u.norm()),
    }


def plot(records: list[dict], path: Path) -> None:
    """Gain and noise by lr g, a column per dtype, a line per mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    modes = list(dict.fromkeys(r["mode"] for r in records))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(4 * len(dtypes), 7), sharex=True, sharey="row", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        for row, what in enumerate(("gain", "noise")):
            axis = axes[row][column]
            for number, mode in enumerate(modes):
                points = [r for r in records if r["dtype"] == dtype and r["mode"] == mode]
                axis.plot(
                    [p["lr_g"] for p in points],
                    [p[what] for p in points],
                    marker="osD^vP*X"[number % 8],
                    label=mode,
                    linestyle="--" if mode in (LOOP, "mezo") else "-",
                    alpha=0.8,
                )
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(dtype)
                axis.set_ylim(-0.3, 1.3)
            else:
                axis.set_yscale("log")
                axis.set_xlabel("lr g")
            if column == 0:
                axis.set_ylabel(
                    "share of the update that arrived"
                    if what == "gain"
                    else "error / intended update"
                )
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the study; writes study.json and study.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--model", type=Path, help="Hugging Face directory (default: SmolLM2)")
    parser.add_argument("--std", type=float, help="normal weights instead of a model's")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, LOOP], default=[*MODES, LOOP])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--lr-g", nargs="+", type=float, default=[1e-7, 1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--weights", type=int, default=1 << 17)
    parser.add_argument("--eps", type=float, default=1e-3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.std is not None:
        weights = normal_weights(options.std, options.weights)
    else:
        weights = sample(options.model or prepare(progress=print), options.weights)
    unit = unit_update(weights, options.steps)
    work = [(d, m, g) for d in options.dtypes for m in options.modes for g in options.lr_g]
    records = []
    with progress_bar("study") as progress:
        for done, (dtype, name, lr_g) in enumerate(work):
            progress(f"{dtype} {name}", done, len(work))
            rounded = {n: w.to(DTYPES[dtype]).double() for n, w in weights.items()}
            setting = (weights, DTYPES[dtype], options.steps, lr_g, options.eps)
            if name == LOOP:
                final, intended = run_loop(*setting)
            else:
                final = run_mode(name, *setting)
                intended = {n: lr_g * u for n, u in unit.items()}
            records.append(
                {"dtype": dtype, "mode": name, "lr_g": lr_g, **measure(final, rounded, intended)}
            )
        progress("done", len(work), len(work))
    facts = {name: getattr(options, name) for name in ("steps", "weights", "eps", "std")}
    write_file(options.out / "study.json", json.dumps({**facts, "records": records}, indent=1))
    plot(records, options.out / "study.png")
    print(f"{'dtype':9} {'mode':12} {'lr g':>7} {'gain':>9} {'(error)':>9} {'noise':>9}")
    for r in records:
        print(
            f"{r['dtype']:9} {r['mode']:12} {r['lr_g']:7.0e} {r['gain']:9.4f} "
            f"{r['gain_error']:9.4f} {r['noise']:9.3g}"
        )
    print(f"report {options.out / 'study.json'}, plot {options.out / 'study.png'}")


if __name__ == "__main__":
    main()
