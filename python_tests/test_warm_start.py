"""Updates that join the first step: in every mode, in logs, replayed, resumed, taken back."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_logs import MARK, TENSORS, header_of, places, small_log, steps_of, weights_after, write
from tiny_models import bits, closure_of, same_bits, tiny_model
from tiny_replay import assert_same, saved, tensors_of

import zo_kernels as zk
from zo_kernels import noise
from zo_kernels.replay import (
    GroupStep,
    Header,
    LogWriter,
    Step,
    WarmStart,
    fingerprint,
    read_log,
    replay_,
    replay_directory,
    verify,
)
from zo_kernels.replay.header import ARITHMETICS
from zo_kernels.replay.updates import logged_updates, warm_start_update

MODES = sorted(ARITHMETICS)
DIRECTIONS = [noise.LAYER_SCORING, noise.LAYER_SCORING + 1, 2**32 - 1]


def scales_of(model):
    """Scales for all weights of the second block but one, the last direction unused by some."""
    names = [n for n, _ in model.named_parameters() if ".layers.1." in n][1:]
    return {n: [1e-3, -2e-3, 1e-3 * (i % 2)] for i, n in enumerate(names)}


def make(mode, dtype=torch.bfloat16, warm=True, skip=(), **options):
    """A tiny model, its optimizer with two groups, and a loss that is infinite in some steps."""
    model = tiny_model("llama", dtype)
    named = list(model.named_parameters())
    groups = [{"params": named[::2]}, {"params": named[1::2], "lr": 3e-2}]
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 2**40 + 3, "mode": mode, **options}
    optimizer = zk.ZOSGD(groups, **options)
    if warm:
        optimizer.warm_start(DIRECTIONS, scales_of(model))
    loss = closure_of(model)
    return model, optimizer, lambda: loss() + (math.inf if optimizer.steps in skip else 0.0)


def by_hand(base, log, stop=None):
    """The weights after a log's steps, by one combine_ per step, tensor and warm start."""
    groups = [{p.name: base[p.name] for p in group} for group in log.header.groups]
    steps = [
        Step(
            int(row["step"]), row["losses_plus"], row["losses_minus"],
            [GroupStep(*map(float, (row["lr"][g], row["eps"][g], row["decay"][g])),
                       row["coefficients"][g].tolist()) for g in range(2)],
            skipped=bool(skipped),
        )
        for row, skipped in zip(log.steps[:stop], log.skipped[:stop], strict=True)
    ]  # fmt: skip
    return weights_after(groups, log.header, steps)


