"""combine, emit and the noise itself under emulation; emulated.py says what that proves."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import pytest
import torch
from emulated import (
    FLAGS,
    RANGES,
    SEED,
    STREAM,
    all_patterns,
    job_of,
    kernels_of,
    pointer,
    rounding_patterns,
)
from helpers import (
    DTYPES,
    NAMES,
    assert_borders_intact,
    assert_same_bits,
    bits,
    bordered,
    weights,
)
from test_noise import KNOWN_ANSWERS

import zo_kernels as zk
from zo_kernels.backends import reference
from zo_kernels.backends.native import DISTRIBUTION_CODES, DTYPE_CODES


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels of one instruction set, compiled against the emulation."""
    return kernels_of(request.param)


class Job(NamedTuple):
    """What both sides compute for one range: the address of its first element, and the rest."""

    begin: int
    directions: list[int]
    scales: list[float]
    src_scale: float
    stochastic: bool
    distribution: str = "normal"


def run_combine(kernels, src, dst, job, changes=None) -> None:
    """One job, as csrc/parallel.cpp would hand it over."""
    kernels.combine_job(
        job_of(
            job.begin, src.numel(), job.directions, job.scales,
            src_scale=job.src_scale, src=src, dst=dst, changes=changes,
        ),
        DISTRIBUTION_CODES[job.distribution],
        DTYPE_CODES[src.dtype],
        DTYPE_CODES[dst.dtype],
        int(job.stochastic),
    )  # fmt: skip


def expect_combine(src, dtype, job, changes=None) -> torch.Tensor:
    out = torch.empty_like(src, dtype=dtype)
    zk.combine_(
        [out],
        [src],
        job.scales,
        seed=SEED,
        directions=job.directions,
        streams=[STREAM],
        offsets=[job.begin],
        rounding="stochastic" if job.stochastic else "nearest",
        src_scale=job.src_scale,
        distribution=job.distribution,
        changes=changes,
        backend="reference",
    )
    return out


@pytest.mark.parametrize("begin, end", RANGES)
def test_words_normals_and_signs(kernels, begin, end):
    """Element order of words, normals and signs over ragged ranges, writing nothing outside."""
    address = {"seed": SEED, "direction": 2**31, "stream": STREAM, "offset": begin}
    expected = {
        -1: zk.random_words(end - begin, **address, backend="reference"),
        DISTRIBUTION_CODES["normal"]: zk.normal(end - begin, **address, backend="reference"),
        DISTRIBUTION_CODES["rademacher"]: zk.rademacher(
            end - begin, **address, backend="reference"
        ),
    }
    for code, values in expected.items():
        buffer, out = bordered(torch.zeros(end - begin))
        kernels.emit_job(job_of(begin, end - begin, [2**31], dst=out), code)
        if code < 0:
            assert torch.equal(out.view(torch.int32).long() & 0xFFFFFFFF, values)
        else:
            assert_same_bits(out, values)
        assert_borders_intact(buffer, out)


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers_of_random123(kernels, counter, key, words):
    """The published vectors, whose blocks lie beyond any element index, on the inner function."""
    out = (ctypes.c_uint32 * 4)()
    block, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    stream, direction = (ctypes.c_uint32(word) for word in counter[2:])
    kernels.philox_block(ctypes.c_uint64(block), ctypes.c_uint64(seed), stream, direction, out)
    assert tuple(out) == words


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dst_dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("src_dtype", DTYPES, ids=NAMES.get)
def test_combine(kernels, src_dtype, dst_dtype, stochastic, distribution):
    """All dtype pairs and roundings over ragged, misaligned ranges with special values."""
    for i, (begin, end) in enumerate(RANGES):
        source = weights(end - begin, src_dtype, seed=i)
        directions, scales = ([5], [1e-2]) if i % 2 else ([5, 2**32 - 1, 7], [1e-2, -3e-3, 0.5])
        job = Job(begin, directions, scales, 1.0 if i % 3 else 0.875, stochastic, distribution)
        expected = expect_combine(source, dst_dtype, job)
        src_buffer, src = bordered(source)
        dst_buffer, dst = bordered(torch.empty_like(expected))
        run_combine(kernels, src, dst, job)
        assert_same_bits(dst, expected, (begin, end))
        assert_borders_intact(src_buffer, src)
        assert_borders_intact(dst_buffer, dst)


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
def test_more_directions_than_are_prepared(kernels, distribution):
    """19 directions, three beyond those whose part outside the inner loop is kept (16)."""
    directions, scales = list(range(19)), [1e-3 * (k + 1) for k in range(19)]
    source = weights(600, torch.bfloat16)
    job = Job(4096 - 300, directions, scales, 0.999, True, distribution)
    out = torch.empty_like(source)
    run_combine(kernels, source, out, job)
    assert_same_bits(out, expect_combine(source, torch.bfloat16, job))


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dst_dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("src_dtype", DTYPES, ids=NAMES.get)
def test_changes(kernels, src_dtype, dst_dtype, distribution):
    """The statistics of each range alone, in and out of place; asking for them changes no bit."""
    lost = 0
    for i, (begin, end) in enumerate(RANGES):
        generator = torch.Generator().manual_seed(i)
        source = (0.02 * torch.randn(end - begin, generator=generator)).to(src_dtype)
        directions, scales = ([5], [2e-5]) if i % 2 else ([5, 7], [1e-5, 2e-5])
        job = Job(begin, directions, scales, 1.0, i % 3 == 0, distribution)
        wanted, got = (torch.full((1, 3), math.nan, dtype=torch.float64) for _ in range(2))
        expected = expect_combine(source, dst_dtype, job, wanted)
        in_place = src_dtype == dst_dtype and i % 4 > 1
        src = source.clone()
        buffer, dst = bordered(src if in_place else torch.empty_like(expected))
        run_combine(kernels, dst if in_place else src, dst, job, got)
        assert_same_bits(dst, expected, (begin, end))
        assert_borders_intact(buffer, dst)
        torch.testing.assert_close(got[:, :2], wanted[:, :2], rtol=1e-5, atol=0.0)
        assert got[0, 2] == wanted[0, 2], (begin, end)
        lost += int(got[0, 2])
    if torch.float32 not in (src_dtype, dst_dtype):
        assert lost > 100
    elif dst_dtype == torch.float32:
        assert lost == 0


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_subnormal_results(kernels, dtype, stochastic):
    """Results around and below the smallest normal number, alone and beside normal ones.

    vcvtneps2bf16 would flush them; the wrapper must take its integer path.
    """
    tiny = torch.finfo(dtype).tiny
    generator = torch.Generator().manual_seed(5)
    values = (torch.rand(1024, generator=generator).double() * 4 - 2) * tiny
    values[512:768] += torch.sign(values[512:768]) * 4 * tiny  # whole vectors of normal numbers
    source = values.float()
    job = Job(0, [1], [tiny / 64], 1.0, stochastic)
    expected = expect_combine(source, dtype, job)
    out = torch.empty_like(expected)
    run_combine(kernels, source, out, job)
    assert_same_bits(out, expected)
    assert ((expected != 0) & (expected.abs() < tiny)).sum() > 100


