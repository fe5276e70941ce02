"""Studies that are stopped, grow, or are asked for something else; and arms of equal time."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_study import counted, run, small_config, stopped, write_files

from zo_kernels import cli, memory
from zo_kernels.pipeline import arms as arms_module
from zo_kernels.pipeline.study import Study
from zo_kernels.pipeline.study_config import ARMS, Arm
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine import checkpoint
from zo_kernels.refine.first_order import FirstOrder
from zo_kernels.refine.records import MetricsLog, read_records
from zo_kernels.refine.refiner import ZORefiner
from zo_kernels.replay import read_log

NAMES = ("zo_robust", "more_fo", "walk_robust")


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """Reports are not what is tested here, and take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zo_kernels.pipeline.study_report.write_report", lambda *_, **__: {})
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, data and text."""
    return write_files(tmp_path_factory.mktemp("resumption"))


@pytest.fixture(scope="module")
def finished(root):
    """A study that nobody stopped: its configuration and its folder."""
    config = small_config(root, *NAMES)
    return config, run(config, root / "finished")


@pytest.fixture
def copy(finished, tmp_path):
    """The same to go on with."""
    config, out = finished
    return config, shutil.copytree(out, tmp_path / "copy")


def evaluated(out):
    return (out / "evaluation.jsonl").read_bytes()


def contents(folder):
    """What each file of a folder holds."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


@pytest.mark.parametrize("at", [(0, 1), (1,)], ids=["always", "with one seed"])
def test_what_cannot_be_trained_is_left_out_and_named(at, root, tmp_path, monkeypatch):
    """The others are trained, reported and kept; without it the study is complete."""
    names = ("zo_full", "walk", "zo_random", "more_fo")
    config = small_config(root, *names, align=None, seeds=(0, 1))
    out, original = tmp_path / "out", ZORefiner.run

    def fail(refiner, *args, **options):
        if refiner.config.layers is None and refiner.config.seed in at and "log" in options:
            raise ValueError("lr: expected noise that raises the loss")
        return original(refiner, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZORefiner, "run", fail)
        message = (
            r"the report in .*out is without zo_full, walk: arms\.zo_full, seed "
            rf"{at[0]}: lr: expected noise that raises the loss; it is like zo_full"
        )
        with pytest.raises(ValueError, match=message):
            run(config, out)
    labels = {record["label"] for record in read_records(out / "evaluation.jsonl")}
    assert labels == {"base", "aligned", "lr0", "zo_random", "more_fo"}
    done = counted(monkeypatch)
    run(replace(config, arms=config.arms[2:]), out)
    assert done == []
    # And mended it is trained.
    run(config, out)
    assert [line for line in done if line.startswith("train")] == [f"train zo_full-{n}" for n in at]
    assert {r["label"] for r in read_records(out / "evaluation.jsonl")} == labels | {
        "zo_full", "walk",
    }  # fmt: skip


def test_an_arm_whose_time_others_have_ends_the_study(root, tmp_path, monkeypatch):
    config = small_config(root, "zo_full", "more_fo", equal="seconds", align=None)
    config = replace(config, refine=replace(config.refine, seconds=1.0))
    original = ZORefiner.run

    def fail(refiner, *args, **options):
        if "log" in options:
            raise FloatingPointError("no number")
        return original(refiner, *args, **options)

    monkeypatch.setattr(ZORefiner, "run", fail)
    done = counted(monkeypatch)
    with pytest.raises(ValueError, match=r"^arms\.zo_full, seed 0: no number"):
        run(config, tmp_path / "out")
    assert "train more_fo-0" not in done


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


def test_foreign_folders_are_left_alone(root, tmp_path):
    config = small_config(root, *NAMES)
    for name, content in (("thesis.tex", "mine"), ("study.json", "[1]"), ("study.json", "{}")):
        out = tmp_path / f"{name}{len(content)}"
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises((FileExistsError, ValueError), match=r"expected .*(folder|study)"):
            run(config, out)
        assert {p.name: p.read_text() for p in out.iterdir()} == {name: content}


