"""Arms of equal seconds, steps or forwards, and the report's word on what is not equal."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_study
from tiny_study import run, small_config

from zo_kernels.pipeline.study_config import ARMS
from zo_kernels.pipeline.study_folder import StudyFolder
from zo_kernels.refine.records import read_records

no_report, root = tiny_study.no_report, tiny_study.root


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
