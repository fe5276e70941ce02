"""perturb_quant as the two operations it is: what the reference does, and the other backends where
they have nothing better."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zo_kernels.backends.reference_quantize import group_ends


def perturb_quant(
    combine_: Callable[..., None],
    fake_quant: Callable[..., object],
    out: Tensor,
    src: Tensor,
    scale: float,
    scheme: str,
    *,
    group: int,
    symmetric: bool,
    scales_of: Callable[[Tensor], Tensor] | None,
    look: Callable[[tuple[float, float]], None] | None,
    seed: int,
    direction: int,
    stream: int,
    offset: int,
    distribution: str,
) -> None:
    """out = round(src + scale * z) on the scheme's grid; see zo_kernels.ops.perturb_quant.

    Args:
        combine_, fake_quant: a backend's.
        out, src: contiguous, of one shape and dtype, apart.
        group: elements per group, a divisor of the number of elements, at least 1.
        scales_of: None, or gives the scales of all groups, (groups,), of their ends, (2, groups)
            float32, both on the CPU.
        look: None, or called with the least and the greatest element of round(src + scale * z),
            0 included, NaN if there is one; what it raises ends the call.
    """
    combine_(
        [out],
        [src],
        [[scale]],
        seed=seed,
        directions=[direction],
        streams=[stream],
        offsets=[offset],
        src_scale=1.0,
        stochastic=False,
        distribution=distribution,
        changes=None,
    )
    scales = None
    if scales_of is not None:
        ends = group_ends(out, group=group).cpu()
    elif look is not None:
        ends = group_ends(out, group=out.numel())
    if look is not None:
        low, high = ends[0].min().item(), ends[1].max().item()  # NaN wins
        look((low, high))
    if scales_of is not None:
        scales = scales_of(ends).to(out.device)
    fake_quant(out, out, scheme, group=group, symmetric=symmetric, scales=scales)
