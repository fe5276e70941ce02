"""Weights that read as if Gaussian noise were added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zo_kernels import ops
from zo_kernels.checks import check_tensor, expect_finite, expect_range
from zo_kernels.modes.base import Slot, uninterrupted
from zo_kernels.modes.reads import untouched
from zo_kernels.modes.streamed import StreamedWeights
from zo_kernels.moments import standard_deviation
from zo_kernels.noise import EVAL_WEIGHT_NOISE, RESERVED_RANGE, model_streams
from zo_kernels.views.selection import Selection, expect_used, held_in_place, select

NOISE_KINDS = ("abs", "rel_std", "rel_norm")
"""The units of ``sigma`` in ``perturbed``."""


@contextmanager
def perturbed(
    model: nn.Module,
    *,
    sigma: float,
    seed: int,
    draw: int = 0,
    kind: str = "rel_std",
    parameters: Selection = None,
    in_place: bool = False,
    backend: str | None = None,
) -> Iterator[dict[str, float]]:
    """Let weights read as if Gaussian noise were added, for the length of a ``with`` block.

    w' = round(float32(w) + s * z), one rounding to the weight's dtype, with s from ``noise_std``
    and z the normal at (seed, ``EVAL_WEIGHT_NOISE`` + draw, stream of the name, element index).
    A weight whose s is 0 reads as it is. A backward pass through an operation that read another one
    is a RuntimeError; with in_place it gives their gradients, if it is made within the block.

    Args:
        model: its parameters are contiguous float32, bfloat16 or float16.
        sigma: noise scale in the unit that ``kind`` names, >= 0.
        seed: 0 <= seed < 2**64.
        draw: which draw, 0 <= draw < 2**28.
        kind: "abs", "rel_std" or "rel_norm", see ``noise_std``.
        parameters: what to change: a pattern as of ``fnmatch``, or several, of names as in
            ``model.named_parameters()`` ("*" for all, "*.mlp.*"); a mapping from such names to
            parameters; None: ``linear_weights(model)``.
        in_place: write the noise into the weights for the length of the block, and take it off
            again bit for bit (``ops.Held``: a fraction of a byte per weight is kept, more for more
            noise). For generation, whose every step would make all the copies anew, and for
            compiled models.
        backend: as in ``zk.combine_``.

    Yields:
        The noise's standard deviation by parameter name.

    Raises:
        ValueError, TypeError: as ``noise_std``; seed or draw no int or out of range; no parameters,
            a pattern that no name matches, or a name without a noise stream in this model.
        RuntimeError: at the end of the block, if no operation in it read one of the weights (which
            in_place cannot tell); or at once, if in_place within a context that changes what they
            read as, or while another thread holds one of them changed in place.
    """
    expect_range("draw", draw, RESERVED_RANGE)
    expect_range("seed", seed, 1 << 64)
    chosen = select(model, parameters)
    stds = {
        name: noise_std(untouched(parameter), sigma=sigma, kind=kind, name=name)
        for name, parameter in chosen.items()
    }
    streams = model_streams(model)
    unknown = [name for name in chosen if name not in streams]
    if unknown:
        raise ValueError(f"parameters: expected names of model.named_parameters(), got {unknown}")
    noisy = [name for name, std in stds.items() if std > 0]
    if not noisy:
        yield stds
        return
    address = {"seed": seed, "direction": EVAL_WEIGHT_NOISE + draw, "backend": backend}
    if in_place:
        with held(
            [chosen[name] for name in noisy],
            [stds[name] for name in noisy],
            streams=[streams[name] for name in noisy],
            **address,
        ):
            yield stds
        return
    slots = [Slot(name, chosen[name], streams[name]) for name in noisy]
    view = StreamedWeights(slots, [stds[name] for name in noisy], **address)
    with view:
        yield stds
    expect_used(view, "perturbed", noisy)


@contextmanager
def held(tensors: Sequence[Tensor], scales: Sequence[float], **address: Any) -> Iterator[None]:
    """Tensors that hold round(w + scale * z) for the length of a block, and w after it.

    Args:
        tensors, scales, address: as for ``ops.Held``.

    Raises:
        RuntimeError: within a context that changes what the tensors read as, or while another
            thread holds one of them changed in place.
    """
    with held_in_place(tensors):
        held = None
        try:
            with uninterrupted():
                held = ops.Held([tensor.detach() for tensor in tensors], scales, **address)
            yield
        finally:
            if held is not None:
                with uninterrupted():
                    held.release_()


def noise_std(weight: Tensor, *, sigma: float, kind: str, name: str = "weight") -> float:
    """Return the standard deviation of the noise that ``perturbed`` adds to a weight.

    With n elements: `abs`: sigma. `rel_std`: sigma * std(W), the population standard deviation.
    `rel_norm`: sigma * ||W|| / sqrt(n), so that E ||noise||^2 = sigma^2 ||W||^2 (the norm itself
    is that to within a factor 1 - 1/4n). Moments are taken in float64; orders of summation differ
    between devices, but by so little that the scale rounded to binary32 is the same all but always.
    The value is in the unit of the weight.

    Raises:
        ValueError: unknown `kind`, negative or non-finite `sigma`, or non-finite weights (which
            `abs` does not look at).
        TypeError: `sigma` is no number, or a dtype other than float32, bfloat16, float16.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"kind: expected one of {NOISE_KINDS}, got {kind!r}")
    if expect_finite("sigma", sigma) < 0:
        raise ValueError(f"sigma: expected a finite number >= 0, got {sigma}")
    check_tensor(f"'{name}'", weight)
    if kind == "abs" or weight.numel() == 0:
        return float(sigma)
    result = sigma * standard_deviation(weight, centred=kind == "rel_std")
    if not math.isfinite(result):
        raise ValueError(f"expected finite weights in {name!r}, got NaN or infinity")
    return result
