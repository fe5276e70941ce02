"""Imports point one way: cli -> pipeline -> refine -> {robustness, optim} -> {modes, replay} ->
ops -> backends -> noise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zo_kernels import backends

PACKAGE = Path(__file__).parents[1] / "zo_kernels"
# Each module or package imports only from rooms with a lower number, and from itself.
FLOORS = {
    "noise": 0,
    "formats": 0,
    "backends": 1,
    "ops": 2,
    "quantize": 3,
    "modes": 3,
    "replay": 3,
    "views": 4,
    "optim": 4,
    "activations": 4,
    "robustness": 5,
    "refine": 6,
    "pipeline": 7,
    "cli": 8,
    "__main__": 9,
}
# Helpers beside the stairs: they import nothing of the house but the floors named here.
HELPERS = {
    "blocks": set(),
    "chat": set(),
    "checks": set(),
    "files": set(),
    "memory": set(),
    "moments": set(),
    "places": set(),
    "progress": set(),
    "scales": {"backends", "formats"},
    "vectors": {"ops"},
}


def imported(path: Path) -> set[str]:
    """Rooms of zo_kernels that a file imports anywhere, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{path}: relative import"
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("zo_kernels.")}
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if room_of(p) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    """No file imports its own floor's neighbours or anything above it."""
    room = room_of(path)
    assert room in FLOORS or room in HELPERS, f"{room} has no place in the order of imports"
    for other in imported(path) - {room, "_C"}:
        if room in HELPERS:
            assert other in HELPERS[room], f"{room} imports {other}"
        elif (
            other not in HELPERS and (PACKAGE / other).exists() | (PACKAGE / f"{other}.py").exists()
        ):
            assert FLOORS[other] < FLOORS[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", HELPERS)
def test_helpers_import_what_they_may(room):
    """A floor that a helper has left is taken off its list."""
    imports = [imported(path) for path in FILES if room_of(path) == room]
    assert set().union(*imports) - {room} == HELPERS[room]


def test_the_doors_of_the_backends():
    """Each backend has all that their package names, and it names all that the operations use."""
    triton = pytest.importorskip("zo_kernels.backends.triton")
    named = set(re.findall(r"^    (\w+)[(:]", backends.__doc__, re.MULTILINE))
    files = [*(PACKAGE / "ops").glob("*.py"), PACKAGE / "quantize.py"]
    pattern = r"\broom\.(\w+)|backend_for\([^()]*\)\.(\w+)"
    calls = [found for path in files for found in re.findall(pattern, path.read_text())]
    used = {name for found in calls for name in found if name}
    assert {"swap_", "combine_"} <= used
    assert used - {"interpreting", "unavailable_reason"} <= named
    for room in (backends.reference, backends.native, triton):
        assert named <= set(dir(room)), room.__name__


def test_the_rule_can_fail(tmp_path):
    """The parser sees plain, aliased, from and nested imports."""
    file = tmp_path / "x.py"
    file.write_text(
        "import zo_kernels.cli as c\nfrom zo_kernels import optim\n"
        "def f():\n    from zo_kernels.backends.native import isa\n"
    )
    assert imported(file) == {"cli", "optim", "backends"}


def test_the_stages_are_attributes_imported_on_demand():
    """Each is its module's own object; none is loaded before, and no others exist."""
    code = (
        "import sys, zo_kernels as zk\n"
        "print([m for m in sys.modules if m.startswith('zo_kernels.refine')])\n"
        "names = 'AlignConfig RefineConfig ScoreConfig ZORefiner align score'.split()\n"
        "print(set(names) <= set(dir(zk)) & set(zk.__all__))\n"
        "found = [getattr(zk, name) for name in names]\n"
        "print(*[f'{f.__module__[18:]}.{f.__name__}' for f in found])\n"
        "print(hasattr(zk, 'refiner'), hasattr(zk, 'ZORefine'), found[3] is zk.ZORefiner)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "[]",
        "True",
        "align.AlignConfig config.RefineConfig scores.ScoreConfig refiner.ZORefiner align.align "
        "scoring.score",
        "False False True",
    ], done.stderr
