"""Settings for the whole suite, and every backend that this machine can run as a fixture.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is
imported. A missing C++ extension is an error here, not a fallback.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

os.environ["ZO_KERNELS_STRICT"] = "1"
os.environ.pop("ZO_KERNELS_ISA", None)
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before its interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

# After the settings above.
from helpers import runnable

from zo_kernels.backends import native

ISAS = native.available_isas()
BACKENDS = ["reference", *(f"native-{isa}" for isa in ISAS), "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each backend in turn; the native one once per instruction set of this machine."""
    name, _, isa = request.param.partition("-")
    runnable(name)
    if isa:
        monkeypatch.setenv("ZO_KERNELS_ISA", isa)
    return name


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of the native backend, selected."""
    monkeypatch.setenv("ZO_KERNELS_ISA", request.param)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def ctrl_c():
    """Python's handling of SIGINT, which background processes inherit ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
