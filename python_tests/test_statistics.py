"""The normals are normal, and independent along every part of their address.

Every test reduces a sample to p-values by a function that takes any sample, and the same function
must reject a broken generator. All seeds are fixed; a p-value below 1e-6 is a failure. About 100
p-values are looked at, so a sound generator had a chance of 1e-4 of failing when the seeds were
chosen, and none since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from helpers import rounding_bits
from scipy import stats
from torch import Tensor

import zo_kernels as zk
from zo_kernels.backends import reference

LEVEL = 1e-6
CHUNK = 1 << 23
BINS_PER_SIGMA, RANGE = 128, 6  # bin edges are exact in binary32; nothing lies beyond 5.9


def normal_chunks(total: int, **address: int) -> Iterator[Tensor]:
    for start in range(0, total, CHUNK):
        yield zk.normal(min(CHUNK, total - start), offset=start, **address)


def two_sided(z: float) -> float:
    return 2 * stats.norm.sf(abs(z))


def normality(chunks: Iterable[Tensor]) -> dict[str, float]:
    """p-values of moments 1 to 4, tails beyond 3, 4, 5 sigma, chi-square and Kolmogorov-Smirnov.

    The moments' standard errors are those of the exact normal. KS looks at the 1536 bin edges
    only, which can but lower its statistic, so its p-values err on the large side.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(2 * RANGE * BINS_PER_SIGMA, dtype=torch.int64)
    n = 0
    for z in chunks:
        n += z.numel()
        square = z * z
        powers = [z, square, square * z, square * square]
        # float32 products (error 2^-24 each, unbiased) summed in float64.
        sums += torch.stack([p.sum(dtype=torch.float64) for p in powers])
        bins = (z * BINS_PER_SIGMA).floor_().int() + RANGE * BINS_PER_SIGMA
        counts += torch.bincount(bins, minlength=len(counts))
    moments = (sums / n).tolist()
    expected, variance = (0, 1, 0, 3), (1, 2, 15, 96)
    p = {
        f"moment {k + 1}": two_sided((moments[k] - expected[k]) / math.sqrt(variance[k] / n))
        for k in range(4)
    }
    edges = torch.arange(len(counts) + 1).double() / BINS_PER_SIGMA - RANGE
    cdf = torch.special.ndtr(edges)
    cumulative = counts.cumsum(0).double() / n
    p["KS"] = stats.kstwo.sf((cumulative - cdf[1:]).abs().max().item(), n)
    for sigma in (3, 4, 5):
        low, high = (RANGE - sigma) * BINS_PER_SIGMA, (RANGE + sigma) * BINS_PER_SIGMA
        beyond = (counts[:low].sum() + counts[high:].sum()).item()
        mean = 2 * stats.norm.sf(sigma) * n
        tails = stats.poisson.cdf(beyond, mean), stats.poisson.sf(beyond - 1, mean)
        p[f"beyond {sigma}"] = min(1.0, 2 * min(tails))
    probability = cdf[1:] - cdf[:-1]
    # Bins with fewer than 20 expected are counted as one.
    thin = probability * n < 20
    mass = torch.cat([probability[~thin], (1 - probability[~thin].sum()).view(1)]) * n
    seen = torch.cat([counts[~thin], counts[thin].sum().view(1)]).double()
    p["chi-square"] = stats.chi2.sf(((seen - mass).square() / mass).sum().item(), len(mass) - 1)
    return p


def correlation(a: Tensor, b: Tensor) -> float:
    """p-value of no correlation between rows of a and b (or 1-d), of z, of z^2 and across.

    Bonferroni over everything looked at: the returned p is the smallest times their number.
    """
    a, b = torch.atleast_2d(a), torch.atleast_2d(b)
    n = a.shape[-1]
    worst, looked = 0.0, 0
    for x in (a, (a * a - 1) / math.sqrt(2)):
        for y in (b, (b * b - 1) / math.sqrt(2)):
            worst = max(worst, (torch.linalg.vecdot(x, y).abs().max() / math.sqrt(n)).item())
            looked += len(a)
    return min(1.0, two_sided(worst) * looked)


def all_pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return rows[i], rows[j]


def independence(a: Tensor, b: Tensor, bins: int) -> float:
    """Chi-square p-value that two integer samples below `bins`, each uniform, are independent."""
    counts = torch.bincount(a * bins + b, minlength=bins * bins).double()
    expected = len(a) / (bins * bins)
    statistic = ((counts - expected).square() / expected).sum().item()
    return stats.chi2.sf(statistic, bins * bins - 1)


def test_134_million_normals_are_normal():
    """2^27 normals of one parameter and direction pass all nine tests."""
    p = normality(normal_chunks(1 << 27, seed=0, direction=0, stream=zk.stream_id("w")))
    assert min(p.values()) > LEVEL, p


@pytest.mark.parametrize(
    "seed, direction, stream", [(2**64 - 1, 2**31 - 1, 2**32 - 1), (1, 2**31, 0), (12345, 77, 1)]
)
def test_normal_elsewhere(seed, direction, stream):
    """4 million normals at other addresses, across element 2^34."""
    address = {"seed": seed, "direction": direction, "stream": stream}
    p = normality([zk.normal(1 << 22, offset=2**34 - 2**21, **address)])
    assert min(p.values()) > LEVEL, p


