"""Scales and directions as tensors, which a Triton launch reads on the device."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, weights

import zo_kernels as zk
from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import launch

DIRECTIONS = [2**32 - 1, 0, 7]
SCALES = [[1e-3, 2e-3, -1e-3], [1.0, 0.5, 0.25]]


def tensors(device: str) -> list[torch.Tensor]:
    return [weights(1500, torch.bfloat16, 1).to(device), weights(70, torch.float32, 2).to(device)]


@pytest.mark.parametrize("shared", [False, True])
def test_same_bits_as_from_lists(backend, device, shared):
    """One row per tensor, or one for all; two dtypes are two launches that share the scales."""
    rows = SCALES[0] if shared else SCALES
    options = {"seed": 2**63 + 1, "streams": [3, 4], "rounding": "stochastic", "backend": backend}
    expected, actual = tensors(device), tensors(device)
    zk.combine_(expected, expected, rows, directions=DIRECTIONS, **options)
    zk.combine_(
        actual,
        actual,
        torch.tensor(rows, device=device),
        directions=torch.tensor(DIRECTIONS, device=device),
        **options,
    )
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


def test_a_launch_reads_what_the_tensors_hold_then(device):
    """The table is made once; new values in the same tensors need nothing from the host."""
    reason = room.unavailable_reason()
    if reason:
        pytest.skip(reason)
    launch._tables.clear()
    weight = weights(300, torch.bfloat16).to(device)
    scales, directions = (
        torch.zeros(1, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    for step in range(3):
        scales.fill_(10.0**-step)
        directions.fill_(step)
        expected = weight.cpu()
        zk.perturb_(
            [expected], 10.0**-step, seed=1, direction=step, streams=[2], backend="reference"
        )
        zk.combine_(
            [weight], [weight], scales, seed=1, directions=directions, streams=[2], backend="triton"
        )
        assert_same_bits(weight, expected)
    assert len(launch._tables) == 1


def test_tables_do_not_grow_without_bound(device, monkeypatch):
    reason = room.unavailable_reason()
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(launch, "_KEPT", 3)
    launch._tables.clear()
    weight = weights(40, torch.float32).to(device)
    for offset in range(5):
        zk.perturb_(
            [weight], 0.0, seed=1, direction=1, streams=[2], offsets=[offset], backend="triton"
        )
    assert len(launch._tables) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_launch_replays_with_new_values():
    """The twin on the CPU is test_a_launch_reads_what_the_tensors_hold_then."""
    weight = weights(300, torch.bfloat16).cuda()
    scales, directions = torch.zeros(1).cuda(), torch.zeros(1, dtype=torch.int64).cuda()

    def run() -> None:
        zk.combine_([weight], [weight], scales, seed=1, directions=directions, streams=[2])

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in range(3):
        scales.fill_(0.1)
        directions.fill_(step)
        expected = weight.cpu()
        zk.perturb_([expected], 0.1, seed=1, direction=step, streams=[2], backend="reference")
        graph.replay()
        assert_same_bits(weight, expected)


@pytest.mark.parametrize(
    "scales, directions, message",
    [
        (torch.ones(1), [2], "both as lists or both as tensors"),
        ([1.0], torch.tensor([2]), "both as lists or both as tensors"),
        (torch.ones(2), torch.tensor([2]), "scales: expected a list, or float32 of shape"),
        (torch.ones(1, dtype=torch.float64), torch.tensor([2]), "scales: expected a list, or"),
        (torch.ones(1), torch.tensor([2], dtype=torch.int32), "directions: expected a list, or"),
        (torch.ones(0), torch.tensor([], dtype=torch.int64), "directions: expected a list, or"),
    ],
)
def test_unfit_tensors_are_refused(scales, directions, message):
    weight = torch.ones(4)
    with pytest.raises((TypeError, ValueError), match=message):
        zk.combine_([weight], [weight], scales, seed=1, directions=directions, streams=[3])
    assert_same_bits(weight, torch.ones(4))


def test_values_on_the_cpu_are_checked():
    """Only values on a GPU are taken as they are."""
    weight = torch.ones(4)
    with pytest.raises(ValueError, match=r"expected a finite float32 value, got nan"):
        zk.combine_(
            [weight], [weight], torch.tensor([torch.nan]), seed=1, directions=torch.tensor([1]),
            streams=[3], backend="reference",
        )  # fmt: skip
    assert_same_bits(weight, torch.ones(4))


def test_tables_of_a_captured_graph_are_kept(device, monkeypatch):
    """A graph replays the table's address: it must outlive the tables that are only cached."""
    reason = room.unavailable_reason()
    if reason:
        pytest.skip(reason)

    def table_of(weight):
        return launch.device_table([weight], [weight], [1], [0], [0], weight.device)[0]

    monkeypatch.setattr(launch, "_tables", type(launch._tables)())
    monkeypatch.setattr(launch, "_captured", {})
    monkeypatch.setattr(launch, "_KEPT", 2)
    weights_of_runs = [torch.zeros(64, device=device) for _ in range(5)]
    captured = table_of(weights_of_runs[0])
    monkeypatch.setattr(launch, "_capturing", lambda device: True)
    assert table_of(weights_of_runs[0]) is captured
    with pytest.raises(RuntimeError, match="expected the same call once before the capture"):
        table_of(weights_of_runs[1])
    monkeypatch.setattr(launch, "_capturing", lambda device: False)
    cached = [table_of(weight) for weight in weights_of_runs[1:]]
    assert table_of(weights_of_runs[0]) is captured and len(launch._tables) == 2
    assert table_of(weights_of_runs[1]) is not cached[0]
