"""What a run will hold in memory, said before anything is loaded.

    plan("configs/llama-3-8b-instruct", mode="streamed", layers=[12, 24, 29, 31]).total_device

Weights, copies, gradients and states are counted exactly, from names and shapes; activations by
the formulas of ``zo_kernels.pipeline.footprint``. Beside what is counted a process needs about 1 GB
on the host for the interpreter and its libraries and, on a GPU, CUDA's context and workspaces (up
to 1 GB, of which torch reports next to nothing): leave so much of a budget free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from zo_kernels import ops
from zo_kernels.blocks import linear_weights
from zo_kernels.modes import MODES
from zo_kernels.pipeline.footprint import Work, backward_peak, forward_peak
from zo_kernels.pipeline.shapes import ModelShape, largest_read, read_shape
from zo_kernels.pipeline.traffic import traffic
from zo_kernels.pipeline.workload import Workload
from zo_kernels.refine.checkpoint import DTYPES, fast_dtype
from zo_kernels.refine.config import select_parameters

FIRST_ORDER = ("align-sgd", "align-adamw", "align-noise", "dpo")
"""Training by gradients: plain SGD, AdamW, AdamW at noisy weights, AdamW on pairs of answers."""
PREFERENCE = ("master", "master8", "dual", "streamed", "inplace")
"""Modes in the order in which ``choose`` takes them for 16-bit weights."""
PREFERENCE_FLOAT32 = ("dual", "streamed", "inplace")
"""The same for float32 weights, which neither masters nor residuals make more exact."""
# Options of a refinement alone: what they are without one, and the word for it.
_REFINED = {
    "layers": (None, "none"),
    "quantized": (None, "none"),
    "parameters": ("linear", "none"),
    "queries": (1, "1"),
}
_SAMPLE = 1 << 18  # weights on which the exceptions of "inplace" are counted
_MOMENTS, _PIECE = 16, 1 << 22  # bytes per element, elements at a time: ``zo_kernels.moments``


@dataclass(frozen=True)
class Item:
    """Something that is held: what, its bytes, and whether on the "device" or the "host"."""

    name: str
    bytes: int
    place: str = "device"


@dataclass(frozen=True)
class Plan:
    """What a run holds at its peak.

    Attributes:
        model: model_type of the config.
        mode: mode of ``ZOSGD``, or one of ``FIRST_ORDER``.
        dtype: of the weights.
        device: where the model is, "cuda" or "cpu".
        parameters: number of all weights, tied ones once.
        selected: number of those that are trained.
        normals: that a step draws.
        bytes_moved: that a step reads and writes to perturb and update weights; the forwards' own
            reads of weights are not among them.
        items: what is held.
    """

    model: str
    mode: str
    dtype: str
    device: str
    parameters: int
    selected: int
    normals: int
    bytes_moved: int
    items: tuple[Item, ...]

    @property
    def total_device(self) -> int:
        """Bytes where the model is: on the GPU, or on the host if it computes."""
        return sum(item.bytes for item in self.items if item.place == "device")

    @property
    def total_host(self) -> int:
        """Bytes of the host's memory: all of them if the host computes."""
        if self.device == "cpu":
            return self.total_device
        return sum(item.bytes for item in self.items if item.place == "host")

    def bytes_of(self, name: str) -> int:
        """Bytes of one item, 0 if there is no such item."""
        return sum(item.bytes for item in self.items if item.name == name)

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        totals = {"total_device": self.total_device, "total_host": self.total_host}
        return {**asdict(self), **totals}


def plan(config: str | os.PathLike[str], *, mode: str = "streamed", **workload: Any) -> Plan:
    """What a run in one mode holds.

    Args:
        config: a Hugging Face directory or a config.json; weights are not read.
        mode: a mode of ``ZOSGD`` or one of ``FIRST_ORDER``. "dpo" is AdamW on pairs: both answers
            in one forward, the reference's log-probabilities computed once before training.
        workload: fields of ``Workload``.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: naming the option; a model whose activations are not modelled.
    """
    [found] = plans(config, [mode], **workload)
    return found


