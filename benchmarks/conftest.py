"""Collects the interleaved tables and prints them after pytest-benchmark's own."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from zo_kernels.backends import native

_tables: list[tuple[str, dict[str, float], dict[str, float]]] = []


def pytest_addoption(parser) -> None:
    """How often each case runs, and on how much."""
    parser.addoption("--rounds", type=int, default=None, help="interleaved rounds of each table")
    parser.addoption("--examples", type=int, default=8, help="examples that layers are scored on")
    parser.addoption("--modes", nargs="+", default=None, help="modes of ZOSGD (default: all)")


@pytest.fixture
def rounds(request) -> Callable[[int], int]:
    """The number of rounds: the default of the benchmark, or --rounds."""
    return lambda default: request.config.getoption("--rounds") or default


@pytest.fixture
def report(benchmark) -> Callable[[str, dict[str, float], dict[str, float]], None]:
    """Keep a table: title, seconds (or other numbers) by row, ratios by name."""

    def add(title: str, rows: dict[str, float], ratios: dict[str, float]) -> None:
        _tables.append((title, rows, ratios))
        benchmark.extra_info.update({**rows, **ratios})

    return add


@pytest.fixture(scope="module")
def directory() -> Path:
    """SmolLM2's Hugging Face directory, prepared on first use; needs the demo extra."""
    from zo_kernels.pipeline.smollm2 import prepare

    return prepare(progress=print)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}thread")
def threads(request) -> Iterator[int]:
    """Number of threads of torch and of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print every table, with the machine."""
    if not _tables:
        return
    terminalreporter.section("interleaved medians")
    cpu = Path("/proc/cpuinfo")
    model = platform.processor()
    if cpu.exists():
        lines = cpu.read_text().splitlines()
        model = next((line for line in lines if line.startswith("model name")), model)
    terminalreporter.line(f"{model.split(':')[-1].strip()}; {', '.join(native.available_isas())}")
    for title, rows, ratios in _tables:
        terminalreporter.line(title)
        for name, value in rows.items():
            terminalreporter.line(f"    {name:34} {value:10.4g}")
        for name, value in ratios.items():
            terminalreporter.line(f"    {name:34} {value:10.2f} x")
