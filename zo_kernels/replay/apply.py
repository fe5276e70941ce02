"""Replay in memory: the updates of a log, many in one pass over the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.checks import check_tensor
from zo_kernels.noise import canonical_name
from zo_kernels.replay.fingerprint import fingerprint
from zo_kernels.replay.header import Header, Parameter
from zo_kernels.replay.log import Log
from zo_kernels.replay.updates import logged_updates

#: Updates in one pass over the weights; any number gives the same bits.
CHUNK = 64


@dataclass(slots=True)
class ReplayState:
    """What a run keeps beside the weights.

    Attributes:
        steps: number of steps done.
        copies: by canonical name, in "master" arithmetic the float32 copies of all logged
            parameters, in "master8" their int8 residuals (of shape (0,) for float32 parameters);
            empty in "stochastic".
    """

    steps: int = 0
    copies: dict[str, Tensor] = field(default_factory=dict)


class Replica:
    """Tensors of one group on their way through its updates, in the arithmetic of a run.

    Args:
        header: of the log.
        tensors: contiguous, in the dtypes of the log; or pieces of such tensors.
        parameters: one per tensor.
        offsets: index of each tensor's first element in its parameter (default 0).
        copies: as in ``ReplayState``, one per tensor; made from the tensors without.
        backend: as for ``ops.advance_``.
    """

    def __init__(
        self,
        header: Header,
        tensors: Sequence[Tensor],
        parameters: Sequence[Parameter],
        *,
        offsets: Sequence[int] | None = None,
        copies: Sequence[Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        self.tensors = list(tensors)
        self._arithmetic = header.arithmetic
        self.copies = [] if copies is None else list(copies)
        if copies is None and self._arithmetic != "stochastic":
            self.copies = [self._copy(tensor) for tensor in self.tensors]
        self._options = {
            "seed": header.seed,
            "streams": [parameter.stream for parameter in parameters],
            "offsets": offsets,
            "distribution": header.distribution,
            "backend": backend,
        }

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._arithmetic == "master":
            return tensor.to(torch.float32, copy=True)
        shape = (0,) if tensor.dtype == torch.float32 else tensor.shape
        return torch.zeros(shape, dtype=torch.int8, device=tensor.device)

    def advance_(self, updates: Sequence[ops.Update]) -> None:
        """Apply updates; after that, ``settle_`` makes the tensors current."""
        if self._arithmetic == "stochastic":
            ops.advance_(self.tensors, updates, rounding="stochastic", **self._options)
        elif self._arithmetic == "master":
            ops.advance_(self.copies, updates, **self._options)
        else:
            ops.advance_(self.tensors, updates, residuals=self.copies, **self._options)

    def settle_(self) -> None:
        """Round float32 copies into the tensors."""
        if self._arithmetic == "master":
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                tensor.copy_(copy)


def logged_tensors(tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """The tensors of a log's parameters, by canonical name and in its order; others are left out.

    Raises:
        TypeError, ValueError: one is missing, or its shape or dtype is not the log's; names it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        canonical = canonical_name(name)
        if canonical in found:
            raise ValueError(f"'{name}': expected a name of its own, got '{canonical}' twice")
        found[canonical] = tensor
    chosen: dict[str, Tensor] = {}
    for parameter in header.parameters():
        name = canonical_name(parameter.name)
        if name not in found:
            raise ValueError(f"'{name}': expected this parameter of the log, got a model without")
        tensor = found[name].detach()
        check_tensor(f"'{name}'", tensor)
        if tuple(tensor.shape) != parameter.shape:
            raise ValueError(
                f"'{name}': expected shape {parameter.shape} as in the log, got "
                f"{tuple(tensor.shape)}"
            )
        if tensor.dtype != parameter.torch_dtype:
            raise ValueError(
                f"'{name}': expected {parameter.torch_dtype} as in the log, got {tensor.dtype}"
            )
        chosen[name] = tensor
    return chosen


def check_base(tensors: Mapping[str, Tensor], header: Header) -> None:
    """Refuse tensors that are not those before the first step, if the log knows them.

    Raises:
        TypeError, ValueError: as ``logged_tensors``; or the weights differ.
    """
    expect_base(header, fingerprint(logged_tensors(tensors, header).items()))


