"""Weights that read as if they were quantised, and a view of a model that is entered many times."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from zo_kernels import ops
from zo_kernels.blocks import is_conv1d
from zo_kernels.checks import check_tensor
from zo_kernels.modes.base import uninterrupted
from zo_kernels.modes.reads import Part, Perturbation, StreamedReads, untouched
from zo_kernels.ops.quant_arguments import check_format, group_of
from zo_kernels.quantize import fake_quant
from zo_kernels.views.selection import Selection, expect_used, held_in_place, select


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
) -> QuantizedView:
    """Let weights read as their ``zk.fake_quant`` values, for the length of a ``with`` block.

    The output channel is dim 0, except for a transformers ``Conv1D``, whose weight is stored
    (in, out). Weights of more than two dimensions (stacked experts) are taken as (..., in). A
    backward pass through an operation that read one of them is a RuntimeError; with in_place it
    gives their gradients, if it is made within the block.

    What it returns can be entered many times, unless in_place also in two threads at once, such as
    in the closure of a ``ZOSGD`` step, which then minimises the loss of the quantised model:

        view = zk.quantized(model, "int4", group_size=128)

        def closure():
            with view:
                return model(**batch).loss

    Args:
        model: its parameters are contiguous float32, bfloat16 or float16.
        scheme, group_size, symmetric, double_quant: as in ``zk.fake_quant``.
        parameters: what to change, as in ``perturbed``.
        in_place: keep a copy of these weights and write their values into them for the length of
            the block. For generation, whose every step would round all of them anew, and for
            compiled models.
        backend: as in ``zk.fake_quant``.

    Returns:
        A context manager; ``as`` gives the names of the parameters. All weights are looked at
        when it is first entered, which takes a pass over them, and what they read as at each read;
        on a GPU, where a look waits for the device, only at the first of each.

    Raises:
        ValueError, TypeError: as ``zk.fake_quant``, naming the parameter; or as ``perturbed``. At
            once, but for values that are not finite.
        RuntimeError: at the end of a block, if no operation in it read one of the weights (which
            in_place cannot tell); or at its begin, if in_place within a context that changes what
            they read as, or while another thread holds one of them changed in place.
    """
    chosen = select(model, parameters)
    options = {
        "group_size": group_size,
        "symmetric": symmetric,
        "double_quant": double_quant,
        "backend": backend,
    }
    return QuantizedView(chosen, scheme, _transposed(model), in_place=in_place, **options)


class QuantizedView(AbstractContextManager):
    """What ``zk.quantized`` returns: a context to enter any number of times, in several threads.

    Each entry has a ``QuantizedWeights`` of its own, kept with its scratch for the next one.

    Args:
        parameters, scheme, transposed, options: as for ``QuantizedWeights``.
        in_place: as for ``zk.quantized``; then in one thread at a time.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        scheme: str,
        transposed: frozenset[int] = frozenset(),
        *,
        in_place: bool = False,
        **options: object,
    ) -> None:
        self._parameters, self._in_place = dict(parameters), in_place
        self._seen: set[int] = set()
        self._make = lambda: QuantizedWeights(
            self._parameters, scheme, transposed, self._seen, **options
        )
        self._idle = [self._make()]
        self._lock = threading.Lock()
        self._looked = False
        self._entered = threading.local()

    def __enter__(self) -> list[str]:
        """Begin a block of this thread; the names of the parameters."""
        block = self._block()
        names = block.__enter__()
        self._blocks.append(block)
        return names

    def __exit__(self, *error: object) -> bool | None:
        """End this thread's innermost block."""
        return self._blocks.pop().__exit__(*error)

    @property
    def _blocks(self) -> list[AbstractContextManager]:
        if not hasattr(self._entered, "blocks"):
            self._entered.blocks = []
        return self._entered.blocks

    @contextmanager
    def _block(self) -> Iterator[list[str]]:
        with self._lock:
            weights = self._idle.pop() if self._idle else self._make()
        try:
            with self._lock:
                if not self._looked:
                    weights.look()
                    self._looked = True
            names = list(self._parameters)
            if self._in_place:
                with _rounded(self._parameters, weights):
                    yield names
                return
            weights.used = 0
            with weights:
                yield names
            expect_used(weights, "quantized", names)
        finally:
            with self._lock:
                self._idle.append(weights)


