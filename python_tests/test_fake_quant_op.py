"""zk.fake_quant as an operation: where results go, what it refuses, how it behaves under torch."""

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
    runnable,
)

import zo_kernels as zk
from zo_kernels import quantize
from zo_kernels.backends import native
from zo_kernels.ops import BACKENDS, dispatch, perturb_quant


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the backends."""
    return runnable(request.param)


def good() -> torch.Tensor:
    return torch.linspace(-1, 1, 40).view(4, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shift", [0, 1])
def test_where_the_result_goes(backend, device, dtype, shift):
    """In place, into other memory, into a new tensor; aligned or not; nothing beside it."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = zk.fake_quant(weight, "int4", group_size=32, backend="reference")
    buffer, view = bordered(weight, device, shift)
    got = zk.fake_quant(view, "int4", group_size=32, backend=backend)
    assert_same_bits(got, expected)
    assert_same_bits(view, weight)
    other, out = bordered(torch.full_like(weight, math.nan), device, shift)
    assert zk.fake_quant(view, "int4", group_size=32, out=out, backend=backend) is out
    assert_same_bits(out, expected)
    assert zk.fake_quant(view, "int4", group_size=32, out=view, backend=backend) is view
    assert_same_bits(view, expected)
    alias = out.view(9, 64)
    out.copy_(weight)
    zk.fake_quant(out, "int4", group_size=32, out=alias, backend=backend)
    assert_same_bits(out, expected)
    assert_borders_intact(buffer, view)
    assert_borders_intact(other, out)


# What is wrong: tensor, arguments, error, part of the message.
BAD = [
    ([1.0], {}, TypeError, "tensor: expected a tensor, got list"),
    (good().view(-1), {}, ValueError, "tensor: expected shape (out, in), got (40,)"),
    (good().double(), {}, TypeError, "tensor: expected float32, bfloat16 or float16"),
    (good().t(), {}, ValueError, "tensor: expected a contiguous tensor"),
    (good().to("meta"), {}, ValueError, "tensor: expected a tensor with data"),
    (good(), {"scheme": "int9"}, ValueError, "scheme: expected one of ('int2', 'int3', "),
    (good(), {"scheme": 4}, ValueError, "'mxfp4', 'nvfp4'), got 4"),
    (good(), {"symmetric": 1}, TypeError, "symmetric: expected a bool, got int (1)"),
    (
        good(),
        {"scheme": "nf4", "symmetric": False},
        ValueError,
        "symmetric: expected True for scheme 'nf4', got False",
    ),
    (
        good(),
        {"group_size": 4},
        ValueError,
        "group_size: expected a divisor of 10, the in dimension of tensor, got 4",
    ),
    (good(), {"scheme": "nf4"}, ValueError, "group_size: expected a divisor of 10"),
    (good(), {"group_size": 0}, ValueError, "group_size: expected a divisor of 10"),
    (good(), {"group_size": -1}, ValueError, "group_size: expected a divisor of 10"),
    (good(), {"group_size": "channel"}, ValueError, "expected an int, 'row' or 'tensor', got"),
    (good(), {"group_size": 5.0}, TypeError, "group_size: expected an int, got float (5.0)"),
    (good(), {"check_finite": None}, TypeError, "check_finite: expected a bool, got NoneType"),
    (good(), {"out": 1}, TypeError, "out: expected a tensor or None, got int"),
    (good(), {"out": good().t()}, ValueError, "out: expected a contiguous tensor"),
    (good(), {"out": good()[:3]}, ValueError, "out: expected shape torch.Size([4, 10]) as tensor"),
    (good(), {"out": good().half()}, ValueError, "out: expected dtype torch.float32 as tensor"),
    (good(), {"out": good().to("meta")}, ValueError, "out: expected a tensor with data"),
    (good(), {"backend": "cuda"}, ValueError, "backend: expected None or one of"),
    (good(), {"double_quant": 1}, TypeError, "double_quant: expected a bool, got int (1)"),
    (
        good(),
        {"double_quant": True},
        ValueError,
        "double_quant: expected False for scheme 'int4', got True",
    ),
    (good(), {"scheme": "mxfp4"}, ValueError, "group_size: expected a divisor of 10"),
    (good(), {"name": "w", "group_size": 3}, ValueError, "the in dimension of w, got 3"),
]


