"""One pass over held weights on a GPU: what is launched, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from zo_kernels.backends.triton import launch, swap
from zo_kernels.backends.triton.combine import ready
from zo_kernels.backends.triton.compile import Variant
from zo_kernels.backends.triton.tiles import LANES, STEPS


@dataclass(frozen=True)
class Call:
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

    def tiles_of(self, members: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """A mask of the tiles that some of these tensors have in the table of all of them."""
        table, tiles = self.table(members)
        wanted = torch.tensor([i in chosen for i in members], device=table.device)
        return wanted[launch.columns_of_tiles(table, tiles)]

    def ready_combine(
        self, members: Sequence[int], copies: Sequence[Tensor], scales: Sequence[float], **options
    ) -> Callable[[], None]:
        """A call that makes tensors round(src_scale * copy + scale * z); see ``ready``."""
        return ready(
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
class Regions:
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

    def only(self, call: Call, members: Sequence[int]) -> tuple[Regions, Tensor]:
        """The regions of some members, in the same data, and a mask of their tiles."""
        mask = call.tiles_of(self.members, members)
        kept = [i for i in self.members if i in members]
        return Regions(kept, self.data, self.places[:, mask], self.state[:, mask]), mask

    def compact(self) -> Regions:
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


def ready_swap(
    call: Call,
    members: Sequence[int],
    held_scales: Sequence[float] | None,
    scales: Sequence[float] | None,
    *,
    old: Regions | None = None,
    begin: Tensor | None = None,
    new: Regions | None = None,
    stopped: Tensor | None = None,
    counts: Tensor | None = None,
    src_scale: float = 1.0,
    stochastic: bool = False,
    partials: Tensor | None = None,
) -> Callable[[], None]:
    """A launch of swap_kernel over tensors of one dtype, as a call that allocates nothing.

    Args:
        old, begin: regions that give w, and the state to begin with when it is launched (None: the
            beginning).
        new, stopped: regions to fill, and where the states of old are left.
        counts: filled with the states that new regions would have; nothing else is written then.
        partials: None, or filled with sums of the changes, see ``launch.sum_changes``.
    """
    table, tiles = call.table(members)
    device = table.device
    rows = [
        [0.0 if values is None else values[i] for values in (held_scales, scales)] for i in members
    ]
    state = table.new_zeros(3, tiles, dtype=torch.int32)
    # Stands in for the regions that this pass does not have.
    none = Regions([], state.new_empty(1, dtype=torch.int8), table, state)
    source, target = old or none, new or none
    arguments = (
        table,
        launch.in_one_copy([torch.tensor(rows, dtype=torch.float32)], device)[0],
        source.data,
        source.places,
        state if begin is None else begin,
        source.state,
        target.data,
        target.places,
        target.state if counts is None else counts,
        state if stopped is None else stopped,
        launch.partial_sums(tiles, False, device) if partials is None else partials,
        table.shape[1],
        launch.signed(call.direction),
        launch.signed(call.seed & 0xFFFFFFFF),
        launch.signed(call.seed >> 32),
        float(src_scale),
    )
    constants = _constants(
        call.tensors[members[0]].dtype,
        rademacher=call.distribution == "rademacher",
        stochastic=stochastic,
        scale_src=src_scale != 1.0,
        decode=old is not None,
        perturb=scales is not None,
        encode=new is not None or counts is not None,
        count=counts is not None,
        changes=partials is not None,
    )

    def run() -> None:
        with launch.on(device):
            swap.swap_kernel[(tiles,)](*arguments, **constants, **launch.options(device))

    return run


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


_SIGNATURE = {
    "table": "*i64",
    "scales": "*fp32",
    "old_data": "*i8",
    "old_places": "*i64",
    "begin": "*i32",
    "end": "*i32",
    "new_data": "*i8",
    "new_places": "*i64",
    "reached": "*i32",
    "stopped": "*i32",
    "partials": "*fp32",
    "tensors": "i32",
    "direction": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "src_scale": "fp32",
}
#: What a pass does, by the words of its variant's name.
PASSES = {
    "hold": {"perturb": True, "encode": True},
    "hold count": {"perturb": True, "encode": True, "count": True},
    "swap": {"decode": True, "perturb": True, "encode": True},
    "swap count": {"decode": True, "perturb": True, "encode": True, "count": True},
    "release": {"decode": True},
    "release update": {"decode": True, "perturb": True},
}


def variant(name: str, dtype: torch.dtype, **options: bool) -> Variant:
    """One specialisation of swap_kernel: a key of PASSES, and options as for ``_constants``."""
    op, *rest = name.split()
    words = [*rest, *(option for option, on in options.items() if on)]
    counted = PASSES[name].get("count", False)
    return Variant(
        name=" ".join([op, launch.SHORT_NAMES[dtype], *words]),
        kernel=swap.swap_kernel,
        signature=_SIGNATURE,
        constants=_constants(dtype, **PASSES[name], **options),
        aligned=(),
        lanes=LANES,
        bytes_per_element=(1.0 if counted else 2.0) * dtype.itemsize,
        dst_itemsize=dtype.itemsize,
    )


def variants() -> list[Variant]:
    """What the passes over held weights launch."""
    fp32, bf16, fp16 = launch.TRITON_DTYPES
    plain = [
        variant(name, dtype, rademacher=rademacher)
        for name, dtype, rademacher in product(
            ("hold", "swap", "release", "release update"), (bf16, fp16, fp32), (False, True)
        )
    ]
    others = [
        variant("hold count", bf16),
        variant("swap count", bf16),
        variant("release update", bf16, stochastic=True),
        variant("release update", bf16, stochastic=True, scale_src=True, changes=True),
    ]
    return plain + others
