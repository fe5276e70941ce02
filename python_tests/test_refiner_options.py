"""What a refinement can be asked for beyond steps: each option against what it says."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    EXAMPLES,
    Quadratic,
    bits,
    same_bits,
    tiny_encoded,
    tiny_model,
    tiny_tokenizer,
)
from tiny_refiner import logged, refiner, untimed

import zo_kernels as zk
from zo_kernels import chat, noise
from zo_kernels.blocks import linear_weights
from zo_kernels.modes import Slot
from zo_kernels.moments import standard_deviation
from zo_kernels.refine.config import RefineConfig, first_block, select_parameters
from zo_kernels.refine.curvature import measure_curvature
from zo_kernels.refine.held_out import held_out_part, noisy_loss
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.refine.scoring import score
from zo_kernels.replay import LogWriter, read_log, replay_

HELD_OUT = EXAMPLES[1:3]


def loss_of(model, examples=EXAMPLES, size=4):
    encoded = chat.encode(tiny_tokenizer(), examples)
    return Objective(model, fixed_batches(model, tiny_tokenizer(), encoded, size))


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


def test_batches_go_on_where_others_ended(tmp_path):
    """A resumed run counts forwards' batches, accumulated ones too."""
    options = {"batch_size": 1, "accumulation": 2, "lr": 0.0, "eps": 0.0}
    whole = refiner(**options, steps=3).run(EXAMPLES)
    refiner(**options, steps=1).run(EXAMPLES, log=tmp_path / "log")
    rest = refiner(**options, steps=3).run(EXAMPLES, log=tmp_path / "log", resume=True)
    assert untimed(rest) == untimed(whole[1:]) and len({r["loss"] for r in whole}) > 1


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


@pytest.mark.parametrize("eps", ["match:0.3", "match:abs:0.02"])
def test_a_rate_that_is_measured(eps, tmp_path, monkeypatch):
    """From the first batches and what is moved; in the log; not measured again by a resumed run."""
    Quadratic.use(monkeypatch)
    options = {
        "steps": 3, "lr": "auto", "eps": eps, "layers": (1, 2), "calibration_draws": 6,
        "schedule": "cosine", "batch_size": 2,
    }  # fmt: skip
    whole = refiner(Quadratic(), **options)
    assert whole.optimizer.param_groups[0]["lr"] == 0.0
    records = whole.run(EXAMPLES, log=tmp_path / "whole")
    model, (scale, relative) = Quadratic(), RefineConfig(eps=eps).scale()
    chosen, streams = linear_weights(model), noise.model_streams(model)
    names = [name for name in chosen if not name.startswith("layers.0.")]
    units = [standard_deviation(chosen[name]) if relative else 1.0 for name in names]
    found = measure_curvature(
        lambda: [float(model(torch.zeros(1)).detach())] * 4,
        [Slot(name, chosen[name], streams[name]) for name in names], units, scale, draws=6, seed=0,
    )  # fmt: skip
    assert whole.curvature.trace == pytest.approx(found.trace, rel=1e-6)
    lr = whole.curvature.learning_rate(3)
    assert lr == pytest.approx(found.learning_rate(3), rel=1e-6)
    assert records[0]["lr"] == [lr] and records[2]["lr"][0] < 0.3 * lr
    assert read_log(tmp_path / "whole").header.user["lr"] == lr

    part = refiner(Quadratic(), **options)

    def stop(record):
        if record["step"] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.run(EXAMPLES, log=tmp_path / "part", on_step=stop)
    resumed = refiner(Quadratic(), **options)
    rest = resumed.run(EXAMPLES, log=tmp_path / "part", resume=True)
    assert resumed.curvature is None
    assert [r["lr"] for r in rest] == [r["lr"] for r in records[1:]]
    assert same_bits(resumed.model, bits(whole.model))
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")


