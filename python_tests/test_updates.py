"""pair_ and advance_: the bits of combine_, in fewer draws and passes."""

from __future__ import annotations

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
    weights,
)

import zo_kernels as zk
from zo_kernels.backends import reference_updates
from zo_kernels.noise import DISTRIBUTIONS
from zo_kernels.ops import Update, advance_, pair_

SEED = 2**63 + 12345


def lists(dtype, device, backend):
    """Buffers with sentinels, the views in them, and where the views begin in their parameters."""
    places = FEW if interpreted(backend, device) else PLACES
    made = [bordered(weights(n, dtype, n), device, shift=n % 3) for n, _ in places]
    return [b for b, _ in made], [v for _, v in made], [o for _, o in places]


SCALES = [1e-3, -1e-3, 0.0, 2.0, 1e-2, 100.0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_pair_is_two_combinations(backend, device, dtype, distribution):
    _, src, offsets = lists(dtype, device, backend)
    options = {
        "seed": SEED, "streams": STREAMS[: len(src)], "offsets": offsets,
        "distribution": distribution,
    }  # fmt: skip
    scales = SCALES[: len(src)]
    plus_buffers, plus, _ = lists(dtype, device, backend)
    minus_buffers, minus, _ = lists(dtype, device, backend)
    before = [s.clone() for s in src]
    pair_(plus, minus, src, scales, direction=2**31, backend=backend, **options)
    for sign, got, buffers in ((1, plus, plus_buffers), (-1, minus, minus_buffers)):
        expected = [s.cpu().clone() for s in src]
        rows = [[sign * scale] for scale in scales]
        zk.combine_(expected, expected, rows, directions=[2**31], backend="reference", **options)
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(g, e, (sign, (len(got), offsets[i])))
            assert_borders_intact(buffers[i], g)
    for s, b in zip(src, before, strict=True):
        assert_same_bits(s, b)


def test_pair_refuses_bad_arguments():
    w = torch.zeros(4)
    options = {"seed": 0, "direction": 0, "streams": [1]}
    outs = [torch.zeros(4)], [torch.zeros(4)]
    with pytest.raises(ValueError, match=r"scales: expected 1 \(one per tensor of src\), got 2"):
        pair_(*outs, [w], [1.0, 2.0], **options)
    with pytest.raises(TypeError, match=r"scales: expected a list of floats, got float"):
        pair_(*outs, [w], 1.0, **options)
    with pytest.raises(ValueError, match=r"minus\[0\]: expected shape \(4,\) as src, got \(3,\)"):
        pair_(outs[0], [torch.zeros(3)], [w], [1.0], **options)
    with pytest.raises(TypeError, match=r"plus\[0\]: expected torch.float32 as src, got torch.bf"):
        pair_([torch.zeros(4, dtype=torch.bfloat16)], outs[1], [w], [1.0], **options)
    for plus, minus in (([w], outs[1]), (outs[0], outs[0])):
        with pytest.raises(ValueError, match="expected memory apart from all written tensors"):
            pair_(plus, minus, [w], [1.0], **options)
    assert not w.any() and not outs[0][0].any()


def updates_of(tensors: int, lengths: tuple[int, ...]) -> list[Update]:
    """Updates with directions and scales of their own for every tensor, some with decay."""
    made, k = [], 0
    for n, length in enumerate(lengths):
        rows = [
            [1e-3 * (-1) ** (k + j) * (1 + 0.1 * i + 0.01 * j) for j in range(length)]
            for i in range(tensors)
        ]
        decay = 1.0 if n % 2 else 1.0 - 2.0**-9
        made.append(Update([(2**32 - 3 + k + j) % 2**32 for j in range(length)], rows, decay))
        k += length
    return made


@pytest.mark.parametrize("lengths", [(1,), (3,), (1,) * 5, (2, 1, 3), (1,) * 40], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_advance_is_one_combination_per_update(
    backend, device, dtype, rounding, distribution, lengths
):
    if interpreted(backend, device):
        same = (rounding, dtype) == ("stochastic", torch.float32)
        if lengths != (2, 1, 3) or same or (distribution, dtype) == ("rademacher", torch.float16):
            pytest.skip("the interpreter is slow: test_updates_compiled.py has the others")
        lengths = lengths[:2]
    buffers, tensors, offsets = lists(dtype, device, backend)
    options = {
        "seed": SEED, "streams": STREAMS[: len(tensors)], "offsets": offsets,
        "rounding": rounding, "distribution": distribution,
    }  # fmt: skip
    expected = [t.cpu().clone() for t in tensors]
    made = updates_of(len(tensors), lengths)
    for update in made:
        zk.combine_(
            expected, expected, update.scales, directions=update.directions,
            src_scale=update.src_scale, backend="native", **options,
        )  # fmt: skip
    advance_(tensors, made, backend=backend, **options)
    for i, (got, want) in enumerate(zip(tensors, expected, strict=True)):
        assert_same_bits(got, want, (len(got), offsets[i]))
        assert_borders_intact(buffers[i], got)


@pytest.mark.parametrize("lengths", [(1,), (2, 1, 3), (1,) * 20], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_advance_with_residuals(backend, device, dtype, distribution, lengths):
    """All backends agree, and many small updates arrive that nearest rounding alone would lose."""
    if interpreted(backend, device):
        if lengths == (1,):
            pytest.skip("the interpreter is slow: the others have this too")
        lengths = lengths[:2]
    buffers, tensors, offsets = lists(dtype, device, backend)
    generator = torch.Generator().manual_seed(3)
    residuals = [
        torch.randint(-128, 128, (0 if dtype == torch.float32 else t.numel(),), generator=generator)
        .to(torch.int8)
        .to(device)
        for t in tensors
    ]
    options = {
        "seed": SEED, "streams": STREAMS[: len(tensors)], "offsets": offsets,
        "distribution": distribution,
    }  # fmt: skip
    expected, rests = [t.cpu().clone() for t in tensors], [r.cpu().clone() for r in residuals]
    made = updates_of(len(tensors), lengths)
    advance_(expected, made, residuals=rests, backend="reference", **options)
    advance_(tensors, made, residuals=residuals, backend=backend, **options)
    for i, (got, want) in enumerate(zip(tensors, expected, strict=True)):
        assert_same_bits(got, want, (len(got), offsets[i]))
        assert_borders_intact(buffers[i], got)
        assert torch.equal(residuals[i].cpu(), rests[i]), (len(got), offsets[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_every_weight_and_residual_survives_joining_and_splitting(dtype):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    plain = ~torch.isfinite(weight)
    if dtype == torch.float16:
        plain |= weight.abs() <= 2.0**-14
    for lo in range(-128, 128, 5):
        rest = torch.full(weight.shape, lo, dtype=torch.int8)
        value = reference_updates.join(weight, rest)
        back, again = reference_updates.split(value, dtype)
        # The largest finite weight with a residual above half its spacing is beyond the format.
        beyond = (weight.abs() == torch.finfo(dtype).max) & torch.isinf(back)
        fine = ~plain & ~beyond & (weight != 0)
        assert_same_bits(back[fine], weight[fine])
        assert torch.equal(again[fine], rest[fine])
        same = reference_updates.round_joined(value, dtype)
        assert_same_bits(same[fine], value[fine])


def test_residuals_keep_small_updates():
    """A thousand updates of an eighth of an ulp arrive; nearest rounding loses every one."""
    w = torch.ones(1, dtype=torch.bfloat16)
    plain, fine, rest = w.clone(), w.clone(), torch.zeros(1, dtype=torch.int8)
    made = [Update([n], [2.0**-10], 1.0) for n in range(1000)]
    options = {"seed": 1, "streams": [2], "distribution": "rademacher"}
    advance_([plain], made, **options)
    advance_([fine], made, residuals=[rest], **options)
    signs = sum(zk.rademacher(1, seed=1, direction=n, stream=2).item() for n in range(1000))
    assert plain.item() == 1.0
    assert reference_updates.join(fine, rest).item() == 1.0 + signs * 2.0**-10


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_changes_of_an_update(backend, device, dtype, rounding):
    """As combine_ reports them, and with residuals between the values that they make."""
    options = {"seed": 7, "streams": [1, 2], "rounding": rounding}
    update = Update([3, 4], [[1e-5, -2e-5], [1e-3, 1e-3]], 0.999)
    originals = [torch.randn(5000).to(dtype), torch.randn(33).to(dtype)]
    expected, got = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    got = got.to(device)
    copies = [w.clone() for w in originals]
    zk.combine_(
        copies, copies, update.scales, directions=update.directions, src_scale=0.999,
        changes=expected, backend="reference", **options,
    )  # fmt: skip
    tensors = [w.clone().to(device) for w in originals]
    advance_(tensors, [update], changes=got, backend=backend, **options)
    assert torch.allclose(got.cpu()[:, :2], expected[:, :2], rtol=1e-5, atol=0)
    assert torch.equal(got.cpu()[:, 2], expected[:, 2])
    if rounding == "nearest":
        sizes = [0 if dtype == torch.float32 else w.numel() for w in originals]
        for place, name in ((device, backend), ("cpu", "reference")):
            rests = [torch.zeros(n, dtype=torch.int8, device=place) for n in sizes]
            advance_(
                [w.clone().to(place) for w in originals], [update], residuals=rests, backend=name,
                changes=got if name == backend else expected, **options,
            )  # fmt: skip
        if backend != "reference":
            assert torch.allclose(got.cpu()[:, :2], expected[:, :2], rtol=1e-5, atol=0)
            assert torch.equal(got.cpu()[:, 2], expected[:, 2])


def test_advance_refuses_bad_arguments():
    w, rest = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int8)
    one = [Update([0], [1.0])]
    options = {"seed": 0, "streams": [1]}
    with pytest.raises(ValueError, match=r"updates\[0\].directions: expected at least one"):
        advance_([w], [Update([], [])], **options)
    with pytest.raises(ValueError, match=r"updates\[1\].scales: expected 1 \(one per direction\)"):
        advance_([w], [*one, Update([0], [1.0, 2.0])], **options)
    with pytest.raises(ValueError, match=r"updates\[0\].src_scale: expected a finite float32"):
        advance_([w], [Update([0], [1.0], float("nan"))], **options)
    with pytest.raises(ValueError, match="rounding: expected 'nearest' with residuals, got 'stoch"):
        advance_([w], one, residuals=[rest], rounding="stochastic", **options)
    with pytest.raises(ValueError, match=r"residuals\[0\]: expected shape \(4,\) on cpu, got \(3,"):
        advance_([w], one, residuals=[rest[:3]], **options)
    with pytest.raises(TypeError, match=r"residuals\[0\]: expected contiguous int8, got torch.bf"):
        advance_([w], one, residuals=[w], **options)
    advance_([w], [], **options)
    assert not w.any() and not rest.any()


def test_updates_may_be_an_iterator():
    """Which can be read only once."""
    w, expected = torch.ones(4), torch.ones(4)
    made = updates_of(1, (1, 2))
    options = {"seed": 0, "streams": [1]}
    advance_([expected], made, **options)
    advance_([w], iter(made), **options)
    assert_same_bits(w, expected)