@pytest.mark.parametrize("weight, changes, error, message", BAD, ids=[b[3][:50] for b in BAD])
def test_bad_arguments_are_named(weight, changes, error, message):
    """What was expected and what came."""
    arguments = {"scheme": "int4", **changes}
    with pytest.raises(error) as caught:
        zk.fake_quant(weight, **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad, backend, device):
    """Named, and the tensor has its values; without the check the other groups are as always."""
    weight = good()
    weight[2, 3] = bad
    weight = weight.to(device)
    out = torch.full_like(weight, 5.0)
    message = r"model\.w: expected finite values, got NaN or infinity"
    before = weight.clone()
    for scheme in ("int4", "int2", "nf4", "fp8_e4m3", "nvfp4"):
        for target in (out, weight, None):
            options = {"group_size": 5, "out": target, "name": "model.w", "backend": backend}
            with pytest.raises(ValueError, match=message):
                zk.fake_quant(weight, scheme, **options)
            assert_same_bits(weight, before)
    with pytest.raises(ValueError, match=message):
        zk.fake_quant(weight, "int4", symmetric=False, out=out, name="model.w", backend=backend)
    with np.errstate(invalid="ignore"):  # the interpreter computes with numpy
        got = zk.fake_quant(weight, "int4", check_finite=False, backend=backend).cpu()
    expected = zk.fake_quant(good(), "int4")
    assert_same_bits(got[[0, 1, 3]], expected[[0, 1, 3]])


def test_ranges_that_are_too_large(backend, device):
    """Where a value of the grid might overflow: max - min, and two odd cases of absmax."""
    weight = torch.tensor([[60000.0, -10000.0]]).half().to(device)
    message = r"tensor: expected max - min that int2 can scale within torch\.float16, got 70000"
    with pytest.raises(ValueError, match=message):
        zk.fake_quant(weight, "int2", symmetric=False, backend=backend)
    assert zk.fake_quant(weight, "int2", backend=backend).isfinite().all()
    largest = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match="max - min that int8 can scale"):
        wide = torch.tensor([[largest, -1e38]], device=device)
        zk.fake_quant(wide, "int8", symmetric=False, backend=backend)
    weight = torch.tensor([[largest]], device=device)
    for scheme in ("int2", "int3", "int4", "int5", "int6", "int7", "int8"):
        if scheme in ("int6", "int8"):  # round(round(largest / Q) * Q) overflows for 31 and 127
            with pytest.raises(ValueError, match=f"magnitudes that {scheme} can scale within"):
                zk.fake_quant(weight, scheme, backend=backend)
            below = weight.nextafter(torch.zeros_like(weight))
            assert zk.fake_quant(below, scheme, backend=backend).isfinite().all()
        else:
            got = zk.fake_quant(weight, scheme, backend=backend)
            assert_same_bits(got, weight, scheme)


def test_scales_that_rounding_raises_out_of_range(backend, device):
    """Of nf4 with double quantisation: 65504 in all groups but two, whose scales pull the mean."""
    weight = torch.full((4, 512), 65504.0)
    weight.view(-1, 64)[:2] = 1.0
    weight = weight.half().to(device)
    before = weight.clone()
    options = {"double_quant": True, "backend": backend}
    message = r"model\.w: expected magnitudes that nf4 with quantised scales can scale within "
    with pytest.raises(ValueError, match=message + r"torch\.float16, got a grid up to 6\d{4}\."):
        zk.fake_quant(weight, "nf4", out=weight, name="model.w", **options)
    assert_same_bits(weight, before.cpu())
    assert zk.fake_quant(weight, "nf4", backend=backend).isfinite().all()
    assert zk.fake_quant(weight / 2, "nf4", **options).isfinite().all()
    assert not zk.fake_quant(weight, "nf4", check_finite=False, **options).isfinite().all()
    call = {"seed": 0, "direction": 0, "streams": [0], "names": ["model.w"], **options}
    with pytest.raises(ValueError, match=message):
        perturb_quant([torch.empty_like(weight)], [weight], [0.0], "nf4", **call)