def test_across_directions_is_normal():
    """One element's normals over many directions and streams are normal too."""
    z = [
        zk.normal(64, seed=9, direction=direction, stream=stream)
        for direction in range(256)
        for stream in range(64)
    ]
    p = normality([torch.cat(z)])
    assert min(p.values()) > LEVEL, p


def test_broken_generators_are_not_normal():
    """The same function rejects: angle = radius bits, a radius 0.3 % too long, a clipped tail."""
    words = zk.random_words(1 << 21, seed=0, direction=0, stream=0).view(-1, 4)
    same = torch.cat(reference.box_muller(words[:, 0], words[:, 0]))
    assert min(normality([same]).values()) < 1e-100
    z = zk.normal(1 << 22, seed=0, direction=0, stream=0)
    assert normality([z])["moment 2"] > LEVEL
    assert normality([z * 1.003])["moment 2"] < LEVEL
    clipped = normality([z.clamp(-3.99, 3.99)])
    assert clipped["beyond 4"] < LEVEL < clipped["moment 2"]
    # Centred where half a bin is off: a mean of 1/256.
    assert min(normality([z + 2**-8]).values()) < LEVEL


def test_streams_directions_and_seeds_are_uncorrelated():
    """All pairs of 24 streams, 24 directions; 64 + 32 + 32 one-bit neighbours of an address."""
    count = 1 << 17
    rows = torch.stack([zk.normal(count, seed=1, direction=2, stream=s) for s in range(24)])
    assert correlation(*all_pairs(rows)) > LEVEL
    rows = torch.stack([zk.normal(count, seed=1, direction=d, stream=2) for d in range(24)])
    assert correlation(*all_pairs(rows)) > LEVEL
    base = {"seed": 0x0123456789ABCDEF, "direction": 5, "stream": 0xDEADBEEF}
    z = zk.normal(count, **base)
    for field, bits in (("seed", 64), ("direction", 32), ("stream", 32)):
        rows = torch.stack(
            [zk.normal(count, **{**base, field: base[field] ^ 1 << bit}) for bit in range(bits)]
        )
        assert correlation(z.expand_as(rows), rows) > LEVEL, field
    swapped = zk.normal(count, seed=1, direction=base["stream"], stream=base["direction"])
    assert correlation(zk.normal(count, **{**base, "seed": 1}), swapped) > LEVEL


def test_neighbouring_elements_are_uncorrelated():
    """Lags 1 to 8 of 2^23 elements, 2^16 (a piece of the C++ loop), and 2^32, 2^34 further on."""
    address = {"seed": 3, "direction": 4, "stream": 5}
    z = zk.normal(CHUNK, **address)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 1 << 16):
        assert correlation(z[:-lag], z[lag:]) > LEVEL, lag
    for far in (2**32, 2**34):
        assert correlation(z, zk.normal(CHUNK, offset=far, **address)) > LEVEL, far
    # Within a pair even and odd places must be independent, not only uncorrelated.
    quantile = (torch.special.ndtr(z.double()) * 64).long().clamp_(0, 63).view(-1, 2)
    assert independence(quantile[:, 0], quantile[:, 1], 64) > LEVEL


def test_dependence_is_seen():
    """The same functions reject equal streams, a shared radius, and 0.3 % of a common part."""
    z = zk.normal(1 << 20, seed=1, direction=2, stream=3)
    other = zk.normal(1 << 20, seed=1, direction=2, stream=4)
    assert correlation(z, z) < 1e-100 and correlation(z, -z) < 1e-100
    assert correlation(z, other) > LEVEL
    assert correlation(z, other + 0.006 * z) < LEVEL
    # The same radius with another angle: uncorrelated, but its squares are not.
    words = zk.random_words(1 << 20, seed=0, direction=0, stream=0).view(-1, 4)
    first, _ = reference.box_muller(words[:, 0], words[:, 1])
    shared, _ = reference.box_muller(words[:, 0], words[:, 2])
    assert abs((first * shared).mean().item()) < 0.01 and correlation(first, shared) < LEVEL
    uniform = zk.random_words(1 << 18, seed=0, direction=0, stream=0)
    assert independence(uniform >> 24, uniform >> 24 & 0xFF, 256) < LEVEL


def test_rounding_bits():
    """The 16 bits are uniform, and independent of the normal, of the neighbour, and in halves.

    A pair's two values are byte swaps of each other by definition, so only each on its own, and
    pairs among each other, are independent.
    """
    address = {"seed": 6, "direction": 7, "stream": 8}
    words, z = zk.random_words(CHUNK, **address), zk.normal(CHUNK, **address)
    random = rounding_bits(words)
    for place in range(4):
        own = random[place::4]
        counts = torch.bincount(own, minlength=1 << 16).double()
        expected = len(own) / (1 << 16)
        statistic = ((counts - expected).square() / expected).sum().item()
        assert LEVEL < stats.chi2.sf(statistic, (1 << 16) - 1) < 1 - LEVEL
        quantile = (torch.special.ndtr(z[place::4].double()) * 256).long().clamp_(0, 255)
        assert independence(own >> 8, quantile, 256) > LEVEL
        assert independence(own & 0xFF, quantile, 256) > LEVEL
        assert independence(own >> 8, own & 0xFF, 256) > LEVEL
    assert independence(random[0::4] >> 8, random[2::4] >> 8, 256) > LEVEL
    # Bits that depend on the normal are seen.
    assert independence(words[0::4] >> 24, (z[0::4].abs() * 32).long().clamp_(0, 255), 256) < LEVEL
