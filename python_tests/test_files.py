"""Files are replaced in one step, or stay as they were."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import tiny_model, tiny_tokenizer

from zo_kernels.files import changed_settings, check_writable, replace_folder, write_file
from zo_kernels.refine import checkpoint
from zo_kernels.refine.alignment_state import write_state
from zo_kernels.refine.records import MetricsLog, read_records, write_records


@pytest.mark.parametrize("data", ["short\n\u00e9", b"\x00\xff"], ids=["text", "bytes"])
def test_new_and_replaced(data, tmp_path):
    """In a new folder, and over a longer file; an ordinary file, with nothing beside it."""
    path = tmp_path / "new" / "folder" / "file"
    content = data.encode() if isinstance(data, str) else data
    write_file(path, data)
    assert path.read_bytes() == content
    path.write_text("something longer than it was before")
    path.chmod(0o600)
    write_file(path, data)
    assert path.read_bytes() == content
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_link_stays_a_link(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    write_file(link, "new")
    assert link.is_symlink() and path.read_text() == "new"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(step, error, tmp_path, monkeypatch):
    """Whatever fails after the first byte; also where there was no file."""

    def fail(*arguments):
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, step, fail)
    for name in ("file", "other"):
        with pytest.raises(type(error)):
            write_file(tmp_path / name, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("failing", [1, 2], ids=["setting aside", "putting in place"])
def test_a_failing_replacement_leaves_the_old_folder(failing, error, tmp_path, monkeypatch):
    """Also between the two steps, when the name is free; a new folder that fails leaves nothing."""
    target, replace, calls = tmp_path / "model", os.replace, []

    def fail(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise error
        replace(source, destination)

    with replace_folder(target) as work:
        (work / "config.json").write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)), replace_folder(target) as work:
        (work / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_where_a_file_is(tmp_path):
    """The option and the file are named, whether it is the folder itself or one that it is in."""
    path = tmp_path / "file"
    path.write_text("mine")
    for target in (path, path / "model"):
        with pytest.raises(NotADirectoryError, match=rf"output: expected .*{target}; {path} is a"):
            with replace_folder(target):
                pass
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_records_are_replaced_together(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    write_records(path, [{"a": 1}, {"a": float("nan")}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_records(path, [{"a": 2}, {"a": path}])
    assert read_records(path) == [{"a": 1}, {"a": None}] and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    """The check and the writing refuse the same, and neither changes anything."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    for name, reason in (
        ("folder", "it is a folder"),
        ("pipe", "it is a device or a pipe"),
        ("file/inside", "File exists"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(OSError, match=reason):
            write_file(tmp_path / name, "new")
        with pytest.raises(OSError, match=rf"report: expected a file .*{name}: .*{reason}"):
            check_writable(tmp_path / name, "report")
    check_writable(tmp_path / "file")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "pipe").is_fifo()


def test_settings_that_have_changed():
    """As JSON has them: a list is a tuple's; what was not there has changed, what went has not."""
    before = {"a": 1, "layers": [1, 2], "gone": 3, "seconds": 4}
    assert changed_settings(before, {"a": 1, "layers": (1, 2), "seconds": 5}, ("seconds",)) == []
    now = {"seconds": 5, "new": None, "layers": (2,), "other": 0}
    assert changed_settings(before, now) == ["layers", "other", "seconds"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """By each writer of what a run leaves, however its library tells it; what was there stays."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    folder = checkpoint.save(model, tokenizer, tmp_path / "model")
    state, table = tmp_path / "run.state", tmp_path / "table.json"
    before = checkpoint.fingerprint(model)
    write_state(state, {}, [], {})
    write_file(table, "old")
    kept = state.read_bytes()

    def fail(*arguments):
        raise FULL

    def torch_tells(*arguments):
        try:
            fail()
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    def safetensors_tells(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"No space left on device: '.*table\.json'"):
            write_file(table, "new")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torch_tells)
        with pytest.raises(OSError, match=r"run\.state: expected a state .* No space left"):
            write_state(state, {}, [], {})
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", safetensors_tells)
        with pytest.raises(OSError, match=r"model: expected room for the model's weights: .*space"):
            checkpoint.save(model, tokenizer, folder)
    assert table.read_text() == "old" and state.read_bytes() == kept
    assert checkpoint.fingerprint(checkpoint.load(folder, dtype="float32")[0]) == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "run.state", "table.json"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_records_name_their_file_on_a_full_disk(tmp_path):
    log = MetricsLog(tmp_path / "run.jsonl")
    with open("/dev/full", "a") as full:
        log._file, own = full, log._file
        with pytest.raises(OSError, match=r"No space left on device: '.*run\.jsonl'"):
            log.write({"loss": 1.0})
        own.close()
        with pytest.raises(OSError, match="No space left"):
            full.close()
