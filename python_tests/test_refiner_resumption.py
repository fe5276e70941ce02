"""Refinements that go on from their log: with the next batches, and as they began or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import EXAMPLES, bits, same_bits, tiny_model
from tiny_refiner import HELD_OUT, refiner, untimed

from zo_kernels.replay import LogWriter, read_log


def test_batches_go_on_where_others_ended(tmp_path):
    """A resumed run counts forwards' batches, accumulated ones too."""
    options = {"batch_size": 1, "accumulation": 2, "lr": 0.0, "eps": 0.0}
    whole = refiner(**options, steps=3).run(EXAMPLES)
    refiner(**options, steps=1).run(EXAMPLES, log=tmp_path / "log")
    rest = refiner(**options, steps=3).run(EXAMPLES, log=tmp_path / "log", resume=True)
    assert untimed(rest) == untimed(whole[1:]) and len({r["loss"] for r in whole}) > 1


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