class QuantizedWeights(StreamedReads):
    """Context in which parameters read as their ``zk.fake_quant`` values.

    Directly within a context that perturbs them (a streamed ZO step, ``zk.perturbed``) both are one
    pass, ``ops.perturb_quant``, with the same bits.

    Args:
        parameters: by name, with two dimensions or more.
        scheme, options: as for ``zk.fake_quant``.
        transposed: ids of the parameters that are stored (in, out).
        seen: ids of parameters on a GPU whose changed values were looked at.

    Raises:
        As ``zk.fake_quant``, of every parameter in turn, but for values that are not finite: those
        come up in ``look`` and in reads.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        scheme: str,
        transposed: frozenset[int] = frozenset(),
        seen: set[int] | None = None,
        *,
        backend: str | None = None,
        **options: object,
    ) -> None:
        super().__init__(parameters.items())
        self._parameters = list(parameters.values())
        self._scheme, self._options, self._transposed = scheme, options, transposed
        self._backend = backend
        self._seen = set() if seen is None else seen
        size = options.get("group_size")
        format_options = {key: value for key, value in options.items() if key != "group_size"}
        defaults = {"symmetric": True, "double_quant": False, "check_finite": True}
        check_format(scheme, **defaults | format_options)
        for name, parameter in parameters.items():
            check_tensor(f"'{name}'", parameter)
            if parameter.dim() < 2:
                raise ValueError(
                    f"'{name}': expected a weight of two dimensions or more to quantise, got shape "
                    f"{tuple(parameter.shape)}"
                )
            group_of(self._matrix(parameter, untouched(parameter)), scheme, size, name)
            ops.backend_for(parameter.device, backend)

    def look(self) -> None:
        """Round all parameters once, so that what is wrong comes up here and not in a forward.

        Raises:
            ValueError: values that are not finite, or a range too large, naming the parameter.
        """
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for parameter in self._parameters:
                copies = self._scratch.allocate([(parameter.shape, parameter)])
                self._round(copies[0], Part.whole(parameter), check_finite=True)

    def fill(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """See ``StreamedReads.fill``."""
        for copy, part in zip(copies, parts, strict=True):
            # What an outer context made, unlike the weights, has not been looked at.
            self._round(copy, part, check_finite=self._looks_at(part, part.source is copy))

    def divisible(self, parameter: Tensor) -> bool:
        """Groups may be longer than a row, and scales may have scales."""
        return id(parameter) not in self._names and super().divisible(parameter)

    def _fill_all(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """As the base does, but in one pass what an outer context only perturbs."""
        rest = []
        for i, part in enumerate(parts):
            noise = self._noise_of(part.parameter)
            if noise is None:
                rest.append(i)
            else:
                self._perturb_and_round(copies[i], part, noise)
        super()._fill_all([copies[i] for i in rest], [parts[i] for i in rest])

    def _noise_of(self, parameter: Tensor) -> Perturbation | None:
        """What precedes the rounding of a parameter, if one pass can do both."""
        own = id(parameter) in self._names and id(parameter) not in self._transposed
        noise = self._outer.perturbation(parameter) if own and self._outer else None
        if noise is None or noise.room is not ops.backend_for(parameter.device, self._backend):
            return None
        return noise

    def _perturb_and_round(self, copy: Tensor, part: Part, noise: Perturbation) -> None:
        ops.perturb_quant(
            [self._matrix(part.parameter, copy)],
            [self._matrix(part.parameter, part.source)],
            [noise.scale],
            self._scheme,
            seed=noise.seed,
            direction=noise.direction,
            streams=[noise.stream],
            offsets=[part.offset],
            distribution=noise.distribution,
            check_finite=self._looks_at(part, changed=True),
            names=[self._name(id(part.parameter))],
            backend=self._backend,
            **self._options,
        )

    def _round(self, copy: Tensor, part: Part, *, check_finite: bool) -> None:
        options = {**self._options, "backend": self._backend, "check_finite": check_finite}
        options["name"] = self._name(id(part.parameter))
        weight = self._matrix(part.parameter, part.source)
        if id(part.parameter) in self._transposed:
            # A clone: where one of the two dimensions is 1, contiguous() is the weight itself.
            weight = weight.clone(memory_format=torch.contiguous_format)
            fake_quant(weight, self._scheme, out=weight, **options)
            copy.copy_(weight.t())
            return
        out = weight if part.source is copy else self._matrix(part.parameter, copy)
        fake_quant(weight, self._scheme, out=out, **options)

    def _matrix(self, parameter: Tensor, values: Tensor) -> Tensor:
        """Values of a parameter as (out, in)."""
        if id(parameter) in self._transposed:
            return values.t()
        return values.view(-1, values.shape[-1])

    def _looks_at(self, part: Part, changed: bool) -> bool:
        """Whether a read looks for values that are not finite: always on a CPU, where that costs
        little; on a GPU, where it waits, at the first read of values that ``look`` has not seen."""
        if part.source.device.type == "cpu":
            return True
        if not changed or id(part.parameter) in self._seen:
            return False
        self._seen.add(id(part.parameter))
        return True


@contextmanager
def _rounded(parameters: Mapping[str, Tensor], view: QuantizedWeights) -> Iterator[None]:
    """Parameters that hold what `view` makes of them for the length of a block, then as before."""
    with held_in_place(list(parameters.values())):
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


def _transposed(model: nn.Module) -> frozenset[int]:
    """Ids of weights that are stored (in, out)."""
    return frozenset(id(module.weight) for module in model.modules() if is_conv1d(module))
