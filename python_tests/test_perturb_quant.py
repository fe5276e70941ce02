"""ops.perturb_quant: the bits of combine_ followed by fake_quant, in one pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    assert_borders_intact,
    assert_same_bits,
    bordered,
    interpreted,
    runnable,
)
from test_fake_quant import hard_weights
from test_native import with_threads

import zo_kernels as zk
from zo_kernels.backends import composed
from zo_kernels.noise import DISTRIBUTIONS
from zo_kernels.ops import perturb_quant

SEED, DIRECTION = 2**63 + 12345, 2**32 - 7
#: Shape and offset: ragged and whole, over where the counter's high word changes, misaligned.
PLACES = [
    ((5, 57), 0),
    ((3, 384), 4093),
    ((70, 96), 2**34 - 4097),
    ((40, 128), 2**35 + 8),
    ((2, 11008), 16),
]
FEW = [((5, 57), 3), ((9, 96), 2**34 - 384), ((5, 128), 2**35 + 8)]
STREAMS = [2**32 - 1, 0, 5, 6, 7]
SCALES = [1e-3, -0.25, 0.0, 2.0**-127, 3.0]
FORMATS = [
    ("int4", {"group_size": "row"}),
    ("int3", {"group_size": "row", "symmetric": False}),
    ("int8", {"group_size": "tensor"}),
    ("nf4", {"group_size": "row"}),
    ("nf4", {"group_size": "row", "double_quant": True}),
    ("fp8_e4m3", {}),
    ("mxfp4", {"group_size": "row"}),
    ("nvfp4", {"group_size": "row"}),
]
IDS = [f"{s}-{'-'.join(str(v) for v in o.values())}".rstrip("-") for s, o in FORMATS]


def in_two_steps(src, scales, scheme, offsets, distribution, **options) -> list[torch.Tensor]:
    """combine_ and fake_quant of the reference backend."""
    made = [torch.empty_like(s) for s in src]
    zk.combine_(
        made, src, [[scale] for scale in scales], seed=SEED, directions=[DIRECTION],
        streams=STREAMS[: len(src)], offsets=offsets, distribution=distribution,
        backend="reference",
    )  # fmt: skip
    return [zk.fake_quant(m, scheme, backend="reference", **options) for m in made]


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scheme, options", FORMATS, ids=IDS)
def test_bits(backend, device, scheme, options, dtype, distribution, check_finite):
    """Groups of rows of all lengths; src keeps its bits, and nothing beside out is written."""
    places = PLACES
    if interpreted(backend, device):
        if check_finite or (distribution, dtype) == ("rademacher", torch.float16):
            pytest.skip("the interpreter is slow: the others have this too")
        places = FEW
    offsets = [offset for _, offset in places]
    source = [hard_weights(*shape, dtype, seed=i) for i, (shape, _) in enumerate(places)]
    scales = SCALES[: len(source)]
    expected = in_two_steps(source, scales, scheme, offsets, distribution, **options)
    src = [bordered(s, device, shift=i % 3)[1] for i, s in enumerate(source)]
    made = [
        bordered(torch.full_like(s, math.nan), device, (i + 1) % 3) for i, s in enumerate(source)
    ]
    out = [view for _, view in made]
    perturb_quant(
        out, src, scales, scheme, seed=SEED, direction=DIRECTION, streams=STREAMS[: len(src)],
        offsets=offsets, distribution=distribution, check_finite=check_finite, backend=backend,
        **options,
    )  # fmt: skip
    for i, (shape, _) in enumerate(places):
        assert_same_bits(out[i], expected[i], shape)
        assert_same_bits(src[i], source[i], shape)
        assert_borders_intact(*made[i])


@pytest.mark.parametrize("size", [1, 32, 96, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_groups_within_rows(isa, dtype, size):
    """More groups than a block of the C++ kernels has, and more elements than a piece."""
    source = hard_weights(500, 192, dtype)
    expected = in_two_steps([source], [0.01], "int4", [7], "normal", group_size=size)
    options = {"offsets": [7], "group_size": size, "backend": "native"}
    address = {"seed": SEED, "direction": DIRECTION, "streams": STREAMS[:1]}
    for threads in (1, 3):
        out = torch.empty_like(source)
        with_threads(
            threads,
            lambda o=out: perturb_quant([o], [source], [0.01], "int4", **address, **options),
        )
        assert_same_bits(out, expected[0], threads)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_groups_longer_than_a_piece(isa, dtype, symmetric):
    """Rows, and the whole tensor, in two walks."""
    source = hard_weights(3, 70_001, dtype)
    for size in ("row", "tensor"):
        options = {"group_size": size, "symmetric": symmetric}
        expected = in_two_steps([source], [0.01], "int4", [0], "rademacher", **options)
        out = torch.empty_like(source)
        perturb_quant(
            [out], [source], [0.01], "int4", seed=SEED, direction=DIRECTION, streams=STREAMS[:1],
            distribution="rademacher", backend="native", **options,
        )  # fmt: skip
        assert_same_bits(out, expected[0], size)


def test_triton_fuses_where_it_says(monkeypatch):
    """Whole 16-byte chunks, aligned in the parameter, within one high word; else in two steps."""
    runnable("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = []
    original = composed.perturb_quant
    monkeypatch.setattr(
        composed, "perturb_quant", lambda *a, **k: steps.append(1) or original(*a, **k)
    )
    cases = [
        (16, 0, {}, 0),
        (16, 2**34 - 40, {}, 0),
        (16, 2**34 - 16, {}, 1),  # the high word changes within
        (16, 4, {}, 1),  # half a chunk of bfloat16
        (12, 0, {}, 1),
        (16, 0, {"check_finite": True}, 1),
        (16, 0, {"scheme": "nf4", "double_quant": True}, 1),
    ]
    for columns, offset, changed, composed_of in cases:
        options = {"scheme": "int4", "group_size": "row"} | changed
        look = options.pop("check_finite", False)
        source = hard_weights(2, columns, torch.bfloat16)
        scheme = options.pop("scheme")
        expected = in_two_steps([source], [0.5], scheme, [offset], "normal", **options)
        out = torch.empty_like(source, device=device)
        steps.clear()
        perturb_quant(
            [out], [source.to(device)], [0.5], scheme, seed=SEED, direction=DIRECTION,
            streams=STREAMS[:1], offsets=[offset], check_finite=look, backend="triton", **options,
        )  # fmt: skip
        assert_same_bits(out, expected[0], (columns, offset, changed))
        assert len(steps) == composed_of, (columns, offset, changed)


@pytest.mark.parametrize("scheme, options", FORMATS, ids=IDS)
def test_values_that_are_not_finite(backend, device, scheme, options):
    """The perturbed weights are looked at, and the error names the one; src is as it was."""
    good = torch.linspace(-1, 1, 64).view(4, 16).to(device)
    call = {"seed": SEED, "direction": 1, "streams": [1, 2], "backend": backend, **options}
    for value, scale in ((math.nan, 0.0), (-math.inf, 0.0), (0.5, 3e38)):
        bad = good.clone()
        bad[2, 3] = value
        before = bad.clone()
        out = [torch.empty_like(good), torch.empty_like(good)]
        with (
            np.errstate(all="ignore"),  # the interpreter computes with numpy
            pytest.raises(ValueError, match=r"model\.w: expected finite values, got NaN or inf"),
        ):
            perturb_quant(out, [good, bad], [0.1, scale], scheme, names=["fine", "model.w"], **call)
        assert_same_bits(bad, before)


def good() -> torch.Tensor:
    return torch.linspace(-1, 1, 40).view(4, 10)


CALL = {"seed": 0, "direction": 0, "streams": [1], "scheme": "int4", "scales": [1.0]}
# What is wrong: out, src, arguments, error, part of the message.
BAD = [
    (good(), good(), {"scales": [1.0, 2.0]}, ValueError, "scales: expected 1 (one per tensor of"),
    (good(), good(), {"scales": [math.nan]}, ValueError, "scales[0]: expected a finite float32"),
    (good(), good(), {"streams": []}, ValueError, "streams: expected 1"),
    (good(), good(), {"names": []}, ValueError, "names: expected 1 (one per tensor of src), got 0"),
    (good(), good(), {"direction": 2**32}, ValueError, "direction: expected 0 <= direction < 2^32"),
    (good(), good(), {"distribution": "cauchy"}, ValueError, "distribution: expected one of"),
    (good(), good(), {"scheme": "int9"}, ValueError, "scheme: expected one of ('int2', "),
    (good(), good(), {"symmetric": None}, TypeError, "symmetric: expected a bool, got NoneType"),
    (
        good(),
        good(),
        {"names": ["w"], "group_size": 3},
        ValueError,
        "group_size: expected a divisor of 10, the in dimension of w, got 3",
    ),
    (good().half(), good(), {}, TypeError, "out[0]: expected torch.float32 as src, got torch.flo"),
    (good()[:3], good(), {}, ValueError, "out[0]: expected shape (4, 10) as src, got (3, 10)"),
    (good().flatten(), good().flatten(), {}, ValueError, "src[0]: expected shape (out, in), got"),
    (good(), good().t(), {}, ValueError, "src[0]: expected a contiguous tensor"),
    (good(), good(), {"offsets": [-1]}, ValueError, "offsets[0]: expected 0 <= offset"),
]


@pytest.mark.parametrize("out, src, changes, error, message", BAD, ids=[b[4][:40] for b in BAD])
def test_bad_arguments_are_named(out, src, changes, error, message):
    """What was expected and what came; nothing has been written then."""
    before = out.clone()
    with pytest.raises(error) as caught:
        perturb_quant([out], [src], **CALL | changes)
    assert message in str(caught.value)
    assert_same_bits(out, before)


def test_overlaps_and_empty_tensors():
    """out may touch nothing that is read; a tensor without elements is nothing to do."""
    w = good()
    for out in (w, w.view(4, 10), w.view(-1)[:20].view(2, 10)):
        src = w if out.shape == w.shape else w.view(-1)[10:30].view(2, 10)
        with pytest.raises(ValueError, match="expected memory apart from all written tensors"):
            perturb_quant([out], [src], **CALL)
    assert_same_bits(w, good())
    empty = torch.empty(0, 8)
    perturb_quant([empty], [torch.empty(0, 8)], **CALL)
    perturb_quant([], [], **CALL | {"scales": [], "streams": []})
