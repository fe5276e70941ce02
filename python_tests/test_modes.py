"""Modes: the streamed forward is the forward of explicitly perturbed weights, and leaves no trace.

Each architecture stresses another way of reading weights: grouped attention (llama, qwen2 with
biases), transposed linears through addmm (gpt2), tied embeddings, offset position embeddings
(opt), stacked experts (mixtral).
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, bits, tiny_batch, tiny_model

import zo_kernels as zk
from zo_kernels.modes import MODES, Slot, StreamedWeights
from zo_kernels.noise import model_streams

SEED, DIRECTION, EPS = 2**63 + 17, 41, 0.05


def slots_of(model, chosen=lambda name: True):
    streams = model_streams(model)
    return [Slot(n, p, streams[n]) for n, p in model.named_parameters() if chosen(n)]


def perturbed_copy(model, scale, chosen=lambda name: True):
    """The same model with perturbed weights written into it."""
    other = copy.deepcopy(model)
    slots = slots_of(other, chosen)
    zk.perturb_(
        [s.tensor for s in slots],
        scale,
        seed=SEED,
        direction=DIRECTION,
        streams=[s.stream for s in slots],
    )
    return other


def logits_and_loss(model, batch):
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    return output.logits, output.loss


def streamed(model, scale, chosen=lambda name: True):
    slots = slots_of(model, chosen)
    return StreamedWeights(slots, [scale] * len(slots), seed=SEED, direction=DIRECTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_forward_is_that_of_perturbed_weights(name, dtype):
    model, batch = tiny_model(name, dtype), tiny_batch()
    before = bits(model)
    with streamed(model, EPS):
        logits, loss = logits_and_loss(model, batch)
    expected_logits, expected_loss = logits_and_loss(perturbed_copy(model, EPS), batch)
    assert torch.equal(logits, expected_logits) and torch.equal(loss, expected_loss)
    assert not torch.equal(logits, logits_and_loss(model, batch)[0])  # something was perturbed
    assert all(torch.equal(b, before[k]) for k, b in bits(model).items())


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_streamed_generation_is_that_of_perturbed_weights(name):
    """Cached decoding, where each step reads the weights again."""
    model = tiny_model(name)
    ids = tiny_batch()["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with streamed(model, EPS), torch.no_grad():
        got = model.generate(input_ids=ids, **settings)
    assert torch.equal(got, perturbed_copy(model, EPS).generate(input_ids=ids, **settings))


def test_unselected_parameters_are_not_perturbed():
    model, batch = tiny_model("llama"), tiny_batch()

    def chosen(name):
        return ".0.mlp." in name

    with streamed(model, EPS, chosen) as weights:
        logits, _ = logits_and_loss(model, batch)
    assert torch.equal(logits, logits_and_loss(perturbed_copy(model, EPS, chosen), batch)[0])
    assert weights.used == 3


def test_zero_scale_changes_no_bit():
    model, batch = tiny_model("llama_tied", torch.bfloat16), tiny_batch()
    with streamed(model, 0.0):
        logits, loss = logits_and_loss(model, batch)
    plain = logits_and_loss(model, batch)
    assert torch.equal(logits, plain[0]) and torch.equal(loss, plain[1])


def test_views_of_a_perturbed_copy_stay_valid():
    """A view handed to the model must not be overwritten by the next operation's scratch."""
    a, b = (torch.nn.Parameter(torch.randn(7, 5)) for _ in range(2))
    slots = [Slot("a", a, 1), Slot("b", b, 2)]
    with StreamedWeights(slots, [1.0, 1.0], seed=0, direction=0), torch.no_grad():
        view_a, view_b = a.t(), b.view(5, 7)
        row = a[2]
        doubled = a * 2
        chunks = torch.chunk(b, 2)
    with torch.no_grad():
        zk.perturb_([a, b], 1.0, seed=0, direction=0, streams=[1, 2])
        assert torch.equal(view_a, a.t()) and torch.equal(view_b, b.view(5, 7))
        assert torch.equal(row, a[2]) and torch.equal(doubled, a * 2)
        assert all(torch.equal(x, y) for x, y in zip(chunks, torch.chunk(b, 2), strict=True))


