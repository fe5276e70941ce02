"""Held weights on a GPU: what the host does.

Each tile's region has the bytes that it needs: counted in a pass of its own the first time, and
from then on foreseen from the last pass over the same tensors with the same size of perturbation.
A tensor of which a tile needs more after all, or which would take no less than a copy, is copied.

Memory may run out in between. So whatever writes weights is made ready before the first of it is
launched, and so is the way back for what can fail later.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zo_kernels.backends.triton import launch, swap
from zo_kernels.backends.triton.holding import Call, Regions, ready_swap
from zo_kernels.backends.triton.regions import RECORD, WHOLE_TILE

_ALIGNMENT = 16  # bytes; of regions
# A decoder takes records one after the other: with more than this share a copy is faster.
_MOST_RECORDS = 1 / 8
# Table of a list -> sizes of perturbation, and capacities and totals for the next pass.
_foreseen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass
class Store:
    """What gives the held weights of a list back: regions, and copies by place in the list."""

    regions: Regions | None = None
    copies: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        regions = 0 if self.regions is None else self.regions.nbytes
        return regions + sum(copy.nbytes for copy in self.copies.values())


def swap_(
    tensors: Sequence[Tensor],
    store: Store | None,
    held_scales: Sequence[float] | None,
    scales: Sequence[float] | None,
    *,
    keep: bool,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> Store | None:
    """tensors = round(src_scale * w + scales[.] z), or w if scales is None; see ops/swap.py.

    Args:
        tensors: of one dtype, on one device.
        store, held_scales: what an earlier call returned and the scales that it was given, if the
            tensors hold w perturbed; None if they hold w.
        keep: whether to return what gives w back; src_scale is 1 then, rounding to nearest.

    After an exception the tensors hold w if there was no store; otherwise it still gives w back.
    """
    call = Call(tensors, seed, direction, streams, offsets, distribution)
    if not keep:
        options = {"src_scale": src_scale, "stochastic": stochastic}
        _release(call, store, held_scales, scales, changes, options)
        return None
    kept = Store()
    with ExitStack() as undo:
        if store is None:
            members, old = [i for i, tensor in enumerate(tensors) if tensor.numel()], None
        else:
            members, old = [] if store.regions is None else store.regions.members, store.regions
            if store.copies:
                copied, copies = list(store.copies), list(store.copies.values())
                perturb = call.ready_combine(copied, copies, scales)
                undo.callback(call.ready_combine(copied, copies, held_scales))
                perturb()
                kept.copies |= store.copies
        if members:
            _Hold(call, held_scales, scales, kept, undo).by_regions(members, old)
        undo.pop_all()
    return kept


def _release(
    call: Call,
    store: Store,
    held_scales: Sequence[float],
    scales: Sequence[float] | None,
    changes: Tensor | None,
    options: dict,
) -> None:
    """Give w back, or round(src_scale * w + scale * z) with what has changed."""
    if changes is not None:
        changes.zero_()
    members, copies = list(store.copies), list(store.copies.values())
    if scales is None:
        for i, copy in store.copies.items():
            call.tensors[i].copy_(copy)
    elif copies:
        part = None if changes is None else changes.new_zeros(len(members), 3)
        call.ready_combine(members, copies, scales, changes=part, **options)()
        if part is not None:
            changes[members] = part
    if store.regions is None:
        return
    old, members = store.regions, store.regions.members
    table, tiles = call.table(members)
    partials = None if changes is None else launch.partial_sums(tiles, True, table.device)
    give_back = ready_swap(
        call, members, held_scales, scales, old=old, partials=partials, **options
    )
    give_back()
    store.regions = None  # they are of no use any more, even if what follows fails
    if partials is not None:
        part = changes.new_zeros(len(members), 3)
        launch.sum_changes(partials, table, part)
        changes[members] = part


@dataclass(frozen=True)
class _Hold:
    """A pass that perturbs tensors.

    Attributes:
        call: what its launches have in common.
        held_scales: by which the tensors are perturbed already; None if they hold w.
        scales: by which they will be.
        kept: gets what gives w back.
        undo: gets what makes the tensors hold what they held.
    """

    call: Call
    held_scales: Sequence[float] | None
    scales: Sequence[float]
    kept: Store
    undo: ExitStack

    def by_regions(self, members: list[int], old: Regions | None) -> None:
        """Perturb tensors; those that need too much are copied."""
        call, held_scales, scales = self.call, self.held_scales, self.scales
        table, tiles = call.table(members)
        sizes = [abs(scales[i]) for i in members], call.distribution
        before, capacities, totals = _foreseen.get(table, (None, None, None))
        if before != sizes:
            counts = table.new_empty(3, tiles, dtype=torch.int32)
            ready_swap(call, members, held_scales, scales, old=old, counts=counts)()
            capacities = _capacities(counts, exact=True)
            totals = _totals(table, tiles, capacities, counts)
            later = _capacities(counts, exact=False)
            _foreseen[table] = sizes, later, _totals(table, tiles, later, counts)
        if crowded := _crowded(call, members, totals):
            self.by_copies(crowded, old)
            rest = [i for i in members if i not in crowded]
            if rest:
                _foresee_rest(call, members, rest, scales, capacities, totals)
                old = None if old is None else old.only(call, rest)[0]
                self.by_regions(rest, old)
            return
        begin = capacities.cumsum(0) - capacities
        size = sum(total for total, _ in totals)
        # States of no step done: until a launch has left its own, the way back is the old ones'.
        new = Regions(
            members,
            torch.empty(size, dtype=torch.int8, device=table.device),
            torch.stack([begin, capacities]),
            table.new_zeros(3, tiles, dtype=torch.int32),
        )
        stopped = torch.zeros_like(new.state)
        perturb = ready_swap(call, members, held_scales, scales, old=old, new=new, stopped=stopped)
        # What was not done is w, or had from the old regions; what was done, from the new ones.
        back = [ready_swap(call, members, scales, None, old=new)]
        if old is not None:
            tensors = [call.tensors[i] for i in members]
            back.append(ready_swap(call, members, held_scales, None, old=old, begin=stopped))
            back.append(call.ready_combine(members, tensors, held_scales))
        for step in reversed(back):
            self.undo.callback(step)
        perturb()
        capacities = _capacities(new.state, exact=False)
        short = (new.state[swap.AT] != WHOLE_TILE).long()
        totals = _totals(table, tiles, capacities, new.state, short)
        _foreseen[table] = sizes, capacities, [row[:2] for row in totals]
        short = [i for i, row in zip(members, totals, strict=True) if row[2]]
        if not short:
            self.kept.regions = new
            return
        part, _ = new.only(call, short)
        steps = [ready_swap(call, short, scales, None, old=part)]
        if old is not None:
            part, mask = old.only(call, short)
            begin = stopped[:, mask]
            steps.append(ready_swap(call, short, held_scales, None, old=part, begin=begin))
        copies = [torch.empty_like(call.tensors[i]) for i in short]
        perturb = call.ready_combine(short, copies, scales)
        rest = [i for i in members if i not in short]
        if rest:
            _foresee_rest(call, members, rest, scales, capacities, [row[:2] for row in totals])
            self.kept.regions = new.only(call, rest)[0].compact()
        self.kept.copies |= dict(zip(short, copies, strict=True))
        # Nothing allocates from here on, and undo is of no use any more.
        for step in steps:
            step()
        _copy(call, short, copies)
        perturb()

    def by_copies(self, members: list[int], old: Regions | None) -> None:
        """Perturb tensors, of which copies are kept."""
        call, scales = self.call, self.scales
        copies = [torch.empty_like(call.tensors[i]) for i in members]
        perturb = call.ready_combine(members, copies, scales)
        if old is None:
            _copy(call, members, copies)
            self.undo.callback(_put_back, call, members, copies)
        else:
            part, _ = old.only(call, members)
            give_back = ready_swap(call, members, self.held_scales, None, old=part)
            again = call.ready_combine(members, copies, self.held_scales)
            give_back()
            _copy(call, members, copies)
            self.undo.callback(again)
        perturb()
        self.kept.copies |= dict(zip(members, copies, strict=True))


def _copy(call: Call, members: Sequence[int], copies: Sequence[Tensor]) -> None:
    """Fill the copies of tensors."""
    for i, copy in zip(members, copies, strict=True):
        copy.copy_(call.tensors[i])


def _put_back(call: Call, members: Sequence[int], copies: Sequence[Tensor]) -> None:
    """Make tensors what their copies are."""
    for i, copy in zip(members, copies, strict=True):
        call.tensors[i].copy_(copy)


def _foresee_rest(
    call: Call,
    members: list[int],
    rest: list[int],
    scales: Sequence[float],
    capacities: Tensor,
    totals: Sequence[Sequence[int]],
) -> None:
    """What is known of some tensors' regions, for a list of their own."""
    table, _ = call.table(rest)
    sizes = [abs(scales[i]) for i in rest], call.distribution
    found = [row for i, row in zip(members, totals, strict=True) if i in rest]
    _foreseen[table] = sizes, capacities[call.tiles_of(members, rest)], found


def _capacities(state: Tensor, exact: bool) -> Tensor:
    """Bytes for each tile's region: what it took, and six standard deviations of the next's."""
    codes, records = state[swap.BYTES].long(), state[swap.RECORDS].long()
    needed = codes + RECORD * records
    if not exact:
        variance = 2 * (codes + RECORD**2 * records)
        needed += (6 * variance.double().sqrt()).long() + 64
    return (needed + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _totals(table: Tensor, tiles: int, capacities: Tensor, state: Tensor, *more) -> list[list[int]]:
    """Per tensor: bytes of its regions, records, and sums of more; waits for the device."""
    values = torch.stack([capacities, state[swap.RECORDS].long(), *more], dim=1)
    sums = values.new_zeros(table.shape[1], values.shape[1])
    return sums.index_add_(0, launch.columns_of_tiles(table, tiles), values).tolist()


def _crowded(call: Call, members: Sequence[int], totals: Sequence[Sequence[int]]) -> list[int]:
    """The tensors that are better copied."""
    return [
        i
        for i, (size, records) in zip(members, totals, strict=True)
        if size >= call.tensors[i].nbytes or records > _MOST_RECORDS * call.tensors[i].numel()
    ]
