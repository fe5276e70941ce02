"""A model as if its weights were noisy or quantised, without touching them.

    with zk.perturbed(model, sigma=0.05, seed=0), zk.quantized(model, "int4", group_size=128):
        evaluate(model)

Within the block every operation that reads a chosen weight reads a changed copy, made for that
operation alone in a scratch buffer: the model is never modified, whatever happens, and the extra
memory is the largest weight. Contexts nest, inner ones changing what outer ones give: above, the
noisy weights are quantised. Both work through torch functions of the thread that entered them, so
a model compiled by ``torch.compile`` reads its weights as they are: that is a RuntimeError.

Noise has an address like all noise of this package: (seed, direction, stream, index) with
direction = ``EVAL_WEIGHT_NOISE`` + draw. That range is never used by training, so an evaluation
draw is never a direction the refinement has seen, and the same draw hits every checkpoint alike.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import ops
from zo_kernels.blocks import is_conv1d, linear_weights
from zo_kernels.checks import check_tensor
from zo_kernels.modes.base import Slot, uninterrupted
from zo_kernels.modes.streamed import Part, StreamedReads, StreamedWeights, untouched
from zo_kernels.moments import standard_deviation
from zo_kernels.noise import EVAL_WEIGHT_NOISE, RESERVED_RANGE, model_streams
from zo_kernels.quantize import fake_quant

NOISE_KINDS = ("abs", "rel_std", "rel_norm")
"""The units of ``sigma`` in ``perturbed``."""

#: What to change: parameters by name, or patterns of names; None for ``linear_weights``.
Selection = Mapping[str, Tensor] | str | Sequence[str] | None


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
    A weight whose s is 0 reads as it is.

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
        ValueError, TypeError: as ``noise_std``; seed or draw out of range; a pattern that no name
            matches, or a name without a noise stream in this model.
        RuntimeError: at the end of the block, if no operation in it read one of the weights; or at
            once, if in_place within a context that changes what they read as.
    """
    if not 0 <= draw < RESERVED_RANGE:
        raise ValueError(f"draw: expected 0 <= draw < 2**28, got {draw}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    chosen = select(model, parameters)
    stds = {
        name: noise_std(untouched(parameter), sigma=sigma, kind=kind, name=name)
        for name, parameter in chosen.items()
    }
    streams = model_streams(model)
    unknown = [name for name in chosen if name not in streams]
    if unknown:
        raise ValueError(f"expected names of model.named_parameters(), got {unknown}")
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
    _expect_used(view, "perturbed", noisy)


@contextmanager
def held(tensors: Sequence[Tensor], scales: Sequence[float], **address: Any) -> Iterator[None]:
    """Tensors that hold round(w + scale * z) for the length of a block, and w after it.

    Args:
        tensors, scales, address: as for ``ops.Held``.

    Raises:
        RuntimeError: within a context that changes what the tensors read as.
    """
    _expect_outermost()
    held = None
    try:
        with uninterrupted():
            held = ops.Held([tensor.detach() for tensor in tensors], scales, **address)
        yield
    finally:
        if held is not None:
            with uninterrupted():
                held.release_()


@contextmanager
def _rounded(parameters: Mapping[str, Tensor], view: QuantizedWeights) -> Iterator[None]:
    """Parameters that hold what `view` makes of them for the length of a block, then as before."""
    _expect_outermost()
    kept = [parameter.detach().clone() for parameter in parameters.values()]
    try:
        with torch.no_grad(), uninterrupted():
            for parameter in parameters.values():
                view.fill([parameter.detach()], [Part.whole(parameter)])
        yield
    finally:
        with torch.no_grad(), uninterrupted():
            for parameter, copy in zip(parameters.values(), kept, strict=True):
                parameter.copy_(copy)


def _expect_outermost() -> None:
    if StreamedReads.active():
        raise RuntimeError(
            "in_place: expected False within another zk.perturbed or zk.quantized, whose changes "
            "these would precede; enter the context with in_place first"
        )


@contextmanager
def quantized(
    model: nn.Module,
    scheme: str,
    *,
    group_size: int | str | None = None,
    symmetric: bool = True,
    double_quant: bool = False,
    parameters: Selection = None,
    in_place: bool = False,
    backend: str | None = None,
) -> Iterator[list[str]]:
    """Let weights read as their ``zk.fake_quant`` values, for the length of a ``with`` block.

    The output channel is dim 0, except for a transformers ``Conv1D``, whose weight is stored
    (in, out). Weights of more than two dimensions (stacked experts) are taken as (..., in).

    Args:
        model: its parameters are contiguous float32, bfloat16 or float16.
        scheme, group_size, symmetric, double_quant: as in ``zk.fake_quant``.
        parameters: what to change, as in ``perturbed``.
        in_place: keep a copy of these weights and write their values into them for the length of
            the block. For generation, whose every step would round all of them anew, and for
            compiled models.
        backend: as in ``zk.fake_quant``.

    Yields:
        The names of the parameters.

    Raises:
        ValueError, TypeError: as ``zk.fake_quant``, naming the parameter; or as ``perturbed``.
        RuntimeError: at the end of the block, if no operation in it read one of the weights; or at
            once, if in_place within a context that changes what they read as.
    """
    chosen = select(model, parameters)
    options = {
        "group_size": group_size,
        "symmetric": symmetric,
        "double_quant": double_quant,
        "backend": backend,
    }
    view = QuantizedWeights(chosen, scheme, _transposed(model), **options)
    if in_place:
        with _rounded(chosen, view):
            yield list(chosen)
        return
    with view:
        yield list(chosen)
    _expect_used(view, "quantized", list(chosen))


class QuantizedWeights(StreamedReads):
    """Context in which parameters read as their ``zk.fake_quant`` values.

    Args:
        parameters: by name, with two dimensions or more.
        scheme, options: as for ``zk.fake_quant``.
        transposed: ids of the parameters that are stored (in, out).

    Raises:
        As ``zk.fake_quant``, of every parameter in turn.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        scheme: str,
        transposed: frozenset[int] = frozenset(),
        **options: object,
    ) -> None:
        super().__init__(parameters.items())
        self._scheme, self._options, self._transposed = scheme, options, transposed
        self._checked = False
        for name, parameter in parameters.items():
            check_tensor(f"'{name}'", parameter)
            if parameter.dim() < 2:
                raise ValueError(
                    f"'{name}': expected a weight of two dimensions or more to quantise, got shape "
                    f"{tuple(parameter.shape)}"
                )
            # So that what is wrong comes up here, and not within a forward.
            copies = self._scratch.allocate([(parameter.shape, parameter)])
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self.fill(copies, [Part.whole(parameter)])
        self._checked = True

    def fill(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """See ``StreamedReads.fill``."""
        for copy, part in zip(copies, parts, strict=True):
            source = part.source
            options = {
                **self._options,
                "name": self._name(id(part.parameter)),
                # The weights themselves were looked at on construction; on a GPU a look waits.
                "check_finite": not self._checked or source is copy,
            }
            if id(part.parameter) in self._transposed:
                weight = source.t().contiguous()
                fake_quant(weight, self._scheme, out=weight, **options)
                copy.copy_(weight.t())
                continue
            columns = source.shape[-1]
            weight = source.view(-1, columns)
            out = weight if source is copy else copy.view(-1, columns)
            fake_quant(weight, self._scheme, out=out, **options)

    def divisible(self, parameter: Tensor) -> bool:
        """Groups may be longer than a row, and scales may have scales."""
        return id(parameter) not in self._names and super().divisible(parameter)


def select(model: nn.Module, parameters: Selection = None) -> dict[str, Tensor]:
    """The parameters that a selection means, by name.

    Raises:
        ValueError: a pattern that matches no name, and ``linear_weights``'.
    """
    if parameters is None:
        return linear_weights(model)
    if isinstance(parameters, Mapping):
        return dict(parameters)
    named = dict(model.named_parameters())
    found: set[str] = set()
    for pattern in [parameters] if isinstance(parameters, str) else parameters:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise ValueError(
                f"parameters: expected patterns of model.named_parameters() such as "
                f"{next(iter(named), '')!r}, got {pattern!r}, which matches none"
            )
        found.update(matches)
    return {name: parameter for name, parameter in named.items() if name in found}


def noise_std(weight: Tensor, *, sigma: float, kind: str, name: str = "weight") -> float:
    """Return the standard deviation of the noise that ``perturbed`` adds to a weight.

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
    check_tensor(f"'{name}'", weight)
    if kind == "abs" or weight.numel() == 0:
        return float(sigma)
    result = sigma * standard_deviation(weight, centred=kind == "rel_std")
    if not math.isfinite(result):
        raise ValueError(f"expected finite weights in {name!r}, got NaN or infinity")
    return result


def _transposed(model: nn.Module) -> frozenset[int]:
    """Ids of weights that are stored (in, out)."""
    return frozenset(id(module.weight) for module in model.modules() if is_conv1d(module))


def _expect_used(view: StreamedReads, what: str, names: Sequence[str]) -> None:
    if not view.used:
        raise RuntimeError(
            f"zk.{what}: expected the block to run a model that has '{names[0]}' "
            f"({len(names)} weights in all), but no torch function read one of them; a model "
            "compiled by torch.compile does not go through torch functions"
        )
