"""Refinements that begin with a scoring: the step along its slopes, and with what they go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import EXAMPLES, bits, same_bits, tiny_encoded, tiny_model, tiny_tokenizer
from tiny_refiner import HELD_OUT, loss_of, refiner

import zo_kernels as zk
from zo_kernels import noise
from zo_kernels.blocks import linear_weights
from zo_kernels.moments import standard_deviation
from zo_kernels.refine.scores import ScoreConfig
from zo_kernels.refine.scoring import score
from zo_kernels.replay import read_log, replay_


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
