"""Writing a log: what is refused, taken back and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_logs import MARK, TENSORS, header_of, places, small_log, steps_of

from zo_kernels.replay import GroupStep, LogWriter, Step, read_log


def test_resume_goes_on_and_drops_a_torn_tail(tmp_path):
    path, header, steps = small_log(tmp_path)
    data, begins = path.read_bytes(), places(path)
    path.write_bytes(data[: begins[4] + 20])  # three whole steps and a piece of the fourth
    given = replace(header, base=None, user={"try": 2})
    LogWriter.resume(path, given).close()
    assert path.read_bytes() == data[: begins[4]]
    path.write_bytes(data[: begins[4] + 20])
    with LogWriter.resume(path, given) as writer:
        assert (writer.steps, writer.torn) == (3, 20) and writer.header.base == header.base
        with pytest.raises(ValueError, match="expected step 3, got 4"):
            writer.write_step(replace(steps[0], step=4))
        writer.write_step(steps[3])
        writer.write_mark(MARK)
    assert path.read_bytes() == data
    with pytest.raises(FileExistsError, match="expected a new file"):
        LogWriter(path, header)
    assert path.read_bytes() == data


def changed(header, **fields):
    group = header.groups[0]
    return replace(header, groups=((replace(group[0], **fields), *group[1:]),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: replace(h, seed=1), "seed: expected 1, got 9223372036854775813"),
        (lambda h: replace(h, queries=2), "queries: expected 2, got 1"),
        (lambda h: replace(h, mode="master"), "mode: expected 'master', got 'streamed'"),
        (lambda h: replace(h, distribution="rademacher"), "distribution: expected 'rademacher'"),
        (lambda h: replace(h, base="f" * 32), f"base: expected '{'f' * 32}', got"),
        (lambda h: replace(h, groups=(h.groups[0][:1], h.groups[0][1:])),
         "groups: expected 2, got 1"),
        (lambda h: replace(h, groups=(h.groups[0][::-1],)),
         r"groups\[0\]\[0\]: expected 'b.weight', got 'a.weight'"),
        (lambda h: replace(h, groups=(h.groups[0][:1],)),
         r"groups\[0\]\[1\]: expected None, got 'b.weight'"),
        (lambda h: changed(h, unit=0.5), "'a.weight'.unit: expected 0.5, got 1.0"),
        (lambda h: changed(h, stream=3), "'a.weight'.stream: expected 3, got"),
        (lambda h: changed(h, dtype="float16"), "'a.weight'.dtype: expected 'float16', got"),
        (lambda h: changed(h, shape=(3, 2)), r"'a.weight'.shape: expected \(3, 2\), got \(2, 3\)"),
    ],
)  # fmt: skip
def test_resume_refuses_another_run(tmp_path, change, message):
    path, header, _ = small_log(tmp_path)
    data = path.read_bytes() + b"S"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"not the log of this run: {message}"):
        LogWriter.resume(path, change(header))
    assert path.read_bytes() == data
    assert LogWriter.resume(path, changed(header, unit=None)).steps == 4


def test_a_mark_is_written_once(tmp_path):
    """Resumed where it ended, after steps are taken back to it, too; another one is."""
    path, _, _ = small_log(tmp_path)  # four steps, marks after two and four
    whole = path.read_bytes()
    with LogWriter.resume(path, read_log(path).header) as writer:
        writer.write_mark(MARK)
        assert path.read_bytes() == whole
        writer.drop_after(2)
        shorter = path.read_bytes()
        writer.write_mark(MARK)
        assert path.read_bytes() == shorter
        writer.write_mark(MARK[::-1])
        writer.write_mark(MARK[::-1])
    found = [(mark.steps, mark.fingerprint) for mark in read_log(path).marks]
    assert found == [(2, MARK), (2, MARK[::-1])]


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    header = header_of([TENSORS], {"b.weight": 9.0}, queries=2)
    with LogWriter(tmp_path / "log", header) as writer:
        good = steps_of(1, queries=2)[0]
        group = good.groups[0]
        for step, message in (
            (replace(good, step=1), "expected step 0, got 1"),
            (replace(good, losses_plus=[1.0]), "losses_plus: expected 2, got 1"),
            (replace(good, groups=[]), "groups: expected 1, got 0"),
            (
                replace(good, groups=[replace(group, coefficients=[1.0])]),
                r"groups\[0\].coefficients: expected 2, got 1",
            ),
            (
                replace(good, groups=[GroupStep(1.0, 1.0, 1.0, [1.0, float("nan")])]),
                r"groups\[0\]: expected finite numbers",
            ),
            (
                replace(good, groups=[replace(group, coefficients=[1.0, -1e38])]),
                r"groups\[0\]: expected decay and unit .* in the range of float32, .*up to 9.0",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                writer.write_step(step)
        with pytest.raises(ValueError, match="expected a fingerprint of 32 hexadecimal digits"):
            writer.write_mark("ABC")
        writer.write_step(Step(0, [float("inf")], [2.0], good.groups, skipped=True))
    log = read_log(tmp_path / "log")
    assert log.skipped.tolist() == [True] and log.steps["losses_plus"][0, 0] == np.inf
    with pytest.raises(ValueError, match=r"'a.weight'.unit: expected a float in a new log"):
        LogWriter(tmp_path / "new", changed(header, unit=None))
    assert not (tmp_path / "new").exists()


FULL = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from tiny_logs import TENSORS, header_of, steps_of
from zo_kernels.replay import LogWriter, read_log
path, steps = Path(sys.argv[1]), steps_of(8)
writer = LogWriter(path, header_of([TENSORS]))
limit = path.stat().st_size + 3 * 62 + 30
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    for step in steps:
        writer.write_step(step)
except OSError as error:
    assert error.filename == str(path), error
    assert "after 3 steps, the log ends with its last whole record" in str(error), error
else:
    raise SystemExit("no error")
assert read_log(path).torn == 0 and len(read_log(path).steps) == 3 == writer.steps
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for step in steps[3:]:
    writer.write_step(step)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    LogWriter(path.with_name("new"), header_of([TENSORS]))
except OSError as error:
    assert "no log was made" in str(error) and "new" in str(error), error
else:
    raise SystemExit("no error")
"""


