"""Studies that are stopped and go on; the models that are loaded and kept."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import tiny_study
import torch
from tiny_study import counted, evaluated, run, small_config, stopped

from zo_kernels import memory
from zo_kernels.pipeline import arms as arms_module
from zo_kernels.pipeline.study import Study
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine import checkpoint
from zo_kernels.refine.first_order import FirstOrder
from zo_kernels.refine.records import MetricsLog, read_records

no_report, root = tiny_study.no_report, tiny_study.root
finished, copy = tiny_study.finished, tiny_study.copy


def test_stopped_at_every_stage_it_ends_the_same(finished, tmp_path, monkeypatch):
    """And what a life has finished, none does again."""
    config, uninterrupted = finished
    out = tmp_path / "out"
    monkeypatch.setattr(arms_module, "_SAVE_EVERY", 2)
    done = counted(monkeypatch)

    def life():
        done.clear()
        run(config, out)

    with stopped(FirstOrder, "step", 4):
        life()
    assert done == ["evaluate base", "train aligned"]
    with stopped(MetricsLog, "write", 6, "scores.jsonl"):
        life()
    assert done == ["train aligned", "evaluate aligned", "score"]
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"block": 0, "wh')  # as a kill leaves it
    with stopped(MetricsLog, "write", 4, "training/zo_robust-0.jsonl"):
        life()
    assert done == ["score", "train zo_robust-0"]
    log = out / "training" / "zo_robust-0.zolog"
    log.write_bytes(log.read_bytes()[:-3])
    with stopped(FirstOrder, "step", 4):
        life()
    assert done == ["train zo_robust-0", "evaluate zo_robust", "train more_fo-0"]
    assert (out / "training" / "more_fo-0.state").exists()
    with stopped(MetricsLog, "write", 2, "records/more_fo-0.jsonl"):
        life()
    assert done == ["train more_fo-0", "evaluate more_fo"]
    with (out / "records" / "more_fo-0.jsonl").open("a") as file:
        file.write('{"label": "mor')
    with stopped(MetricsLog, "write", 2, "records/walk_robust-0.jsonl"):
        life()
    # A walk is as cheap as a file: it is taken again for the evaluation.
    assert done == ["evaluate more_fo", "walk", "walk", "evaluate walk_robust"]
    life()
    assert done == ["walk", "evaluate walk_robust"]
    assert evaluated(out) == evaluated(uninterrupted)
    life()
    assert done == [] and evaluated(out) == evaluated(uninterrupted)

    names = {p.relative_to(out) for p in out.rglob("*")}
    assert names == {p.relative_to(uninterrupted) for p in uninterrupted.rglob("*")}
    for name in ("aligned", "zo_robust-0", "more_fo-0"):
        records = [
            [(r["step"], r["loss"]) for r in read_records(f / "training" / f"{name}.jsonl")]
            for f in (out, uninterrupted)
        ]
        assert records[0] == records[1] and len(records[0]) > 4
    untimed = [
        StudyFolder(f).trained("zo_robust", 0).__dict__ | {"seconds": 0, "peak_bytes": 0}
        for f in (out, uninterrupted)
    ]
    assert untimed[0] == untimed[1]


def test_peaks_of_all_lives_count(root, tmp_path, monkeypatch):
    """Here the first life's, in which training takes more memory than in the next."""
    grown = 900
    readings = itertools.cycle([100, 100 + grown])
    monkeypatch.setattr(memory, "resident_peak", lambda: next(readings))
    monkeypatch.setattr(arms_module, "_SAVE_EVERY", 2)
    config, out = small_config(root, "zo_robust"), tmp_path / "out"
    for place, name, where in (
        (FirstOrder, "step", ""),
        (MetricsLog, "write", "scores.jsonl"),
        (MetricsLog, "write", "training/zo_robust-0.jsonl"),
    ):
        grown = 900
        readings = itertools.cycle([100, 100 + grown])
        with stopped(place, name, 4, where):
            run(config, out)
        readings = itertools.cycle([100, 107])
    run(config, out)
    folder = StudyFolder(out)
    assert folder.trained("aligned", None).peak_bytes == folder.trained("zo_robust", 0).peak_bytes
    assert folder.trained("aligned", None).peak_bytes == grown
    assert json.loads((out / "scoring.json").read_text()) == {"peak_bytes": grown}
    assert not list(out.rglob("*.peak"))