def test_nothing_is_made_of_bad_input(root, tmp_path, capsys):
    """A missing model or data set leaves no folder that a mended study would be refused."""
    config = small_config(root, *NAMES)
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"model: expected a Hugging Face directory"):
        run(replace(config, model=str(tmp_path / "none")), out)
    with pytest.raises(FileNotFoundError, match="none"):
        run(replace(config, data=str(tmp_path / "none")), out)
    rows = (root / "data.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:2]))
    with pytest.raises(ValueError, match="data: expected examples to train on and some held out"):
        run(replace(config, data=str(tmp_path / "few.jsonl")), out)
    assert cli.main(["run", "--config", str(tmp_path / "none.yaml"), "--out", str(out)]) == 1
    assert "none.yaml" in capsys.readouterr().err
    assert not out.exists()


def clock(monkeypatch):
    """A clock that every look at it takes a second on, for both kinds of steps."""
    seconds = iter(range(10**9))
    fake = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("zo_kernels.refine.refiner.time", fake)
    monkeypatch.setattr("zo_kernels.refine.align.time", fake)


@pytest.mark.parametrize("limit", [None, 7.0], ids=["by its steps", "by its seconds"])
def test_arms_of_equal_seconds(limit, root, tmp_path, monkeypatch):
    """The first zeroth-order arm ends by its own limits, the others by its time.

    With ``update_norm``, which leaves the lr = 0 control where it is, and without an alignment.
    """
    clock(monkeypatch)
    names = ("walk", "more_fo", "zo_random", "zo_full")
    config = small_config(root, *names, equal="seconds", align=None)
    refine = replace(config.refine, seconds=limit, steps=9, update_norm=1e-3, curvature_every=0)
    config = replace(config, refine=refine)
    out = run(config, tmp_path / "out")
    assert not (out / "aligned").exists()
    folder = StudyFolder(out)
    first = folder.trained("zo_full", 0)
    assert (first.steps, first.seconds) == (9 if limit is None else 7, limit or 9.0)
    for name in names[1:3]:
        records = read_records(out / "training" / f"{name}-0.jsonl")
        assert records[-1]["seconds"] >= first.seconds > records[-2]["seconds"]
        assert folder.trained(name, 0).config["seconds"] == first.seconds
    assert folder.trained("zo_random", 0).steps == first.steps
    assert folder.trained("more_fo", 0).steps < first.steps  # which look at the clock twice
    assert folder.trained("walk", 0).steps == first.steps
    # Stopped behind its last step, an arm takes no further one.
    (out / "training" / "zo_full-0.json").unlink()
    run(config, out)
    again = folder.trained("zo_full", 0)
    assert replace(again, peak_bytes=first.peak_bytes) == first
    # Others would have the time of another arm.
    with pytest.raises(ValueError, match="in timed"):
        run(replace(config, arms=(ARMS["zo_snip"],)), out)


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


def test_a_report_says_which_arm_cost_more(root, tmp_path, monkeypatch):
    """Where scoring alone takes more than every arm has: a step is taken all the same."""
    notes: list[str] = []
    monkeypatch.setattr(
        "zo_kernels.pipeline.study_report.write_report",
        lambda *_, **options: notes.extend(options["notes"]) or {},
    )
    config = small_config(root, "zo_robust", "zo_magnitude", align=None)
    config = replace(config, refine=replace(config.refine, steps=4))
    folder = StudyFolder(run(config, tmp_path / "out"))
    robust, other = folder.trained("zo_robust", 0), folder.trained("zo_magnitude", 0)
    assert robust.steps == 1 and robust.cost > 2 * config.forwards() > 1.5 * other.cost
    told = [note for note in notes if "Not at equal cost" in note]
    times = f"took {robust.cost / 16:.1f} times as many forwards"
    assert len(told) == 1 and "focused ZO, robust blocks" in told[0] and times in told[0]


def test_arms_of_equal_steps(root, tmp_path):
    """Whatever they cost."""
    names = ("zo_robust", "zo_full", "more_fo")
    config = small_config(root, *names, align=None, equal="steps")
    config = replace(config, refine=replace(config.refine, steps=3))
    folder = StudyFolder(run(config, tmp_path / "out"))
    trained = {name: folder.trained(name, 0) for name in names}
    assert {one.steps for one in trained.values()} == {3}
    assert trained["zo_robust"].cost > 2 * trained["zo_full"].cost  # with its scoring
