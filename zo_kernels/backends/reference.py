"""Every operation in plain torch: slow, exact, obvious.

What the other backends are compared with, bit for bit. It runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.backends import composed
from zo_kernels.backends.reference_noise import (
    CHUNK,
    DRAW,
    box_muller,
    fma,
    philox,
    round_stochastic,
    rounding_bits,
    words,
)
from zo_kernels.backends.reference_quantize import fake_quant, group_ends
from zo_kernels.backends.reference_updates import add_changes, advance_, pair_, swap_

__all__ = [
    "advance_", "box_muller", "combine_", "fake_quant", "fma", "group_ends", "normal", "pair_",
    "perturb_quant", "philox", "rademacher", "random_words", "round_stochastic", "swap_",
]  # fmt: skip

#: combine_ takes ``scales`` and ``directions`` as lists only.
DEVICE_SCALES = False
#: fake_quant returns nothing.
FAKE_QUANT_FINDS_ENDS = False


def combine_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    scales: Sequence[Sequence[float]],
    *,
    seed: int,
    directions: Sequence[int],
    streams: Sequence[int],
    offsets: Sequence[int],
    src_scale: float,
    stochastic: bool,
    distribution: str,
    changes: Tensor | None,
) -> None:
    """dst = round(src_scale * src + sum_k scales[.][k] z_k); see zo_kernels.ops.combine_."""
    factor = torch.tensor(src_scale, dtype=torch.float32)
    draw = DRAW[distribution]
    if changes is not None:
        changes.zero_()
    for i, (d, s) in enumerate(zip(dst, src, strict=True)):
        coefficients = torch.tensor(scales[i], dtype=torch.float32).tolist()
        d_flat, s_flat = d.view(-1), s.view(-1)
        for start in range(0, d.numel(), CHUNK):
            count = min(CHUNK, d.numel() - start)
            old = s_flat[start : start + count].float()
            acc = old * factor.to(s.device)
            for direction, c in zip(directions, coefficients, strict=True):
                address = {"seed": seed, "stream": streams[i], "direction": direction}
                acc = fma(draw(offsets[i] + start, count, address, d.device), c, acc)
            if stochastic:
                bits = rounding_bits(offsets[i] + start, count, address, d.device)
                new = round_stochastic(acc, bits, d.dtype)
            else:
                new = acc.to(d.dtype)
            if changes is not None:  # before the write: old is src itself if that is float32
                add_changes(changes[i], old, acc, new.float())
            d_flat[start : start + count] = new


def perturb_quant(out: Tensor, src: Tensor, scale: float, scheme: str, **options: Any) -> None:
    """out = round(src + scale * z) on the scheme's grid; see composed.py."""
    composed.perturb_quant(combine_, fake_quant, out, src, scale, scheme, **options)


def normal(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z: (count,) float32."""
    address = {"seed": seed, "stream": stream, "direction": direction}
    return DRAW["normal"](offset, count, address, device)


def rademacher(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Elements [offset, offset + count) of z, +1 or -1: (count,) float32."""
    address = {"seed": seed, "stream": stream, "direction": direction}
    return DRAW["rademacher"](offset, count, address, device)


def random_words(
    count: int, *, seed: int, direction: int, stream: int, offset: int, device: torch.device
) -> Tensor:
    """Words of elements [offset, offset + count): (count,) int64 with values below 2^32."""
    address = {"seed": seed, "stream": stream, "direction": direction}
    return words(offset, count, address, device)