def plans(config: str | os.PathLike[str], modes: Sequence[str], **workload: Any) -> list[Plan]:
    """The same for several modes."""
    work = Workload(**workload)
    work.check()
    known = (*MODES, *FIRST_ORDER)
    for mode in modes:
        if mode not in known:
            raise ValueError(f"mode: expected one of {list(known)}, got {mode!r}")
        for option, (plain, word) in _REFINED.items():
            if mode in FIRST_ORDER and getattr(work, option) != plain:
                raise ValueError(
                    f"{option}: expected {word} with mode {mode!r}, which trains all parameters as "
                    f"they are by gradients, got {getattr(work, option)!r}"
                )
    shapes: dict[torch.dtype, ModelShape] = {}
    found = []
    for mode in modes:
        dtype = _dtype(work, mode)
        if dtype not in shapes:
            shapes[dtype] = read_shape(config, dtype)
        found.append((_first_order if mode in FIRST_ORDER else _refine)(shapes[dtype], mode, work))
    return found


def all_plans(config: str | os.PathLike[str], **workload: Any) -> list[Plan]:
    """Of every mode of ``ZOSGD``, and of ``FIRST_ORDER`` for all parameters as they are."""
    as_they_are = {name: value for name, value in workload.items() if name not in _REFINED}
    return [
        *plans(config, list(MODES), **workload),
        *plans(config, FIRST_ORDER, **as_they_are),
    ]


def choose(found: Sequence[Plan], budget: float) -> Plan:
    """The plan to take: the first one of ``PREFERENCE`` (``PREFERENCE_FLOAT32``) that fits.

    All of these modes leave the weights bit-exact around an evaluation. With 16-bit weights what
    tells them apart most is how much of an update arrives: all of it in float32 masters, nearly
    all in 24 bits, on average by stochastic rounding. Then comes speed: ``dual`` draws two normals
    per weight and step, the others three. ``inplace`` comes last: it needs least where few layers
    are selected. ``snapshot`` gives the same run as ``streamed`` for more memory, ``mezo`` drifts,
    and first-order training is another thing: they are chosen only where no other plan is given.

    Args:
        found: plans of the modes to choose from, as ``plans`` or ``all_plans`` gives them.
        budget: bytes on the device.

    Raises:
        ValueError: none fits; says which needs least, and how much.
    """
    if not found:
        raise ValueError("found: expected at least one plan, got none")
    by_mode = {one.mode: one for one in found}
    wide = all(one.dtype == "float32" for one in found if one.mode in MODES)
    order = [by_mode[m] for m in (PREFERENCE_FLOAT32 if wide else PREFERENCE) if m in by_mode]
    order = order or list(found)
    for one in order:
        if one.total_device <= budget:
            return one
    least = min(order, key=lambda one: one.total_device)
    raise ValueError(
        f"budget: expected enough for {' or '.join(one.mode for one in order)}, got "
        f"{budget / 1e9:.2f} GB; '{least.mode}' needs least, {least.total_device / 1e9:.2f} GB, of "
        f"which the weights are {least.bytes_of('weights') / 1e9:.2f} GB"
    )


def _dtype(work: Workload, mode: str) -> torch.dtype:
    if work.dtype != "auto":
        return DTYPES[work.dtype]
    return torch.float32 if mode in FIRST_ORDER else fast_dtype(work.device)


def _evaluation(work: Workload, dtype: torch.dtype, *, output: int, pairs: int = 1) -> Work:
    completion = work.length - 1 if work.completion is None else work.completion
    return Work(work.batch_size * pairs, work.length, completion, dtype.itemsize, output)


def _plan(
    shape: ModelShape, mode: str, work: Workload, trained: int, moved: tuple[int, int], items: Any
) -> Plan:
    dtype = next(shape.model.parameters()).dtype
    weights = shape.elements * dtype.itemsize + shape.buffer_bytes
    held = [Item("weights", weights), *(Item(*item) for item in items.items() if item[1])]
    if work.device == "cuda":
        held.append(Item("weights while loaded or saved", weights, "host"))
    return Plan(
        model=shape.name,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        device=work.device,
        parameters=shape.elements,
        selected=trained,
        normals=moved[0],
        bytes_moved=moved[1],
        items=tuple(held),
    )