def expect_base(header: Header, found: str, where: str = "base") -> None:
    """ValueError unless the fingerprint is that of the log's base, or the log has none."""
    if header.base is not None and found != header.base:
        raise ValueError(
            f"{where}: expected the weights that the log began with, of fingerprint "
            f"{header.base}, got {found}: it is the log of another model"
        )


@torch.no_grad()
def replay_(
    tensors: Mapping[str, Tensor],
    log: Log,
    *,
    start: int = 0,
    stop: int | None = None,
    state: ReplayState | None = None,
    chunk: int = CHUNK,
    backend: str | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> ReplayState:
    """Apply steps [start, stop) of a log to tensors in place, with the bits of the run.

    The weights before the first step are the caller's word; see ``check_base``. Interrupted, the
    tensors are part way: begin again with the base.

    Args:
        tensors: by name, as ``dict(model.named_parameters())``; others than the log's are left
            alone. They hold the weights after ``start`` steps.
        log: from ``read_log``.
        start, stop: steps; to the end of the log without ``stop``.
        state: what an earlier call returned that ended at ``start``; needed then in "master" and
            "master8" arithmetic. Its copies are changed in place.
        chunk: updates in one pass; any number gives the same bits.
        backend: as for ``ops.advance_``.
        progress: called as progress(text, steps done, steps in all).

    Returns:
        The state after ``stop`` steps, for a run that goes on.

    Raises:
        TypeError, ValueError, RuntimeError: naming the parameter or option, what was expected and
            what came; nothing has been written then.
    """
    header = log.header
    stop = log.stop(stop)
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= stop:
        raise ValueError(f"start: expected an int from 0 to {stop}, got {start!r}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    chosen = logged_tensors(tensors, header)
    copies = _copies_of(header, chosen, start, state)
    replicas = []
    for group in header.groups:
        members = [canonical_name(parameter.name) for parameter in group]
        own = None if copies is None else [copies[name] for name in members]
        replica = Replica(
            header, [chosen[name] for name in members], group, copies=own, backend=backend
        )
        replica.advance_([])  # an unknown backend is refused before anything is written
        replicas.append(replica)
    total = max(1, (stop - start) * len(replicas))
    for number, replica in enumerate(replicas):
        for part in chunks(logged_updates(log, number, start, stop), chunk):
            replica.advance_([update for _, update in part])
            if progress is not None:
                step = part[-1][0] + 1
                progress(f"step {step}", number * (stop - start) + step - start, total)
        replica.settle_()
    if progress is not None:
        progress(f"step {stop}", total, total)
    kept = [copy for replica in replicas for copy in replica.copies]
    return ReplayState(stop, dict(zip(chosen, kept, strict=True)) if kept else {})


def chunks(
    updates: Iterable[tuple[int, ops.Update]], size: int
) -> Iterable[list[tuple[int, ops.Update]]]:
    """Lists of at most so many."""
    iterator = iter(updates)
    while part := list(islice(iterator, size)):
        yield part


def _copies_of(
    header: Header, tensors: Mapping[str, Tensor], start: int, state: ReplayState | None
) -> Mapping[str, Tensor] | None:
    """The state's copies, checked; None where they begin anew."""
    if state is None:
        if start and header.arithmetic != "stochastic":
            raise ValueError(
                f"state: expected the state after {start} steps, which '{header.mode}' needs "
                "beside the weights, got None"
            )
        return None
    if state.steps != start:
        raise ValueError(f"state: expected one after {start} steps, got one after {state.steps}")
    if header.arithmetic == "stochastic":
        return None
    for name, tensor in tensors.items():
        copy = state.copies.get(name)
        dtype, shape = torch.float32, tuple(tensor.shape)
        if header.arithmetic == "master8":
            dtype, shape = torch.int8, (0,) if tensor.dtype == torch.float32 else shape
        if copy is None or copy.dtype != dtype or tuple(copy.shape) != shape:
            got = "none" if copy is None else f"{copy.dtype} of shape {tuple(copy.shape)}"
            raise ValueError(
                f"state.copies['{name}']: expected {dtype} of shape {shape}, got {got}"
            )
    return state.copies
