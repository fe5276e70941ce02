"""The two-point pair, logged updates and held weights in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from zo_kernels.backends.reference_noise import (
    CHUNK,
    DRAW,
    bits_of,
    fma,
    from_bits,
    round_stochastic,
    rounding_bits,
)

#: Bits of a float32 pattern below those of a weight with its residual, and of one without.
RESIDUAL_SHIFT = {torch.bfloat16: (8, 16), torch.float16: (5, 13)}


def pair_(
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[float],
    *,
    seed: int,
    direction: int,
    streams: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
) -> None:
    """plus, minus = round(src +- scales[.] z); see zo_kernels.ops.pair_."""
    draw = DRAW[distribution]
    for i, tensor in enumerate(src):
        address = {"seed": seed, "stream": streams[i], "direction": direction}
        scale = torch.tensor(scales[i], dtype=torch.float32).item()
        flat, above, below = tensor.view(-1), plus[i].view(-1), minus[i].view(-1)
        for start in range(0, tensor.numel(), CHUNK):
            here = slice(start, start + CHUNK)
            w = flat[here].float()
            z = draw(offsets[i] + start, w.numel(), address, tensor.device)
            above[here], below[here] = fma(z, scale, w), fma(z, -scale, w)


def join(tensor: Tensor, residual: Tensor) -> Tensor:
    """The float32 values of 16-bit weights with their residuals; see zo_kernels.ops.advance_."""
    shift, _ = RESIDUAL_SHIFT[tensor.dtype]
    joined = from_bits((bits_of(tensor.float()) + (residual.long() << shift)) & 0xFFFFFFFF)
    return torch.where(torch.isfinite(tensor), joined, tensor.float())


def round_joined(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to those that a weight of dtype with a residual can have."""
    shift, _ = RESIDUAL_SHIFT[dtype]
    pattern = bits_of(value)
    half = (1 << (shift - 1)) - 1 + (pattern >> shift & 1)
    rounded = from_bits((pattern + half) >> shift << shift & 0xFFFFFFFF)
    plain = value.to(dtype).float()
    return torch.where(_is_plain(value, plain, dtype), plain, rounded)


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight and the int8 residual of values that ``round_joined`` gave."""
    shift, dropped = RESIDUAL_SHIFT[dtype]
    pattern = bits_of(value)
    near = (pattern + (1 << (dropped - 1))) >> dropped << dropped & 0xFFFFFFFF
    weight = from_bits(near).to(dtype)
    plain = _is_plain(value, weight.float(), dtype)
    residual = torch.where(plain, 0, (pattern - near) >> shift)
    return torch.where(plain, value.to(dtype), weight), residual.to(torch.int8)


def _is_plain(value: Tensor, rounded: Tensor, dtype: torch.dtype) -> Tensor:
    """Where there is no residual: values too small for one in float16, infinities, NaN."""
    small = value.abs() < 2.0**-14 if dtype == torch.float16 else torch.zeros_like(value) != 0
    return small | ~torch.isfinite(rounded) | value.isnan()


def advance_(
    tensors: Sequence[Tensor],
    residuals: Sequence[Tensor] | None,
    scales: Sequence[Sequence[float]],
    *,
    seed: int,
    directions: Sequence[int],
    lengths: Sequence[int],
    src_scales: Sequence[float],
    streams: Sequence[int],
    offsets: Sequence[int],
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> None:
    """Updates of ``lengths`` directions each, one after the other; see zo_kernels.ops.advance_."""
    draw = DRAW[distribution]
    factors = torch.tensor(src_scales, dtype=torch.float32).tolist()
    if changes is not None:
        changes.zero_()
    for i, tensor in enumerate(tensors):
        coefficients = torch.tensor(scales[i], dtype=torch.float32).tolist()
        flat, dtype = tensor.view(-1), tensor.dtype
        joined = residuals is not None and dtype != torch.float32
        for start in range(0, tensor.numel(), CHUNK):
            here = slice(start, start + CHUNK)
            rest = residuals[i].view(-1)[here] if joined else None
            old = join(flat[here], rest) if joined else flat[here].float()
            value, place = old, (offsets[i] + start, old.numel())
            terms = iter(zip(directions, coefficients, strict=True))
            for length, factor in zip(lengths, factors, strict=True):
                acc = value * factor
                for direction, c in islice(terms, length):
                    address = {"seed": seed, "stream": streams[i], "direction": direction}
                    acc = fma(draw(*place, address, tensor.device), c, acc)
                if joined:
                    value = round_joined(acc, dtype)
                elif stochastic:
                    bits = rounding_bits(*place, address, tensor.device)
                    value = round_stochastic(acc, bits, dtype).float()
                else:
                    value = acc.to(dtype).float()
            if changes is not None:
                add_changes(changes[i], old, acc, value)
            if joined:
                flat[here], rest[:] = split(value, dtype)
            else:
                flat[here] = value


def add_changes(row: Tensor, old: Tensor, acc: Tensor, new: Tensor) -> None:
    """Add (new - old)^2, (acc - old)^2 and the number of elements that rounding lost."""
    moved, wanted = new - old, acc - old
    lost = ((moved == 0) & (wanted != 0)).sum()
    sums = [(moved.double() ** 2).sum(), (wanted.double() ** 2).sum(), lost.double()]
    row += torch.stack(sums).to(row.device)


class Store(list):
    """Copies of the held weights: no memory is saved here, and nothing can go wrong."""

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for copy in self)


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
    copies = Store(tensor.clone() for tensor in tensors) if store is None else store
    try:
        for i, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
            tensor.copy_(copy)
            if scales is not None:
                advance_(
                    [tensor],
                    None,
                    [[scales[i]]],
                    seed=seed,
                    directions=[direction],
                    lengths=[1],
                    src_scales=[src_scale],
                    streams=[streams[i]],
                    offsets=[offsets[i]],
                    stochastic=stochastic,
                    distribution=distribution,
                    changes=None if changes is None else changes[i : i + 1],
                )
    except BaseException:
        if store is None:  # the caller has no other copies
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        raise
    return copies if keep else None
