"""Early stopping: the best weights, a log of exactly these, and runs that were killed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import EXAMPLES, bits, same_bits, tiny_model, tiny_tokenizer
from tiny_refiner import logged, refiner, untimed

from zo_kernels.refine import checkpoint
from zo_kernels.refine.held_out import EarlyStop, noisy_loss
from zo_kernels.refine.records import MetricsLog, logged_records, read_records, write_records
from zo_kernels.replay import read_log, replay_, replay_directory, verify

HELD_OUT = EXAMPLES[1:3]
STOP = {
    "steps": 16, "batch_size": 2, "lr": 100.0, "eps": 0.3, "held_out_every": 2,
    "held_out_draws": 2, "held_out_noise": 0.05, "patience": 2, "layers": (1,),
}  # fmt: skip


def held_out_loss(**options):
    """That of the model that the runs begin with."""
    options = {**options, "steps": 1, "lr": 0.0, "held_out_every": 1, "patience": 0}
    run = refiner(tiny_model("llama", torch.bfloat16), **options)
    return run.run(EXAMPLES, held_out=HELD_OUT)[0]["held_out_loss"]


def stopped(path, model=None, **options):
    """A run that early stopping ended, its records and its log."""
    run = refiner(tiny_model("llama", torch.bfloat16) if model is None else model,
                  **{**STOP, **options})  # fmt: skip
    return run, run.run(EXAMPLES, held_out=HELD_OUT, log=path)


@pytest.mark.parametrize("mode", ["streamed", "dual", "inplace", "master", "master8"])
def test_early_stopping_goes_back_to_the_best(mode, tmp_path):
    """The weights of the least held-out loss, and a log that replays to exactly these."""
    path = tmp_path / "log"
    run, records = stopped(path, mode=mode)
    losses = {r["step"] + 1: r["held_out_loss"] for r in records if "held_out_loss" in r}
    best = min(losses, key=losses.get)
    assert run.early_stop.losses[0] == (0, held_out_loss(**STOP))
    assert run.early_stop.losses[1:] == list(losses.items())
    assert (run.early_stop.steps, run.early_stop.best) == (best, losses[best])
    assert len(records) == best + 2 * STOP["patience"] < STOP["steps"], losses
    log = read_log(path)
    assert len(log.steps) == best and [mark.steps for mark in log.marks] == [best]
    model = tiny_model("llama", torch.bfloat16)
    replay_(dict(model.named_parameters()), log)
    assert same_bits(run.model, bits(model))
    # And a run of just so many steps.
    plain = refiner(tiny_model("llama", torch.bfloat16),
                    **{**STOP, "mode": mode, "steps": best, "patience": 0})  # fmt: skip
    plain.run(EXAMPLES, held_out=HELD_OUT)
    assert same_bits(plain.model, bits(run.model))


def test_a_run_whose_last_weights_are_the_best_keeps_them(tmp_path):
    run, records = stopped(tmp_path / "log", steps=2)
    assert len(records) == 2 == run.early_stop.steps
    assert len(read_log(tmp_path / "log").steps) == 2


def test_losses_that_are_not_finite_are_never_the_best(tmp_path, monkeypatch):
    """Nothing to go back to: the weights and the log stay as they are, and replay gives them."""
    monkeypatch.setattr("zo_kernels.refine.refiner.noisy_loss", lambda *_, **__: math.nan)
    run, records = stopped(tmp_path / "log")
    assert len(records) == 2 * STOP["patience"]
    log = read_log(tmp_path / "log")
    assert len(log.steps) == len(records)
    model = tiny_model("llama", torch.bfloat16)
    replay_(dict(model.named_parameters()), log)
    assert same_bits(run.model, bits(model))


@pytest.mark.parametrize("mode", ["streamed", "master", "master8"])
def test_a_run_that_only_harms_gives_the_model_back(mode, tmp_path, monkeypatch):
    """The weights before the first step are measured too; the log has no steps, and replays."""
    base = dict(tiny_model("llama", torch.bfloat16).named_parameters())

    def distance(objective, slots, *_, **__):
        return sum(float((s.tensor - base[s.name]).detach().abs().sum()) for s in slots)

    monkeypatch.setattr("zo_kernels.refine.refiner.noisy_loss", distance)
    checkpoint.save(tiny_model("llama", torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    path, options = tmp_path / "log", {"mode": mode}
    run, records = stopped(path, **options)
    losses = [loss for _, loss in run.early_stop.losses]
    assert losses[0] == 0.0 < min(losses[1:]) and run.early_stop.steps == 0
    assert len(records) == 2 * STOP["patience"]
    log, start = read_log(path), tiny_model("llama", torch.bfloat16)
    assert same_bits(run.model, bits(start))
    assert len(log.steps) == 0 and [mark.steps for mark in log.marks] == [0]
    replay_(dict(start.named_parameters()), log)
    assert same_bits(run.model, bits(start))
    assert all(check.ok for check in verify(tmp_path / "base", log))
    replay_directory(tmp_path / "base", log, tmp_path / "out")
    replayed = checkpoint.load(tmp_path / "out", dtype="bfloat16")[0]
    assert same_bits(run.model, bits(replayed))
    # Killed in between, the run ends there too.
    earlier = killed(tmp_path / "part", 2, True, **options)
    again = refiner(tiny_model("llama", torch.bfloat16), **{**STOP, **options})
    again.run(EXAMPLES, held_out=HELD_OUT, log=tmp_path / "part", resume=True, earlier=earlier)
    assert same_bits(again.model, bits(start))
    assert logged(tmp_path / "part") == logged(path)


class Killed(BaseException):
    pass


def killed(path, after, written, **options):
    """A run that is killed after a step, before or after its record is written; the records."""
    records = []

    def on_step(record):
        if record["step"] == after and not written:
            raise Killed
        records.append(json.loads(json.dumps({**record, "seconds": 0.0})))
        if record["step"] == after:
            raise Killed

    run = refiner(tiny_model("llama", torch.bfloat16), **{**STOP, **options})
    with pytest.raises(Killed):
        run.run(EXAMPLES, held_out=HELD_OUT, log=path, on_step=on_step)
    return records


def test_a_run_is_interrupted_and_resumed_again_and_again(tmp_path, monkeypatch):
    """In the held-out loss after a step, which costs its record, then later, as the commands do it.

    The loss that the first resumption measures again is in the records for the second one.
    """
    options = {"patience": 6, "steps": 8}
    _, records = stopped(tmp_path / "whole", **options)
    log, lines = tmp_path / "log", tmp_path / "lines.jsonl"

    def go_on(interrupt, resume=True):
        earlier = logged_records(lines, log) if resume else []
        write_records(lines, earlier)
        calls = []

        def measure(*args, **kwargs):
            calls.append(0)
            if interrupt == ("loss", len(calls)):
                raise KeyboardInterrupt
            return noisy_loss(*args, **kwargs)

        monkeypatch.setattr("zo_kernels.refine.refiner.noisy_loss", measure)
        run = refiner(tiny_model("llama", torch.bfloat16), **{**STOP, **options})
        with MetricsLog(lines) as metrics:

            def on_step(record):
                metrics.write(record)
                if interrupt == ("step", record["step"]):
                    raise KeyboardInterrupt

            if interrupt is None:
                new = run.run(EXAMPLES, held_out=HELD_OUT, log=log, resume=resume,
                              earlier=earlier, on_step=on_step)  # fmt: skip
                return [*earlier, *new]
            with pytest.raises(KeyboardInterrupt):
                run.run(EXAMPLES, held_out=HELD_OUT, log=log, resume=resume, earlier=earlier,
                        on_step=on_step)  # fmt: skip

    go_on(("loss", 3), resume=False)  # of the start, after step 2, after step 4
    assert [r["step"] for r in read_records(lines)] == [0, 1, 2]
    go_on(("loss", 2))  # of the start, and again after step 4
    go_on(("step", 5))
    found = {r["step"]: r.get("held_out_loss") for r in read_records(lines)}
    assert found[3] == records[3]["held_out_loss"] is not None
    assert len(go_on(None)) == 8
    last = {r["step"]: r for r in read_records(lines)}
    for step, record in last.items():
        assert record.get("held_out_loss") == records[step].get("held_out_loss")
        assert record["losses_plus"] == records[step]["losses_plus"]
        assert record["seconds"] >= last[max(step - 1, 0)]["seconds"]
    assert logged(log) == logged(tmp_path / "whole")


@pytest.mark.parametrize("written", [True, False], ids=["written", "unwritten"])
@pytest.mark.parametrize("mode", ["streamed", "master"])
def test_early_stopping_that_is_resumed(mode, written, tmp_path):
    """Killed after any step, with or without its record, the run ends with the same bits.

    The last step too: what it decided is not decided anew, and no further one is taken.
    """
    options = {"mode": mode, "curvature_every": 3}
    run, records = stopped(tmp_path / "whole", **options)
    assert STOP["patience"] * 2 < len(records) < STOP["steps"]
    every = 1 if (mode, written) == ("streamed", True) else 3
    for after in range(len(records) - 1, -1, -every):
        path = tmp_path / f"{after}"
        earlier = killed(path, after, written, **options)
        assert len(earlier) == after + written
        again = refiner(tiny_model("llama", torch.bfloat16), **{**STOP, **options})
        rest = again.run(EXAMPLES, held_out=HELD_OUT, log=path, resume=True, earlier=earlier)
        assert same_bits(again.model, bits(run.model)), after
        assert again.early_stop.losses == run.early_stop.losses
        assert untimed(rest) == untimed(records[after + 1 :])
        assert logged(path) == logged(tmp_path / "whole")
    path = tmp_path / "other"
    earlier = killed(path, 4, True, **options)
    again = refiner(tiny_model("llama", torch.bfloat16), **{**STOP, **options})
    with pytest.raises(ValueError, match="earlier: expected the held-out loss after 2 steps"):
        again.run(EXAMPLES, held_out=HELD_OUT, log=path, resume=True, earlier=earlier[2:])
    assert same_bits(again.model, bits(tiny_model("llama", torch.bfloat16)))


def test_early_stop_by_itself():
    """The patience counts measurements without a new best; null losses are of no number."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    stop = EarlyStop({"w": parameter}, patience=2)
    for steps, loss in enumerate([3.0, 2.0, 2.0, math.nan], 1):
        assert not stop.over
        parameter.data.fill_(steps)
        stop.note(steps, loss)
    assert stop.over and (stop.best, stop.steps) == (2.0, 2)
    stop.restore()
    assert parameter.tolist() == [2.0, 2.0]
    stop.note(5, 1.0, {"w": torch.full((2,), 7.0)})
    assert not stop.over
    stop.restore()
    assert parameter.tolist() == [7.0, 7.0]
    stop = EarlyStop({"w": parameter}, patience=1)
    stop.note(0, math.nan)
    assert not stop.over  # nothing was tried yet
    stop.note(2, math.nan)
    assert stop.over and stop.best == math.inf
