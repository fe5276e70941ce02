"""Refinements that measure: their own rate before the first step, and curvature as they go."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tiny_models import EXAMPLES, Quadratic, bits, same_bits
from tiny_refiner import logged, refiner

from zo_kernels import noise
from zo_kernels.blocks import linear_weights
from zo_kernels.modes import Slot
from zo_kernels.moments import standard_deviation
from zo_kernels.refine.config import RefineConfig
from zo_kernels.refine.curvature import measure_curvature
from zo_kernels.replay import LogWriter, read_log


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