def test_negative_and_sliced_indices_of_a_stacked_parameter():
    stacked = torch.nn.Parameter(torch.randn(4, 3, 5))
    with StreamedWeights([Slot("s", stacked, 9)], [0.5], seed=0, direction=0), torch.no_grad():
        last, middle, picked = stacked[-1], stacked[1:3], stacked[torch.tensor([2, 0])]
    with torch.no_grad():
        zk.perturb_([stacked], 0.5, seed=0, direction=0, streams=[9])
    assert torch.equal(last, stacked[-1]) and torch.equal(middle, stacked[1:3])
    assert torch.equal(picked, stacked[torch.tensor([2, 0])])


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_perturbs_only_rows_looked_up(padding_idx, monkeypatch):
    table = torch.nn.Parameter(torch.randn(1000, 6))
    ids = torch.tensor([[3, 999, 3], [0, 17, 999]])
    touched = []
    from zo_kernels.backends import native

    original = native.combine_

    def spy(dst, *arguments, **options):
        touched.append(sum(t.numel() for t in dst))
        return original(dst, *arguments, **options)

    monkeypatch.setattr(native, "combine_", spy)
    with StreamedWeights([Slot("t", table, 4)], [1.0], seed=5, direction=6), torch.no_grad():
        got = F.embedding(ids, table, padding_idx=padding_idx)
    monkeypatch.undo()
    assert touched == [4 * 6]
    with torch.no_grad():
        zk.perturb_([table], 1.0, seed=5, direction=6, streams=[4])
        assert torch.equal(got, F.embedding(ids, table))


@pytest.mark.parametrize("number", [-1, 9])
def test_ids_that_no_row_has_are_the_error_of_the_embedding(number):
    """And not one of what makes the noise."""
    table, ids = torch.nn.Parameter(torch.randn(9, 6)), torch.tensor([number, 3])
    with pytest.raises(IndexError) as expected:
        F.embedding(ids, table)
    with StreamedWeights([Slot("t", table, 4)], [1.0], seed=5, direction=6):
        with pytest.raises(IndexError) as caught:
            F.embedding(ids, table)
    assert str(caught.value) == str(expected.value)


def test_reading_the_address_is_refused_by_name():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    with StreamedWeights([Slot("head.weight", weight, 1)], [1.0], seed=0, direction=0):
        assert weight.shape == (4, 4) and weight.dtype == torch.float32  # metadata is free
        with pytest.raises(RuntimeError, match=r"data_ptr takes the address of 'head.weight'"):
            weight.data_ptr()


def test_streamed_needs_only_the_largest_leaf():
    """The scratch left behind is that of the largest operation: the tied head, 64 x 32."""
    model, batch = tiny_model("llama_tied"), tiny_batch()
    mode = MODES["streamed"](seed=0)
    slots = slots_of(model)
    mode.evaluate_pair(slots, [EPS] * len(slots), 0, lambda: logits_and_loss(model, batch)[1])
    held = sum(buffer.numel() for buffer in mode._scratch._buffers.values())
    assert held == 64 * 32


def test_closure_that_reads_no_parameter_is_refused():
    model = tiny_model("llama")
    mode = MODES["streamed"](seed=0)
    with pytest.raises(RuntimeError, match="read none of the"):
        mode.evaluate_pair(slots_of(model), [EPS] * 21, 0, lambda: 1.0)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_modes_agree_on_both_losses(mode):
    """In float32, mezo's second point differs by its rounding only; streamed's are exact."""
    model, batch = tiny_model("llama_tied"), tiny_batch()
    plus = logits_and_loss(perturbed_copy(model, EPS), batch)[1].item()
    minus = logits_and_loss(perturbed_copy(model, -EPS), batch)[1].item()
    slots = slots_of(model)
    made = MODES[mode](seed=SEED)
    got = made.evaluate_pair(
        slots, [EPS] * len(slots), DIRECTION, lambda: logits_and_loss(model, batch)[1]
    )
    assert got[0] == plus
    if made.exact:
        assert got[1] == minus
    else:
        assert got[1] == pytest.approx(minus, rel=1e-5)


def test_mezo_drifts_in_bfloat16_and_no_other_mode_does():
    model, batch = tiny_model("llama", torch.bfloat16), tiny_batch()
    changed = {}
    for name in sorted(MODES):
        trial = copy.deepcopy(model)
        slots = slots_of(trial)
        before = bits(trial)
        mode = MODES[name](seed=0)
        mode.evaluate_pair(
            slots, [1e-3] * len(slots), 0, lambda m=trial: logits_and_loss(m, batch)[1]
        )
        mode.settle()
        after = bits(trial)
        changed[name] = any(not torch.equal(after[k], before[k]) for k in before)
    assert {name for name, drifts in changed.items() if drifts} == {"mezo"}