def detached(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:ZOSGD. step . skipped")
@pytest.mark.parametrize("skip", [(), (0, 1)], ids=["first", "third"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_those_by_hand_whatever_way_they_are_come_by(mode, dtype, skip, tmp_path):
    """Optimizer, combine_, replay in parts, a resumed run; a skipped step postpones it."""
    path = tmp_path / "run.zolog"
    model, optimizer, closure = make(mode, dtype, skip=skip)
    base, first = detached(model), len(skip)
    optimizer.start_log(path, user={"warm": True})
    after = []
    for _ in range(4):
        optimizer.step(closure)
        after.append(detached(model))
    optimizer.end_log()
    log = read_log(path)
    assert log.header.warm_start == WarmStart(
        tuple(DIRECTIONS), {n: tuple(map(float, s)) for n, s in scales_of(model).items()}
    )
    for stop in (first + 1, 4):
        expected = by_hand(base, log, stop)
        for name, tensor in after[stop - 1].items():
            assert_same(tensor, expected[name])
    for weights in after[:first]:
        assert all(torch.equal(weights[name], base[name]) for name in base)
    # It is there once: without it the weights are others, by about its size where it goes.
    plain, its, same = make(mode, dtype, warm=False, skip=skip)
    for _ in range(first + 1):
        its.step(same)
    moved = {n for n, p in detached(plain).items() if not torch.equal(p, after[first][n])}
    assert moved == set(scales_of(model))

    for chunk, stops in ((1, (4,)), (64, (first, first + 1, 4)), (3, (1, 2, 3, 4))):
        found, state, start = {n: t.clone() for n, t in base.items()}, None, 0
        for stop in stops:
            state = replay_(found, log, start=start, stop=stop, state=state, chunk=chunk)
            start = stop
        assert all(torch.equal(found[name], after[-1][name]) for name in base)

    for stop in sorted({0, first, first + 1}):
        model, optimizer, closure = make(mode, dtype, warm=False, skip=skip)
        part = write_prefix(path, tmp_path / f"{stop}.zolog", stop)
        assert optimizer.resume_log(part) == stop
        while optimizer.steps < 4:
            optimizer.step(closure)
        optimizer.end_log()
        assert part.read_bytes() == path.read_bytes()
        assert same_bits(model, bits_of(after[-1]))


def bits_of(weights):
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in weights.items()}


def write_prefix(path, target, steps):
    """A copy of a log that ends after so many steps."""
    target.write_bytes(path.read_bytes())
    log = read_log(target)
    with LogWriter.resume(target, log.header) as writer:
        writer.drop_after(steps)
    return target


@pytest.mark.parametrize("mode", ["streamed", "master", "master8"])
def test_directories_are_replayed_and_verified(mode, tmp_path):
    model, optimizer, closure = make(mode)
    base = saved(tmp_path / "base", model, shard="20KB")
    optimizer.start_log(tmp_path / "log")
    for _ in range(3):
        optimizer.step(closure)
    optimizer.end_log()
    log = read_log(tmp_path / "log")
    done = replay_directory(base, log, tmp_path / "out")
    assert done.steps == 3 and done.marks == (3,)
    written = tensors_of(tmp_path / "out")
    for name, parameter in detached(model).items():
        assert_same(written[name][0], parameter)
    assert all(check.ok for check in verify(base, log, model=tmp_path / "out"))
    # A log without the warm start is another one: its mark tells.
    header = replace(log.header, warm_start=None)
    assert [check.ok for check in verify(base, replace(log, header=header))] == [False]


def test_a_step_without_an_update_of_its_own_has_it_too(tmp_path):
    """lr 0 makes no pass over the weights; the warm start is one, of its group alone."""
    model, optimizer, closure = make("streamed")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    base = detached(model)
    optimizer.start_log(tmp_path / "log")
    optimizer.step(closure)
    optimizer.step(closure)
    optimizer.end_log()
    moved = {n for n, p in detached(model).items() if not torch.equal(p, base[n])}
    assert moved == set(scales_of(model))
    log = read_log(tmp_path / "log")
    updates = [list(logged_updates(log, group, 0, 2)) for group in range(2)]
    assert [[step for step, _ in found] for found in updates] == [[0], [0]]
    assert [list(logged_updates(log, g, 1, 2)) for g in range(2)] == [[], []]
    replay_(base, log)
    assert all(torch.equal(base[n], p) for n, p in detached(model).items())


def test_members_and_still_groups():
    """One tensor of a group takes its own row; a group that has no scale but 0 takes no update."""
    header = header_of([{"a": torch.zeros(2), "b": torch.zeros(2)}, {"c": torch.zeros(2)}])
    warm = WarmStart((7, 9), {"b": (1.0, 2.0), "c": (0.0, 0.0)})
    update = warm_start_update(warm, header.groups[0])
    assert (update.directions, update.scales) == ([7, 9], [[0.0, 0.0], [1.0, 2.0]])
    assert warm_start_update(warm, header.groups[0], [0]).scales == [[0.0, 0.0]]
    assert warm_start_update(warm, header.groups[1]) is None


def test_resumed_under_a_wrapper(tmp_path):
    """Before its first applied step, too: names are compared without a wrapper's prefix."""
    found = []
    for wrapped in (False, True):
        path = tmp_path / f"{wrapped}.zolog"
        model, optimizer, closure = make("streamed")
        optimizer.start_log(path)
        if wrapped:
            optimizer.log.close()
            model = tiny_model("llama", torch.bfloat16)
            named = [(f"module.{n}", p) for n, p in model.named_parameters()]
            groups = [{"params": named[::2]}, {"params": named[1::2], "lr": 3e-2}]
            optimizer = zk.ZOSGD(groups, lr=1e-2, eps=1e-2, seed=2**40 + 3)
            closure = closure_of(model)
            assert optimizer.resume_log(path) == 0
        optimizer.step(closure)
        optimizer.end_log()
        found.append(model)
    assert same_bits(found[0], bits(found[1]))
    assert read_log(tmp_path / "True.zolog").marks == read_log(tmp_path / "False.zolog").marks


def test_it_goes_with_the_state():
    """A state that was saved before the first step has it, one that was saved after has not."""
    expected, optimizer, closure = make("streamed")
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure)
    after = copy.deepcopy(optimizer.state_dict())
    assert before["zo"]["warm_start"]["directions"] == tuple(DIRECTIONS)
    assert after["zo"]["warm_start"] is None
    for state, ready in ((before, False), (after, True)):
        model, optimizer, closure = make("streamed", warm=False)
        if ready:
            model.load_state_dict(expected.state_dict())
        optimizer.load_state_dict(state)
        optimizer.step(closure)
        if not ready:
            assert same_bits(model, bits(expected))
    other, its, closure = make("streamed")
    its.step(closure)
    its.step(closure)
    assert same_bits(other, bits(model))


def test_what_it_refuses(tmp_path):
    _, optimizer, _ = make("streamed", warm=False)
    name = "model.layers.0.mlp.up_proj.weight"
    for directions, scales, message in (
        ([], {}, "warm_start.directions: expected at least one, got none"),
        ([2**32], {name: [1.0]}, "warm_start.directions"),
        ([-1], {name: [1.0]}, "warm_start.directions"),
        ([1, 2], {name: [1.0]}, rf"warm_start.scales\['{name}'\]: expected 2, one per .* got 1"),
        ([1], {name: [math.nan]}, "in the range of float32, got"),
        ([1], {name: [-1e39]}, "in the range of float32, got"),
        ([1], {"nobody": [1.0]}, "warm_start: expected parameters of the optimizer, got 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.warm_start(directions, scales)
    assert optimizer._warm_start is None
    optimizer.start_log(tmp_path / "log")
    with pytest.raises(ValueError, match="before the first step and before any log"):
        optimizer.warm_start([1], {name: [1.0]})
    optimizer.end_log()
    _, optimizer, closure = make("streamed", warm=False)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="before the first step and before any log"):
        optimizer.warm_start([1], {name: [1.0]})


def test_headers_with_it(tmp_path):
    header = header_of([TENSORS], warm_start=WarmStart((5,), {"a.weight": (0.25,)}))
    assert Header.decode(header.encode()) == header
    record = json.loads(header.encode())
    assert record["warm_start"] == {"directions": [5], "scales": {"a.weight": [0.25]}}
    bare = {k: v for k, v in record.items() if k != "warm_start"}  # as older versions wrote it
    assert Header.decode(json.dumps(bare).encode()).warm_start is None
    with pytest.raises(ValueError, match=r"expected parameters of the run, got 'x' \(2 in all\)"):
        header_of([TENSORS], warm_start=WarmStart((5,), {"x": (1.0,), "y": (1.0,)}))
    for broken in ({"scales": {}}, {"directions": [5], "scales": {"a.weight": ["x"]}}, [1]):
        data = json.dumps({**record, "warm_start": broken}).encode()
        with pytest.raises(ValueError, match="header: expected the fields of this format"):
            Header.decode(data)
    path = write(tmp_path / "log", header, steps_of(2))
    header.check_continues(read_log(path).header)
    replace(header, warm_start=None).check_continues(read_log(path).header)


@pytest.mark.parametrize("steps", range(5))
def test_steps_are_taken_back_with_the_marks_behind_them(steps, tmp_path):
    """drop_after leaves the records before it as they are, and a writer that goes on."""
    path, _, records = small_log(tmp_path)  # four steps, marks after two and four
    whole, begins = path.read_bytes(), places(path)
    end = begins[{0: 0, 1: 1, 2: 3, 3: 4, 4: 6}[steps]]
    with LogWriter.resume(path, read_log(path).header) as writer:
        writer.drop_after(steps)
        assert writer.steps == steps and path.read_bytes() == whole[:end]
        with pytest.raises(ValueError, match=f"expected step {steps}, got {steps + 1}"):
            writer.write_step(replace(records[0], step=steps + 1))
        for step in records[steps:]:
            writer.write_step(step)
            if step.step in (1, 3):
                writer.write_mark(MARK)
    assert path.read_bytes() == whole


def test_taking_back_is_refused_and_repeated(tmp_path, monkeypatch):
    path, _, records = small_log(tmp_path)
    whole = path.read_bytes()
    with LogWriter.resume(path, read_log(path).header) as writer:
        for steps in (-1, 5):
            with pytest.raises(ValueError, match=f"expected 0 to 4 steps, got {steps}"):
                writer.drop_after(steps)
        assert path.read_bytes() == whole and writer.steps == 4
        monkeypatch.setattr("os.ftruncate", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(OSError, match="broken"):
            writer.drop_after(3)
        monkeypatch.undo()
        writer.write_step(records[3])  # cuts first
        writer.write_mark(MARK)
    assert path.read_bytes() == whole


def test_fingerprints_of_the_marks(tmp_path):
    """The mark at the end is that of the weights with the warm start."""
    model, optimizer, closure = make("streamed")
    optimizer.start_log(tmp_path / "log")
    optimizer.step(closure)
    optimizer.end_log()
    names = [p.name for p in read_log(tmp_path / "log").header.parameters()]
    named = dict(model.named_parameters())
    assert read_log(tmp_path / "log").marks[0].fingerprint == fingerprint(
        (name, named[name].detach()) for name in names
    )