def test_overlaps_are_refused():
    """out may be the tensor or touch it, and nothing between."""
    base = torch.linspace(-1, 1, 80)
    before = base.clone()
    weight, out = base[:40].view(4, 10), base[39:79].view(4, 10)
    message = "out: expected tensor itself or memory apart from it, got an overlap"
    for a, b in ((weight, out), (out, weight)):
        with pytest.raises(ValueError, match=message):
            zk.fake_quant(a, "int4", out=b)
    assert_same_bits(base, before)
    zk.fake_quant(weight, "int4", out=base[40:].view(4, 10))
    assert_same_bits(base[40:].view(4, 10), zk.fake_quant(weight, "int4"))


def test_empty_tensors(backend, device):
    """No rows, no columns."""
    for shape in ((0, 64), (3, 0), (0, 0)):
        for scheme in ("int4", "nf4"):
            for size in (None, "row", "tensor", 64):
                weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
                got = zk.fake_quant(weight, scheme, group_size=size, backend=backend)
                assert got.shape == shape and got.dtype == torch.bfloat16


def test_backends_by_device(monkeypatch):
    """On the CPU the C++ kernels; a named backend never falls back."""
    weight = good()
    monkeypatch.setattr(dispatch, "_triton_reason", lambda: "no GPU is visible")
    with pytest.raises(RuntimeError, match="backend 'triton': no GPU is visible"):
        zk.fake_quant(weight, "int4", backend="triton")
    expected = zk.fake_quant(weight, "int4", backend="reference")
    ran = []
    original = native.fake_quant
    monkeypatch.setattr(native, "fake_quant", lambda *a, **k: ran.append(1) or original(*a, **k))
    assert_same_bits(zk.fake_quant(weight, "int4"), expected)
    assert ran == [1]
    monkeypatch.setattr(native, "_reason", "not built")
    with pytest.raises(RuntimeError, match="backend 'native': not built"):
        zk.fake_quant(weight, "int4", backend="native")


def test_opcheck():
    """Schemas, mutation annotations, fake tensors and autograd registration of both ops."""
    options = ("int4", 5, True, False, True, "tensor", "reference")
    torch.library.opcheck(quantize._fake_quant_op, (torch.empty(4, 10), good(), *options))
    torch.library.opcheck(quantize._in_place_op, (good(), *options))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_gives_the_same_bits(compiler):
    """torch.compile traces a new tensor, out and in place without a graph break."""

    def step(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        fresh = zk.fake_quant(weight, "int4", group_size=5, symmetric=False)
        zk.fake_quant(weight, "fp8_e4m3", out=out)
        zk.fake_quant(weight, "int2", out=weight)
        return fresh + weight * 2

    expected_weight, expected_out = good(), torch.empty(4, 10)
    expected = step(expected_weight, expected_out)
    torch._dynamo.reset()
    weight, out = good(), torch.empty(4, 10)
    actual = torch.compile(step, fullgraph=True, backend=compiler)(weight, out)
    assert_same_bits(actual, expected)
    assert_same_bits(weight, expected_weight)
    assert_same_bits(out, expected_out)


def test_parameters_and_gradients():
    """No gradient flows; a parameter may be written in place, and its version tells."""
    weight = torch.nn.Parameter(good())
    got = zk.fake_quant(weight, "int4")
    assert not got.requires_grad
    version = weight._version
    loss = (weight * weight).sum()
    zk.fake_quant(weight, "int4", out=weight)
    assert weight._version > version
    assert_same_bits(weight, got)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
