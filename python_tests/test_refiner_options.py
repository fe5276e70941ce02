"""What a refinement can be asked for beyond steps: each option against what it says."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import EXAMPLES, bits, same_bits, tiny_model
from tiny_refiner import HELD_OUT, logged, loss_of, refiner, untimed

import zo_kernels as zk
from zo_kernels import chat, noise
from zo_kernels.blocks import linear_weights
from zo_kernels.modes import Slot
from zo_kernels.moments import standard_deviation
from zo_kernels.refine.config import RefineConfig, first_block, select_parameters
from zo_kernels.refine.held_out import held_out_part, noisy_loss
from zo_kernels.refine.objective import Objective


@pytest.mark.parametrize("reuse", [True, False])
def test_accumulated_batches_are_one_batch(reuse):
    """k batches of b examples have the loss of one of k b: weighted by tokens, up to rounding."""
    losses = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = tiny_model("llama")
        config = {
            "steps": 3, "lr": 0.0, "eps": 0.2, "layers": (1,), "reuse_prefix": reuse, "queries": 2,
            "batch_size": size, "accumulation": accumulation,
        }  # fmt: skip
        records = refiner(model, **config).run(EXAMPLES)
        losses.append([x for r in records for x in (*r["losses_plus"], *r["losses_minus"])])
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    assert losses[2] == pytest.approx(losses[0], abs=2e-6)
    assert len(set(losses[0])) == 12
    # Not the mean of the batches' means, which other lengths would show.
    model = tiny_model("llama")
    with torch.no_grad():
        parts = [float(chat.completion_loss(model, b)) for b in loss_of(model, size=1).batches]
    assert abs(sum(parts) / 4 - loss_of(model)()) > 1e-4


def test_the_scale_of_the_noise():
    for text, expected in (
        (0.25, (0.25, True)), ("match:0.1", (0.1, True)), ("match:1e-2", (0.01, True)),
        ("match:abs:0.002", (0.002, False)),
    ):  # fmt: skip
        assert RefineConfig(eps=text).scale() == expected
    assert RefineConfig(eps=0.25, relative_eps=False).scale() == (0.25, False)
    assert RefineConfig(eps="match:0.1", relative_eps=False).scale() == (0.1, True)
    for text in (
        *("0.1", "match", "match:", "match:x", "match:0", "match:-1", "match:nan", "match:inf"),
        *("match:abs:", "match:abs:0", "match:rel:0.1", "noise:0.1"),
    ):
        with pytest.raises(ValueError, match=rf"eps: expected a number, .* got '{text}'"):
            RefineConfig(eps=text).check()
    group = refiner(eps="match:abs:0.002").optimizer.param_groups[0]
    assert (group["eps"], group["relative_eps"]) == (0.002, False)
    group = refiner(eps="match:0.1").optimizer.param_groups[0]
    assert (group["eps"], group["relative_eps"]) == (0.1, True)


def test_the_held_out_loss_is_under_noise_on_all_linear_weights():
    """At eps where no scale is given, along directions that no step and no evaluation has."""
    model = tiny_model("llama")
    options = {"steps": 2, "lr": 0.0, "eps": 0.2, "layers": (1,), "held_out_every": 1}
    for given, sigma in (({}, 0.2), ({"held_out_noise": 0.05}, 0.05), ({"held_out_noise": 0.0}, 0)):
        records = refiner(model, **options, **given, held_out_draws=3, seed=6).run(
            EXAMPLES, held_out=HELD_OUT
        )
        streams, weights = noise.model_streams(model), linear_weights(model)
        slots = [Slot(n, w, streams[n]) for n, w in weights.items()]
        scales = [sigma * standard_deviation(w) for w in weights.values()]
        loss = loss_of(model, HELD_OUT)
        expected = noisy_loss(loss, slots, scales, draws=3, seed=6)
        assert [r["held_out_loss"] for r in records] == [expected] * 2
    assert expected == loss()
    seen = []

    class Spy(Objective):
        def __call__(self):
            seen.append((slots[0].tensor * 1.0).detach())
            return 1.0

    assert noisy_loss(Spy(model, loss.batches), slots, [1.0] * 14, draws=2, seed=6) == 1.0
    for draw, found in enumerate(seen):
        copy = slots[0].tensor.detach().clone()
        address = {"seed": 6, "direction": noise.CALIBRATION + 2**20 + draw}
        zk.perturb_([copy], 1.0, streams=[slots[0].stream], **address)
        assert torch.equal(copy, found)


def test_which_examples_are_held_out():
    """Every eighth of each kind, in the order of the data; of none too few."""
    kinds = ["harmless", "harmful"] * 8 + ["harmful"] * 9
    encoded = [chat.Encoded((number, 0), 1, kind) for number, kind in enumerate(kinds)]
    training, held = held_out_part(encoded)
    # harmless: 0, 2 ... 14; harmful: 1, 3 ... 15, then 16, 17 ... 24
    assert [one.input_ids[0] for one in held] == [14, 15, 23]
    assert training == [one for one in encoded if one not in held]
    message = "at least 8 examples of each kind, to hold every 8th out, got 7 that are harmless"
    with pytest.raises(ValueError, match=f"held_out: expected {message}$"):
        held_out_part([one for one in encoded if one.input_ids[0] != 4])
    with pytest.raises(ValueError, match=r"held_out: expected .* got none$"):
        held_out_part([])


def test_layers_confine():
    """What is moved, whatever the pattern; and where forwards can begin."""
    model = tiny_model("llama", layers=3)
    assert {n.split(".")[2] for n, _ in select_parameters(model, "linear", (0, 2))} == {"0", "2"}
    assert len(select_parameters(model, "linear", (1,))) == 7
    assert len(select_parameters(model, "all", (1,))) == 9
    assert [n for n, _ in select_parameters(model, "*norm*", [2])] == [
        "model.layers.2.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight"
    ]  # fmt: skip
    for layers, message in (((3,), "layers: expected 0 to 2, got 3"), ((-1,), "got -1")):
        with pytest.raises(ValueError, match=message):
            select_parameters(model, "linear", layers)
    with pytest.raises(ValueError, match=r"layers: expected some of 'lm_head\*' in \[1\]"):
        select_parameters(model, "lm_head*", (1,))
    assert first_block(model, ["model.layers.2.x", "model.layers.1.y"]) == 1
    assert first_block(model, ["model.layers.2.x", "model.norm.weight"]) == 0
    before = bits(model)
    refiner(model, steps=2, lr=0.5, layers=(2, 0)).run(EXAMPLES)
    moved = {n for n, b in bits(model).items() if not torch.equal(b, before[n])}
    assert moved == {n for n in linear_weights(model) if ".layers.1." not in n}


def test_the_cosine_schedule_over_the_steps(tmp_path):
    """lr (1 + cos(pi n / steps)) / 2, in a resumed run too; another number of steps is refused."""
    options = {"steps": 5, "lr": 0.2, "schedule": "cosine"}
    model = tiny_model("llama")
    records = refiner(model, **options).run(EXAMPLES, log=tmp_path / "whole")
    expected = [0.1 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]
    assert [r["lr"][0] for r in records] == pytest.approx(expected, rel=1e-12)

    def stop(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refiner(**options).run(EXAMPLES, log=tmp_path / "part", on_step=stop)
    with pytest.raises(ValueError, match=r"steps: expected 5 as in .*, got 6"):
        refiner(**{**options, "steps": 6}).run(EXAMPLES, log=tmp_path / "part", resume=True)
    again = refiner(**options)
    rest = again.run(EXAMPLES, log=tmp_path / "part", resume=True)
    assert untimed(rest) == untimed(records[3:]) and same_bits(again.model, bits(model))
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")


def test_a_refiner_runs_once():
    """What another run would begin with is neither its optimizer's nor its schedule's."""
    run = refiner(steps=2, schedule="cosine")
    run.run(EXAMPLES)
    before = bits(run.model)
    with pytest.raises(ValueError, match="expected a refiner that has not run, got one after 2"):
        run.run(EXAMPLES)
    assert same_bits(run.model, before)
    with pytest.raises(ValueError, match="resume: expected a log to go on with, got none"):
        refiner(steps=2).run(EXAMPLES, resume=True)


def test_frozen_parameters_are_not_moved():
    """They are none of the refiner's, whose prefix may end behind them."""
    model = tiny_model("llama", layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.2." in name or ".layers.1.mlp.up" in name)
    before, run = bits(model), refiner(model, steps=2, lr=0.5)
    assert set(run.parameters) == {
        n for n in linear_weights(model) if ".2." in n or ".1.mlp.up" in n
    }
    run.run(EXAMPLES)
    moved = {n for n, b in bits(model).items() if not torch.equal(b, before[n])}
    assert moved == set(run.parameters)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters: expected some .* got 21 that are frozen"):
        refiner(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "accumulation: expected at least 1, got 0"),
        ({"calibration_draws": 1}, "calibration_draws: expected at least 2"),
        ({"curvature_every": -1}, "curvature_every: expected at least 0"),
        ({"held_out_every": -1}, "held_out_every: expected at least 0"),
        ({"held_out_draws": 0}, "held_out_draws: expected at least 1"),
        ({"held_out_noise": -0.1}, "held_out_noise: expected a finite number of at least 0"),
        ({"held_out_noise": math.nan}, "held_out_noise: expected a finite number of at least 0"),
        ({"patience": -1}, "patience: expected at least 0"),
        ({"patience": 1}, "patience: expected held_out_every with it, got 0"),
        ({"held_out_every": 1, "eps": "match:abs:0.1"}, "held_out_noise: expected a number where"),
        ({"held_out_every": 1, "relative_eps": False}, "held_out_noise: expected a number where"),
        ({"lr": "fast"}, "lr: expected a number or 'auto', got 'fast'"),
        ({"lr": "auto", "eps": 0.0}, "lr: expected a number where eps is 0"),
        ({"lr": "auto", "update_norm": 0.1}, "lr: expected a number with update_norm, .* 'auto'"),
        ({"seconds": math.nan}, "seconds: expected a positive number, got nan"),
        ({"seconds": math.inf}, "seconds: expected a positive number, got inf"),
        ({"parameters": "*.nothing"}, r"parameters: expected .* got '\*.nothing' \(named_"),
        ({"layers": ()}, "layers: expected at least one decoder block, got none"),
        ({"layers": (2,)}, "layers: expected 0 to 1, got 2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        refiner(**options)
