"""Held weights: perturbed in place, and had back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from helpers import (
    DTYPES,
    FEW,
    NAMES,
    PLACES,
    STREAMS,
    assert_borders_intact,
    assert_same_bits,
    bordered,
    interpreted,
    runnable,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

import zo_kernels as zk
from zo_kernels.backends import reference_updates
from zo_kernels.noise import DISTRIBUTIONS
from zo_kernels.ops import Held
from zo_kernels.ops.dispatch import backend_for

SEED, DIRECTION = 2**63 + 99, 2**31 - 1


def plain(tensors, scales, offsets, distribution, **options):
    """The same perturbation out of place, by the reference."""
    out = [t.cpu().clone() for t in tensors]
    zk.combine_(
        out, out, [[s] for s in scales], seed=SEED, directions=[DIRECTION],
        streams=STREAMS[: len(out)], offsets=offsets, distribution=distribution,
        backend="reference", **options,
    )  # fmt: skip
    return out


def hold(tensors, scales, offsets, distribution, backend):
    return Held(
        tensors, scales, seed=SEED, direction=DIRECTION, streams=STREAMS[: len(tensors)],
        offsets=offsets, distribution=distribution, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("eps", [0.0, 1e-3, 3.0, 1e30])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_both_points_and_the_way_back(backend, device, dtype, distribution, eps):
    """Weights of all magnitudes, zeros, subnormals, infinities and NaN among them."""
    places = FEW if interpreted(backend, device) else PLACES
    if interpreted(backend, device) and eps in (0.0, 3.0) and dtype != torch.bfloat16:
        pytest.skip("the interpreter is slow: bfloat16 has this")
    made = [bordered(weights(n, dtype, n), device, shift=n % 3) for n, _ in places]
    tensors, offsets = [v for _, v in made], [o for _, o in places]
    before = [t.cpu().clone() for t in tensors]
    scales = [eps * (1 + 0.1 * i) for i in range(len(tensors))]
    held = hold(tensors, scales, offsets, distribution, backend)
    for got, want in zip(tensors, plain(before, scales, offsets, distribution), strict=True):
        assert_same_bits(got, want, "plus")
    held.swap_([-s for s in scales])
    points = plain(before, [-s for s in scales], offsets, distribution)
    for got, want in zip(tensors, points, strict=True):
        assert_same_bits(got, want, "minus")
    held.release_()
    for (buffer, view), want in zip(made, before, strict=True):
        assert_same_bits(view, want, "restored")
        assert_borders_intact(buffer, view)
    with pytest.raises(RuntimeError, match="expected tensors that are held, got released ones"):
        held.swap_(scales)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_the_update_joins_the_way_back(backend, device, dtype, distribution, rounding):
    places = FEW if interpreted(backend, device) else PLACES
    originals = [weights(n, dtype, n) for n, _ in places]
    originals[2] = torch.randn(originals[2].shape).to(dtype)
    tensors, offsets = [w.clone().to(device) for w in originals], [o for _, o in places]
    count = len(tensors)
    held = hold(tensors, [1e-2] * count, offsets, distribution, backend)
    held.swap_([-1e-2] * count)
    update = [1e-4 * (1 + i) for i in range(count)]
    changes = torch.empty(count, 3, dtype=torch.float64, device=device)
    held.release_(update, src_scale=0.99, rounding=rounding, changes=changes)
    reported = torch.empty(count, 3, dtype=torch.float64)
    expected = plain(
        originals, update, offsets, distribution, src_scale=0.99, rounding=rounding,
        changes=reported,
    )  # fmt: skip
    for got, want in zip(tensors, expected, strict=True):
        assert_same_bits(got, want)
    assert torch.allclose(changes[2, :2].cpu(), reported[2, :2], rtol=1e-5, atol=0)
    assert torch.equal(changes[2, 2].cpu(), reported[2, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("share", [0.33, 1.0])
def test_many_zeros(backend, device, dtype, share):
    """Each zero needs its whole value; never more memory than about a copy."""
    generator = torch.Generator().manual_seed(1)
    count = 20_000 if interpreted(backend, device) else 70_000
    w = 0.02 * torch.randn(count, generator=generator)
    w[torch.rand(count, generator=generator) < share] = 0.0
    w[::7] = -w[::7]  # zeros of both signs
    w = w.to(dtype)
    tensor = w.clone().to(device)
    held = hold([tensor], [1e-3], [0], "normal", backend)
    assert held.nbytes <= w.nbytes + 4096
    held.swap_([-1e-3])
    assert held.nbytes <= w.nbytes + 4096
    held.release_()
    assert_same_bits(tensor, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_tenth_of_a_byte_per_weight(isa, dtype):
    generator = torch.Generator().manual_seed(1)
    w = (0.02 * torch.randn(1 << 20, generator=generator)).to(dtype)
    tensor = w.clone()
    held = hold([tensor], [1e-3], [0], "normal", "native")
    assert 0.05 * w.numel() < held.nbytes <= 0.10 * w.numel()
    held.swap_([-1e-3])
    assert 0.05 * w.numel() < held.nbytes <= 0.10 * w.numel()
    held.release_()
    assert held.nbytes == 0
    assert_same_bits(tensor, w)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_every_weight_comes_back_from_every_scale(isa, dtype, distribution):
    """All 65536 patterns at scales from far below to far above them."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for exponent in range(-30, 20, 3 if dtype == torch.float16 else 5):
        tensor = patterns.clone()
        held = hold([tensor], [2.0**exponent * 1.3], [0], distribution, "native")
        held.swap_([-(2.0**exponent) * 1.3])
        held.release_()
        assert_same_bits(tensor, patterns, exponent)