def test_a_rate_that_is_measured_is_of_so_many_steps(tmp_path, monkeypatch):
    """Other steps are refused, and so is a log that does not say what was measured."""
    Quadratic.use(monkeypatch)
    options = {"steps": 2, "lr": "auto", "eps": 0.3}
    refiner(Quadratic(), **options).run(EXAMPLES, log=tmp_path / "log")
    more = options | {"steps": 4}
    with pytest.raises(ValueError, match=r"steps: expected 2 as in .*log, got 4"):
        refiner(Quadratic(), **more).run(EXAMPLES, log=tmp_path / "log", resume=True)
    header = read_log(tmp_path / "log").header
    # Older versions left the steps out.
    left = {k: v for k, v in header.user["options"].items() if k != "steps"}
    older = replace(header, user=header.user | {"options": left})
    LogWriter(tmp_path / "older", older).close()
    records = refiner(Quadratic(), **more).run(EXAMPLES, log=tmp_path / "older", resume=True)
    assert [r["lr"] for r in records] == [[header.user["lr"]]] * 4
    bare = replace(header, user={k: v for k, v in header.user.items() if k != "lr"})
    LogWriter(tmp_path / "bare", bare).close()
    with pytest.raises(ValueError, match=r"lr: expected the rate that was .*bare, got None"):
        refiner(Quadratic(), **options).run(EXAMPLES, log=tmp_path / "bare", resume=True)


def test_the_time_of_what_is_measured_first_counts(monkeypatch):
    """In the records and against the limit; one step is taken anyhow."""
    Quadratic.use(monkeypatch)

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return measure_curvature(*args, **kwargs)

    monkeypatch.setattr("zo_kernels.refine.refiner.measure_curvature", slowly)
    records = refiner(Quadratic(), steps=2, lr="auto", eps=0.3).run(EXAMPLES)
    assert 0.3 <= records[0]["seconds"] <= records[1]["seconds"]
    late = refiner(Quadratic(), steps=9, lr="auto", eps=0.3, seconds=0.3)
    assert len(late.run(EXAMPLES)) == 1


