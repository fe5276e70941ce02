"""PeakMemory sees what was held at most, not what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zo_kernels import memory
from zo_kernels.memory import PeakMemory

MIB = 2**20
SLACK = 4 * MIB  # what the interpreter and the C library take meanwhile


def touch(mebibytes: int) -> None:
    """Hold that much for a moment."""
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


needs_reset = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel cannot reset the peak"
)


@needs_reset
def test_peak_of_what_is_gone_at_the_end():
    with PeakMemory() as measured:
        touch(64)
    assert abs(measured.peak - measured.before - 64 * MIB) < SLACK


@needs_reset
def test_an_earlier_peak_is_forgotten():
    touch(128)
    with PeakMemory() as measured:
        touch(16)
    assert abs(measured.peak - measured.before - 16 * MIB) < SLACK


@needs_reset
def test_the_peak_is_there_after_an_exception():
    with pytest.raises(KeyError), PeakMemory() as measured:
        touch(64)
        raise KeyError
    assert abs(measured.peak - measured.before - 64 * MIB) < SLACK


def test_without_a_reset_it_is_the_peak_since_the_process_began(monkeypatch, tmp_path):
    resident = memory.resident_peak()
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none")
    with PeakMemory() as measured:
        touch(16)
    assert measured.peak >= measured.before >= resident - SLACK


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_on_a_gpu():
    with PeakMemory("cuda") as measured:
        torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    assert measured.peak - measured.before == 64 * MIB


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got 'meta'"):
        PeakMemory("meta")
