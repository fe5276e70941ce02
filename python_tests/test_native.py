"""What only the C++ kernels have: pieces and threads, prepared directions, two kinds of passes."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    assert_borders_intact,
    assert_same_bits,
    bordered,
    combined,
    weights,
)

import zo_kernels as zk

# Sizes and offsets around the cut into pieces (2^16), a job's high counter words (normals: 2^34,
# signs: 2^39) and the end of the index range.
SIZES = [1, 70_000, 3, 200_001, 65_536, 4097, 9000]
OFFSETS = [0, 65_530, 2**34 - 2, 2**34 - 100_000, 1, 2**39 - 4096, 2**61 - 4500]
STREAMS = list(range(len(SIZES)))


def small_updates(dtype: torch.dtype) -> list[torch.Tensor]:
    """Finite weights of those sizes."""
    generator = torch.Generator().manual_seed(0)
    return [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in SIZES]


def with_threads(threads: int, call) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_threads_cuts_and_order_change_no_bit(isa, distribution):
    """One to three threads, one call and many, any order: bits and statistics stay the same."""
    options = {"seed": 8, "directions": [9], "rounding": "stochastic"}
    options["distribution"] = distribution
    source = small_updates(torch.bfloat16)
    expected = [s.clone() for s in source]
    rows = torch.empty(len(SIZES), 3, dtype=torch.float64)
    addresses = {"streams": STREAMS, "offsets": OFFSETS}
    zk.combine_(expected, source, [1e-4], **addresses, **options, changes=rows, backend="native")
    wanted = torch.empty_like(rows)
    reference = [s.clone() for s in source]
    zk.combine_(
        reference, source, [1e-4], **addresses, **options, changes=wanted, backend="reference"
    )
    for i, (e, r) in enumerate(zip(expected, reference, strict=True)):
        assert_same_bits(e, r, i)
    torch.testing.assert_close(rows[:, :2], wanted[:, :2], rtol=1e-5, atol=0.0)
    assert torch.equal(rows[:, 2], wanted[:, 2]) and rows[:, 2].sum() > 1000

    order = list(range(len(SIZES)))
    for order_, split, threads in product((order, order[::-1]), (False, True), (1, 2, 3)):
        for group in [[i] for i in order_] if split else [order_]:
            out = [source[i].clone() for i in group]
            changes = torch.empty(len(group), 3, dtype=torch.float64)
            where = {"streams": group, "offsets": [OFFSETS[i] for i in group]}
            asked = {**options, **where, "changes": changes, "backend": "native"}
            with_threads(threads, lambda o=out, a=asked: zk.combine_(o, o, [1e-4], **a))
            for i, o in zip(group, out, strict=True):
                assert_same_bits(o, expected[i], (i, split, threads))
            assert torch.equal(changes, rows[group]), (split, threads)


@pytest.mark.parametrize("offset", [2**34 - 31, 2**39 - 31, 2**61 - 31, 4096 - 31])
def test_signs_of_shards_are_those_of_the_whole(isa, offset):
    """Cut anywhere, also across a change of the high counter word of words or of signs."""
    cuts = (0, 13, 31, 70, 131)
    whole = weights(131, torch.bfloat16)
    options = {"seed": 5, "direction": 6, "rounding": "stochastic", "distribution": "rademacher"}
    expected = whole.clone()
    zk.perturb_([expected], 1e-2, streams=[7], offsets=[offset], backend="reference", **options)
    one = whole.clone()
    zk.perturb_([one], 1e-2, streams=[7], offsets=[offset], backend="native", **options)
    assert_same_bits(one, expected)
    parts = [whole[a:b].clone() for a, b in pairwise(cuts)]
    starts = [offset + a for a in cuts[:-1]]
    zk.perturb_(parts, 1e-2, streams=[7] * 4, offsets=starts, backend="native", **options)
    assert_same_bits(torch.cat(parts), expected)


@pytest.mark.parametrize("count", [2, 16, 17, 19])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_many_directions(isa, distribution, count):
    """Up to the number prepared ahead (16) and beyond, over several passes and spans."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    sources = [weights(4500, d, seed=i) for i, d in enumerate(dtypes)]
    options = {
        "seed": 2**64 - 1,
        "directions": [2**32 - 1 - k for k in range(count)],
        "streams": [1, 2, 3],
        "offsets": [5, 0, 2**34 - 4500],
        "rounding": "stochastic",
        "src_scale": 0.9993,
        "distribution": distribution,
    }
    scales = [[1e-3 / (1 + i + k) * (-1) ** k for k in range(count)] for i in range(3)]
    expected = combined("reference", "cpu", sources, dtypes, scales, **options)
    actual = combined("native", "cpu", sources, dtypes, scales, **options)
    for dtype, a, e in zip(dtypes, actual, expected, strict=True):
        assert_same_bits(a, e, dtype)


def test_changes_of_mixed_dtypes_keep_their_rows(isa):
    """The kernels run once per dtype pair; rows follow the lists, and nothing else is written."""
    pairs = list(product(DTYPES, DTYPES))
    pairs = pairs[::2] + pairs[1::2]
    generator = torch.Generator().manual_seed(1)
    sizes = [0 if i == 4 else 300 + 100 * i for i in range(len(pairs))]
    sources = [
        (0.02 * torch.randn(n, generator=generator)).to(s)
        for n, (s, _) in zip(sizes, pairs, strict=True)
    ]
    options = {"seed": 1, "directions": [2], "streams": list(range(len(pairs)))}
    rows = {}
    for backend in ("reference", "native"):
        buffer, place = bordered(torch.full((len(pairs), 3), torch.nan, dtype=torch.float64))
        dst = [torch.empty(n, dtype=d) for n, (_, d) in zip(sizes, pairs, strict=True)]
        zk.combine_(dst, sources, [3e-5], **options, changes=place, backend=backend)
        assert_borders_intact(buffer, place)
        rows[backend] = place
    expected, actual = rows["reference"], rows["native"]
    torch.testing.assert_close(actual[:, :2], expected[:, :2], rtol=1e-5, atol=0.0)
    assert torch.equal(actual[:, 2], expected[:, 2])
    assert (actual[4] == 0).all() and (actual[:, 1] > 0).sum() == len(pairs) - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_changes_do_not_see_the_processors_mode(isa, dtype):
    """A change that is subnormal counts as one, also where torch flushes such numbers."""
    source = torch.full((1000,), float(torch.finfo(dtype).tiny)).to(dtype)
    options = {"seed": 1, "directions": [2], "streams": [3], "distribution": "rademacher"}
    scale = 2.0**-140  # below half a unit of the 16-bit types here, 512 units of float32
    before = source.clone()
    assert torch.set_flush_denormal(True), "this processor has no flush-to-zero mode to test"
    try:
        out, rows = source.clone(), torch.empty(1, 3, dtype=torch.float64)
        zk.combine_([out], [out], [scale], **options, changes=rows, backend="native")
    finally:
        torch.set_flush_denormal(False)
    lost = 0 if dtype == torch.float32 else 1000
    if dtype == torch.float16:  # 2^-14 and 2^-140 apart: lost in the accumulator already
        lost = 0
    assert rows[0, 2] == lost
    assert torch.equal(out, before) == (dtype != torch.float32)