def test_the_mean_noise_is_that_of_the_batches_that_are_measured(monkeypatch):
    """Four batches of the run's: without replacement, of so many examples."""
    Quadratic.use(monkeypatch)
    seen = []

    def measure(*args, mean_noise, **kwargs):
        seen.append(mean_noise)
        return measure_curvature(*args, mean_noise=mean_noise, **kwargs)

    monkeypatch.setattr("zo_kernels.refine.refiner.measure_curvature", measure)
    for batch_size, accumulation, examples in ((1, 2, 16), (2, 1, 32), (1, 1, 4)):
        run = refiner(
            Quadratic(), steps=1, lr="auto", eps=0.3, batch_size=batch_size,
            accumulation=accumulation,
        )  # fmt: skip
        run.run(EXAMPLES * (examples // 4))
    assert seen == [0.5, 0.75, 0.0]


def test_a_rate_that_cannot_be_told(monkeypatch):
    Quadratic.use(monkeypatch)
    model = Quadratic()
    for block in model.layers:
        block.curvature.zero_()
    before = bits(model)
    with pytest.raises(ValueError, match="lr: expected noise that raises the loss"):
        refiner(model, lr="auto").run(EXAMPLES)
    assert same_bits(model, before)


def test_records_of_curvature(monkeypatch):
    """c = (l+ + l-) / 2 - l0, and the trace that it tells, every so many steps."""
    Quadratic.use(monkeypatch)
    model = Quadratic()
    run = refiner(
        model, steps=5, lr=0.0, eps=0.1, relative_eps=False, curvature_every=2, queries=3,
        distribution="rademacher",
    )  # fmt: skip
    records = run.run(EXAMPLES)
    assert [("curvature" in r, "clean_loss" in r, "trace" in r) for r in records] == [
        (n % 2 == 0,) * 3 for n in range(5)
    ]
    trace = sum(model.trace(number) for number in range(3))
    for record in records[::2]:
        evaluated = [*record["losses_plus"], *record["losses_minus"]]
        assert record["loss"] == pytest.approx(sum(evaluated) / 6)
        assert record["clean_loss"] == float(model(torch.zeros(1)).detach())
        assert record["curvature"] == record["loss"] - record["clean_loss"]
        assert record["trace"] == pytest.approx(trace, rel=1e-4)  # of signs, without spread
    none = refiner(Quadratic(), steps=1, lr=0.0, eps=0.0, curvature_every=1)
    assert none.run(EXAMPLES)[0]["trace"] is None


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


def test_scores_give_the_first_step(tmp_path):
    """The step along the scoring's slopes, in the blocks that are moved; in the log, not later."""
    config = ScoreConfig(selected=1, draws=3, max_draws=3, kind="all", seed=4)
    scores = score(tiny_model("llama"), tiny_tokenizer(), tiny_encoded(), config)
    options = {"steps": 2, "lr": 0.05, "eps": 0.1, "layers": (1,), "seed": 4}
    model = tiny_model("llama")
    refiner(model, **options).run(EXAMPLES, scores=scores, log=tmp_path / "log")
    log = read_log(tmp_path / "log")
    warm = log.header.warm_start
    assert warm.directions == tuple(noise.LAYER_SCORING + draw for draw in range(3))
    start = tiny_model("llama")
    mine = {n: w for n, w in linear_weights(start).items() if ".layers.1." in n}
    assert warm.scales == {
        n: tuple(-0.05 * standard_deviation(w) * s / 3 for s in scores.blocks[1].slopes)
        for n, w in mine.items()
    }
    replay_(dict(start.named_parameters()), log)
    assert same_bits(model, bits(start))
    # It goes downhill, by the gradient: the slopes that it is made of are those of this loss.
    start = tiny_model("llama")
    mine = {n: w for n, w in start.named_parameters() if n in warm.scales}
    gradients = torch.autograd.grad(loss_of(start).batch_loss(0), list(mine.values()))
    change = [torch.zeros_like(weight) for weight in mine.values()]
    zk.combine_(
        change, change, [list(warm.scales[name]) for name in mine], seed=4,
        directions=list(warm.directions), streams=[zk.stream_id(name) for name in mine],
    )  # fmt: skip
    fall = sum(float((g * c).sum()) for g, c in zip(gradients, change, strict=True))
    # <g, -lr mean_r s_r v_r> = -lr mean_r s_r <v_r, g>, and s_r = <v_r, g> up to O(rho^2).
    expected = -0.05 * sum(slope**2 for slope in scores.blocks[1].slopes) / 3
    assert fall == pytest.approx(expected, rel=0.05)

    for changed, message in (
        ({"seed": 5}, "scores: expected seed 5 as of the refinement, got 4"),
        ({"eps": "match:abs:0.01"}, "scores: expected relative_rho False as of the refinement"),
        (
            {"distribution": "rademacher"},
            "scores: expected distribution 'normal'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refiner(**{**options, **changed}).run(EXAMPLES, scores=scores)
    paper = score(
        tiny_model("llama"), tiny_tokenizer(), tiny_encoded(),
        replace(config, estimator="one-sided", draws=1, max_draws=1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="warm_start: expected antithetic scores"):
        refiner(**options).run(EXAMPLES, scores=paper)
    for name, value in (("update_norm", 1e-3), ("clip_projected_gradient", 1.0)):
        with pytest.raises(ValueError, match=f"scores: expected .* without {name}, .* got {value}"):
            refiner(**options, **{name: value}).run(EXAMPLES, scores=scores)
    # Parameters that no score is of begin without.
    other = refiner(**{**options, "layers": None, "parameters": "*norm*"})
    other.run(EXAMPLES, scores=scores, log=tmp_path / "other")
    assert read_log(tmp_path / "other").header.warm_start is None


def test_scores_are_the_same_in_a_run_that_goes_on(tmp_path):
    """A run that began with the scoring's step, or without, goes on as it began or not at all."""
    config = ScoreConfig(selected=1, draws=2, max_draws=2, kind="all")
    first = score(tiny_model("llama"), tiny_tokenizer(), tiny_encoded(), config)
    others = replace(first, blocks=[replace(b, slopes=b.slopes[::-1]) for b in first.blocks])
    options = {"steps": 1, "lr": 0.05, "eps": 0.1}
    for name, scores in (("with", first), ("without", None)):
        refiner(**options).run(EXAMPLES, scores=scores, log=tmp_path / name)
    more = options | {"steps": 2}
    for name, scores, message in (
        ("with", None, "scores: expected those as .*with began, got none"),
        ("with", others, "scores: expected those with which .*with began, got others"),
        ("without", first, "scores: expected none as .*without began, got some"),
    ):
        run = refiner(**more)
        with pytest.raises(ValueError, match=message):
            run.run(EXAMPLES, scores=scores, log=tmp_path / name, resume=True)
        assert run.optimizer.steps == 0 and run.optimizer.log is None
    for name, scores in (("with", first), ("without", None)):
        whole, again = refiner(**more), refiner(**more)
        whole.run(EXAMPLES, scores=scores, log=tmp_path / f"{name} all")
        again.run(EXAMPLES, scores=scores, log=tmp_path / name, resume=True)
        assert same_bits(again.model, bits(whole.model))


def test_what_does_not_fit_is_told_before_the_work(tmp_path, monkeypatch):
    """No loss is computed, with a rate to be measured, for scores or a log that are refused."""
    config = ScoreConfig(selected=1, draws=1, max_draws=1, kind="all", estimator="one-sided")
    scores = score(tiny_model("llama"), tiny_tokenizer(), tiny_encoded(), config)
    refiner(steps=1, held_out_every=1).run(EXAMPLES, held_out=HELD_OUT, log=tmp_path / "log")
    forwards = []
    monkeypatch.setattr(
        "zo_kernels.refine.objective.completion_loss", lambda *_: forwards.append(0)
    )
    options = {"steps": 1, "lr": "auto", "held_out_every": 1, "patience": 1}
    for run, message in (
        ({"scores": scores}, "warm_start: expected antithetic scores"),
        ({"log": tmp_path / "log", "resume": True}, "lr: expected 0.001 as in .*log, got 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            refiner(**options).run(EXAMPLES, held_out=HELD_OUT, **run)
    assert forwards == []


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


def test_what_a_run_lacks_is_named(tmp_path):
    too_few = "held_out: expected at least 8 examples of each kind, .* 2 that are harmless and 2"
    none = "held_out: expected examples for held_out_every, got none"
    for examples, message in ((None, too_few), ([], none)):
        with pytest.raises(ValueError, match=message):
            refiner(held_out_every=1).run(EXAMPLES, held_out=examples)
    options = {"steps": 2, "layers": (1,), "curvature_every": 1}
    refiner(**options).run(EXAMPLES, log=tmp_path / "log")
    for changed, message in (
        ({"layers": (0,)}, r"layers: expected \[1\] as in .*log, got \[0\]"),
        ({"layers": None}, r"layers: expected \[1\] as in .*log, got None"),
        ({"accumulation": 2}, "accumulation: expected 1 as in .*log, got 2"),
        ({"lr": "auto"}, "lr: expected 0.001 as in .*log, got 'auto'"),
        ({"curvature_every": 0}, "curvature_every: expected 1 as in .*log, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            refiner(**{**options, **changed}).run(EXAMPLES, log=tmp_path / "log", resume=True)
    with pytest.raises(ValueError, match="data: expected the examples with which"):
        refiner(**options).run(EXAMPLES[:3], log=tmp_path / "log", resume=True)
    again = refiner(**{**options, "held_out_every": 1})
    again.run(EXAMPLES, held_out=HELD_OUT, log=tmp_path / "watched")
    with pytest.raises(ValueError, match="held_out: expected the examples with which"):
        refiner(**{**options, "held_out_every": 1}).run(
            EXAMPLES, held_out=EXAMPLES, log=tmp_path / "watched", resume=True
        )
    # Other numbers of steps, or seconds, are of no account to a constant schedule.
    again = refiner(**{**options, "steps": 3, "seconds": 60.0})
    assert len(again.run(EXAMPLES, log=tmp_path / "log", resume=True)) == 1


def test_a_log_of_an_older_version_goes_on(tmp_path):
    """What it did not know of had its default; another value is refused."""
    model = tiny_model("llama")
    refiner(model, steps=3).run(EXAMPLES, log=tmp_path / "whole")
    header = read_log(tmp_path / "whole").header
    new = {"accumulation", "calibration_draws", "layers", "quantized", "reuse_prefix"}
    options = {k: v for k, v in header.user["options"].items() if k not in new}
    options["first_batch"] = 0  # an option that is no more
    user = {"options": options, "data": header.user["data"]}
    for changed, message in (({}, None), ({"accumulation": 2}, "accumulation: expected 1 as in")):
        path = tmp_path / f"old{len(changed)}"
        LogWriter(path, replace(header, user=user)).close()
        run = refiner(steps=3, **changed)
        if message is None:
            assert len(run.run(EXAMPLES, log=path, resume=True)) == 3
            assert same_bits(run.model, bits(model))
        else:
            with pytest.raises(ValueError, match=message):
                run.run(EXAMPLES, log=path, resume=True)
    user = user | {"options": options | {"first_batch": 2}}
    LogWriter(tmp_path / "later", replace(header, user=user)).close()
    with pytest.raises(ValueError, match=r"first_batch: expected 2 as in .*later, got 0"):
        refiner(steps=3).run(EXAMPLES, log=tmp_path / "later", resume=True)
