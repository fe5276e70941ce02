"""Replay in memory: the bits of a run that took its steps one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits, weights
from tiny_logs import header_of, steps_of, weights_after, write

from zo_kernels.noise import canonical_name
from zo_kernels.replay import (
    GroupStep,
    ReplayState,
    Step,
    check_base,
    group_update,
    read_log,
    replay_,
)

UNITS = {"a.weight": 0.5, "b.weight": 1.0, "c.bias": 1 / 3, "d.weight": 0.0}


def groups_of(dtype=torch.bfloat16):
    """Two groups; the second has a float32 tensor and one of unit 0."""
    made = {
        "a.weight": weights((40, 7), dtype, 1),
        "b.weight": weights(33, torch.float16, 2),
        "c.bias": weights(4100, torch.float32, 3),
        "d.weight": weights(9, dtype, 4),
    }
    for tensor in made.values():  # residuals want finite weights
        tensor[~torch.isfinite(tensor) | (tensor.abs() > 1e4)] = -0.0
    names = list(made)
    return [{n: made[n] for n in names[:2]}, {n: made[n] for n in names[2:]}]


def run_of(tmp_path, *, count=7, queries=2, mode="streamed", distribution="normal", **options):
    groups = groups_of()
    header = header_of(groups, UNITS, queries=queries, mode=mode, distribution=distribution)
    steps = steps_of(count, queries=queries, groups=2, skip=[4], **options)
    return groups, header, steps, read_log(write(tmp_path / "log", header, steps))


def copies(groups):
    return {n: t.clone() for group in groups for n, t in group.items()}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("mode", ["streamed", "master", "master8"])
def test_replay_is_the_run_step_by_step(tmp_path, mode, distribution):
    """Two groups, two queries, decay, a skipped step, relative units; any number in one pass."""
    groups, header, steps, log = run_of(tmp_path, mode=mode, distribution=distribution)
    expected = weights_after(groups, header, steps)
    for chunk in (64, 1, 3):
        tensors = copies(groups)
        tensors["other"] = torch.ones(3)
        state = replay_(tensors, log, chunk=chunk)
        for name, want in expected.items():
            assert_same_bits(tensors[name], want, (name, chunk))
        assert torch.equal(tensors["other"], torch.ones(3)) and state.steps == 7
        assert set(state.copies) == (set() if mode == "streamed" else set(expected))
    assert any(not torch.equal(expected[n], t) for n, t in copies(groups).items())


@pytest.mark.parametrize("mode", ["streamed", "master", "master8"])
def test_replay_goes_on_from_its_state(tmp_path, mode):
    """In two parts, under wrappers' names, as in one; a shorter replay undoes the last steps."""
    groups, header, steps, log = run_of(tmp_path, mode=mode, queries=1)
    tensors = {f"module.{n}": t for n, t in copies(groups).items()}
    seen = []
    state = replay_(tensors, log, stop=3, progress=lambda *args: seen.append(args))
    assert seen[-1] == ("step 3", 6, 6)
    for name, want in weights_after(groups, header, steps[:3]).items():
        assert_same_bits(tensors[f"module.{name}"], want, name)
    state = replay_(tensors, log, start=3, state=state)
    for name, want in weights_after(groups, header, steps).items():
        assert_same_bits(tensors[f"module.{name}"], want, name)
    if mode == "master":
        assert all(c.dtype == torch.float32 for c in state.copies.values())
        for name, tensor in tensors.items():
            assert_same_bits(state.copies[canonical_name(name)].to(tensor.dtype), tensor)
    if mode == "master8":
        assert {n: tuple(c.shape) for n, c in state.copies.items()} == {
            "a.weight": (40, 7), "b.weight": (33,), "c.bias": (0,), "d.weight": (9,)
        }  # fmt: skip
        assert any(c.any() for c in state.copies.values())