def test_every_rounding_of_half_and_bfloat16(kernels):
    """fp32 to 16 bits for ties and their neighbours at every exponent; all 16-bit patterns."""
    patterns = rounding_patterns()
    source = torch.where(patterns >> 31 == 1, patterns - (1 << 32), patterns)
    source = source.int().view(torch.float32)
    job = Job(0, [0], [0.0], 1.0, False)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty_like(source, dtype=dtype)
        run_combine(kernels, source, out, job)
        # -0 + 0 z may be +0, so zeros are compared without their sign.
        expected = source.to(dtype)
        nonzero = source != 0
        assert_same_bits(out[nonzero], expected[nonzero], dtype)
        assert (out[~nonzero] == 0).all()
        everything = all_patterns(dtype)
        out = torch.empty(2**16)
        run_combine(kernels, everything, out, job)
        nonzero = everything != 0
        assert_same_bits(out[nonzero], everything.float()[nonzero], dtype)


def test_all_radii(kernels):
    """All 2^24 radii are finite, 0 only at u = 1, near the truth and falling as u grows.

    At angle 0 the cosine is the polynomial's constant, so the normal is the radius. Monotone
    within rounding: never above its predecessor by more than 3 units in the last place (as
    measured). The radius is within 2^-17.75 of float64 (fits: 2^-17.88, measured 2^-17.80).
    Exhaustive for the scalar kernels; the others give their bits at both ends.
    """
    count = 1 << 24
    if kernels.isa_name() != b"scalar":
        words = torch.cat([torch.arange(1 << 14), torch.arange(count - (1 << 14), count)]) << 8
        a, b = words.int(), torch.full((1 << 15,), 0x40000000, dtype=torch.int32)
        radius, sine = torch.empty(1 << 15), torch.empty(1 << 15)
        kernels.box_muller_pairs(
            pointer(a), pointer(b), pointer(radius), pointer(sine), ctypes.c_uint64(1 << 15)
        )
        z0, z1 = reference.box_muller(words, b.long())
        assert_same_bits(radius, z0)
        assert_same_bits(sine, z1)
        return
    a = torch.arange(count).mul_(256).int()  # as bit patterns: the cast keeps the low 32 bits
    b = torch.full_like(a, 0x40000000)
    radius, sine = torch.empty(count), torch.empty(count)
    kernels.box_muller_pairs(
        pointer(a), pointer(b), pointer(radius), pointer(sine), ctypes.c_uint64(count)
    )
    assert torch.isfinite(radius).all() and torch.isfinite(sine).all()
    assert (radius >= 0).all() and (radius == 0).nonzero().tolist() == [[count - 1]]
    assert (bits(radius).diff() <= 3).all()
    for part in (slice(0, 1 << 20), slice(7 << 20, 9 << 20), slice(count - (1 << 20), count - 1)):
        u = ((torch.arange(count)[part] << 8) | 0x80).float().double() / 2**32
        exact = torch.sqrt(-2 * torch.log(u)) * float.fromhex("0x1.ffff2p-1")
        assert ((radius[part] / exact - 1).abs() <= 2**-17.75).all()
    sample = torch.cat([torch.arange(1 << 14), torch.arange(count - (1 << 14), count)])
    words = sample << 8
    z0, z1 = reference.box_muller(words, torch.full_like(words, 0x40000000))
    assert_same_bits(radius[sample], z0)
    assert_same_bits(sine[sample], z1)
    assert abs(radius[0].item() / math.sqrt(50 * math.log(2)) - 1) < 2**-16.4