def test_bad_arguments_leave_the_weights():
    w = torch.randn(8)
    before = w.clone()
    options = {"seed": 0, "direction": 0, "streams": [1]}
    with pytest.raises(ValueError, match=r"scales: expected 1 \(one per tensor of tensors\)"):
        Held([w], [1.0, 2.0], **options)
    with pytest.raises(ValueError, match=r"streams\[0\]: expected 0 <= streams\[0\] < 2\^32"):
        Held([w], [1.0], seed=0, direction=0, streams=[2**32])
    assert torch.equal(w, before)
    held = Held([w], [1.0], **options)
    perturbed = w.clone()
    with pytest.raises(ValueError, match="scales: expected them together with src_scale"):
        held.release_(rounding="stochastic")
    with pytest.raises(ValueError, match=r"scales\[0\]: expected a finite float32 value, got nan"):
        held.swap_([float("nan")])
    with pytest.raises(ValueError, match="rounding: expected 'nearest' or 'stochastic', got 'up'"):
        held.release_([1.0], rounding="up")
    assert torch.equal(w, perturbed)
    held.release_()
    assert torch.equal(w, before)


@pytest.fixture
def mixed(device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors of two dtypes, one of which no mode can hold but by a copy; and what they are."""
    generator = torch.Generator().manual_seed(2)
    before = [
        (0.02 * torch.randn(1100, generator=generator)).bfloat16(),
        weights(300, torch.bfloat16),
        0.02 * torch.randn(520, generator=generator),
    ]
    return [w.clone().to(device) for w in before], before


def failing_at_the_second_call(work: Callable) -> Callable:
    calls = count()

    def swap_(*arguments, **options):
        if next(calls) == 1:
            raise MemoryError("none left")
        return work(*arguments, **options)

    return swap_


@pytest.mark.parametrize("step", ["hold", "swap", "release"])
def test_the_way_back_from_a_failure_at_the_second_dtype(backend, device, mixed, monkeypatch, step):
    """The first dtype has its new scales then, the second its old ones, or w."""
    tensors, before = mixed
    room = backend_for(torch.device(device), backend)
    work = room.swap_
    scales, offsets = [1e-2, 2e-2, 3e-2], [0, 3, 5]
    if step != "hold":
        held = hold(tensors, scales, offsets, "normal", backend)
        perturbed = [t.cpu().clone() for t in tensors]
    monkeypatch.setattr(room, "swap_", failing_at_the_second_call(work))
    with pytest.raises(MemoryError, match="none left"):
        if step == "hold":
            hold(tensors, scales, offsets, "normal", backend)
        elif step == "swap":
            held.swap_([-s for s in scales])
        else:
            held.release_()
    monkeypatch.setattr(room, "swap_", work)
    if step == "swap":
        minus = plain(before, [-s for s in scales], offsets, "normal")
        for got, want in zip(tensors, [*minus[:2], perturbed[2]], strict=True):
            assert_same_bits(got, want)
        held.swap_(scales)
    if step == "release":
        for got, want in zip(tensors, [*before[:2], perturbed[2]], strict=True):
            assert_same_bits(got, want)
        with pytest.raises(RuntimeError, match="expected tensors that are held, got released ones"):
            held.swap_(scales)
    if step != "hold":
        held.release_()
    for got, want in zip(tensors, before, strict=True):
        assert_same_bits(got, want)


def test_the_reference_puts_back_what_it_cannot_hold(monkeypatch):
    """At the second tensor of one dtype, when the first is perturbed."""
    before = [torch.randn(8), torch.randn(5)]
    tensors = [w.clone() for w in before]
    work = reference_updates.advance_
    monkeypatch.setattr(reference_updates, "advance_", failing_at_the_second_call(work))
    with pytest.raises(MemoryError, match="none left"):
        hold(tensors, [1.0, 1.0], [0, 0], "normal", "reference")
    for got, want in zip(tensors, before, strict=True):
        assert_same_bits(got, want)


class OutOfMemory(TorchDispatchMode):
    """The n-th operation that allocates fails, but for those of launches."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left, self.launching = n, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        allocates = all(output.alias_info is None for output in function._schema.returns)
        if allocates and not self.launching:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("none left")
        return function(*args, **kwargs or {})

    @contextmanager
    def on(self, device):
        """In place of ``launch.on``, which surrounds launches."""
        self.launching = True
        yield
        self.launching = False


@pytest.mark.parametrize("step", ["hold", "swap"])
def test_no_allocation_of_a_gpu_pass_loses_the_way_back(step, monkeypatch):
    """Each third fails in turn, in the interpreter, and the tensors hold what they held. One of
    them keeps regions, one a copy, and one finds its regions too small."""
    runnable("triton")
    if torch.cuda.is_available():
        pytest.skip("in the interpreter only")
    from zo_kernels.backends.triton import held as room
    from zo_kernels.backends.triton import launch

    capacities = room._capacities

    def too_small(state, exact):
        found = capacities(state, exact)
        found[0] = 0
        return found

    generator = torch.Generator().manual_seed(2)
    before = [(0.02 * torch.randn(n, generator=generator)).bfloat16() for n in (100, 70)]
    before.append(weights(40, torch.bfloat16))
    tensors = [w.clone() for w in before]
    scales, offsets = [1e-3, 2e-3, 3e-2], [0, 3, 5]
    if step == "swap":
        held = hold(tensors, scales, offsets, "normal", "triton")
    holding = [t.clone() for t in tensors]
    room._foreseen.clear()
    for n in count(1, 3):
        mode = OutOfMemory(n)
        with monkeypatch.context() as patch, mode:
            patch.setattr(launch, "on", mode.on)
            patch.setattr(room, "_capacities", too_small)
            try:
                if step == "swap":
                    held.swap_([-s for s in scales])
                else:
                    held = hold(tensors, scales, offsets, "normal", "triton")
                break
            except MemoryError:
                pass
        for got, want in zip(tensors, holding, strict=True):
            assert_same_bits(got, want, n)
    assert n > 20 and set(held._parts[0].store.copies) == {0, 2}
    held.release_()
    for got, want in zip(tensors, before, strict=True):
        assert_same_bits(got, want)
