"""Arms that cannot be trained, bad input and foreign folders: what a study says and leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_study
from tiny_study import NAMES, counted, run, small_config

from zo_kernels import cli
from zo_kernels.refine.records import read_records
from zo_kernels.refine.refiner import ZORefiner

no_report, root = tiny_study.no_report, tiny_study.root


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
