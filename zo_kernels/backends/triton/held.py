"""Held weights on a GPU: what the host does.

Each tile's region has the bytes that it needs: counted in a pass of its own the first time, and
from then on foreseen from the last pass over the same tensors with the same size of perturbation.
A tensor of which a tile needs more after all, or which would take no less than a copy, is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zo_kernels.backends.triton import launch, swap
from zo_kernels.backends.triton.combine import combine_
from zo_kernels.backends.triton.regions import RECORD, WHOLE_TILE
from zo_kernels.backends.triton.tiles import LANES, STEPS
from zo_kernels.backends.triton.updates import by_dtype

_ALIGNMENT = 16  # bytes; of regions
# A decoder takes records one after the other: with more than this share a copy is faster.
_MOST_RECORDS = 1 / 8
# Table of a list -> sizes of perturbation, and capacities and totals for the next pass.
_foreseen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class _Call:
    """What all launches of a pass have in common; lists by place in the list of tensors."""

    tensors: Sequence[Tensor]
    seed: int
    direction: int
    streams: Sequence[int]
    offsets: Sequence[int]
    distribution: str

    def table(self, members: Sequence[int]) -> tuple[Tensor, int]:
        """The table of some tensors, and the number of tiles."""
        tensors = [self.tensors[i] for i in members]
        streams = [self.streams[i] for i in members]
        offsets = [self.offsets[i] for i in members]
        rows = range(len(members))
        return launch.device_table(tensors, tensors, streams, offsets, rows, tensors[0].device)

    def combine_(
        self, members: Sequence[int], copies: Sequence[Tensor], scales: Sequence[float], **options
    ) -> None:
        """Make tensors round(src_scale * copy + scale * z)."""
        combine_(
            [self.tensors[i] for i in members],
            copies,
            [[scales[i]] for i in members],
            seed=self.seed,
            directions=[self.direction],
            streams=[self.streams[i] for i in members],
            offsets=[self.offsets[i] for i in members],
            distribution=self.distribution,
            **{"src_scale": 1.0, "stochastic": False, "changes": None, **options},
        )


@dataclass(frozen=True)
class _Regions:
    """What gives some tensors of one dtype back.

    Attributes:
        members: their places in the list; none is empty.
        data: int8, the regions of all tiles.
        places: (2, tiles) int64, where in data a tile's region begins, and its bytes.
        state: (3, tiles) int32, see swap_kernel.
    """

    members: list[int]
    data: Tensor
    places: Tensor
    state: Tensor

    def only(self, call: _Call, members: Sequence[int]) -> tuple[_Regions, Tensor]:
        """The regions of some members, in the same data, and a mask of their tiles."""
        table, tiles = call.table(self.members)
        chosen = torch.tensor([i in members for i in self.members], device=table.device)
        mask = chosen[launch.columns_of_tiles(table, tiles)]
        kept = [i for i in self.members if i in members]
        return _Regions(kept, self.data, self.places[:, mask], self.state[:, mask]), mask

    def compact(self) -> _Regions:
        """With data that holds nothing else."""
        begin, size = self.places
        moved = size.cumsum(0) - size
        data = self.data.new_empty(int(size.sum()))
        runs = (begin - moved).unique_consecutive(return_counts=True)
        tile = 0
        for ahead, count in zip(*(part.tolist() for part in runs), strict=True):
            first, last = int(moved[tile]), int(moved[tile + count - 1] + size[tile + count - 1])
            data[first:last] = self.data[first + ahead : last + ahead]
            tile += count
        return replace(self, data=data, places=torch.stack([moved, size]))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.data.nbytes + self.places.nbytes + self.state.nbytes


@dataclass
class Store:
    """What gives the held weights of a list back: regions, one for each dtype, and copies."""

    regions: list[_Regions] = field(default_factory=list)
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
    call = _Call(tensors, seed, direction, streams, offsets, distribution)
    options = {"src_scale": src_scale, "stochastic": stochastic}
    if store is None:
        full = [i for i, tensor in enumerate(tensors) if tensor.numel()]
        groups = by_dtype([tensors[i] for i in full]).values()
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
            _launch(call, members, held_scales, scales, old=old, changes=part, **options)
            if part is not None:
                changes[members] = part
        return None
    kept = Store(copies=dict(copies))
    for members, old in olds:
        _hold(call, members, held_scales, scales, old, kept)
    return kept


def _hold(
    call: _Call,
    members: list[int],
    held_scales: Sequence[float] | None,
    scales: Sequence[float],
    old: _Regions | None,
    kept: Store,
) -> None:
    """Perturb tensors of one dtype, and add what gives them back to ``kept``."""
    table, tiles = call.table(members)
    sizes = [abs(scales[i]) for i in members], call.distribution
    before, capacities, totals = _foreseen.get(table, (None, None, None))
    if before != sizes:
        counts = table.new_empty(3, tiles, dtype=torch.int32)
        _launch(call, members, held_scales, scales, old=old, counts=counts)
        capacities = _capacities(counts, exact=True)
        totals = _totals(table, tiles, capacities, counts)
        _foreseen[table] = sizes, _capacities(counts, exact=False), totals
    if crowded := _crowded(call, members, totals):
        if old is not None:
            part, _ = old.only(call, crowded)
            _launch(call, crowded, held_scales, None, old=part)
        _copy(call, crowded, scales, kept)
        rest = [i for i in members if i not in crowded]
        if rest:
            old = None if old is None else old.only(call, rest)[0]
            _hold(call, rest, held_scales, scales, old, kept)
        return
    begin = capacities.cumsum(0) - capacities
    size = sum(total for total, _ in totals)
    new = _Regions(
        members,
        torch.empty(size, dtype=torch.int8, device=table.device),
        torch.stack([begin, capacities]),
        table.new_empty(3, tiles, dtype=torch.int32),
    )
    stopped = torch.empty_like(new.state)
    _launch(call, members, held_scales, scales, old=old, new=new, stopped=stopped)
    capacities = _capacities(new.state, exact=False)
    short = (new.state[swap.AT] != WHOLE_TILE).long()
    totals = _totals(table, tiles, capacities, new.state, short)
    _foreseen[table] = sizes, capacities, [row[:2] for row in totals]
    short = [i for i, row in zip(members, totals, strict=True) if row[2]]
    if short:
        # What was not done is w, or had from the old regions; what was done, from the new ones.
        if old is not None:
            part, mask = old.only(call, short)
            _launch(call, short, held_scales, None, old=part, begin=stopped[:, mask])
        part, _ = new.only(call, short)
        _launch(call, short, scales, None, old=part)
        _copy(call, short, scales, kept)
        new = new.only(call, [i for i in members if i not in short])[0].compact()
    if new.members:
        kept.regions.append(new)


def _copy(call: _Call, members: list[int], scales: Sequence[float], kept: Store) -> None:
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


def _crowded(call: _Call, members: Sequence[int], totals: Sequence[Sequence[int]]) -> list[int]:
    """The tensors that are better copied."""
    return [
        i
        for i, (size, records) in zip(members, totals, strict=True)
        if size >= call.tensors[i].nbytes or records > _MOST_RECORDS * call.tensors[i].numel()
    ]


def _launch(
    call: _Call,
    members: Sequence[int],
    held_scales: Sequence[float] | None,
    scales: Sequence[float] | None,
    *,
    old: _Regions | None = None,
    begin: Tensor | None = None,
    new: _Regions | None = None,
    stopped: Tensor | None = None,
    counts: Tensor | None = None,
    src_scale: float = 1.0,
    stochastic: bool = False,
    changes: Tensor | None = None,
) -> None:
    """Launch swap_kernel over tensors of one dtype.

    Args:
        old, begin: regions that give w, and the state to begin with (None: the beginning).
        new, stopped: regions to fill, and where the states of old are left.
        counts: filled with the states that new regions would have; nothing else is written then.
        changes: (members, 3), to which the changes are added.
    """
    table, tiles = call.table(members)
    device = table.device
    rows = [
        [0.0 if values is None else values[i] for values in (held_scales, scales)] for i in members
    ]
    state = table.new_zeros(3, tiles, dtype=torch.int32)
    # Stands in for the regions that this pass does not have.
    none = _Regions([], state.new_empty(1, dtype=torch.int8), table, state)
    source, target = old or none, new or none
    partials = launch.partial_sums(tiles, changes is not None, device)
    with launch.on(device):
        swap.swap_kernel[(tiles,)](
            table,
            launch.in_one_copy([torch.tensor(rows, dtype=torch.float32)], device)[0],
            source.data,
            source.places,
            state if begin is None else begin.contiguous(),
            source.state,
            target.data,
            target.places,
            target.state if counts is None else counts,
            state if stopped is None else stopped,
            partials,
            table.shape[1],
            launch.signed(call.direction),
            launch.signed(call.seed & 0xFFFFFFFF),
            launch.signed(call.seed >> 32),
            float(src_scale),
            **_constants(
                call.tensors[members[0]].dtype,
                rademacher=call.distribution == "rademacher",
                stochastic=stochastic,
                scale_src=src_scale != 1.0,
                decode=old is not None,
                perturb=scales is not None,
                encode=new is not None or counts is not None,
                count=counts is not None,
                changes=changes is not None,
            ),
            **launch.options(device),
        )
    if changes is not None:
        launch.sum_changes(partials, table, changes)


def _constants(dtype: torch.dtype, **options: bool) -> dict[str, object]:
    """The ``tl.constexpr`` arguments of swap_kernel; an option not named is off."""
    names = ["rademacher", "stochastic", "scale_src", "decode", "perturb", "encode", "count"]
    flags = {name.upper(): options.get(name, False) for name in [*names, "changes"]}
    flags["STOCHASTIC"] &= dtype != torch.float32
    return {
        "DTYPE": launch.TRITON_DTYPES[dtype],
        "ITEMSIZE": dtype.itemsize,
        **flags,
        "LANES": LANES,
        "STEPS": STEPS,
    }