def test_a_full_disk_leaves_whole_records_and_a_writer_that_goes_on(tmp_path):
    """The limit cuts a write short, as a full disk does."""
    path = tmp_path / "run.zolog"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(read_log(path).steps) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["run.zolog"]


def test_failures_that_cannot_be_taken_back_are_taken_back_later(tmp_path, monkeypatch):
    """/dev/full: nothing can be written, brought to the disk or cut off."""
    path, steps = tmp_path / "run.zolog", steps_of(3)
    with LogWriter(path, header_of([TENSORS])) as writer:
        writer.write_step(steps[0])
        full = os.open("/dev/full", os.O_WRONLY)
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(full, data))
        with pytest.raises(OSError, match=r"No space left .*after 1 steps, the log ends with its"):
            writer.write_step(steps[1])
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]) if len(data) > 42
                            else real(full, data))  # fmt: skip
        monkeypatch.setattr(os, "ftruncate", lambda fd, end: real(full, b"x"))
        with pytest.raises(
            OSError, match=r"No space left .*a part of a record, which could not be"
        ):
            writer.write_step(steps[1])
        monkeypatch.undo()
        os.close(full)
        assert read_log(path).torn == 20
        writer.write_step(steps[1])
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(OSError, match="another process writes this log"):
            writer.write_step(steps[2])
    with pytest.raises(FileExistsError, match="/dev/full"):
        LogWriter("/dev/full", header_of([TENSORS]))


def test_a_record_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    path, steps = tmp_path / "run.zolog", steps_of(2)
    real, failures = os.fsync, [OSError(5, "Input/output error")]

    def fsync(number):
        if failures:
            raise failures.pop()
        real(number)

    with LogWriter(path, header_of([TENSORS])) as writer:
        writer.write_step(steps[0])
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output error; after 1 steps, the log ends with"):
            writer.write_step(steps[1])
        assert (len(read_log(path).steps), read_log(path).torn) == (1, 0)
        writer.write_step(steps[1])
    assert len(read_log(path).steps) == 2
