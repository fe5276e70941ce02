"""Fake quantisation: the formulas by hand, by other implementations, and bits of all backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DTYPES, NAMES, assert_same_bits, runnable

import zo_kernels as zk
from zo_kernels.backends import reference_quantize
from zo_kernels.ops import BACKENDS

# QLoRA's NF4 as published in bitsandbytes (create_normal_map), and the thresholds of its kernels.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
CASES = [
    *((f"int{bits}", {"symmetric": s}) for bits in (2, 3, 4, 8) for s in (True, False)),
    *(("nf4", {"double_quant": d}) for d in (False, True)),
    *((scheme, {}) for scheme in ("fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4")),
]
IDS = [f"{s}-{'-'.join(f'{k}={v}' for k, v in o.items())}".rstrip("-") for s, o in CASES]
FP8 = {
    "fp8_e4m3": (torch.float8_e4m3fn, 448.0, 464.0),
    "fp8_e5m2": (torch.float8_e5m2, 57344.0, 61440.0),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the backends."""
    return runnable(request.param)


@pytest.fixture
def quantised(backend: str, device: str):
    """zk.fake_quant on a backend; tensors of the CPU in and out."""

    def run(weight: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        return zk.fake_quant(weight.to(device), *args, backend=backend, **options).cpu()

    return run


def hard_weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Runs of 16 elements of very different kinds, so that groups of any length meet them."""
    generator = torch.Generator().manual_seed(seed)
    step = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]
    largest = torch.finfo(dtype).max
    runs = -(-rows * columns // 16)
    normal = torch.randn(runs, 16, generator=generator).double()
    uniform = torch.rand(runs, 16, generator=generator).double()
    kinds = [
        normal * 2.0 ** torch.randint(-12, 3, (runs, 1), generator=generator),
        normal * 0.0,  # zeros of both signs
        (normal * 300).round() * step,  # subnormal, and so is the scale
        torch.full_like(normal, -step),
        (uniform - 0.5) * 0.99 * largest,
        normal.abs() + 1,  # one sign only
        torch.cat([torch.full((runs, 1), 7.0), (uniform[:, 1:] * 28).round() / 2 - 7], 1),  # ties
        torch.cat([normal[:, :1] * 40, normal[:, 1:]], 1),  # an outlier
    ]
    values = torch.stack([kinds[i % len(kinds)][i] for i in range(runs)])
    return values.flatten()[: rows * columns].view(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scheme, options", CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_bits_of_the_backends(scheme, options, dtype, backend, device):
    """Zeros, subnormals, huge values, ties; groups of all sizes; odd shapes."""
    changed = 0
    for shape, sizes in (((6, 384), [32, 64, 128, "row", "tensor"]), ((5, 57), [1, 3, "row"])):
        weight = hard_weights(*shape, dtype)
        for size in sizes:
            sized = {"group_size": size, **options}
            expected = zk.fake_quant(weight, scheme, backend="reference", **sized)
            assert expected.isfinite().all()
            actual = zk.fake_quant(weight.to(device), scheme, backend=backend, **sized)
            assert_same_bits(actual, expected, (shape, size))
            changed += (expected != weight).sum().item()
    assert changed > 500


@pytest.mark.parametrize(
    "columns, dtype",
    [
        (4096, torch.float32),
        (4097, torch.bfloat16),
        (9000, torch.float32),
        (9000, torch.bfloat16),
        (70_001, torch.bfloat16),
    ],
    ids=lambda value: NAMES.get(value, str(value)),
)
def test_long_groups(columns, dtype, quantised):
    """The Triton kernels for rows that do not fit in registers, and for longer ones still."""
    weight = hard_weights(1, columns, dtype)
    weight[0, 5] = -torch.finfo(dtype).max / 2  # max|w| is once that of min w, once of max w
    weight = torch.cat([weight, -weight])
    for scheme, symmetric in (("int4", True), ("int4", False), ("nf4", True), ("fp8_e4m3", True)):
        options = {"group_size": "row", "symmetric": symmetric}
        rows = [
            zk.fake_quant(row, scheme, backend="reference", **options) for row in weight.split(1)
        ]
        expected = torch.cat(rows)
        assert_same_bits(quantised(weight, scheme, **options), expected, (scheme, symmetric))


@pytest.mark.parametrize("columns", [600, 9000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_scales_of_scales_of_long_groups(columns, dtype, quantised):
    """Given scales in each of the Triton kernels, and in groups that C++ cuts into pieces."""
    weight = hard_weights(3, columns, dtype)
    for scheme, options in (("nvfp4", {}), ("nf4", {"double_quant": True})):
        sized = {"group_size": "row", **options}
        expected = zk.fake_quant(weight, scheme, backend="reference", **sized)
        assert_same_bits(quantised(weight, scheme, **sized), expected, scheme)


def test_the_reference_in_pieces(monkeypatch):
    """Bounding the temporaries changes no bit, within groups nor between them."""
    weight = hard_weights(7, 96, torch.bfloat16)
    for size in (32, "row", "tensor"):
        expected = zk.fake_quant(weight, "int4", group_size=size, symmetric=False)
        for chunk in (5, 70, 100):
            monkeypatch.setattr(reference_quantize, "_CHUNK", chunk)
            actual = zk.fake_quant(weight, "int4", group_size=size, symmetric=False)
            assert_same_bits(actual, expected, (size, chunk))
        monkeypatch.undo()


def test_groups(quantised):
    """A group is a run of a row: the same as rows of that length; defaults by scheme."""
    weight = hard_weights(6, 384, torch.float32)
    for size in (32, 96, 128):
        expected = quantised(weight.view(-1, size), "int4").view(6, 384)
        assert_same_bits(quantised(weight, "int4", group_size=size), expected, size)
    expected = quantised(weight.view(1, -1), "int4").view(6, 384)
    assert_same_bits(quantised(weight, "int4", group_size="tensor"), expected)
    assert_same_bits(quantised(weight, "nf4"), quantised(weight, "nf4", group_size=64))
    row = quantised(weight, "nf4", group_size="row")
    assert_same_bits(row, quantised(weight, "nf4", group_size=384))
    assert not torch.equal(row, quantised(weight, "nf4"))
    for scheme in ("int8", "fp8_e4m3"):
        expected = quantised(weight, scheme, group_size="row")
        assert_same_bits(quantised(weight, scheme), expected)


def test_integers_by_hand(quantised):
    """Ties to even, the lowest level is -Q, the zero point, scales that underflow."""
    # max 7 at 4 bits: scale 1.
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -7.0, 3.4]])
    expected = torch.tensor([[7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -7.0, 3.0]])
    assert_same_bits(quantised(weight, "int4"), expected)
    # 0..15 at 4 bits, asymmetric: scale 1, zero point 0; then -5..10: zero point 5.
    weight = torch.tensor([[15.0, 0.5, 1.5, 0.0], [-5.0, 10.0, 0.4, -0.6]])
    expected = torch.tensor([[15.0, 0.0, 2.0, 0.0], [-5.0, 10.0, 0.0, -1.0]])
    assert_same_bits(quantised(weight, "int4", symmetric=False), expected)
    # -0.25..2.75 at 2 bits: scale 1, zero point 0, so the range moves to 0..3.
    weight = torch.tensor([[-0.25, 2.75, 0.5, 1.5]])
    expected = torch.tensor([[0.0, 3.0, 0.0, 2.0]])
    assert_same_bits(quantised(weight, "int2", symmetric=False), expected)
    tiny = torch.full((1, 4), 1e-45)  # the scale underflows
    assert_same_bits(quantised(tiny, "int4"), torch.zeros(1, 4))


def test_zeros(quantised):
    """One zero for integers and NF4; FP8 keeps the sign, in groups of zeros too."""
    weight = torch.tensor([[1.0, -0.0, 0.0, -1e-12], [-0.0, 0.0, -0.0, 0.0]])
    for scheme, options in CASES:
        got = quantised(weight, scheme, group_size="row", **options)
        expected = torch.zeros(2, 4)
        if "fp" in scheme:
            expected = expected.copysign(weight)
        expected[0, 0] = got[0, 0]
        assert got[0, 0].item() == pytest.approx(1.0, rel=1e-6)
        assert_same_bits(got, expected, scheme)
    for scheme, options in CASES:  # all of them below what a scale can express
        weight = torch.tensor([[-(2.0**-149), 0.0, 2.0**-149, -0.0]])
        got = quantised(weight, scheme, group_size="row", **options)
        # Only 1/1 and 2/3 of the least subnormal do not round to a scale of 0.
        if scheme in ("int2", "nf4"):
            assert_same_bits(got, weight + 0.0, scheme)
        else:
            sign = weight if "fp" in scheme else torch.ones(1, 4)
            assert_same_bits(got, torch.zeros(1, 4).copysign(sign), scheme)


def quantised_by_numpy(weight: torch.Tensor, width: int, size: int, symmetric: bool) -> np.ndarray:
    """Independent float64 quantiser, group by group."""
    source = weight.double().numpy()
    values = np.zeros_like(source)
    for row in range(source.shape[0]):
        for start in range(0, source.shape[1], size):
            group = source[row, start : start + size]
            if symmetric:
                top = 2 ** (width - 1) - 1
                scale, zero, low = np.abs(group).max() / top, 0, -top
            else:
                top, low = 2**width - 1, 0
                floor, ceiling = min(group.min(), 0.0), max(group.max(), 0.0)
                scale = (ceiling - floor) / top
                zero = np.rint(-floor / scale) if scale else 0
            if scale == 0:
                continue
            level = np.clip(np.rint(group / scale) + zero, low, top)
            values[row, start : start + size] = (level - zero) * scale
    return values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("group", [None, 16])
def test_integers_against_numpy(symmetric, width, group, quantised):
    """The formulas in float64."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(11))
    weight[0] = 0.0
    weight[1, :16] = 0.0
    weight[2] = weight[2].abs() + 1.0  # one sign only
    weight[3] = 0.7  # constant
    weight[4, 3] = 40.0  # an outlier
    got = quantised(weight, f"int{width}", group_size=group, symmetric=symmetric)
    values = quantised_by_numpy(weight, width, group or 64, symmetric)
    assert got.dtype == weight.dtype and got.shape == weight.shape
    # float32 and float64 could disagree on a level only at an exact tie, which random data lack.
    np.testing.assert_allclose(got.double().numpy(), values, rtol=3e-7, atol=0)
    assert torch.count_nonzero(got[0]) == 0
    assert len(torch.unique(got[5, :16])) <= 2**width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("scheme, options", CASES, ids=IDS)
def test_rounded_once(dtype, scheme, options, quantised):
    """16-bit weights: float32 arithmetic and one rounding at the end."""
    weight = hard_weights(8, 64, dtype)
    wide = quantised(weight.float(), scheme, **options)
    assert_same_bits(quantised(weight, scheme, **options), wide.to(dtype))


def near_ties(columns: int, top: int) -> torch.Tensor:
    """Rows whose elements are as close to (n + 1/2) scale as float32 has them."""
    most = torch.rand(512, 1, generator=torch.Generator().manual_seed(4)) + 0.5
    halves = torch.linspace(-top, top - 1, columns - 1).round() + 0.5
    return torch.cat([most, halves * (most / torch.full_like(most, top))], dim=1)


def test_divisions(quantised):
    """Near ties a product with the reciprocal gives other levels than the division specified."""
    weight = near_ties(15, 7)
    w = weight.numpy()
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(7)
    expected = np.clip(np.rint(w / scale), -7, 7) * scale
    other = np.clip(np.rint(w * (np.float32(1) / scale)), -7, 7) * scale
    assert expected.dtype == np.float32 and (expected != other).any()
    assert np.array_equal(quantised(weight, "int4").numpy(), expected)


@pytest.mark.parametrize("scheme, top", [("int8", 127), ("int4", 7)])
def test_against_torch(scheme, top):
    """torch.fake_quantize_per_channel_affine, which multiplies by 1 / scale, but for near ties.

    Its quotient is off by 1.5 ulp at most (two roundings) and ours by half a one, so they can
    disagree only where the exact quotient is within 2^-22 of itself of a tie; then by one level.
    """
    normal = torch.randn(512, 96, generator=torch.Generator().manual_seed(7))
    different = 0
    for weight in (normal, near_ties(96, top)):
        most = weight.abs().amax(1, keepdim=True)
        scale = most / torch.full_like(most, top)
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(
            weight, scale.flatten(), zeros, 0, -top, top
        )
        ours = zk.fake_quant(weight, scheme)
        quotient = weight.double() / scale.double()
        to_tie = (quotient - quotient.floor() - 0.5).abs()
        odd = ours != theirs
        assert (to_tie[odd] <= quotient[odd].abs() * 2.0**-22).all()
        levels = ((ours.double() - theirs.double()).abs() / scale.double())[odd]
        torch.testing.assert_close(levels, torch.ones_like(levels), rtol=1e-4, atol=0)
        different += odd.sum().item()
    assert 0 < different < 0.5 * normal.numel()


@pytest.mark.parametrize("scheme", list(FP8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_fp8_is_torchs_on_all_16_bit_patterns(scheme, dtype, quantised):
    """A group whose largest magnitude is TOP has scale 1: every pattern up to TOP."""
    cast, top, _ = FP8[scheme]
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    values = patterns[patterns.abs() <= top]  # no NaN
    assert len(values) > 30_000
    padded = torch.cat([values, torch.zeros(-len(values) % 255, dtype=dtype)]).view(-1, 255)
    weight = torch.cat([torch.full((len(padded), 1), top, dtype=dtype), padded], dim=1)
    expected = weight.to(cast).to(dtype)
    assert len(expected.unique()) > 100
    assert_same_bits(quantised(weight, scheme), expected)


@pytest.mark.parametrize("scheme", list(FP8))
def test_fp8_scales(scheme, quantised):
    """Division, torch's cast, product; a scale that was rounded down saturates."""
    cast, top, overflow = FP8[scheme]
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    weight *= 2.0 ** torch.arange(-32, 32).view(-1, 1)
    most = weight.abs().amax(1, keepdim=True)
    scale = most / torch.full_like(most, top)
    expected = (weight / scale).clamp(-top, top).to(cast).float() * scale
    assert_same_bits(quantised(weight, scheme, group_size="row"), expected)
    step = 2.0**-149
    weight = torch.tensor([[1.49 * top, -1.2 * top, 3.0, -0.0]], dtype=torch.float64) * step
    weight = weight.float()
    assert weight[0, 0] / step > overflow  # beyond what the cast would take to TOP
    expected = (torch.tensor([[top, -top, 3.0, -0.0]], dtype=torch.float64) * step).float()
    assert_same_bits(quantised(weight, scheme, group_size="row"), expected)


def test_nf4(quantised):
    """The published levels; a threshold belongs to the level below, its successor to the next."""
    levels = torch.tensor(NF4, dtype=torch.float32)
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float32)
    assert_same_bits((levels[1:] + levels[:-1]) / 2, thresholds)
    above = thresholds.nextafter(torch.tensor(2.0))
    weight = torch.cat([levels, thresholds, above, torch.zeros(2)]).view(1, -1)
    expected = torch.cat([levels, levels[:-1], levels[1:], torch.zeros(2)]).view(1, -1)
    assert_same_bits(quantised(weight, "nf4", group_size="row"), expected)
    normal = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    blocks = normal.view(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / most).double()[..., None] - levels.double()).abs().argmin(-1)
    expected = (levels[nearest] * most).view(normal.shape)
    assert len(nearest.unique()) == 16
    assert_same_bits(quantised(normal, "nf4"), expected)


def test_the_largest_values(quantised):
    """absmax at the dtype's limit: finite results, and the largest value is a level."""
    for dtype in DTYPES:
        # The largest float32 itself is refused for int8: test_ranges_that_are_too_large.
        limit = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
        largest = (limit.nextafter(limit * 0) if dtype == torch.float32 else limit).item()
        weight = torch.tensor([[largest, -largest, largest / 3, 1.0]], dtype=dtype)
        for scheme in ("int8", "int4", "int3", "int2", "nf4", "fp8_e4m3", "fp8_e5m2"):
            got = quantised(weight, scheme, group_size="row")
            expected = zk.fake_quant(weight, scheme, group_size="row", backend="reference")
            assert_same_bits(got, expected, (dtype, scheme))
            assert got.isfinite().all()
            assert got[0, 0].item() == -got[0, 1].item() == pytest.approx(largest, rel=1e-6)
