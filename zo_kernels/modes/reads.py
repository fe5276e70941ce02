"""Weights that are never touched: changed copies exist only while an operation reads them.

A ``TorchFunctionMode`` sees every torch function the model calls. Where an argument is one of the
parameters, a changed copy, such as ``round(w + scale * z)``, is written into a scratch buffer
shared by all of them, and the function gets the copy. Extra memory is what one operation needs, at
most the largest leaf; a crash, a NaN or Ctrl-C cannot damage the model; no module has to be known,
so tied weights, stacked experts and functional code work alike.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Reads of a parameter that do not touch its values.
_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes names is_cuda is_cpu is_meta is_leaf "
    "is_quantized is_sparse is_mkldnn is_nested is_xpu is_mps requires_grad grad grad_fn _version "
    "_backward_hooks"
).split()
_METADATA = {getattr(Tensor, p).__get__ for p in _PROPERTIES if hasattr(Tensor, p)} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size,
    Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.storage_offset,
    Tensor.get_device, Tensor.__len__, Tensor.__hash__, torch.is_floating_point, torch.numel,
    torch.is_complex,
}  # fmt: skip
# A kernel that takes the address itself would read the unperturbed weights.
_ADDRESSES = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.numpy, Tensor.__dlpack__}
_ALIGNMENT = 64  # bytes, between two copies in one scratch


class Scratch:
    """One growing buffer per device and dtype, handed out anew to every operation."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def allocate(self, slots: Sequence[tuple[torch.Size, Tensor]]) -> list[Tensor]:
        """Uninitialised tensors of the given shapes, each like its example's device and dtype."""
        used: dict[tuple[torch.device, torch.dtype], int] = {}
        places = []
        for shape, like in slots:
            key = (like.device, like.dtype)
            start = used.get(key, 0)
            step = _ALIGNMENT // like.element_size()
            used[key] = start + -(-shape.numel() // step) * step
            places.append((key, start, shape))
        for key, total in used.items():
            if key not in self._buffers or self._buffers[key].numel() < total:
                self._buffers.pop(key, None)  # let go of the small one first
                self._buffers[key] = torch.empty(total, device=key[0], dtype=key[1])
        return [self._buffers[k][at : at + shape.numel()].view(shape) for k, at, shape in places]

    def give_away_if_aliased(self, result: object) -> None:
        """Forget every buffer that a result is a view of: it now belongs to the result."""
        if not self._buffers:
            return
        held = {tensor.untyped_storage().data_ptr() for tensor in _tensors(result)}
        for key, buffer in list(self._buffers.items()):
            if buffer.untyped_storage().data_ptr() in held:
                del self._buffers[key]


@dataclass(frozen=True, slots=True)
class Part:
    """Contiguous elements of a parameter that an operation reads, from number ``offset`` on."""

    parameter: Tensor
    source: Tensor
    offset: int

    @staticmethod
    def whole(parameter: Tensor) -> Part:
        """All of it."""
        return Part(parameter, untouched(parameter), 0)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A parameter w that reads as ``round(w + scale * z)``: the address of z, and who adds it."""

    scale: float
    seed: int
    direction: int
    stream: int
    distribution: str
    room: ModuleType


def untouched(parameter: Tensor) -> Tensor:
    """The parameter's own values, in whatever contexts."""
    with torch._C.DisableTorchFunction():
        return parameter.detach()


class _Active(threading.local):
    """The innermost context of this thread: torch's modes are a thread's own too."""

    reads: StreamedReads | None = None


_active = _Active()


class StreamedReads(TorchFunctionMode, ABC):
    """Context in which parameters read as changed copies of themselves.

    Contexts may be nested: the inner one changes what the outer ones give. A backward pass through
    an operation that read a parameter within is a RuntimeError.

    Args:
        parameters: by name.
        scratch: buffer to reuse between contexts; a new one by default.

    ``used`` counts the substitutions made. Reading a parameter's address inside the context
    (``data_ptr`` and the like) raises RuntimeError, because the caller would see the weights
    themselves.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], scratch: Scratch | None = None
    ) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters}
        self._scratch = Scratch() if scratch is None else scratch
        self._outer: StreamedReads | None = None
        self.used = 0

    @staticmethod
    def active() -> bool:
        """Whether this thread is in such a context."""
        return _active.reads is not None

    @abstractmethod
    def fill(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """Write the changed elements of parts of this context's own parameters into copies.

        A part's source may be the copy itself.
        """

    def perturbation(self, parameter: Tensor) -> Perturbation | None:
        """What the parameter reads as here, if that is one perturbation of it and no more."""
        if id(parameter) in self._names or self._outer is None:
            return None
        return self._outer.perturbation(parameter)

    def divisible(self, parameter: Tensor) -> bool:
        """Whether a slice of it may be changed alone."""
        return self._outer is None or self._outer.divisible(parameter)

    def __enter__(self) -> StreamedReads:
        """Become the innermost context."""
        self._outer, _active.reads = _active.reads, self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Give that place back."""
        try:
            super().__exit__(*error)
        finally:
            _active.reads, self._outer = self._outer, None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call func with changed copies in place of the parameters among its arguments."""
        kwargs = kwargs or {}
        found = self._find(args)
        if kwargs:
            found |= self._find(kwargs.values())
        if not found or func in _METADATA:
            return func(*args, **kwargs)
        if func in _ADDRESSES:
            name = self._name(next(iter(found)))
            raise RuntimeError(
                f"{getattr(func, '__name__', func)} takes the address of '{name}', whose changed "
                "copy exists only inside torch functions; use a mode that keeps perturbed weights "
                "in place (ZOSGD's 'inplace', 'snapshot' or 'master'), or zk.perturbed with "
                "in_place"
            )
        self._count(found)
        if func is F.embedding and self._looked_up(*args, **kwargs):
            return self._embedding(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[1], int) and self.divisible(args[0]):
            return self._row(args[0], args[1])
        parts = [Part.whole(t) for t in found.values()]
        copies = dict(zip(found, self.copies(parts), strict=True))
        result = func(*_replace(args, copies), **_replace(kwargs, copies))
        self._scratch.give_away_if_aliased(result)
        if torch.is_grad_enabled():
            _refuse_gradients(result, self._name(next(iter(found))))
        return result

    def copies(self, parts: Sequence[Part]) -> list[Tensor]:
        """A changed copy of each part, in the scratch."""
        copies = self._scratch.allocate([(part.source.shape, part.source) for part in parts])
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._fill_all(copies, parts)
        return copies

    def _fill_all(self, copies: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """``fill`` of the outer contexts, then of this one, each for its own parameters."""
        changed: set[int] = set()
        if self._outer is not None:
            changed = {i for i, part in enumerate(parts) if self._outer.covers(part.parameter)}
            self._outer._fill_all([copies[i] for i in changed], [parts[i] for i in changed])
        own = [i for i, part in enumerate(parts) if id(part.parameter) in self._names]
        if own:
            given = [replace(parts[i], source=copies[i]) if i in changed else parts[i] for i in own]
            self.fill([copies[i] for i in own], given)

    def covers(self, parameter: object) -> bool:
        """Whether this context or an outer one changes it."""
        own = id(parameter) in self._names
        return own or (self._outer is not None and self._outer.covers(parameter))

    def _name(self, key: int) -> str:
        return self._names[key] if key in self._names or not self._outer else self._outer._name(key)

    def _count(self, found: Iterable[int]) -> None:
        found = list(found)
        self.used += sum(key in self._names for key in found)
        if self._outer is not None:
            self._outer._count(found)

    def _find(self, arguments: Iterable[object]) -> dict[int, Tensor]:
        """The parameters among arguments and in lists among them, by id."""
        found = {}
        for argument in arguments:
            if isinstance(argument, Tensor):
                if self.covers(argument):
                    found[id(argument)] = argument
            elif isinstance(argument, (list, tuple)):
                found |= self._find(argument)
        return found

    def _looked_up(self, ids: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> bool:
        """Whether only the table is a parameter and fewer rows are read than it has."""
        max_norm = rest[1] if len(rest) > 1 else kwargs.get("max_norm")
        known = self.covers(weight) and not self.covers(ids) and self.divisible(weight)
        return known and max_norm is None and ids.numel() < weight.shape[0]

    def _embedding(self, ids: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """Changes only the rows that are looked up (padding_idx and the like act on gradients)."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        table, width = untouched(weight), weight.shape[1]
        numbers = unique.tolist()
        if numbers and not 0 <= numbers[0] <= numbers[-1] < table.shape[0]:
            return F.embedding(ids, table)  # which refuses them in its own words
        rows = self.copies([Part(weight, table[n], n * width) for n in numbers])
        return F.embedding(inverse, torch.stack(rows) if rows else table[:0])

    def _row(self, stacked: Tensor, index: int) -> Tensor:
        """One slice of a stacked parameter (an expert), in a tensor of its own."""
        source = untouched(stacked)[index]
        start = (index % stacked.shape[0]) * source.numel()
        return self.copies([Part(stacked, source, start)])[0].clone()


def _refuse_gradients(result: object, name: str) -> None:
    """Let a backward pass end with an error where an operation read a changed copy of ``name``.

    What autograd has kept of that copy is written anew by the next operation, past the count of
    versions that would tell. A forward whose gradients nobody asks for goes on.
    """

    def refuse(gradients: object) -> None:
        raise RuntimeError(
            f"'{name}': expected no gradient through an operation that reads a changed copy of it, "
            "which is gone by now, got a backward pass; compute under torch.no_grad(), or enter "
            "zk.perturbed or zk.quantized with in_place=True and go back within its block"
        )

    for tensor in _tensors(result):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(refuse)


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _replace(tree: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return copies.get(id(tree), tree)
    if isinstance(tree, (list, tuple)):
        items = [_replace(item, copies) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _replace(item, copies) for key, item in tree.items()}
    return tree
