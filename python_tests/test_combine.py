"""The primitive dst = round(src_scale src + sum_k c_k z_k): the same bits from every backend.

The reference backend is the yardstick; test_noise.py ties it to the published generator and to a
committed table, and test_definition below to an evaluation in exact rational arithmetic.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    assert_borders_intact,
    assert_same_bits,
    bordered,
    combined,
    rounding_bits,
    special_values,
    weights,
)

import zo_kernels as zk

SHAPES = [(1,), (3,), (4,), (63,), (64,), (65,), (1023,), (3, 37)]
OFFSETS = [0, 1, 3, 61, 2**34 - 40, 2**40 + 3]
CASES = list(product(SHAPES, OFFSETS))
# Triton's interpreter takes a twentieth of a second per tensor: every shape and offset once.
INTERPRETED = [(shape, OFFSETS[(i + 2) % len(OFFSETS)]) for i, shape in enumerate(SHAPES)]
PAIRS = list(product(DTYPES, DTYPES))
PAIR_IDS = [f"{NAMES[s]}-{NAMES[d]}" for s, d in PAIRS]
SEED = 0xFEEDFACE12345678
ROUNDINGS = ["nearest", "stochastic"]


def cases_for(backend: str, device: str) -> list:
    return INTERPRETED if backend == "triton" and device == "cpu" else CASES


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("src_dtype, dst_dtype", PAIRS, ids=PAIR_IDS)
def test_same_bits_as_the_reference(backend, device, src_dtype, dst_dtype, rounding):
    """Ragged, misaligned tensors of all dtype pairs in one list; nothing outside them is written.

    The weights include both zeros, subnormals, the largest values, infinities and NaN.
    """
    cases = cases_for(backend, device)
    options = {
        "seed": SEED,
        "directions": [7],
        "streams": [2**32 - 1 - i for i in range(len(cases))],
        "offsets": [offset for _, offset in cases],
        "rounding": rounding,
    }
    scales = [[1e-3 * 4.0 ** (i % 5)] for i in range(len(cases))]
    sources = [weights(shape, src_dtype, seed=i) for i, (shape, _) in enumerate(cases)]
    expected = combined("reference", "cpu", sources, [dst_dtype] * len(cases), scales, **options)
    src = [bordered(s, device, shift=i % 3) for i, s in enumerate(sources)]
    dst = [bordered(torch.empty_like(e), device, shift=i % 2) for i, e in enumerate(expected)]
    zk.combine_([d for _, d in dst], [s for _, s in src], scales, backend=backend, **options)
    for case, e, (buffer, d), (_, s), original in zip(
        cases, expected, dst, src, sources, strict=True
    ):
        assert_same_bits(d, e, case)
        assert_same_bits(s, original, case)
        assert_borders_intact(buffer, d)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("src_dtype, dst_dtype", PAIRS, ids=PAIR_IDS)
def test_aligned_tensors_and_their_ends(backend, device, src_dtype, dst_dtype, rounding):
    """Aligned memory from a multiple of 1024 on: 16-byte accesses in Triton, then a ragged end."""
    source = weights(1024 + 7, src_dtype)
    options = {"seed": SEED, "directions": [2**31], "streams": [9], "offsets": [2**34 - 1024]}
    expected = combined(
        "reference", "cpu", [source], [dst_dtype], [3e-3], rounding=rounding, **options
    )
    _, src = bordered(source, device, shift=0)
    buffer, dst = bordered(torch.empty_like(expected[0]), device, shift=0)
    assert src.data_ptr() % 16 == dst.data_ptr() % 16 == 0
    zk.combine_([dst], [src], [3e-3], rounding=rounding, backend=backend, **options)
    assert_same_bits(dst, expected[0])
    assert_borders_intact(buffer, dst)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_in_place_is_out_of_place(backend, device, dtype, rounding):
    """perturb_ and combine_ onto itself give the bits of combine_ into another tensor."""
    source = weights((5, 211), dtype, seed=1)
    options = {"seed": 3, "streams": [5], "offsets": [17], "rounding": rounding}
    expected = combined("reference", "cpu", [source], [dtype], [-2e-3], directions=[9], **options)
    buffer, view = bordered(source, device)
    zk.perturb_([view], -2e-3, direction=9, backend=backend, **options)
    assert_same_bits(view, expected[0])
    assert_borders_intact(buffer, view)
    again = source.to(device)
    zk.combine_([again], [again], [[-2e-3]], directions=[9], backend=backend, **options)
    assert_same_bits(again, expected[0])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("directions", [[4, 5], [2**32 - 1, 0, 7], list(range(19))])
def test_many_directions_and_weight_decay(backend, device, directions, rounding):
    """K directions and a src_scale in one pass, for several tensors with scales of their own.

    19 directions are more than the C++ kernels prepare ahead (16).
    """
    if backend == "triton" and device == "cpu" and len(directions) > 3:
        directions = directions[:4]  # the kernel's loop has no special case beyond one direction
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    sources = [weights(67, d, seed=i) for i, d in enumerate(dtypes)]
    scales = [[1e-3 / (1 + i + k) * (-1) ** k for k in range(len(directions))] for i in range(3)]
    options = {
        "seed": 2**64 - 1,
        "directions": directions,
        "streams": [1, 2, 3],
        "offsets": [5, 0, 2**34 - 8],
        "rounding": rounding,
        "src_scale": 0.9993,
    }
    expected = combined("reference", "cpu", sources, dtypes, scales, **options)
    actual = combined(backend, device, sources, dtypes, scales, **options)
    for dtype, a, e in zip(dtypes, actual, expected, strict=True):
        assert_same_bits(a, e, dtype)


def nearest32(value: Fraction) -> Fraction:
    """A rational of ordinary size rounded to binary32, ties to even."""
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit  # Fraction rounds ties to even


def test_definition(backend, device):
    """fma in binary32 for k in order, then one rounding: against exact rational arithmetic."""
    count, directions, scales, src_scale = 24, [3, 4, 5], [0.3, -1e-3, 7e-2], 0.97
    source = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.1
    address = {"seed": 11, "stream": 12, "offset": 2}
    common = {"streams": [12], "offsets": [2], "src_scale": src_scale, "seed": 11}
    z = [zk.normal(count, direction=d, backend="reference", **address) for d in directions]
    words = zk.random_words(count + 4, direction=5, seed=11, stream=12, backend="reference")
    random = rounding_bits(words[: (count + 4) // 4 * 4])[2 : 2 + count]
    actual = {
        (dtype, rounding): combined(
            backend,
            device,
            [source],
            [dtype],
            scales,
            directions=directions,
            rounding=rounding,
            **common,
        )[0]
        for dtype, rounding in [
            (torch.float32, "nearest"),
            (torch.bfloat16, "nearest"),
            (torch.bfloat16, "stochastic"),
        ]
    }
    c32 = [Fraction(float(np.float32(c))) for c in scales]
    for i in range(count):
        acc = nearest32(Fraction(float(np.float32(src_scale))) * Fraction(source[i].item()))
        for c, zk_ in zip(c32, z, strict=True):
            acc = nearest32(acc + c * Fraction(zk_[i].item()))
        exact = float(acc)
        assert actual[torch.float32, "nearest"][i].item() == exact
        assert actual[torch.bfloat16, "nearest"][i] == torch.tensor(exact).bfloat16()
        pattern = int(np.float32(exact).view(np.uint32)) + int(random[i]) & 0xFFFF0000
        stochastic = np.uint32(pattern).view(np.float32)
        assert actual[torch.bfloat16, "stochastic"][i].item() == stochastic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("weight", [1.0, -0.0371, 300.0])
def test_stochastic_rounding_is_unbiased(dtype, weight):
    """Mean over 4096 directions x 512 elements of updates of 1/64 ulp: the intended one arrives.

    The scale is so small beside the ulp that the nearest rounding of the same updates loses all
    of them. The threshold is 4.5 standard errors (p = 7e-6), from the updates' own spread.
    """
    directions, count = 4096, 512
    source = torch.full((count,), weight, dtype=dtype)
    ulp = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(abs(weight)))
    drift, scale = ulp / 64, ulp / 1024
    start = torch.full((count,), source[0].item() + drift)  # float32 holds both
    total, squares = 0.0, 0.0
    for direction in range(directions):
        (out,) = combined(
            "native",
            "cpu",
            [start],
            [dtype],
            [scale],
            seed=1,
            directions=[direction],
            streams=[2],
            rounding="stochastic",
        )
        moved = (out.double() - source.double()) / ulp
        total, squares = total + moved.sum().item(), squares + moved.square().sum().item()
    n = directions * count
    intended = (start.double()[0] - source.double()[0]).item() / ulp
    # z itself is a part of the intended update; its mean over n draws is below the error.
    error = np.sqrt(squares / n / n)
    assert squares > 0 and abs(total / n - intended) < 4.5 * error, (total / n, intended, error)
    options = {"seed": 1, "directions": [0], "streams": [2]}
    (nearest,) = combined("native", "cpu", [start], [dtype], [scale], **options)
    assert_same_bits(nearest, source)


def test_stochastic_rounding_below_the_range_of_half(backend, device):
    """float16 below 2^-14 rounds to nearest, from 2^-14 on by the bits; NaN, inf, zero stay."""
    tiny = torch.finfo(torch.float16).tiny
    values = torch.tensor([tiny * (1 - 2**-13), tiny * 0.3, 1e-7, -3e-8, 0.0, torch.nan])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf])]).repeat(8)
    options = {"seed": 0, "directions": [0], "streams": [0], "rounding": "stochastic"}
    (out,) = combined(backend, device, [values], [torch.float16], [0.0], **options)
    assert_same_bits(out, values.half())
    above = torch.full((256,), tiny * (1 + 2**-11))  # half way between two halves
    (out,) = combined(backend, device, [above], [torch.float16], [0.0], **options)
    assert set(out.tolist()) == {tiny, tiny * (1 + 2**-10)}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_scale_zero_keeps_the_weights(backend, device, dtype):
    """With scale 0 every value but -0 comes back in both roundings (-0 + 0 z is +0 if z > 0)."""
    source = torch.cat([special_values(dtype), weights(77, dtype)])
    source[source == 0] = 0.0
    for rounding in ROUNDINGS:
        options = {"seed": 4, "directions": [0], "streams": [0], "rounding": rounding}
        (out,) = combined(backend, device, [source], [dtype], [0.0], **options)
        same = torch.where(out == 0, 0.0, out.float()).to(dtype)
        assert_same_bits(same, source, rounding)


def test_streams_and_offsets_address_one_long_tensor(backend, device):
    """Perturbing shards with their offsets is perturbing the whole, also across 2^34."""
    offset, cuts = 2**34 - 31, (0, 13, 31, 70, 131)
    whole = weights(131, torch.bfloat16)
    options = {"seed": 5, "direction": 6, "rounding": "stochastic", "backend": backend}
    expected = whole.clone().to(device)
    zk.perturb_([expected], 1e-2, streams=[7], offsets=[offset], **options)
    parts = [whole[a:b].clone().to(device) for a, b in pairwise(cuts)]
    starts = [offset + a for a in cuts[:-1]]
    zk.perturb_(parts, 1e-2, streams=[7] * 4, offsets=starts, **options)
    assert_same_bits(torch.cat(parts), expected.cpu())


def test_threads_and_list_order_change_no_bit(isa):
    """One and two threads, one call and many, any order: the same bits, past the cut at 2^16."""
    sizes = [1, 70_000, 3, 200_001, 65_536, 77]
    source = [weights(n, torch.bfloat16, seed=n) for n in sizes]
    offsets = [0, 65_530, 2**34 - 2, 2**34 - 100_000, 1, 5]
    options = {"seed": 8, "direction": 9, "rounding": "stochastic", "backend": "native"}
    streams = list(range(len(sizes)))

    def run(order: list[int], split: bool, threads: int) -> list[torch.Tensor]:
        out = [s.clone() for s in source]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for group in [[i] for i in order] if split else [order]:
                pick = [[values[i] for i in group] for values in (out, streams, offsets)]
                zk.perturb_(pick[0], 1e-3, streams=pick[1], offsets=pick[2], **options)
        finally:
            torch.set_num_threads(before)
        return out

    order = list(range(len(sizes)))
    expected = [s.clone() for s in source]
    zk.perturb_(
        expected, 1e-3, streams=streams, offsets=offsets, **{**options, "backend": "reference"}
    )
    for order_, split, threads in product((order, order[::-1]), (False, True), (1, 2)):
        for i, (a, e) in enumerate(zip(run(order_, split, threads), expected, strict=True)):
            assert_same_bits(a, e, (i, order_, split, threads))


def test_flush_denormal_mode_changes_no_bit(isa):
    """torch.set_flush_denormal(True) neither alters the kernels' results nor is altered by them."""
    source = [weights(257, d) for d in DTYPES]
    source.append(torch.full((64,), 2.0**-130))
    dtypes = [*DTYPES, torch.float32]
    options = {"seed": 1, "directions": [2, 3], "streams": [0, 1, 2, 3]}
    scales = [1e-39, 1e-41]
    expected = combined("reference", "cpu", source, dtypes, scales, **options)
    smallest = torch.tensor(2.0**-130)
    assert torch.set_flush_denormal(True), "this processor has no flush-to-zero mode to test"
    try:
        assert smallest * 1.0 == 0
        actual = combined("native", "cpu", source, dtypes, scales, **options)
        assert smallest * 1.0 == 0
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    # The case is a real one: subnormals differ from zero in what was compared.
    assert ((expected[-1] != 0) & (expected[-1].abs() < 2.0**-126)).any()


@pytest.mark.parametrize("boundary", [2**32, 2**34, 2**36])
def test_counters_past_32_bits(backend, device, boundary):
    """Elements just before and after 2^32 and 2^34 differ from those at the truncated index.

    2^34 elements are 2^32 blocks: there the second counter word takes over.
    """
    address = {"seed": 1, "direction": 2, "stream": 3, "backend": backend, "device": device}
    across = zk.normal(8, offset=boundary - 4, **address).cpu()
    reference = zk.normal(8, offset=boundary - 4, **{**address, "backend": "reference"}).cpu()
    assert_same_bits(across, reference)
    assert not (across[4:] == zk.normal(4, offset=0, **address).cpu()).any()
    assert_same_bits(across[4:], zk.normal(4, offset=boundary, **address).cpu())
