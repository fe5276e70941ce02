"""Layer scores: what they estimate and how well, their cost, resumption, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, replace

import pytest
import torch
from tiny_models import (
    EXAMPLES,
    Quadratic,
    bits,
    block_calls,
    same_bits,
    tiny_encoded,
    tiny_model,
    tiny_tokenizer,
)

import zo_kernels as zk
from zo_kernels import chat, noise
from zo_kernels.blocks import linear_weights
from zo_kernels.cli import build_parser
from zo_kernels.moments import standard_deviation
from zo_kernels.refine.objective import Objective, fixed_batches
from zo_kernels.refine.scores import ScoreConfig, Scores, top
from zo_kernels.refine.scoring import score

RHO = 0.2
EXACT = {
    "rho": RHO, "relative_rho": False, "quantization": "none", "normalization": "none",
    "selected": 1, "kind": "all",
}  # fmt: skip
UNTIMED = {"seconds": 0.0}


def scored(model, **options):
    return score(model, tiny_tokenizer(), tiny_encoded(), ScoreConfig(**options))


def quadratic_scores(monkeypatch, seeds, **options):
    """The model, and its scores under each of some seeds."""
    model = Quadratic()
    model.use(monkeypatch)
    config = ScoreConfig(**EXACT, **options)
    found = [
        score(model, tiny_tokenizer(), tiny_encoded(), replace(config, seed=seed))
        for seed in range(seeds)
    ]
    return model, found


def spread(values):
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def test_antithetic_scores_are_traces_with_honest_errors(monkeypatch):
    """On a quadratic c = rho^2/2 <v, H v>: mean rho^2/2 tr H, variance rho^4/2 tr H^2 a draw."""
    draws = 24
    model, found = quadratic_scores(monkeypatch, 80, draws=draws, max_draws=draws)
    standard, ratios, own = [], [], []
    for scores in found:
        for block in scores.blocks:
            mean = RHO**2 / 2 * model.trace(block.number)
            variance = RHO**4 / 2 * model.squared_trace(block.number) / draws
            assert block.trace == pytest.approx(2 * block.noise / RHO**2, rel=1e-12)
            standard.append((block.noise - mean) / math.sqrt(variance))
            ratios.append(block.noise_se**2 / variance)
            own.append((block.noise - mean) / block.noise_se)
    for values, expected in (
        (standard, 0.0),
        ([z * z for z in standard], 1.0),
        (ratios, 1.0),  # the reported error's square is the variance, in the mean
        ([z * z for z in own], (draws - 1) / (draws - 3)),  # Student's t
    ):
        mean, error = spread(values)
        assert abs(mean - expected) < 4 * error < 0.6, (mean, expected, error)


def test_one_sided_scores_have_the_slopes_error_too(monkeypatch):
    """Variance of a draw: rho^2 |g|^2 + rho^4/2 tr H^2; the antithetic one has no first term."""
    draws = 12
    options = {"draws": draws, "max_draws": draws}
    model, found = quadratic_scores(monkeypatch, 40, estimator="one-sided", **options)
    for number in range(3):
        slope = RHO**2 * float(model.gradient(number).square().sum())
        curved = RHO**4 / 2 * model.squared_trace(number)
        mean, error = spread([scores.blocks[number].noise_se ** 2 * draws for scores in found])
        assert abs(mean - (slope + curved)) < 4 * error
        assert curved < (mean - 4 * error) / 2  # and that is far from the antithetic one's
        mean, error = spread([scores.blocks[number].noise for scores in found])
        assert abs(mean - RHO**2 / 2 * model.trace(number)) < 4 * error
    assert all(block.slopes == () and block.slope is None for block in found[0].blocks)


def test_slopes_are_the_gradients_norm(monkeypatch):
    """Mean square of <v, g>, whose variance is 2 |g|^4 a draw."""
    draws, seeds = 12, 40
    model, found = quadratic_scores(monkeypatch, seeds, draws=draws, max_draws=draws)
    for number in range(3):
        squared = float(model.gradient(number).square().sum())
        blocks = [scores.blocks[number] for scores in found]
        mean = statistics.fmean(block.slope**2 for block in blocks)
        assert abs(mean / squared - 1) < 4 * math.sqrt(2 / (draws * seeds))
        # By the delta method: the spread of the root is that of the square over twice the root.
        mean, error = spread([(block.slope_se * 2 * block.slope) ** 2 for block in blocks])
        assert abs(mean - 2 * squared**2 / draws) < 4 * error


def test_slopes_are_along_the_addressed_noise(monkeypatch):
    model, (scores,) = quadratic_scores(monkeypatch, 1, draws=4)
    for block in scores.blocks:
        name = f"layers.{block.number}.proj.weight"
        for draw, slope in enumerate(block.slopes):
            v = zk.normal(
                36, seed=0, direction=noise.LAYER_SCORING + draw, stream=zk.stream_id(name)
            ).double()
            assert slope == pytest.approx(
                float(v @ model.gradient(block.number).flatten()), abs=1e-5
            )


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "mixtral"])
def test_reuse_gives_the_same_scores(name):
    model = tiny_model(name, torch.bfloat16, layers=3)
    before = bits(model)
    found = [
        scored(model, selected=1, draws=2, max_draws=2, batch_size=1, reuse_prefix=reuse)
        for reuse in (True, False)
    ]
    assert found[0].blocks == found[1].blocks and found[0].loss == found[1].loss
    assert found[1].forwards == found[1].naive_forwards == 1 + 3 * 5 > found[0].forwards
    assert same_bits(model, before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("estimator", "draws"), [("antithetic", 8), ("one-sided", 16)])
def test_the_cost_is_about_half(estimator, draws):
    """Block by block as they are computed: at most 0.6 of whole forwards, the check included."""
    layers, batches = 8, 2
    model = tiny_model("llama", layers=layers)
    calls = block_calls(model)
    scores = scored(
        model, estimator=estimator, draws=draws, max_draws=draws, kind="all", batch_size=2
    )
    signs = 2 if estimator == "antithetic" else 1
    assert scores.naive_forwards == 1 + (signs * draws + 1) * layers
    computed = sum(calls) / (layers * batches)
    assert computed <= 0.6 * scores.naive_forwards
    check = 1 + (layers - 4) / layers  # a whole forward and one behind the middle block, number 3
    assert computed == pytest.approx(scores.forwards + check)


def test_training_mode_and_weights_are_left_alone():
    model = tiny_model("llama").train()
    model.lm_head.eval()
    before = bits(model)
    scored(model, selected=1, draws=1, max_draws=1)
    assert same_bits(model, before)
    assert all(module.training != (module is model.lm_head) for module in model.modules())


def untimed(line):
    return {key: value for key, value in line.items() if key != "seconds"}


def test_resumption_computes_nothing_twice():
    """What an earlier call found is taken as it is, even through JSON; the rest is computed."""
    options = {"selected": 1, "draws": 2, "max_draws": 4, "batch_size": 1}
    config = ScoreConfig(**options)
    arguments = (tiny_model("llama", layers=3), tiny_tokenizer(), tiny_encoded(), config)
    lines = []
    expected = score(*arguments, on_result=lines.append)
    assert len({(line["block"], line["what"]) for line in lines}) == len(lines) > 1 + 3 * 5
    lines = json.loads(json.dumps(lines))
    for kept in (0, 1, 8, len(lines) - 1, len(lines)):
        rest = []
        calls = block_calls(arguments[0])
        found = score(*arguments, finished=lines[:kept], on_result=rest.append)
        assert replace(found, **UNTIMED) == replace(expected, **UNTIMED)
        assert [untimed(line) for line in rest] == [untimed(line) for line in lines[kept:]]
        assert found.seconds >= (lines[kept - 1]["seconds"] if kept else 0.0)
        if kept == len(lines):
            assert sum(calls) <= 2 * 3 * 2  # the check alone


def test_draws_are_doubled_until_the_selection_is_settled(monkeypatch):
    """Of clearly different blocks at once; of two equal ones up to the limit."""
    model = Quadratic()
    model.use(monkeypatch)

    def draws_of(**options):
        config = ScoreConfig(**{**EXACT, **options})
        scores = score(model, tiny_tokenizer(), tiny_encoded(), config)
        assert scores.settled == (scores.separation is not None and scores.separation >= 2)
        return scores.draws, scores.settled, scores.selected()

    assert draws_of() == (4, True, (2,))  # curvatures of 1, 4 and 9
    assert draws_of(draws=2, max_draws=2)[0] == 2
    with torch.no_grad():
        model.layers[1].curvature.copy_(model.layers[2].curvature)
    draws, settled, chosen = draws_of(max_draws=24, seed=1)
    assert (draws, settled) == (24, False) and chosen in ((1,), (2,))
    assert draws_of(max_draws=24, seconds=1e-9, seed=1)[:2] == (4, False)
    assert draws_of(estimator="one-sided")[:2] == (1, False)  # as the paper: never of single draws
    found = score(model, tiny_tokenizer(), tiny_encoded(), ScoreConfig(**{**EXACT, "selected": 3}))
    assert (found.settled, found.separation, found.draws) == (True, None, 4)  # nothing is left out


def test_terms_and_normalizations_by_hand():
    """One-sided: f(+) - f(0); quantization: f(block quantized) - f; both scaled to 0..1, added."""
    model = tiny_model("gpt2", layers=3)
    common = {"selected": 1, "kind": "all", "batch_size": 2, "estimator": "one-sided", "seed": 5}
    scaled = {"normalization": "minmax", "quantization": "int3-asym-g8"}
    scores = scored(model, **common, quant_weight=0.5, **scaled)
    loss = Objective(model, fixed_batches(model, tiny_tokenizer(), tiny_encoded(), 2))
    assert scores.loss == loss() and scores.examples == 4
    streams = noise.model_streams(model)
    noises, quants = [], []
    for number in range(3):
        mine = {n: w for n, w in linear_weights(model).items() if f".h.{number}." in n}
        assert len(mine) == 4
        with zk.quantized(model, "int3", group_size=8, symmetric=False, parameters=mine):
            quants.append(loss() - scores.loss)
        kept = {name: w.detach().clone() for name, w in mine.items()}
        for name, weight in mine.items():
            scale = 0.1 * standard_deviation(weight)
            assert scores.units[name] == standard_deviation(weight)
            address = {"seed": 5, "direction": noise.LAYER_SCORING, "streams": [streams[name]]}
            zk.perturb_([weight.data], scale, **address)
        noises.append(loss() - scores.loss)
        for name, weight in mine.items():
            weight.data.copy_(kept[name])
    assert [block.noise for block in scores.blocks] == noises
    assert [block.quant for block in scores.blocks] == quants

    def scaled(values):
        return [(v - min(values)) / (max(values) - min(values)) for v in values]

    totals = [a + 0.5 * b for a, b in zip(scaled(noises), scaled(quants), strict=True)]
    assert [block.score for block in scores.blocks] == pytest.approx(totals)
    assert scores.selected() == (totals.index(max(totals)),)
    plain = scored(model, **common, quantization="int3-asym-g8", normalization="none")
    assert [block.score for block in plain.blocks] == [
        a + b for a, b in zip(noises, quants, strict=True)
    ]
    alone = scored(model, **common, quantization="none", normalization="none")
    assert [(b.score, b.quant) for b in alone.blocks] == [(value, None) for value in noises]


def test_the_loss_is_that_of_the_kind():
    model = tiny_model("llama")
    options = {"selected": 1, "draws": 1, "max_draws": 1, "quantization": "none"}
    for kind, examples, wanted in (
        (chat.HARMFUL, None, EXAMPLES[2:]), ("all", None, EXAMPLES), ("all", 3, EXAMPLES[:3]),
        (chat.HARMFUL, 1, EXAMPLES[2:3]),
    ):  # fmt: skip
        scores = scored(model, kind=kind, examples=examples, **options)
        chosen = chat.encode(tiny_tokenizer(), wanted)
        loss = Objective(model, fixed_batches(model, tiny_tokenizer(), chosen, 8))()
        assert (scores.loss, scores.examples) == (loss, len(wanted))


def test_scores_go_through_a_file(tmp_path):
    scores = scored(tiny_model("llama", layers=3), selected=2, draws=2, max_draws=2, seconds=60.0)
    path = tmp_path / "scores.json"
    scores.save(path)
    found = Scores.load(path)
    assert found == scores and found.selected() == scores.selected() and found.units == scores.units
    assert found.rows() == [asdict(block) for block in scores.blocks]
    settings = found.settings()
    assert settings["draws"] == 2 and settings["prompts"] == 2 and settings["rho"] == 0.1
    json.dumps(settings, allow_nan=False)
    for text in ("[]", '"x"', "{}", "nonsense", '{"config": {"rhoo": 1}, "blocks": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"scores\.json: expected scores of zo-kernels score"):
            Scores.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"scores\.json: expected scores"):
        Scores.load(path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "two"}, "estimator: expected one of"),
        ({"normalization": "z"}, "normalization: expected one of"),
        ({"kind": "evil"}, "kind: expected one of"),
        ({"rho": 0.0}, "rho: expected a positive number, got 0.0"),
        ({"rho": math.nan}, "rho: expected a positive number, got nan"),
        ({"quant_weight": math.inf}, "quant_weight: expected a finite number"),
        ({"selected": 0}, "selected: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"examples": 0}, "examples: expected at least 1"),
        ({"draws": 0}, "draws: expected at least 1"),
        ({"max_draws": 0}, "max_draws: expected at least 1"),
        ({"draws": 8, "max_draws": 4}, r"max_draws: expected draws <= max_draws .* got 8 and 4"),
        ({"max_draws": 2**28 + 1}, r"max_draws: expected .* 2\*\*28"),
        ({"seconds": 0.0}, "seconds: expected a positive number"),
        ({"seconds": math.nan}, "seconds: expected a positive number, got nan"),
        ({"seed": -1}, "seed: expected 0 <= seed"),
        ({"seed": 2**64}, "seed: expected 0 <= seed"),
        ({"quantization": "int9"}, "quantization: expected a scheme"),
        ({"quantization": "int8-a8"}, "quantization: expected one of weights alone, got 'int8-a8'"),
        ({"selected": 3}, "selected: expected at most the model's 2 decoder blocks, got 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        scored(tiny_model("llama"), **{"selected": 1, **options})


def test_what_cannot_be_scored_is_named():
    model, tokenizer, config = tiny_model("llama"), tiny_tokenizer(), ScoreConfig(selected=1)
    harmless = chat.encode(tokenizer, EXAMPLES[:2])
    with pytest.raises(ValueError, match="kind: expected examples that are harmful, got none"):
        score(model, tokenizer, harmless, config)
    # A block that only noise drives out of range: named with its draw, not before.
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(0).view(-1)[0] = 3e38
        model.model.layers[1].mlp.up_proj.weight.zero_()
    for reuse in (True, False):
        options = {"rho": 5.0, "relative_rho": False, "reuse_prefix": reuse}
        with pytest.raises(FloatingPointError, match=r"'model.layers.1', 0\+: expected a finite"):
            scored(model, selected=1, quantization="none", **options)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    for reuse in (True, False):  # of no account to what is wrong
        with pytest.raises(FloatingPointError, match="the model as it is: expected a finite loss"):
            scored(model, selected=1, reuse_prefix=reuse)


def test_progress_counts_all_losses():
    seen = []
    score(
        tiny_model("llama"), tiny_tokenizer(), tiny_encoded(),
        ScoreConfig(selected=1, draws=2, max_draws=2), progress=lambda *args: seen.append(args),
    )  # fmt: skip
    assert [done for _, done, _ in seen] == [*range(10), 1] and seen[-1] == ("2 draws", 1, 1)
    assert seen[0] == ("model.layers.0, 2 draws", 0, 10)


def test_the_command_takes_all_examples(capsys):
    parse, needed = build_parser().parse_args, ["score", "--model", "m", "--out", "o"]
    found = [parse([*needed, "--examples", text]).examples for text in ("7", "all")]
    assert found == [7, None] and parse(needed).examples == ScoreConfig().examples
    with pytest.raises(SystemExit):
        parse([*needed, "--examples", "some"])
    assert "--examples: expected a number or 'all', got 'some'" in capsys.readouterr().err


def test_top_takes_the_first_of_equals():
    assert top([1.0, 3.0, 3.0, 2.0], 2) == (1, 2) and top([5.0, 5.0, 5.0], 2) == (0, 1)
