"""Building and installing: what is shipped, which compiler is taken, where torch comes from."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def run_setup(*arguments: str, cxx: str = "", code: str = "") -> subprocess.CompletedProcess:
    """setup.py with these arguments, and code that comes before it."""
    start = f"import sys; sys.argv = {['setup.py', *arguments]!r}; __file__ = 'setup.py'\n"
    return subprocess.run(
        [sys.executable, "-c", f"{start}{code}\nexec(open('setup.py').read())"],
        cwd=ROOT, env={**os.environ, "CXX": cxx, "ZO_KERNELS_SKIP_CPP": ""}, capture_output=True,
        text=True,
    )  # fmt: skip


def test_a_source_distribution_has_what_is_compiled_and_tested(tmp_path):
    """The list that sdist packs: an installation compiles all of csrc."""
    done = run_setup("egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    packed = set((tmp_path / "zo_kernels.egg-info" / "SOURCES.txt").read_text().splitlines())
    for folder in ("csrc", "python_tests", "configs", "examples", ".ci", "zo_kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".cpp", ".h", ".py", ".yaml", ".json"):
                assert str(path.relative_to(ROOT)) in packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def build(tmp_path: Path, **options: str) -> subprocess.CompletedProcess:
    place = ["--build-temp", str(tmp_path / "work"), "--build-lib", str(tmp_path / "lib")]
    return run_setup("build_ext", *place, **options)


def test_a_compiler_behind_a_launcher(tmp_path):
    """Ninja runs both; this launcher lets nothing be compiled."""
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nif [ $2 = --version ]; then exec "$@"; fi\nexit 1\n')
    launcher.chmod(0o755)
    done = build(tmp_path, cxx=f"{launcher} g++")
    assert done.returncode == 1 and "compiling the CPU kernels failed" in done.stderr
    assert f"cxx = {launcher} g++\n" in (tmp_path / "work" / "build.ninja").read_text()


def test_a_compiler_that_cannot_be_run(tmp_path):
    """One sentence, and only where something is compiled."""
    done = build(tmp_path, cxx="no-such-compiler -m64")
    message = "CXX: expected a compiler, got 'no-such-compiler -m64': .*No such file"
    assert done.returncode == 1 and re.match(message, done.stderr.splitlines()[-1])
    assert run_setup("--version", cxx="no-such-compiler").stdout.strip() == "0.1.0"


def test_other_systems_are_refused_unless_nothing_is_compiled(tmp_path):
    other = "import platform; platform.system = lambda: 'Darwin'"
    done = build(tmp_path, code=other)
    assert done.returncode == 1
    assert "the CPU kernels are for Linux, and this is Darwin; set ZO_KERNELS_SKIP" in done.stderr
    skip = "import os; os.environ['ZO_KERNELS_SKIP_CPP'] = '1'"
    done = build(tmp_path, code=f"{other}\n{skip}")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "work").exists()


@pytest.fixture
def make_venv(monkeypatch) -> ModuleType:
    """.ci/make_venv.py as a module."""
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / ".ci" / "make_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "version, sees",
    [
        ("2.5.1+cpu", False),
        ("1.13.0", False),
        ("2.6.0", True),
        ("2.10.0a0+git1", True),
        (None, False),
    ],
)
def test_an_old_torch_is_not_taken_over(make_venv, monkeypatch, tmp_path, version, sees):
    """pip would fetch the default build, CUDA's, in its place."""

    def of(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    made, ran = {}, []
    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sys, "argv", ["make_venv.py", str(tmp_path)])
    monkeypatch.delenv("ZO_KERNELS_TORCH", raising=False)
    monkeypatch.setattr(make_venv.shutil, "which", lambda name: None)
    monkeypatch.setattr(make_venv.venv, "create", lambda folder, **options: made.update(options))
    monkeypatch.setattr(
        make_venv, "run", lambda *command: ran.append(command) or "install" in command
    )
    assert make_venv.main() == 0
    assert made["system_site_packages"] == sees
    assert (not ran) if sees else ran[-1][-1] == "torch>=2.6"
