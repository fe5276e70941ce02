"""Held weights on a GPU: what the host does.

Each tile's region has the bytes that it needs: counted in a pass of its own the first time, and
from then on foreseen from the last pass over the same tensors with the same size of perturbation.
A tensor of which a tile needs more after all, or which would take no less than a copy, is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zo_kernels.backends.triton import launch, swap
from zo_kernels.backends.triton.holding import Call, Regions, launch_swap
from zo_kernels.backends.triton.regions import RECORD, WHOLE_TILE
from zo_kernels.places import places

_ALIGNMENT = 16  # bytes; of regions
# A decoder takes records one after the other: with more than this share a copy is faster.
_MOST_RECORDS = 1 / 8
# Table of a list -> sizes of perturbation, and capacities and totals for the next pass.
_foreseen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass
class Store:
    """What gives the held weights of a list back: regions, one for each dtype, and copies."""

    regions: list[Regions] = field(default_factory=list)
    copies: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = [*self.regions, *self.copies.values()]
        return sum(part.nbytes for part in parts)


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
        store, held_scales: what an earlier call returned and the scales that it was given, if the
            tensors hold w perturbed; None if they hold w.
        keep: whether to return what gives w back; src_scale is 1 then, rounding to nearest.
    """
    call = Call(tensors, seed, direction, streams, offsets, distribution)
    options = {"src_scale": src_scale, "stochastic": stochastic}
    if store is None:
        full = [i for i, tensor in enumerate(tensors) if tensor.numel()]
        groups = places(tensors[i].dtype for i in full).values()
        olds = [([full[i] for i in group], None) for group in groups]
        copies = {}
    else:
        olds = [(regions.members, regions) for regions in store.regions]
        copies = store.copies
    if changes is not None:
        changes.zero_()
    if copies:
        members = list(copies)
        if scales is None:
            for i, copy in copies.items():
                tensors[i].copy_(copy)
        else:
            part = None if changes is None else changes.new_zeros(len(members), 3)
            call.combine_(members, list(copies.values()), scales, changes=part, **options)
            if part is not None:
                changes[members] = part
    if not keep:
        for members, old in olds:
            part = None if changes is None else changes.new_zeros(len(members), 3)
            launch_swap(call, members, held_scales, scales, old=old, changes=part, **options)
            if part is not None:
                changes[members] = part
        return None
    kept = Store(copies=dict(copies))
    for members, old in olds:
        _hold(call, members, held_scales, scales, old, kept)
    return kept


def _hold(
    call: Call,
    members: list[int],
    held_scales: Sequence[float] | None,
    scales: Sequence[float],
    old: Regions | None,
    kept: Store,
) -> None:
    """Perturb tensors of one dtype, and add what gives them back to ``kept``."""
    table, tiles = call.table(members)
    sizes = [abs(scales[i]) for i in members], call.distribution
    before, capacities, totals = _foreseen.get(table, (None, None, None))
    if before != sizes:
        counts = table.new_empty(3, tiles, dtype=torch.int32)
        launch_swap(call, members, held_scales, scales, old=old, counts=counts)
        capacities = _capacities(counts, exact=True)
        totals = _totals(table, tiles, capacities, counts)
        later = _capacities(counts, exact=False)
        _foreseen[table] = sizes, later, _totals(table, tiles, later, counts)
    if crowded := _crowded(call, members, totals):
        if old is not None:
            part, _ = old.only(call, crowded)
            launch_swap(call, crowded, held_scales, None, old=part)
        _copy(call, crowded, scales, kept)
        rest = [i for i in members if i not in crowded]
        if rest:
            _foresee_rest(call, members, rest, scales, capacities, totals)
            old = None if old is None else old.only(call, rest)[0]
            _hold(call, rest, held_scales, scales, old, kept)
        return
    begin = capacities.cumsum(0) - capacities
    size = sum(total for total, _ in totals)
    new = Regions(
        members,
        torch.empty(size, dtype=torch.int8, device=table.device),
        torch.stack([begin, capacities]),
        table.new_empty(3, tiles, dtype=torch.int32),
    )
    stopped = torch.empty_like(new.state)
    launch_swap(call, members, held_scales, scales, old=old, new=new, stopped=stopped)
    capacities = _capacities(new.state, exact=False)
    short = (new.state[swap.AT] != WHOLE_TILE).long()
    totals = _totals(table, tiles, capacities, new.state, short)
    _foreseen[table] = sizes, capacities, [row[:2] for row in totals]
    short = [i for i, row in zip(members, totals, strict=True) if row[2]]
    if short:
        # What was not done is w, or had from the old regions; what was done, from the new ones.
        if old is not None:
            part, mask = old.only(call, short)
            launch_swap(call, short, held_scales, None, old=part, begin=stopped[:, mask])
        part, _ = new.only(call, short)
        launch_swap(call, short, scales, None, old=part)
        _copy(call, short, scales, kept)
        rest = [i for i in members if i not in short]
        if not rest:
            return
        new = new.only(call, rest)[0].compact()
        _foresee_rest(call, members, rest, scales, capacities, [row[:2] for row in totals])
    kept.regions.append(new)


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


def _copy(call: Call, members: list[int], scales: Sequence[float], kept: Store) -> None:
    """Hold tensors that are w by copies, and perturb them."""
    copies = [call.tensors[i].clone() for i in members]
    call.combine_(members, copies, scales)
    kept.copies |= dict(zip(members, copies, strict=True))


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
