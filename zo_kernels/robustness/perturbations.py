"""Weight perturbations for evaluation: Gaussian noise and round-to-nearest fake quantisation.

Both are context managers. They write the disturbed weights into the model's own parameters, so any
code that takes a model can be run under them, and they put the original bits back on the way out,
also when the body raises. A same-dtype copy of the disturbed parameters is held in between.

Noise has an address like all noise of this package: (seed, direction, stream, index) with
direction = `EVAL_WEIGHT_NOISE` + draw. That range is never used by training, so an evaluation draw
is never a direction the refinement has seen, and the same draw hits every checkpoint alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels.moments import standard_deviation
from zo_kernels.noise import EVAL_WEIGHT_NOISE, RESERVED_RANGE, model_streams

NOISE_KINDS = ("abs", "rel_std", "rel_norm")
"""The units of `sigma` in `weight_noise`."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the 2-D weights of the linear layers inside the model's decoder blocks.

    A decoder block is an element of an `nn.ModuleList` (`model.layers`, `transformer.h`, ...); a
    linear layer is an `nn.Linear` or a transformers `Conv1D` somewhere below one. Embeddings, the
    output head (tied or not), norms, biases and projections outside the blocks are left out.
    Names and order are those of `model.named_parameters()`.

    Raises:
        ValueError: no such weight was found.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            excluded.update(id(p) for p in module.parameters(recurse=False))
    wanted: set[int] = set()
    for container in model.modules():
        if not isinstance(container, nn.ModuleList):
            continue
        for block in container:
            # A linear that is itself the list's element (a list of heads) is no part of a block.
            wanted.update(
                id(module.weight)
                for module in block.modules()
                if module is not block and (isinstance(module, nn.Linear) or _is_conv1d(module))
            )
    wanted -= excluded
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted and parameter.dim() == 2
    }
    if not found:
        raise ValueError(
            "no linear weights inside decoder blocks: expected nn.Linear or Conv1D layers below "
            f"the elements of an nn.ModuleList, got {type(model).__name__} without any; "
            "name the parameters to disturb with `parameters=`"
        )
    return found


def noise_std(weight: Tensor, *, sigma: float, kind: str, name: str = "weight") -> float:
    """Return the standard deviation of the noise that `weight_noise` adds to `weight`.

    With n elements: `abs`: sigma. `rel_std`: sigma * std(W), the population standard deviation.
    `rel_norm`: sigma * ||W|| / sqrt(n), so that E ||noise||^2 = sigma^2 ||W||^2 (the norm itself
    is that to within a factor 1 - 1/4n). Moments are taken in float64; orders of summation differ
    between devices, but by so little that the scale rounded to binary32 is the same all but always.
    The value is in the unit of the weight.

    Raises:
        ValueError: unknown `kind`, negative or non-finite `sigma`, or non-finite weights.
        TypeError: a dtype other than float32, bfloat16, float16.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"expected a noise kind out of {NOISE_KINDS}, got {kind!r}")
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"expected a finite sigma >= 0, got {sigma!r}")
    _check_dtype(weight, name)
    if kind == "abs" or weight.numel() == 0:
        return float(sigma)
    result = sigma * standard_deviation(weight, centred=kind == "rel_std")
    if not math.isfinite(result):
        raise ValueError(f"expected finite weights in {name!r}, got NaN or infinity")
    return result


@contextmanager
def weight_noise(
    model: nn.Module,
    *,
    sigma: float,
    seed: int,
    draw: int,
    kind: str = "rel_std",
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Iterator[dict[str, float]]:
    """Add Gaussian noise to weights for the length of a `with` block.

    w' = round(float32(w) + s * z), one rounding to the weight's dtype, with s from `noise_std`
    and z the normal at (seed, `EVAL_WEIGHT_NOISE` + draw, stream of the name, element index).
    Where s is 0 the weight is not written at all, so sigma = 0 is an exact identity.

    Args:
        model: the model; its parameters' dtypes are float32, bfloat16 or float16, contiguous.
        sigma: noise scale in the unit that `kind` names, >= 0.
        seed: 0 <= seed < 2**64.
        draw: which draw, 0 <= draw < 2**28.
        kind: "abs", "rel_std" or "rel_norm", see `noise_std`.
        parameters: what to disturb, keyed as in `model.named_parameters()`. None:
            `linear_weights(model)`. For all parameters pass `dict(model.named_parameters())`.

    Yields:
        The noise's standard deviation by parameter name.

    Raises:
        ValueError, TypeError: as `noise_std`; or seed or draw out of range, or a name without a
            noise stream in this model. Nothing has been written then.
    """
    if not 0 <= draw < RESERVED_RANGE:
        raise ValueError(f"expected 0 <= draw < 2**28, got {draw}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected 0 <= seed < 2**64, got {seed}")
    chosen = linear_weights(model) if parameters is None else dict(parameters)
    stds = {n: noise_std(p, sigma=sigma, kind=kind, name=n) for n, p in chosen.items()}
    streams = model_streams(model)
    unknown = [name for name in chosen if name not in streams]
    if unknown:
        raise ValueError(f"expected names of model.named_parameters(), got {unknown}")
    noisy = {name: chosen[name] for name, std in stds.items() if std > 0}
    with _restored(noisy) as snapshot:
        if noisy:
            with torch.no_grad():
                zk.combine_(
                    [parameter.detach() for parameter in noisy.values()],
                    [snapshot[name] for name in noisy],
                    [[stds[name]] for name in noisy],
                    seed=seed,
                    directions=[EVAL_WEIGHT_NOISE + draw],
                    streams=[streams[name] for name in noisy],
                )
        yield stds


@contextmanager
def round_to_nearest(
    model: nn.Module,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Iterator[None]:
    """Replace weights by their `zk.fake_quant` values for the length of a `with` block.

    The scheme is "int<bits>". The output channel is dim 0, except for a transformers `Conv1D`,
    whose weight is stored (in, out).

    Args:
        model: the model; its parameters are contiguous.
        bits: 2 to 8.
        group_size: None for one scale per output channel, else a divisor of the in dimension.
        symmetric: False for a zero point and a range from min to max.
        parameters: as in `weight_noise`.

    Raises:
        ValueError, TypeError: as `zk.fake_quant`, naming the parameter. The weights have their
            original bits then.
    """
    chosen = linear_weights(model) if parameters is None else dict(parameters)
    transposed = {id(module.weight) for module in model.modules() if _is_conv1d(module)}
    with _restored(chosen) as snapshot:
        with torch.no_grad():
            for name, parameter in chosen.items():
                flip = id(parameter) in transposed
                weight = snapshot[name].t().contiguous() if flip else snapshot[name]
                rounded = zk.fake_quant(
                    weight, f"int{bits}", group_size=group_size, symmetric=symmetric, name=name
                )
                parameter.detach().copy_(rounded.t() if flip else rounded)
        yield


def _is_conv1d(module: nn.Module) -> bool:
    """Tell a transformers `Conv1D` (weight stored (in, out)) without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _check_dtype(weight: Tensor, name: str) -> None:
    """Raise TypeError unless the weight is float32, bfloat16 or float16."""
    if weight.dtype not in _FLOATS:
        raise TypeError(f"expected {name!r} in one of {_FLOATS}, got {weight.dtype}")


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the parameters; on any exit write them back bit for bit."""
    snapshot = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield snapshot
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.detach().copy_(snapshot[name])
