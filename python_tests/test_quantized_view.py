"""A quantised view of a model that is made once, and its one pass within a perturbation."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_views import tiny_gpt2, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import zo_kernels as zk
from zo_kernels import ops
from zo_kernels.blocks import linear_weights
from zo_kernels.modes import Slot
from zo_kernels.modes.reads import Part
from zo_kernels.modes.streamed import StreamedWeights
from zo_kernels.noise import EVAL_WEIGHT_NOISE, model_streams
from zo_kernels.ops import perturb_quant
from zo_kernels.views import QuantizedWeights


@pytest.mark.parametrize("mode", ["streamed", "dual", "inplace", "snapshot", "master", "master8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_view_is_made_once_and_entered_by_every_mode(monkeypatch, mode, dtype) -> None:
    """The losses of a view made anew each time, without its pass over the weights at each entry."""
    model, ids = tiny_llama(dtype), torch.arange(12).view(1, 12)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    looks = []
    original = QuantizedWeights.look
    monkeypatch.setattr(QuantizedWeights, "look", lambda view: looks.append(view) or original(view))

    def losses(context, reads) -> list[float]:
        for name, p in model.named_parameters():
            p.data.copy_(start[name])

        def closure():
            with torch.no_grad(), context() as names:
                assert names == list(linear_weights(model))
                return model(input_ids=ids, labels=ids).loss

        options = {"lr": 1e-3, "eps": 0.05, "queries": 2, "seed": 3, "mode": mode}
        optimizer = zk.ZOSGD(model.named_parameters(), **options)
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(
                ops, "perturb_quant", lambda *a, **k: reads.append(k) or perturb_quant(*a, **k)
            )
            for _ in range(2):
                optimizer.step(closure)
                found += [*optimizer.last_step.losses_plus, *optimizer.last_step.losses_minus]
        return found

    view, fused, anew = zk.quantized(model, "int4", group_size=16), [], []
    got = losses(lambda: view, fused)
    assert len(looks) == 1
    assert got == losses(lambda: zk.quantized(model, "int4", group_size=16), anew)
    assert len(set(got)) == 8 and len(looks) == 1 + 8
    # Every read of a linear weight in 2 steps of 2 queries at 2 points.
    count = 8 * len(linear_weights(model)) if mode in ("streamed", "dual", "master8") else 0
    assert len(fused) == len(anew) == count

    def two_passes(*_):
        return None

    monkeypatch.setattr(StreamedWeights, "perturbation", two_passes)
    assert got == losses(lambda: view, fused) and len(fused) == count


def test_what_a_perturbation_and_a_rounding_read_as() -> None:
    """One pass where it is the only change within; two for Conv1D and between other contexts."""
    for make, flip in ((tiny_llama, False), (tiny_gpt2, True)):
        model = make()
        chosen, streams = linear_weights(model), model_streams(model)
        noise = {"sigma": 0.1, "seed": 1, "kind": "abs"}
        calls: list[None] = []

        def spy(*arguments, calls=calls, **options) -> None:
            calls.append(perturb_quant(*arguments, **options))

        with (
            pytest.MonkeyPatch.context() as patch,
            zk.perturbed(model, **noise),
            zk.quantized(model, "nf4", group_size=16, double_quant=True),
        ):
            patch.setattr(ops, "perturb_quant", spy)
            found = {name: (p + 0.0).clone() for name, p in chosen.items()}
            assert len(calls) == (0 if flip else len(chosen))
            with zk.perturbed(model, **noise):
                next(iter(chosen.values())) + 0.0  # not of the weights themselves
            with zk.quantized(model, "int2"):
                next(iter(chosen.values())) + 0.0
        for name, p in chosen.items():
            expected = p.detach().clone()
            address = {"seed": 1, "direction": EVAL_WEIGHT_NOISE, "streams": [streams[name]]}
            zk.perturb_([expected], 0.1, **address)
            expected = (expected.t() if flip else expected).contiguous()
            zk.fake_quant(expected, "nf4", group_size=16, double_quant=True, out=expected)
            assert torch.equal(found[name], expected.t() if flip else expected), name


def test_a_view_names_what_is_not_finite() -> None:
    """At the first entry, and on a CPU at any read after an update; the blocks before are ended."""
    model, ids = tiny_llama(), torch.arange(12).view(1, 12)
    weight = model.model.layers[1].mlp.down_proj.weight
    view = zk.quantized(model, "int4")
    message = r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite values"
    keep = weight[0, 0].item()
    weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=message), view:
        pytest.fail("the block was entered")
    weight.data[0, 0] = keep
    with torch.no_grad():
        with view, view:
            expected = model(ids).logits
        weight.data[0, 0] = math.inf
        with pytest.raises(ValueError, match=message), view:
            model(ids)
        streams = model_streams(model)
        slots = [Slot(n, p, streams[n]) for n, p in model.named_parameters()]
        with (
            pytest.raises(ValueError, match=message),
            StreamedWeights(slots, [0.0] * len(slots), seed=0, direction=0),
            view,
        ):
            model(ids)
        weight.data[0, 0] = keep
        with view, view:
            assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"a divisor of 32, the in dimension of model\.layers\.0"):
        zk.quantized(model, "int4", group_size=5)


def test_when_reads_on_a_device_that_waits_are_looked_at() -> None:
    """Changed values once, whether or not unchanged ones were read before; on a CPU always."""
    weight, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    view = QuantizedWeights({"w": weight, "o": other}, "int4")
    on_device = torch.empty(2, 2, device="meta")  # stands for any that is not a CPU
    looks = [
        view._looks_at(Part(parameter, on_device, 0), changed)
        for parameter, changed in [(weight, c) for c in (False, True, True)] + [(other, True)]
    ]
    assert looks == [False, True, False, True]
    assert all(view._looks_at(Part.whole(weight), changed) for changed in (False, True))


@pytest.mark.parametrize("outputs, inputs", [(1, 8), (8, 1)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_conv1d_whose_transpose_is_contiguous(in_place, outputs, inputs) -> None:
    """With one output or one input (in, out) and (out, in) have the same memory."""
    model = nn.ModuleDict({"c": Conv1D(outputs, inputs)})
    weight = model["c"].weight
    with torch.no_grad():
        weight.copy_(torch.linspace(-1.0, 0.83, 8).view(weight.shape))
    before = weight.detach().clone()
    expected = zk.fake_quant(before.t().reshape(outputs, inputs), "int3", group_size="tensor").t()
    options = {"group_size": "tensor", "parameters": "c.weight", "in_place": in_place}
    with torch.no_grad(), zk.quantized(model, "int3", **options):
        read = weight + 0.0
        if not in_place:
            with torch._C.DisableTorchFunction():
                assert torch.equal(weight, before)
    assert torch.equal(read, expected) and not torch.equal(read, before)
    assert torch.equal(weight, before)