@pytest.mark.parametrize(
    "moment", ["before the note", "before it is removed", "while it is removed"]
)
def test_stopped_around_a_checkpoint(moment, copy, monkeypatch):
    """An arm of first-order steps has one as long as it is not evaluated."""
    config, out = copy
    expected, files = evaluated(out), {p.relative_to(out) for p in out.rglob("*")}
    (out / "records" / "more_fo-0.jsonl").unlink()
    (out / "training" / "more_fo-0.json").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        place, name = {
            "before the note": (StudyFolder, "finish"),
            "before it is removed": (checkpoint, "remove"),
            "while it is removed": (shutil, "rmtree"),
        }[moment]
        original = getattr(place, name)

        def stop(path, *args, **options):
            wanted = {"while it is removed": ".gone-more_fo-0.model", "before the note": ""}
            if wanted.get(moment, "more_fo-0") not in str(path):
                return original(path, *args, **options)
            raise KeyboardInterrupt

        patch.setattr(place, name, stop)
        run(config, out)
    left = {p.name for p in (out / "training").iterdir() if p.is_dir()}
    prefix = ".gone-" if moment == "while it is removed" else ""
    assert left == {f"{prefix}more_fo-0.model"}
    done = counted(monkeypatch)
    run(config, out)
    again = ["train more_fo-0", "evaluate more_fo"] if moment == "before the note" else []
    assert done == again and evaluated(out) == expected
    assert {p.relative_to(out) for p in out.rglob("*")} == files


def test_models_are_kept_later_where_a_log_makes_them(copy, monkeypatch):
    """And one that was kept is not taken away."""
    config, out = copy
    said: list[str] = []
    Study(replace(config, keep_models=True), out, said.append).run()
    assert {p.name for p in (out / "models").iterdir()} == {"zo_robust-0", "walk_robust-0"}
    assert "more_fo-0: trained without keep_models, so that its model is gone" in said
    folder = StudyFolder(out)
    for name in ("zo_robust", "walk_robust"):
        model, _ = checkpoint.load(folder.model(name, 0), dtype="float32")
        assert checkpoint.fingerprint(model) == folder.trained(name, 0).fingerprint
    done = counted(monkeypatch)
    run(config, out)
    assert done == [] and len(list((out / "models").iterdir())) == 2


def test_everything_is_loaded_to_the_device(root, tmp_path, monkeypatch):
    """In every stage, and where a log makes the model."""
    devices = []
    original = checkpoint.load

    def load(*args, device="cpu", **options):
        devices.append(device)
        return original(*args, **options)

    monkeypatch.setattr("zo_kernels.pipeline.study.expect_device", lambda *_: None)
    monkeypatch.setattr(checkpoint, "load", load)
    config = small_config(root, "zo_robust", "more_fo", "walk_robust")
    run(replace(config, device="cuda:1"), tmp_path / "out")
    assert len(devices) > 8 and set(devices) == {"cuda:1"}


def test_a_mode_that_drifts(root, tmp_path, monkeypatch):
    """Its control is evaluated and not taken for the aligned model; no log, so a checkpoint."""
    config = small_config(root, "zo_full", align=None, dtype="bfloat16", keep_models=True)
    config = replace(config, refine=replace(config.refine, mode="mezo", steps=4))
    out = tmp_path / "out"
    with stopped(MetricsLog, "write", 2, "records/lr0.jsonl"):
        run(config, out)
    done = counted(monkeypatch)
    run(config, out)
    assert done == ["evaluate lr0", "train zo_full-0", "evaluate zo_full"]
    records = {}
    for record in read_records(out / "evaluation.jsonl"):
        records.setdefault(record["label"], []).append(json.dumps(record["refusal_loss"]))
    assert {label: len(rows) for label, rows in records.items()} == {
        "base": 2, "aligned": 2, "lr0": 2, "zo_full": 2,
    }  # fmt: skip
    assert records["base"] == records["aligned"] != records["lr0"]
    assert not list(out.rglob("*.zolog"))
    model, _ = checkpoint.load(out / "models" / "zo_full-0", dtype=torch.bfloat16)
    assert checkpoint.fingerprint(model) == StudyFolder(out).trained("zo_full", 0).fingerprint
