"""doctor --verify: what is computed and compared, bit by bit."""

from __future__ import annotations

import pytest
import torch
from helpers import special_values

from zo_kernels import vectors
from zo_kernels.pipeline import cases, measure
from zo_kernels.pipeline.cases import CASES, RAGGED_COUNT, RAGGED_OFFSET


def test_the_interpreters_part_of_the_table():
    """The vectors it computes have all kinds of lines, each type as source and result, and both
    roundings."""
    part = vectors.read()[:: measure.INTERPRETED_STEP]
    assert {vector.kind for vector in part} == {vector.kind for vector in vectors.read()}
    updates = [vector.fields for vector in part if vector.kind == "update"]
    assert len({fields[4] for fields in updates}) == len({fields[9] for fields in updates}) == 3
    assert {fields[8] for fields in updates} == {"nearest", "stochastic"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_difference_compares_bits(dtype):
    """The sign of zero and one bit count, a NaN's payload does not, another dtype is an error."""
    values = special_values(dtype)
    assert cases.difference(values, values.clone()) is None
    other = values.clone()
    other[1] = 0.0
    found = cases.difference(other, values, first=100)
    assert (found["index"], found["differing"]) == (101, 1)
    sign = 1 << (8 * dtype.itemsize - 1)
    assert (int(found["expected"], 16), int(found["got"], 16)) == (sign, 0)
    other = values.clone()
    other[values.isnan()] = torch.nan
    assert cases.difference(other, values) is None
    with pytest.raises(TypeError, match=r"expected torch\.float64"):
        cases.difference(values, values.double())
    with pytest.raises(ValueError, match="expected shape"):
        cases.difference(values[1:], values)


def test_windows_and_weights():
    """The first, the middle and the last elements; a window's weights are the buffer's there."""
    for count in (1, 4096, 28672, 28673, 100_003, 1 << 24):
        parts = cases.windows(count)
        assert parts[0][0] == 0 and sum(parts[-1]) == count
        assert all(start % cases.ALIGNMENT == 0 for start, _ in parts)
    assert len(parts) == 3 and sum(n for _, n in parts) == sum(cases.WINDOWS)
    memory = cases.buffers(torch.bfloat16, 200_001, "cpu", "native")
    memory.fill()
    part = cases.buffers(torch.bfloat16, 70_000, "cpu", "native", shift=3)
    part.fill(start=130_001)
    assert torch.equal(part.weights, memory.weights[130_001:]) and memory.scratch.isnan().all()
    assert part.weights.storage_offset() == 3 and part.weights.std() > 0.01


def test_every_case_is_one_of_its_own():
    """Names are unique; sizes divide; the ragged run does cross the change of the counter."""
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert cases.ALIGNMENT % case.multiple == 0 and case.traffic > 0
    assert RAGGED_OFFSET < 1 << 34 < RAGGED_OFFSET + RAGGED_COUNT
