"""Studies asked for more, or for something else, than their folder holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny_study
import torch
from tiny_study import counted, evaluated, run

from zo_kernels.pipeline.study_config import ARMS, Arm
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine import checkpoint
from zo_kernels.refine.records import read_records
from zo_kernels.replay import read_log

no_report, root = tiny_study.no_report, tiny_study.root
finished, copy = tiny_study.finished, tiny_study.copy


def contents(folder):
    """What each file of a folder holds."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_seeds_and_arms_are_added(copy, monkeypatch):
    """What is there stays; an arm's name may have a dot."""
    config, out = copy
    before = read_records(out / "evaluation.jsonl")
    old = contents(out / "training")
    done = counted(monkeypatch)
    wild = [Arm(f"zo_{lr}", "zo", options={"lr": lr}) for lr in (0.3, 0.1)]
    more = replace(config, arms=(*config.arms, *wild), seeds=(0, 1), keep_models=True)
    run(more, out)
    trained = [line.removeprefix("train ") for line in done if line.startswith("train")]
    wanted = {f"{arm.name}-{seed}" for arm in more.arms for seed in (0, 1) if arm.kind != "walk"}
    assert set(trained) == wanted - {"zo_robust-0", "more_fo-0"} and len(trained) == 6
    assert "score" not in done and "evaluate aligned" not in done
    records = read_records(out / "evaluation.jsonl")
    assert [r for r in records if r.get("training_seed") in (None, 0) and r in before] == before
    assert len(records) == (3 + 5 * 2) * 2
    assert contents(out / "training").items() >= old.items()
    folder = StudyFolder(out)
    prints = set()
    for arm in wild:
        model, _ = checkpoint.load(folder.model(arm.name, 1), dtype="float32")
        assert checkpoint.fingerprint(model) == folder.trained(arm.name, 1).fingerprint
        prints.add(checkpoint.fingerprint(model))
        assert len(read_log(folder.training(arm.name, 1, ".zolog")).steps) > 5
    assert len(prints) == 2 and not folder.model("more_fo", 0).exists()
    # Fewer of them are fine too, and what they left remains.
    run(config, out)
    assert read_records(out / "evaluation.jsonl") == before
    assert folder.trained("zo_0.3", 1) is not None


OTHER = {
    "align": lambda c: replace(c, align=replace(c.align, steps=7)),
    "align_none": lambda c: replace(c, align=None),
    "score": lambda c: replace(c, score=replace(c.score, rho=0.2)),
    "refine": lambda c: replace(c, refine=replace(c.refine, lr=0.5)),
    "first_order": lambda c: replace(c, first_order=replace(c.first_order, lr=0.5)),
    "evaluation": lambda c: replace(c, evaluation=replace(c.evaluation, draws=2)),
    "dtype": lambda c: replace(c, dtype="bfloat16"),
    "equal, timed": lambda c: replace(c, equal="seconds"),
}
ARM = {
    "lr 0.001, .* got 0.5": lambda a: replace(a, options={"lr": 0.5}),
    "mode 'streamed', .* got 'master'": lambda a: replace(a, options={"mode": "master"}),
    "blocks 'robust', .* got 'magnitude'": lambda a: replace(a, blocks="magnitude"),
    "kind 'zo', .* got 'fo'": lambda a: Arm(a.name, "fo"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_changes_are_refused_and_named(name, finished):
    config, out = finished
    before, named = contents(out), name.removesuffix("_none")
    with pytest.raises(ValueError, match=rf"the same configuration, .* in {named}$"):
        run(OTHER[name](config), out)
    assert contents(out) == before


def test_other_data_is_refused_whatever_its_name(copy, root, tmp_path):
    config, out = copy
    before = contents(out)
    for name in ("data", "text"):
        file = tmp_path / f"{name}.other"
        text = (root / getattr(config, name)).read_text()
        file.write_text(text.replace("door", "key"))
        with pytest.raises(ValueError, match=f"differs in {name}$"):
            run(replace(config, **{name: str(file)}), out)
    # The same examples under another name are the same.
    moved = tmp_path / "moved.jsonl"
    moved.write_text((root / "data.jsonl").read_text())
    assert contents(out) == before
    # With another one held out they are not.
    rows = [json.loads(line) for line in moved.read_text().splitlines()]
    split = [row | {"split": "train" if i else "held_out"} for i, row in enumerate(rows)]
    (tmp_path / "split.jsonl").write_text("\n".join(map(json.dumps, split)))
    with pytest.raises(ValueError, match=r"differs in data, held_out$"):
        run(replace(config, data=str(tmp_path / "split.jsonl")), out)
    assert contents(out) == before
    run(replace(config, data=str(moved)), out)
    assert evaluated(out) == before[(out / "evaluation.jsonl").relative_to(out)]


def test_another_model_is_refused_whatever_its_place(copy, root, tmp_path):
    config, out = copy
    before = contents(out)
    moved = shutil.copytree(root / "base", tmp_path / "moved")
    model, tokenizer = checkpoint.load(moved, dtype="float32")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    checkpoint.save(model, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match=r"differs in model$"):
        run(replace(config, model=str(tmp_path / "other")), out)
    assert contents(out) == before
    run(replace(config, model=str(moved)), out)
    assert evaluated(out) == before[(out / "evaluation.jsonl").relative_to(out)]


@pytest.mark.parametrize("message", ARM)
def test_trained_arms_are_not_changed_under_their_names(message, finished):
    config, out = finished
    before = contents(out)
    changed = ARM[message](config.arms[0])
    others = () if changed.kind == "fo" else config.arms[1:]
    with pytest.raises(ValueError, match=rf"arms\.zo_robust: expected {message}; give the changed"):
        run(replace(config, arms=(changed, *others)), out)
    assert contents(out) == before


def test_a_walk_like_another_arm_is_another_walk(copy):
    config, out = copy
    other = replace(config.arms[2], like="zo_full")
    with pytest.raises(ValueError, match=r"like 'zo_robust', .* got 'zo_full'; give"):
        run(replace(config, arms=(*config.arms[:2], other, ARMS["zo_full"])), out)
