"""fake_quant under emulation; emulated.py says what that proves."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager

import pytest
import torch
from emulated import FLAGS, SEED, STREAM, QuantJob, all_patterns, kernels_of, pointer
from emulated import job_of as perturbation_of
from helpers import DTYPES, NAMES, assert_same_bits
from test_fake_quant import CASES, IDS, hard_weights

import zo_kernels as zk
from zo_kernels.backends import reference
from zo_kernels.backends.native import DISTRIBUTION_CODES, DTYPE_CODES, FORMAT_CODES
from zo_kernels.formats import FORMATS


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels of one instruction set, compiled against the emulation."""
    return kernels_of(request.param)


def job_of(scheme, group, tensor, symmetric, *, out=None, scales=None, ends=None) -> QuantJob:
    form = FORMATS[scheme]
    address = {"dst": out, "scales": scales, "lows": None, "highs": None}
    if ends is not None:
        address |= {"lows": ends[0], "highs": ends[1]}
    return QuantJob(
        src=tensor.data_ptr(),
        groups=tensor.numel() // group,
        group=group,
        top=form.top(symmetric),
        mantissa=form.mantissa,
        min_exponent=form.min_exponent,
        power_of_two=form.scale == "power_of_two",
        **{name: None if t is None else t.data_ptr() for name, t in address.items()},
    )


def run(kernels, scheme, group, tensor, symmetric=True, **tensors) -> torch.Tensor:
    """One job; the ends it found."""
    ends = torch.zeros(2)
    kernels.fake_quant_job(
        ctypes.byref(job_of(scheme, group, tensor, symmetric, **tensors)),
        DTYPE_CODES[tensor.dtype],
        FORMAT_CODES[FORMATS[scheme].kind, symmetric],
        pointer(ends),
    )
    return ends


@pytest.fixture
def through(kernels, monkeypatch):
    """Lets these kernels stand in for the reference's, one job for a tensor, within a block."""

    def fake_quant(out, tensor, scheme, *, group, symmetric, scales=None):
        run(kernels, scheme, group, tensor, symmetric, out=out, scales=scales)

    @contextmanager
    def these():
        with monkeypatch.context() as patched:
            patched.setattr(reference, "fake_quant", fake_quant)
            yield

    return these


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scheme, options", CASES, ids=IDS)
def test_bits(through, scheme, options, dtype):
    """Groups of all sizes, whole steps and ragged ones, in place; all kinds of weights."""
    for shape, sizes in (((3, 384), (16, 32, 64, 128, "row")), ((5, 57), (1, 3, "row"))):
        weight = hard_weights(*shape, dtype)
        for size in sizes:
            sized = {"group_size": size, "backend": "reference", **options}
            expected = zk.fake_quant(weight, scheme, **sized)
            got = weight.clone()
            with through():
                zk.fake_quant(got, scheme, out=got, **sized)
            assert_same_bits(got, expected, (shape, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ends(kernels, dtype, symmetric):
    """The least and the greatest element of each group and of all, 0 included; NaN and infinity."""
    weight = hard_weights(6, 57, dtype)
    ends, expected = torch.full((2, 6), 9.0), reference.group_ends(weight, group=57)
    found = run(kernels, "int4", 57, weight, symmetric, ends=ends)
    if symmetric:
        expected = torch.stack([torch.zeros(6), torch.maximum(-expected[0], expected[1])])
    assert torch.equal(ends, expected)
    assert torch.equal(found, torch.stack([expected[0].min(), expected[1].max()]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight[4, 31] = bad
        found = run(kernels, "int4", 57, weight, symmetric)
        assert not found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_nf4_of_every_16_bit_pattern(kernels, dtype):
    """The integer search against the division, at many scales; ends at the extremes too."""
    patterns = all_patterns(dtype)
    patterns = patterns[patterns.isfinite()]
    most = torch.tensor(
        [1.0, 1.9921875, 1.25, 0.0131, 3.7e-5, 6e-8, 40.0, 60000.0], dtype=torch.float64
    ).to(dtype)
    for scale in most:
        inside = patterns[patterns.abs() <= scale]
        rest = -len(inside) % 127
        rows = torch.cat([inside, inside.new_zeros(rest)]).view(-1, 127)
        weight = torch.cat([scale.expand(len(rows), 1), rows], 1).contiguous()
        expected = zk.fake_quant(weight, "nf4", group_size="row", backend="reference")
        out = torch.empty_like(weight)
        run(kernels, "nf4", 128, weight, out=out)
        assert_same_bits(out, expected, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
def test_perturbed_bits(kernels, distribution, dtype):
    """perturb_quant's blocks: ragged and whole ones, several of them, and ends beside them."""
    for scheme, symmetric, group, rows, begin in (
        ("int4", True, 128, 140, 5),
        ("int4", False, 57, 3, 0),
        ("nf4", True, 96, 5, 2**34 - 96 * 5),
        ("fp8_e4m3", True, 5000, 2, 4093),
    ):
        source = hard_weights(rows, group, dtype)
        noisy, out, ends = torch.empty_like(source), torch.empty_like(source), torch.zeros(2)
        zk.combine_(
            [noisy], [source], [0.01], seed=SEED, directions=[9], streams=[STREAM],
            offsets=[begin], distribution=distribution, backend="native",
        )  # fmt: skip
        options = {"symmetric": symmetric, "group_size": "row", "backend": "reference"}
        expected = zk.fake_quant(noisy, scheme, **options)
        noise = perturbation_of(begin, source.numel(), [9], [0.01], src=source, dst=out)
        job = job_of(scheme, group, out, symmetric, out=out)
        kernels.perturb_quant_job(
            ctypes.byref(noise),
            ctypes.byref(job),
            DISTRIBUTION_CODES[distribution],
            DTYPE_CODES[dtype],
            FORMAT_CODES[FORMATS[scheme].kind, symmetric],
            pointer(ends),
        )
        assert_same_bits(out, expected, scheme)
        low, high = noisy.float().min().clamp(max=0), noisy.float().max().clamp(min=0)
        wanted = [0.0, max(-low, high)] if symmetric else [low, high]
        assert torch.equal(ends, torch.tensor(wanted))
