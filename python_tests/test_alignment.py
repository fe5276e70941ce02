"""First-order steps: accumulation, masters, noise, and runs that are killed and go on."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_alignment import CONFIG, EVERY, encoded
from tiny_models import bits, same_bits, tiny_model, tiny_tokenizer

import zo_kernels as zk
from zo_kernels import chat, ops
from zo_kernels.blocks import linear_weights
from zo_kernels.noise import model_streams
from zo_kernels.refine import first_order
from zo_kernels.refine.align import AlignConfig, align
from zo_kernels.refine.alignment_state import read_state
from zo_kernels.refine.first_order import FirstOrder

SGD = AlignConfig(
    steps=1, batch_size=4, lr=0.5, optimizer="sgd", warmup=0.0, schedule="constant",
    clip_norm=9e9, precision="float32",
)  # fmt: skip


def run(model, config, **options):
    return align(model, tiny_tokenizer(), encoded(), config, **options)


def moved(dtype=torch.float32, **changes):
    """A model after a run, and its records."""
    model = tiny_model("llama_tied", dtype)
    return model, run(model, replace(SGD, **changes))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_are_one_batch(accumulation, optimizer):
    """k of b have the gradient of one of k b: by tokens, though the examples' lengths differ."""
    options = {"steps": 3, "optimizer": optimizer, "lr": 1e-2}
    whole, expected = moved(**options)
    parts, records = moved(batch_size=4 // accumulation, accumulation=accumulation, **options)
    for one, other in zip(records, expected, strict=True):
        assert one["tokens"] == other["tokens"] > 4
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
    if optimizer == "sgd":
        for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # The mean of the micro-batches' means is another number here, so the test can fail.
    lengths = {len(e.input_ids) - e.prompt_length for e in encoded()}
    assert len(lengths) > 1


def test_momentum_is_that_of_sgd():
    """Step 2 is lr (g2 + m g1), with the gradients of a plain run's points."""
    start = dict(tiny_model("llama_tied").named_parameters())
    plain, _ = moved(steps=1)
    heavy, _ = moved(steps=2, momentum=0.5)
    batches = chat.batch_stream(encoded(), batch_size=4, seed=0, pad_id=2)
    next(batches)
    chat.completion_loss(plain, next(batches)).backward()
    for name, parameter in heavy.named_parameters():
        first = dict(plain.named_parameters())[name]
        direction = first.grad + 0.5 * (start[name] - first) / 0.5
        torch.testing.assert_close(parameter, first - 0.5 * direction, rtol=0, atol=2e-6)


def test_precision():
    """bfloat16 is autocast: other bits than float32; auto is one of the two."""
    prints = {}
    for precision in ("auto", "float32", "bfloat16"):
        prints[precision], _ = moved(precision=precision)
    exact, fast = bits(prints["float32"]), bits(prints["bfloat16"])
    assert not same_bits(prints["float32"], fast)
    assert same_bits(prints["auto"], exact) or same_bits(prints["auto"], fast)
    assert {p.dtype for p in prints["bfloat16"].parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"precision: expected auto or bfloat16 .*torch\.float16"):
        moved(torch.float16, precision="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_of_16_bit_weights_arrive(dtype):
    """Steps far below the weights' spacing add up as in float32; the weights are 16-bit."""
    options = {"steps": 40, "optimizer": "adamw", "lr": 2e-6, "precision": "auto"}
    model, records = moved(dtype, **options)
    start = tiny_model("llama_tied", dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    twin = tiny_model("llama_tied", dtype).float()
    run(twin, replace(SGD, **{**options, "precision": "float32"}))
    # A sum over all weights of the movement along the float32 run's: 1 where all arrives.
    along = intended = 0.0
    for w0, w1, w2 in zip(start.parameters(), model.parameters(), twin.parameters(), strict=True):
        step = w2.detach().double() - w0.detach().double()
        along += float((step * (w1.detach().double() - w0.detach().double())).sum())
        intended += float((step * step).sum())
    assert along / intended == pytest.approx(1.0, abs=0.25)
    scales = [r.get("loss_scale") for r in records]
    assert set(scales) == ({65536.0} if dtype == torch.float16 else {None})


def test_float16_gradients_that_overflow_are_taken_again(monkeypatch):
    """The scale halves until they fit; the step has the gradient that it has at a small scale."""
    monkeypatch.setattr(first_order, "_LOSS_SCALE", 2.0**40)
    model, records = moved(torch.float16, precision="auto", steps=2)
    assert 2.0**4 < records[0]["loss_scale"] < 2.0**40
    assert records[1]["loss_scale"] == records[0]["loss_scale"]
    monkeypatch.setattr(first_order, "_LOSS_SCALE", 2.0**4)
    other, expected = moved(torch.float16, precision="auto", steps=2)
    assert records[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-2)
    assert all(p.isfinite().all() for p in (*model.parameters(), *other.parameters()))


def test_a_gradient_that_is_not_finite_is_no_update():
    model = tiny_model("llama")
    before = bits(model)
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="step 0: expected a finite gradient"):
        run(model, SGD)
    assert same_bits(model, before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_is_injected_at_the_step_s_direction(dtype):
    """The gradient is that at W + r std(W) z(seed, step), the update is of W."""
    number, r = 4, 0.2
    config = replace(
        SGD, noise=r, seed=7, precision="auto" if dtype != torch.float32 else "float32"
    )
    model = tiny_model("llama_tied", dtype)
    twin = tiny_model("llama_tied", dtype)
    own = FirstOrder(model, config)
    batch = next(chat.batch_stream(encoded(), batch_size=4, seed=0, pad_id=2))
    record = own.step(number, [batch], 0.5)
    own.close()

    weights, streams = linear_weights(twin), model_streams(twin)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for name, weight in weights.items():
        ops.perturb_(
            [weight.detach()], [r * float(weight.detach().double().std(correction=0))],
            seed=7, direction=number, streams=[streams[name]],
        )  # fmt: skip
        assert not torch.equal(weight, start[name])
    loss = chat.completion_loss(twin, batch)
    loss.backward()
    assert record["loss"] == loss.item()
    for name, parameter in model.named_parameters():
        expected = start[name].float() - 0.5 * dict(twin.named_parameters())[name].grad.float()
        ulp = {torch.float32: 2**-22, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(parameter, expected.to(dtype), rtol=ulp, atol=1e-7)
        assert not torch.equal(parameter, start[name]) or "norm" in name, name


def test_noise_leaves_no_trace(monkeypatch):
    """With lr 0 every bit is as before; so after a forward that raises under noise."""
    model = tiny_model("llama_tied", torch.bfloat16)
    before = bits(model)
    records = run(model, replace(CONFIG, lr=0.0))
    assert same_bits(model, before)
    assert len({r["loss"] for r in records}) == CONFIG.steps
    seen = []

    def fail(*arguments):
        seen.append(same_bits(model, before))
        raise KeyboardInterrupt

    monkeypatch.setattr(first_order, "completion_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, CONFIG)
    assert seen == [False] and same_bits(model, before)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_under_noise_helps_under_noise():
    """What the baseline is for: the loss at noise of its scale, of draws it has not seen."""
    config = replace(SGD, steps=100, optimizer="adamw", lr=5e-3)
    plain, robust = tiny_model("llama"), tiny_model("llama")
    run(plain, config)
    run(robust, replace(config, noise=1.0))
    batch = next(chat.batch_stream(encoded(), batch_size=4, seed=0, pad_id=2))
    losses = {}
    for name, model in (("plain", plain), ("robust", robust)):
        total = 0.0
        for draw in range(8):
            with zk.perturbed(model, sigma=1.0, seed=1, draw=draw), torch.no_grad():
                total += chat.completion_loss(model, batch).item()
        losses[name] = total / 8
    assert losses["robust"] < 0.8 * losses["plain"]


def uninterrupted_bits():
    model = tiny_model("llama_tied", torch.bfloat16)
    records = run(model, CONFIG)
    return bits(model), [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.mark.parametrize(("moment", "saved"), [("step", 2 * EVERY), ("write", EVERY)])
def test_a_killed_alignment_goes_on_bit_for_bit(moment, saved, tmp_path):
    """SIGKILL between steps, or in the middle of writing a state: the last whole one is there."""
    expected, records = uninterrupted_bits()
    state = tmp_path / "state"
    script = Path(__file__).parent / "kill_alignment.py"
    result = subprocess.run([sys.executable, script, state, moment], timeout=300)
    assert result.returncode == -signal.SIGKILL
    earlier, _ = read_state(state)
    assert len(earlier) == saved
    model = tiny_model("llama_tied", torch.bfloat16)
    rest = run(model, CONFIG, state=state, save_every=EVERY, resume=True)
    assert same_bits(model, expected)
    seconds = [r["seconds"] for r in (*earlier, *rest)]
    assert seconds == sorted(seconds)
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in (*earlier, *rest)] == records


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd", "momentum": 0.5}, {"optimizer": "sgd"}, {"schedule": "constant"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stopped_and_resumed(dtype, changes, tmp_path, monkeypatch):
    """Every optimizer's state, and the scale of float16 losses, go on."""
    monkeypatch.setattr(first_order, "_LOSS_SCALE_PERIOD", 4)
    config = replace(CONFIG, noise=0.0, **changes)
    whole = tiny_model("llama", dtype)
    expected = run(whole, config)

    def stop(record):
        if record["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama", dtype), config, state=tmp_path / "s", save_every=4, on_step=stop)
    model = tiny_model("llama", dtype)
    rest = run(model, config, state=tmp_path / "s", resume=True)
    assert [r["loss"] for r in rest] == [r["loss"] for r in expected[4:]]
    assert same_bits(model, bits(whole))
    if dtype == torch.float16:
        assert [r["loss_scale"] for r in rest] == [r["loss_scale"] for r in expected[4:]]


def test_states_of_other_runs_are_refused(tmp_path):
    state = tmp_path / "state"
    run(tiny_model("llama"), replace(CONFIG, noise=0.0), state=state, save_every=5)
    fine = replace(CONFIG, noise=0.0)
    for config, dtype, examples, message in [
        (replace(fine, lr=1.0), torch.float32, encoded(), "lr: expected 0.01 as in"),
        (replace(fine, steps=11), torch.float32, encoded(), "steps: expected 10 as in"),
        (fine, torch.bfloat16, encoded(), "model: expected the weights with which"),
        (fine, torch.float32, encoded()[1:], "data: expected the examples with which"),
    ]:
        model = tiny_model("llama", dtype)
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            align(model, tiny_tokenizer(), examples, config, state=state, resume=True)
        assert same_bits(model, before)
    # A whole run's state gives its weights back, and no step is left.
    model = tiny_model("llama")
    assert run(model, fine, state=state, resume=True) == []
    again = tiny_model("llama")
    run(again, fine)
    assert same_bits(model, bits(again))
    with pytest.raises(FileNotFoundError, match="resume: expected an unfinished alignment's state"):
        run(model, fine, state=tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="save_every, resume: expected a number of steps, and a"):
        run(model, fine, save_every=3)
    for content in (b"no state", b""):
        state.write_bytes(content)
        with pytest.raises(ValueError, match="expected the state of an alignment"):
            run(model, fine, state=state, resume=True)


def test_a_state_of_an_older_version_goes_on(tmp_path):
    """It has an option that is no more, at the only value that this version can go on with."""
    state, config = tmp_path / "state", replace(CONFIG, noise=0.0, steps=2)
    run(tiny_model("llama"), config, state=state, save_every=1)
    content = torch.load(state, weights_only=True)
    for value, message in ((0, None), (3, "first_batch: expected 3 as in .*state, got 0")):
        content["identity"]["options"]["first_batch"] = value
        torch.save(content, state)
        if message is None:
            assert run(tiny_model("llama"), config, state=state, resume=True) == []
        else:
            with pytest.raises(ValueError, match=message):
                run(tiny_model("llama"), config, state=state, resume=True)


def test_steps_are_free_where_no_rate_hangs_on_them(tmp_path):
    """A longer run goes on where a shorter one ended, and time spent before counts."""
    config = replace(CONFIG, schedule="constant", warmup=0.0, steps=4)
    run(tiny_model("llama"), config, state=tmp_path / "s", save_every=4)
    spent = read_state(tmp_path / "s")[0][-1]["seconds"]
    whole = tiny_model("llama")
    late = replace(config, steps=9, seconds=spent)
    assert run(tiny_model("llama"), late, state=tmp_path / "s", resume=True) == []
    model = tiny_model("llama")
    rest = run(model, replace(late, seconds=None), state=tmp_path / "s", resume=True)
    assert [r["step"] for r in rest] == [4, 5, 6, 7, 8] and rest[0]["seconds"] > spent
    run(whole, replace(config, steps=9))
    assert same_bits(model, bits(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "accumulation: expected at least 1"),
        ({"momentum": 0.5}, "momentum: expected a number below 1, and 0 unless the optimizer is"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum: expected a number below 1"),
        ({"noise": -0.1}, "noise: expected at least 0"),
        ({"noise": math.nan}, "noise: expected at least 0"),
        ({"seed": -1}, "seed: expected 0 <= seed < 2"),
        ({"precision": "int8"}, "precision: expected one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignConfig(**options).check()
