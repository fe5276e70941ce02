"""A whole study of a tiny model: every arm, the cost of each, the report and the weights."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tiny_models import tiny_encoded, tiny_model, tiny_tokenizer
from tiny_study import run, tiny_config, write_files

from zo_kernels import cli, memory
from zo_kernels.moments import standard_deviation
from zo_kernels.pipeline.arms import refine_cost, starting_cost, walk_arm
from zo_kernels.pipeline.study_config import ARMS, RESERVED, TITLES
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine import checkpoint
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.curvature import Curvature
from zo_kernels.refine.records import read_records
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.refine.scores import Scores
from zo_kernels.replay import read_log, replay_, replay_directory

ZO = [name for name, arm in ARMS.items() if arm.kind == "zo"]
SEEDS = (0, 1)
MIB = 2**20


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """configs/tiny.yaml, run: its configuration and its folder.

    What so small a model takes may all lie in pages that the process holds already, so memory is
    made to grow by a MiB from each reading to the next.
    """
    root = write_files(tmp_path_factory.mktemp("study"))
    config = tiny_config(root)
    readings = itertools.count(100 * MIB, MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_peak", lambda: next(readings))
        return config, run(config, root / "out")


def test_every_arm_has_all_records(study):
    config, out = study
    records = read_records(out / "evaluation.jsonl")
    conditions = [c.name for c in config.evaluation.conditions()]
    assert len(conditions) == 6 and tuple(config.seeds) == SEEDS
    found: dict[tuple, list] = {}
    for record in records:
        key = record["label"], record.get("training_seed")
        found.setdefault(key, []).append(record)
    assert set(found) == {(n, None) for n in RESERVED} | {(n, s) for n in ARMS for s in SEEDS}
    for rows in found.values():
        assert [row["condition"] for row in rows] == conditions
    control, aligned = found["lr0", None], found["aligned", None]
    assert control == [row | {"label": "lr0"} for row in aligned]
    assert found["base", None] != [row | {"label": "base"} for row in aligned]
    # Seeds are of the training, so the same noise meets each arm.
    assert len({json.dumps([r["noise_seed"], r["prompts"]]) for r in records}) == 1


def test_the_report_compares_each_arm_with_its_controls(study):
    _, out = study
    for name in ("report.html", "summary.md", "summary.json", "study.json", "scores.json"):
        assert (out / name).stat().st_size > 500
    for name in ("differences", "metric_vs_noise", "quantization", "scores", "loss_per_step"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    pairs = {(c["reference"], c["other"]) for c in summary["comparisons"]}
    assert pairs == {("aligned", name) for name in ARMS} | {
        ("walk", "zo_full"),
        ("walk_robust", "zo_robust"),
        ("zo_random", "zo_robust"),
        ("fo_noise", "zo_full"),
        ("more_fo", "zo_full"),
    }
    text = (out / "summary.md").read_text()
    assert "bit-identical to the aligned model" in text and "training seeds 0, 1" in text
    [chosen] = Scores.load(out / "scores.json").selected()
    assert f"Focused ZO moves blocks {chosen}" in text and "Not at equal cost" not in text


def test_arms_have_equal_cost(study):
    """To within half a step, which is at most six forwards: of a backward with its forward."""
    config, out = study
    folder = StudyFolder(out)
    budget = config.forwards()
    assert budget == 2 * 24 * 2
    scoring = Scores.load(out / "scores.json")
    # One sweep, then another: quantised and two draws with both signs; two draws more.
    sweeps = {2: [5], 4: [5, 4]}[scoring.draws]
    assert scoring.forwards == 1 + sum((1 + losses * (2 + 1)) / 2 for losses in sweeps)
    costs = {name: [folder.trained(name, seed) for seed in SEEDS] for name in ARMS}
    for name, trained in costs.items():
        for one in trained:
            if ARMS[name].kind == "walk":
                assert one.cost == 0
                continue
            assert abs(one.cost - budget) <= 3
            records = read_records(out / "training" / f"{name}-{trained.index(one)}.jsonl")
            assert [record["step"] for record in records] == list(range(one.steps))
            assert one.seconds == records[-1]["seconds"] > 0
            assert one.peak_bytes == MIB
    # A step is l+, l- and half of a curvature, of two examples; of the second block behind the
    # first one, which is computed once. Choosing blocks comes on top.
    choosing = {"zo_robust": scoring.forwards * scoring.examples, "zo_snip": 3 * 4}
    for name in ZO:
        for one in costs[name]:
            per_step = 2 * (0.5 + 2.5 / 2) if one.config["layers"] == [1] else 2 * 2.5
            assert one.cost == one.steps * per_step + choosing.get(name, 0)
    assert costs["zo_robust"][0].steps < costs["zo_magnitude"][0].steps
    for name in ("more_fo", "fo_noise"):
        assert costs[name][0].cost == costs[name][0].steps * 2 * 3
    rows = json.loads((out / "summary.json").read_text())["costs"]["stages"]
    trained = [TITLES[name] for name in ARMS if ARMS[name].kind != "walk"]
    assert [row["arm"] for row in rows] == [None, None, *trained]
    assert len(rows) == 2 + 7 and [row["first_order"] for row in rows] == [True] + [False] * 8
    assert rows[1]["forwards"] == scoring.forwards * scoring.examples
    assert all(abs(row["forwards"] - budget) <= 3 for row in rows[2:])


@pytest.mark.parametrize("name", ZO)
def test_logs_give_the_weights_that_were_evaluated(name, study, tmp_path):
    _, out = study
    folder = StudyFolder(out)
    aligned = checkpoint.load(out / "aligned", dtype="float32")[0].state_dict()
    prints = set()
    for seed in SEEDS:
        trained = folder.trained(name, seed)
        log = read_log(folder.training(name, seed, ".zolog"))
        assert log.header.seed == seed and len(log.steps) == trained.steps
        done = replay_directory(out / "aligned", log, tmp_path / str(seed))
        model, _ = checkpoint.load(done.out, dtype="float32")
        assert checkpoint.fingerprint(model) == trained.fingerprint
        prints.add(trained.fingerprint)
        blocks = trained.config["layers"]
        moved = {
            parameter.split(".")[2]
            for parameter, weight in model.named_parameters()
            if not torch.equal(weight, aligned[parameter])
        }
        assert moved == ({"0", "1"} if blocks is None else {str(b) for b in blocks})
        assert blocks is None or len(blocks) == 1
    assert len(prints) == 2


def test_log_verify_of_the_command_line(study, capsys):
    _, out = study
    arguments = ["log", "verify", str(out / "training" / "zo_robust-1.zolog")]
    assert cli.main([*arguments, "--base", str(out / "aligned")]) == 0
    assert cli.main([*arguments, "--base", str(out.parent / "base")]) == 1


@pytest.mark.parametrize("walk", ["walk", "walk_robust"])
def test_walks_are_as_long_as_the_arms_they_are_like(walk, study):
    """Root mean square change in standard deviations of each weight; a few thousand weights."""
    _, out = study
    folder = StudyFolder(out)
    for seed in SEEDS:
        log = read_log(folder.training(ARMS[walk].like, seed, ".zolog"))
        names = [parameter.name for parameter in log.header.parameters()]
        models = [checkpoint.load(out / "aligned", dtype="float32")[0] for _ in range(3)]
        start, refined, walked = (dict(model.named_parameters()) for model in models)
        replay_(refined, log)
        assert walk_arm(models[2], log).fingerprint == folder.trained(walk, seed).fingerprint
        way, walked_way = (distances(start, to, names) for to in (refined, walked))
        assert root_mean_square(walked_way) == pytest.approx(root_mean_square(way), rel=0.05)
        assert abs(float(torch.corrcoef(torch.stack([way, walked_way]))[0, 1])) < 0.05
        untouched = set(start) - set(names)
        assert untouched and all(torch.equal(start[n], walked[n]) for n in untouched)


def test_walks_are_as_long_where_steps_are_below_the_spacing_of_the_weights(tmp_path):
    """Most of the way is then that of stochastic rounding, and it grows with every step."""
    torch.manual_seed(0)
    models = [tiny_model("llama").to(torch.bfloat16) for _ in range(3)]
    start, refined, walked = (dict(model.named_parameters()) for model in models)
    config = RefineConfig(steps=60, batch_size=2, update_norm=1e-4, mode="streamed")
    log = tmp_path / "run.zolog"
    ZORefiner(models[1], tiny_tokenizer(), config).run(tiny_encoded(), log=log)
    walk_arm(models[2], read_log(log))
    names = [parameter.name for parameter in read_log(log).header.parameters()]
    way, walked_way = (root_mean_square(distances(start, to, names)) for to in (refined, walked))
    steps = read_log(log).steps["coefficients"]
    nominal = math.sqrt(float((steps**2).sum()))
    assert walked_way == pytest.approx(way, rel=0.1) and way > 2 * nominal


def distances(start, to, names):
    """Changes of all weights, in standard deviations of each tensor."""
    return torch.cat(
        [
            (to[n].detach().double() - start[n].detach().double()).flatten()
            / standard_deviation(start[n])
            for n in names
        ]
    )


def root_mean_square(values):
    return float(values.square().mean().sqrt())


def test_nothing_but_logs_is_kept_of_the_arms(study):
    _, out = study
    assert not (out / "models").exists() and not list(out.rglob(".*"))
    assert {p.suffix for p in (out / "training").iterdir()} == {".json", ".jsonl", ".zolog"}


@pytest.mark.parametrize(("layers", "check"), [(None, 0), ((1,), 2 * 2)], ids=["all", "second"])
def test_the_cost_of_a_step_is_what_the_model_computes(layers, check, monkeypatch):
    """In blocks times examples, calibration and held-out losses included."""
    monkeypatch.setattr(Curvature, "learning_rate", lambda *_: 1e-3)  # noise means nothing here
    model, encoded = tiny_model("llama"), tiny_encoded() * 4
    config = RefineConfig(
        steps=4, batch_size=2, lr="auto", calibration_draws=2, curvature_every=2, held_out_every=2,
        held_out_draws=3, layers=layers, queries=2, patience=4,
    )  # fmt: skip
    computed = []
    for block in model.model.layers:
        # Of the first linear: a block that gives back what was kept is called, but computes not.
        block.self_attn.q_proj.register_forward_hook(lambda m, i, out: computed.append(len(out)))
    ZORefiner(model, tiny_tokenizer(), config).run(encoded)
    cost = 4 * refine_cost(model, config, encoded) + starting_cost(config, encoded)
    # Once it is checked that forwards can begin behind the first block.
    assert cost <= sum(computed) / 2 <= cost + check
    assert refine_cost(model, config, encoded) > 2 * 2 * 2 * (1 if layers is None else 0.5)
