"""swap under emulation; emulated.py says what that proves."""

from __future__ import annotations

import ctypes
import functools
import math

import pytest
import torch
from emulated import EMULATED, RANGES, SEED, STREAM, all_patterns, job_of, kernels_of
from helpers import DTYPES, NAMES, assert_borders_intact, assert_same_bits, bordered, weights
from torch import Tensor

import zo_kernels as zk
from zo_kernels.backends.native import DISTRIBUTION_CODES, DTYPE_CODES

HOLD, SWAP, RELEASE, RELEASE_STOCHASTIC = range(4)  # csrc/dispatch.h
DIRECTION = 2**31 + 1


@pytest.fixture(scope="module", params=EMULATED)
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels of one instruction set, compiled against the emulation."""
    return kernels_of(request.param)


class Held:
    """One piece of a tensor, perturbed in place by one instruction set's kernels."""

    def __init__(self, kernels, tensor, begin, scale, distribution) -> None:
        self.kernels, self.tensor, self.begin = kernels, tensor, begin
        self.codes = DISTRIBUTION_CODES[distribution], DTYPE_CODES[tensor.dtype]
        self.lists, self.scale = None, 0.0
        self.swap(scale)

    def swap(self, scale: float) -> None:
        kept = self.kernels.exceptions_new()
        self._run(HOLD if self.lists is None else SWAP, [scale], kept)
        self._drop()
        self.lists, self.scale = kept, scale

    def release(self, scales=None, src_scale=1.0, stochastic=False, changes=None) -> None:
        what = RELEASE_STOCHASTIC if stochastic else RELEASE
        self._run(what, scales, None, src_scale=src_scale, changes=changes)
        self._drop()

    def is_copy(self) -> bool:
        return bool(self.kernels.exceptions_are_a_copy(self.lists))

    def data(self) -> bytes:
        """All that is kept."""
        count = self.kernels.exceptions_bytes(self.lists)
        return ctypes.string_at(self.kernels.exceptions_data(self.lists), count)

    def _run(self, what, scales, kept, **options) -> None:
        count = self.tensor.numel()
        job = job_of(self.begin, count, [DIRECTION], scales, dst=self.tensor, **options)
        job.held, job.kept, job.held_scale = self.lists, kept, self.scale
        self.kernels.swap_job(job, *self.codes, what)

    def _drop(self) -> None:
        if self.lists is not None:
            self.kernels.exceptions_delete(self.lists)
        self.lists = None


def combined(before, begin, scale, distribution, **options) -> Tensor:
    """The same perturbation or update out of place, by the reference."""
    out = torch.empty_like(before)
    zk.combine_(
        [out], [before], [scale], seed=SEED, directions=[DIRECTION], streams=[STREAM],
        offsets=[begin], distribution=distribution, backend="reference", **options,
    )  # fmt: skip
    return out


@functools.cache
def points(dtype, distribution, eps) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Ragged ranges with their plus and minus points; the same for every instruction set."""
    made = []
    for i, (begin, end) in enumerate(RANGES):
        before = weights(end - begin, dtype, seed=i)
        plus, minus = (combined(before, begin, s, distribution) for s in (eps, -eps))
        made.append((begin, before, plus, minus))
    return made


@pytest.mark.parametrize("eps", [0.0, 1e-3, 3.0, 1e30])
@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_both_points_and_the_way_back(kernels, dtype, distribution, eps):
    """Ragged ranges with zeros, subnormals, infinities and NaN among the weights."""
    for begin, before, plus, minus in points(dtype, distribution, eps):
        buffer, view = bordered(before)
        held = Held(kernels, view, begin, eps, distribution)
        assert_same_bits(view, plus, begin)
        held.swap(-eps)
        assert_same_bits(view, minus, begin)
        held.release()
        assert_same_bits(view, before, begin)
        assert_borders_intact(buffer, view)


@functools.cache
def updates(dtype, distribution, stochastic) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Ragged ranges after an update from the unperturbed weights, and its change statistics."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for begin, end in RANGES:
        before = (0.02 * torch.randn(end - begin, generator=generator)).to(dtype)
        changes = torch.empty(1, 3, dtype=torch.float64)
        after = combined(
            before, begin, 1e-4, distribution, src_scale=0.99, changes=changes,
            rounding="stochastic" if stochastic else "nearest",
        )  # fmt: skip
        made.append((begin, before, after, changes))
    return made


@pytest.mark.parametrize("measured", [False, True], ids=["unmeasured", "measured"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_the_update_joins_the_way_back(kernels, dtype, distribution, stochastic, measured):
    for begin, before, after, wanted in updates(dtype, distribution, stochastic):
        buffer, view = bordered(before)
        held = Held(kernels, view, begin, 1e-2, distribution)
        held.swap(-1e-2)
        changes = torch.full_like(wanted, math.nan) if measured else None
        held.release([1e-4], 0.99, stochastic, changes)
        assert_same_bits(view, after, begin)
        assert_borders_intact(buffer, view)
        if measured:
            torch.testing.assert_close(changes[:, :2], wanted[:, :2], rtol=1e-5, atol=0.0)
            assert changes[0, 2] == wanted[0, 2], begin


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_copies(kernels, dtype):
    """Mostly zeros, each of which takes its whole value: from a list to a copy, and back.

    A perturbation by 0 takes little, for all that is flagged has its code.
    """
    generator = torch.Generator().manual_seed(1)
    before = 0.02 * torch.randn(3001, generator=generator)
    before[torch.rand(3001, generator=generator) < 0.9] = 0.0
    before[::7] = -before[::7]  # zeros of both signs
    before = before.to(dtype)
    for begin in (0, 4095):
        buffer, view = bordered(before)
        held = Held(kernels, view, begin, 0.0, "normal")
        assert not held.is_copy()
        for scale, is_copy in ((1e-3, True), (-1e-3, True), (0.0, False), (1e-3, True)):
            held.swap(scale)
            assert held.is_copy() == is_copy, scale
            assert_same_bits(view, combined(before, begin, scale, "normal"), (begin, scale))
        held.release()
        assert_same_bits(view, before, begin)
        assert_borders_intact(buffer, view)


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_every_weight_comes_back(kernels, dtype, distribution):
    """All 65536 patterns, a whole piece, at scales from far below to far above them."""
    patterns = all_patterns(dtype)
    for eps in (1e-6, 2e-3, 1.3, 3e4):
        tensor = patterns.clone()
        held = Held(kernels, tensor, 2**16, eps, distribution)
        held.swap(-eps)
        held.release()
        assert_same_bits(tensor, patterns, eps)


@pytest.mark.parametrize("distribution", DISTRIBUTION_CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_what_is_kept(kernels, dtype, distribution):
    """The strays, escapes and codes of the scalar kernels, byte for byte."""
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-16, 1, (5000,), generator=generator)
    before = (torch.randn(5000, generator=generator) * 2.0**exponents).to(dtype)
    before[::50] = 0.0
    kept = {}
    for name, library in (("scalar", kernels_of("scalar")), ("this", kernels)):
        tensor = before.clone()
        held = Held(library, tensor, 77, 1e-2, distribution)
        first = held.data()
        assert not held.is_copy()
        held.swap(-3e-2)
        kept[name] = first, held.data()
        held.release()
        assert_same_bits(tensor, before, name)
    assert kept["this"] == kept["scalar"]
    assert min(map(len, kept["this"])) > 500