def _refine(shape: ModelShape, mode: str, work: Workload) -> Plan:
    """Refinement in a mode of ``ZOSGD``."""
    chosen = dict(select_parameters(shape.model, work.parameters, work.layers))
    dtype = next(iter(chosen.values())).dtype
    evaluation = _evaluation(work, dtype, output=dtype.itemsize)
    count = sum(parameter.numel() for parameter in chosen.values())
    streams = mode in ("streamed", "dual", "master8")
    copies = 2 if mode == "dual" else 1
    read = largest_read(shape, chosen, evaluation.tokens) if streams else 0
    if work.quantized is not None:
        read = max(read, largest_read(shape, linear_weights(shape.model), evaluation.tokens))
    forward = forward_peak(shape, evaluation, dual=mode == "dual")
    exceptions = _exceptions(count, dtype, work) if mode == "inplace" else 0
    largest = max(parameter.numel() for parameter in chosen.values())
    moved = traffic(shape, mode, chosen, evaluation.tokens, queries=work.queries)
    kept = {
        "snapshot of the selected weights": count * dtype.itemsize if mode == "snapshot" else 0,
        "float32 masters": 4 * count if mode == "master" else 0,
        "residuals": count if mode == "master8" and dtype.itemsize == 2 else 0,
        "exceptions to one rounding": exceptions,
        "changed copy of the largest leaf": copies * read,
        "hidden states before the first selected block": _prefix(shape, chosen, work, dtype),
        # Between two evaluations there are no activations, but both points' exceptions.
        "activations": max(forward, exceptions),
    }
    # Before all that the moments of each tensor are taken, in float64.
    moments = _MOMENTS * min(largest, _PIECE)
    kept["activations"] += max(0, moments - sum(kept.values()))
    return _plan(shape, mode, work, count, moved, kept)


def _prefix(
    shape: ModelShape, chosen: dict[str, nn.Parameter], work: Workload, dtype: torch.dtype
) -> int:
    """Bytes of the hidden states that need no second forward, where only later blocks change."""
    names = list(shape.blocks)
    first = next(iter(names), "")
    inside = tuple(f"{name}." for name in names)
    untouched = not any(name.startswith(f"{first}.") for name in chosen)
    if not untouched or not all(name.startswith(inside) for name in chosen):
        return 0
    hidden = shape.blocks[first].hidden
    return work.micro_batches * work.batch_size * work.length * hidden * dtype.itemsize


def _exceptions(count: int, dtype: torch.dtype, work: Workload) -> int:
    """Bytes that ``ops.Held`` keeps, measured on normal weights; a GPU's room is a little more."""
    sample = ops.normal(_SAMPLE, seed=0, direction=0, stream=0).to(dtype)
    held = ops.Held(
        [sample], [work.eps], seed=0, direction=1, streams=[0], distribution=work.distribution
    )
    return -(-count * held.nbytes // _SAMPLE)


def _first_order(shape: ModelShape, mode: str, work: Workload) -> Plan:
    """Training of all parameters by gradients.

    16-bit weights have float32 masters, whose gradients and states are float32 too; float32
    weights are multiplied in bfloat16 where the device does that fast (autocast).
    """
    dtype = next(shape.model.parameters()).dtype
    mixed = dtype == torch.float32 and fast_dtype(work.device) != torch.float32
    output = 2 if mixed else dtype.itemsize
    evaluation = _evaluation(work, dtype, output=output, pairs=2 if mode == "dpo" else 1)
    peak = backward_peak(shape, evaluation, gradient_bytes=4)
    linears = linear_weights(shape.model)
    noisy = sum(p.numel() for p in linears.values()) if mode == "align-noise" else 0
    largest = max(parameter.numel() for parameter in shape.model.parameters())
    kept = {
        "float32 masters": 4 * shape.elements if dtype.itemsize == 2 else 0,
        "optimizer state": 0 if mode == "align-sgd" else 8 * shape.elements,
        "exceptions to one rounding": _exceptions(noisy, dtype, work) if noisy else 0,
        "bfloat16 copies of multiplied weights": peak.copies,
        "gradients": peak.gradients,
        "16-bit gradient of the largest leaf": 2 * largest if dtype.itemsize == 2 else 0,
        "activations": peak.activations,
    }
    moved = traffic(shape, mode, linears, evaluation.tokens, queries=1)
    return _plan(shape, mode, work, shape.elements, moved, kept)