def test_nothing_to_do_is_no_pass(tmp_path):
    """Zero scales without decay leave zeros their signs; with decay or one product they do not."""
    zeros = {"w": torch.full((8,), -0.0), "v": torch.full((8,), -0.0)}
    quiet = GroupStep(1e-3, 0.1, 1.0, [0.0])
    loud = replace(quiet, coefficients=[1e-3])
    for units, group, touched in (
        ({}, quiet, False),
        ({"w": 0.0, "v": 0.0}, loud, False),
        ({"w": 0.0, "v": 1.0}, loud, True),
        ({"w": 5e-324, "v": 0.0}, loud, False),  # the product is 0
    ):
        header = header_of([zeros], units)
        path = write(tmp_path / str(len(list(tmp_path.iterdir()))), header,
                     [Step(0, [1.0], [2.0], [group])])  # fmt: skip
        tensors = {n: t.clone() for n, t in zeros.items()}
        replay_(tensors, read_log(path))
        assert bool(torch.signbit(tensors["w"]).all()) != touched
        assert bool(tensors["v"].any()) == touched


def test_group_update():
    update = group_update([0.5, 2.0], [0.1, -0.3], 0.99, [6, 7])
    assert update.scales == [[0.05, -0.15], [0.2, -0.6]] and update.src_scale == 0.99
    assert group_update([0.5, 2.0], [0.1, 0.0], 1.0, [6, 7], [1]).scales == [[0.2, 0.0]]
    assert group_update([1.0, 0.0], [0.1, 0.0], 1.0, [6, 7], [1]).scales == [[0.0, 0.0]]
    assert group_update([0.0], [0.1, 0.2], 1.0, [6, 7]) is None
    assert group_update([1.0], [0.0, -0.0], 1.0, [6, 7]) is None
    assert group_update([0.0], [0.0, 0.0], 0.99, [6, 7]).scales == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("c.bias"), "'c.bias': expected this parameter of the log, got a model w"),
        (lambda t: t.update({"c.bias": t["c.bias"][:5]}), r"'c.bias': expected shape \(4100,\) as"),
        (lambda t: t.update({"c.bias": t["c.bias"].half()}),
         "'c.bias': expected torch.float32 as in the log, got torch.float16"),
        (lambda t: t.update({"a.weight": t["a.weight"].t().contiguous().t()}),
         "'a.weight': expected a contiguous tensor"),
        (lambda t: t.update({"module.c.bias": t["c.bias"]}), "'c.bias' twice"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused_before_anything_is_written(tmp_path, change, message):
    groups, _, _, log = run_of(tmp_path)
    tensors = copies(groups)
    change(tensors)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        replay_(tensors, log)
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name])


def test_bad_options_are_refused_before_anything_is_written(tmp_path):
    groups, _, _, log = run_of(tmp_path, mode="master8")
    tensors = copies(groups)
    for options, message in (
        ({"stop": 8}, "steps: expected an int from 0 to 7, which .*log holds, got 8"),
        ({"start": 3, "stop": 2}, "start: expected an int from 0 to 2, got 3"),
        ({"chunk": 0}, "chunk: expected at least 1, got 0"),
        ({"backend": "magic"}, "backend: expected None or one of"),
        ({"start": 3}, "state: expected the state after 3 steps, which 'master8' needs"),
        ({"start": 3, "state": ReplayState(2)}, "state: expected one after 3 steps, got one"),
        (
            {"start": 3, "state": ReplayState(3)},
            r"state.copies\['a.weight'\]: .*int8 of shape \(40",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replay_(tensors, log, **options)
    for name, tensor in copies(groups).items():
        assert_same_bits(tensors[name], tensor)


def test_the_base_is_checked(tmp_path):
    groups, header, _, log = run_of(tmp_path)
    tensors = copies(groups)
    check_base(tensors, log.header)
    tensors["b.weight"][0] += 1
    with pytest.raises(ValueError, match=f"of fingerprint {header.base}, got .*another model"):
        check_base(tensors, log.header)
    check_base(tensors, replace(header, base=None))
