"""Rademacher directions: signs from the published address, and the same bits from every backend."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    assert_borders_intact,
    assert_same_bits,
    bordered,
    combined,
    philox_words,
    weights,
)

import zo_kernels as zk

SEED = 0xFEEDFACE12345678
# Starts, ends and middles of groups, spans and the range of the high counter word.
PLACES = [0, 1, 7, 8, 255, 256, 4095, 4096, 4097, 2**39 - 3, 2**39 + 5, 2**61 + 1]


def sign(index: int, *, seed: int, stream: int, direction: int) -> int:
    """One sign in Python's integers, from the text in zo_kernels/noise.py."""
    block = 32 * (index // 4096) + index % 256 // 8
    # philox_words puts block >> 32 into the second word: the domain is bit 63 of the block.
    words = philox_words(block | 1 << 63, seed=seed, stream=stream, direction=direction)
    byte = b"".join(word.to_bytes(4, "little") for word in words)[index % 4096 // 256]
    return 1 - 2 * (byte >> index % 8 & 1)


@pytest.mark.parametrize("place", PLACES)
def test_signs_of_the_definition(backend, device, place):
    address = {"seed": SEED, "stream": 0xDEADBEEF, "direction": 2**31 + 5}
    count = 40
    signs = zk.rademacher(count, offset=place, backend=backend, device=device, **address)
    expected = [float(sign(place + i, **address)) for i in range(count)]
    assert_same_bits(signs, torch.tensor(expected))


def test_signs_of_whole_spans(backend, device):
    """All bytes and bits of several Philox calls, and the seams between spans."""
    address = {"seed": 3, "stream": 5, "direction": 7}
    signs = zk.rademacher(3 * 4096 + 100, offset=11, backend=backend, device=device, **address)
    expected = zk.rademacher(3 * 4096 + 100, offset=11, backend="reference", **address)
    assert_same_bits(signs, expected)


def test_signs_are_fair_and_independent():
    """Mean, and correlations between neighbours, directions and streams, within 5 sigma."""
    count = 1 << 20
    signs = [
        zk.rademacher(count, seed=1, direction=direction, stream=stream)
        for direction, stream in ((0, 0), (1, 0), (0, 1))
    ]
    bound = 5 / count**0.5
    first = signs[0]
    assert set(first.tolist()) == {1.0, -1.0}
    for z in signs:
        assert abs(z.mean()) < bound
    for lag in (1, 2, 7, 8, 128, 256, 4096):
        assert abs((first[:-lag] * first[lag:]).mean()) < 5 / (count - lag) ** 0.5
    for other in signs[1:]:
        assert abs((first * other).mean()) < bound


def test_signs_share_no_words_with_normals():
    """The second counter word of a Rademacher call is one that no normal's call has."""
    words = {philox_words(b | 1 << 63, seed=1, stream=2, direction=3) for b in range(64)}
    others = {philox_words(b, seed=1, stream=2, direction=3) for b in range(64)}
    assert len(words) == len(others) == 64 and not words & others
    assert zk.noise.RADEMACHER_DOMAIN << 32 > (2**62 // 4)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "src_dtype, dst_dtype", list(product(DTYPES, DTYPES)), ids=lambda d: NAMES[d]
)
def test_combine(backend, device, src_dtype, dst_dtype, queries, rounding):
    """Ragged, misaligned tensors of all dtype pairs; rounding bits are those of the normals."""
    cases = [(5, 3, 1), (4096 + 1030, 0, 0), (1100, 2**39 - 512, 3)]  # size, offset, misalignment
    if backend != "triton" or device != "cpu":
        cases += [(20_000, 2**40 + 77, 5), (9000, 4096 - 8, 8)]
    options = {
        "seed": SEED,
        "directions": list(range(9, 9 + queries)),
        "streams": list(range(len(cases))),
        "offsets": [offset for _, offset, _ in cases],
        "rounding": rounding,
        "distribution": "rademacher",
    }
    scales = [[1e-3 * 4.0**i / (k + 1) for k in range(queries)] for i in range(len(cases))]
    sources = [weights(size, src_dtype, seed=size) for size, _, _ in cases]
    expected = combined("reference", "cpu", sources, [dst_dtype] * len(cases), scales, **options)
    src = [bordered(s, device, shift=3 - i) for i, s in enumerate(sources[:3])]
    src += [bordered(s, device, shift=0) for s in sources[3:]]
    dst = [
        bordered(torch.empty_like(e), device, shift=shift)
        for e, (_, _, shift) in zip(expected, cases, strict=True)
    ]
    zk.combine_([d for _, d in dst], [s for _, s in src], scales, backend=backend, **options)
    for case, e, (buffer, d) in zip(cases, expected, dst, strict=True):
        assert_same_bits(d, e, case)
        assert_borders_intact(buffer, d)


def test_reference_is_the_definition():
    """Against signs of the definition and torch's own float32 arithmetic."""
    source = torch.linspace(-1, 1, 500)
    address = {"seed": 1, "direction": 2, "stream": 3}
    signs = torch.tensor([float(sign(9 + i, **address)) for i in range(500)])
    (result,) = combined(
        "reference", "cpu", [source], [torch.float32], [0.37], seed=1, directions=[2],
        streams=[3], offsets=[9], distribution="rademacher",
    )  # fmt: skip
    assert_same_bits(result, source + signs * torch.tensor(0.37))


def test_unknown_distribution_is_refused():
    weight = torch.ones(4)
    with pytest.raises(ValueError, match=r"distribution: expected one of .*, got 'uniform'"):
        zk.perturb_([weight], 1.0, seed=1, direction=2, streams=[3], distribution="uniform")
    with pytest.raises(ValueError, match="distribution: expected one of"):
        zk.ZOSGD([("w", torch.nn.Parameter(weight))], distribution="uniform")
    assert_same_bits(weight, torch.ones(4))


def test_optimizer_descends_along_signs():
    """ZOSGD on a quadratic; its state refuses another distribution."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    options = {"lr": 5e-3, "eps": 1e-3, "seed": 4}
    optimizer = zk.ZOSGD([("w", weight)], distribution="rademacher", **options)
    losses = [optimizer.step(lambda: (weight * weight).sum()) for _ in range(200)]
    assert losses[-1] < 0.2 * losses[0]
    other = zk.ZOSGD([("w", weight)], **options)
    with pytest.raises(ValueError, match="distribution"):
        other.load_state_dict(optimizer.state_dict())
