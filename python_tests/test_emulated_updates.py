"""pair and advance under emulation; emulated.py says what that proves."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import pytest
import torch
from emulated import EMULATED, RANGES, SEED, STREAM, job_of, kernels_of
from helpers import DTYPES, NAMES, assert_borders_intact, assert_same_bits, bordered, weights
from test_updates import updates_of
from torch import Tensor

from zo_kernels.backends.native import DISTRIBUTION_CODES, DTYPE_CODES
from zo_kernels.ops import advance_, pair_

ROUNDINGS = {"nearest": 0, "stochastic": 1, "residual": 2}  # csrc/dispatch.h
KINDS = [(dtype, rounding) for dtype in DTYPES for rounding in ROUNDINGS]
# float32 rounds to nearest whatever is asked, and has no residuals.
KINDS = [(d, r) for d, r in KINDS if d != torch.float32 or r == "nearest"]
# 16 directions are prepared: the third list goes beyond within an update, and begins one there.
LENGTHS = [(1,), (2, 1, 3), (15, 3, 1)]


@pytest.fixture(scope="module", params=EMULATED)
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels of one instruction set, compiled against the emulation."""
    return kernels_of(request.param)


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_pair(kernels, dtype, distribution):
    for i, (begin, end) in enumerate(RANGES):
        source, scale = weights(end - begin, dtype, seed=i), (1e-2, -3.0, 0.0)[i % 3]
        wanted = torch.empty_like(source), torch.empty_like(source)
        pair_(
            [wanted[0]], [wanted[1]], [source], [scale], seed=SEED, direction=2**32 - 1 - i,
            streams=[STREAM], offsets=[begin], distribution=distribution, backend="reference",
        )  # fmt: skip
        made = [bordered(tensor) for tensor in (source, *(torch.zeros_like(w) for w in wanted))]
        src, plus, minus = (view for _, view in made)
        kernels.pair_job(
            job_of(begin, end - begin, [2**32 - 1 - i], [scale], src=src, dst=plus, other=minus),
            DISTRIBUTION_CODES[distribution],
            DTYPE_CODES[dtype],
        )
        for got, want in zip((src, plus, minus), (source, *wanted), strict=True):
            assert_same_bits(got, want, (begin, end))
        for buffer, view in made:
            assert_borders_intact(buffer, view)


class Case(NamedTuple):
    """A range before and after the updates, with its change statistics if they are asked for."""

    begin: int
    before: Tensor
    residual: Tensor
    expected: Tensor
    rests: Tensor
    changes: Tensor | None


@functools.cache
def advance_cases(dtype, rounding, distribution, lengths) -> list[Case]:
    """What the reference makes of ragged ranges; the same for every instruction set.

    Half of the ranges hold special values. They have no statistics, which would be NaN; that
    asking for statistics changes no bit, the others show.
    """
    generator = torch.Generator().manual_seed(4)
    cases = []
    for i, (begin, end) in enumerate(RANGES):
        before, changes = weights(end - begin, dtype, seed=i), None
        if i % 2 == 0:
            before = (0.02 * torch.randn(end - begin, generator=generator)).to(dtype)
            changes = torch.full((1, 3), math.nan, dtype=torch.float64)
        residual = torch.randint(-128, 128, (end - begin,), generator=generator).to(torch.int8)
        case = Case(begin, before, residual, before.clone(), residual.clone(), changes)
        joined = rounding == "residual"
        advance_(
            [case.expected], updates_of(1, lengths), residuals=[case.rests] if joined else None,
            seed=SEED, streams=[STREAM], offsets=[begin], distribution=distribution,
            rounding="nearest" if joined else rounding, changes=changes, backend="reference",
        )  # fmt: skip
        cases.append(case)
    return cases


def run_advance(kernels, updates, begin, distribution, rounding, tensor, rest, changes) -> None:
    """One job, as csrc/bindings.cpp would make it."""
    directions = [k for update in updates for k in update.directions]
    scales = [scale for update in updates for scale in update.scales[0]]
    count = len(updates)
    job = job_of(begin, tensor.numel(), directions, scales, dst=tensor, other=rest, changes=changes)
    job.updates = count
    job.lengths = (ctypes.c_int * count)(*(len(update.directions) for update in updates))
    job.src_scales = (ctypes.c_float * count)(*(update.src_scale for update in updates))
    kernels.advance_job(
        job, DISTRIBUTION_CODES[distribution], DTYPE_CODES[tensor.dtype], ROUNDINGS[rounding]
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype, rounding", KINDS, ids=lambda x: NAMES.get(x, x))
def test_advance(kernels, dtype, rounding, distribution, lengths):
    """All bits of weights and residuals, and the statistics; nothing outside is written."""
    updates = updates_of(1, lengths)
    for case in advance_cases(dtype, rounding, distribution, lengths):
        buffer, view = bordered(case.before)
        rest_buffer, rest = bordered(case.residual)
        changes = None if case.changes is None else torch.full_like(case.changes, math.nan)
        run_advance(
            kernels, updates, case.begin, distribution, rounding, view,
            rest if rounding == "residual" else None, changes,
        )  # fmt: skip
        assert_same_bits(view, case.expected, case.begin)
        assert torch.equal(rest, case.rests), case.begin
        assert_borders_intact(buffer, view)
        assert_borders_intact(rest_buffer, rest)
        if changes is not None:
            torch.testing.assert_close(changes[:, :2], case.changes[:, :2], rtol=1e-5, atol=0.0)
            assert changes[0, 2] == case.changes[0, 2], case.begin
