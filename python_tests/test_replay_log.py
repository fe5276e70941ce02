"""The log's file: what is written is read, and nothing else ever is."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_logs import header_of, steps_of, write

from zo_kernels.noise import NOISE_SPEC
from zo_kernels.replay import GroupStep, LogWriter, Step, fingerprint, read_log
from zo_kernels.replay.log import STEP, encode_record, parse_log, step_dtype

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.zeros(4).bfloat16()}
MARK = "0123456789abcdef" * 2


def small(tmp_path, count=4, **options):
    """A log with a mark in the middle and one at the end, and its steps."""
    header = header_of([TENSORS], queries=options.get("queries", 1))
    steps = steps_of(count, **options)
    path = write(tmp_path / "run.zolog", header, steps, {count // 2: MARK, count: MARK})
    return path, header, steps


def places(path):
    """Where each record begins, and the end of the file: found by the lengths alone."""
    data = path.read_bytes()
    offset = 16 + struct.unpack_from("<I", data, 12)[0] + 4
    found = [offset]
    while offset < len(data):
        offset += 5 + struct.unpack_from("<I", data, offset + 1)[0] + 4
        found.append(offset)
    assert found[-1] == len(data)
    return found


def test_round_trip(tmp_path):
    header = header_of(
        [{"a": TENSORS["a.weight"]}, {"b": TENSORS["b.weight"]}], {"a": 0.1, "b": 1 / 3},
        queries=3, mode="master8", distribution="rademacher", user={"lr": 1e-3, "data": "ab12"},
    )  # fmt: skip
    steps = steps_of(5, queries=3, groups=2, skip=[3])
    path = write(tmp_path / "deep" / "run.zolog", header, steps, {5: MARK})
    log = read_log(path)
    assert replace(log.header, package=None, created=None) == header
    assert log.header.package and log.header.created.endswith("+00:00")
    assert log.header.arithmetic == "master8" and log.torn == 0
    assert log.size == path.stat().st_size
    assert log.skipped.tolist() == [False, False, False, True, False]
    assert [(m.steps, m.fingerprint) for m in log.marks] == [(5, MARK)]
    for row, step in zip(log.steps, steps, strict=True):
        assert row["step"] == step.step
        if step.skipped:
            assert np.isnan(row["losses_plus"]).all() and np.isnan(row["losses_minus"]).all()
        else:
            assert row["losses_plus"].tolist() == step.losses_plus
            assert row["losses_minus"].tolist() == step.losses_minus
        for name in ("lr", "eps", "decay", "coefficients"):
            assert row[name].tolist() == [getattr(group, name) for group in step.groups]
    assert [p.name for p in path.parent.iterdir()] == ["run.zolog"]


def test_size_and_speed(tmp_path):
    """At most 80 bytes for a step of one query and one group; 100,000 are read in a second."""
    path, _, _ = small(tmp_path)
    begins = places(path)
    assert begins[1] - begins[0] <= 80
    data = bytearray(path.read_bytes()[: begins[0]])
    seed = struct.unpack_from("<I", data, begins[0] - 4)[0]
    layout = step_dtype(1, 1)
    for n in range(100_000):
        row = np.zeros((), layout)
        row["step"] = n
        data += encode_record(STEP, row.tobytes(), seed)
    path.write_bytes(data)
    started = time.perf_counter()
    log = read_log(path)
    seconds = time.perf_counter() - started
    assert len(log.steps) == 100_000 and seconds < 5  # a quiet machine takes a fifth of a second


def test_every_truncation_gives_the_whole_records_before_it(tmp_path):
    path, _, _ = small(tmp_path)
    data, begins = path.read_bytes(), places(path)
    whole = read_log(path)
    for length in range(len(data)):
        if length < begins[0]:
            with pytest.raises(ValueError, match=r"run\.zolog: byte \d+: expected"):
                parse_log(path, data[:length])
            continue
        log = parse_log(path, data[:length])
        last = max(b for b in begins if b <= length)
        kept = begins.index(last)
        steps = kept - (kept > 2)  # record 2 is the mark in the middle
        assert (log.size, log.torn) == (last, length - last)
        assert log.steps.tobytes() == whole.steps[:steps].tobytes()
        assert log.marks == whole.marks[: kept > 2]


def test_a_tail_whose_blocks_were_never_written_is_torn(tmp_path):
    """A prefix of the last step and zeros to its full length or less, as a crash can leave."""
    path, _, _ = small(tmp_path)
    data, begins = path.read_bytes(), places(path)
    step = data[begins[-3] : begins[-2]]
    for written in range(len(step)):
        for length in (written + 1, len(step)):
            tail = step[:written] + bytes(length - written)
            if tail == step[:length]:
                continue
            log = parse_log(path, data[: begins[-3]] + tail)
            assert (log.torn, len(log.steps)) == (length, 3), (written, length)
    # More than one record was never in flight.
    path.write_bytes(data[: begins[-3]] + bytes(len(step) + 1))
    with pytest.raises(ValueError, match="bytes that begin with zero: the file is damaged"):
        read_log(path)


@pytest.mark.parametrize("queries", [1, 3])
def test_no_flipped_bit_is_read(tmp_path, queries):
    """An error, or in the last record a torn tail: never another value."""
    path, _, _ = small(tmp_path, queries=queries)
    data, begins = path.read_bytes(), places(path)
    whole = read_log(path)
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            try:
                log = parse_log(path, bytes(flipped))
            except ValueError as error:
                assert "run.zolog" in str(error)
                continue
            assert place >= begins[-2], (place, bit)
            assert (log.torn, log.size) == (len(data) - begins[-2], begins[-2])
            assert log.steps.tobytes() == whole.steps.tobytes() and log.marks == whole.marks[:1]


def test_a_flip_before_several_marks_is_an_error(tmp_path):
    """Also where what follows would be shorter than one step."""
    header = header_of([TENSORS], queries=9)
    with LogWriter(tmp_path / "m", header) as writer:
        writer.write_step(steps_of(1, queries=9)[0])
        for _ in range(3):
            writer.write_mark(MARK)
    begins, data = places(tmp_path / "m"), (tmp_path / "m").read_bytes()
    for place in range(begins[1], begins[3]):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError, match=r"record [12] at byte"):
                parse_log(tmp_path / "m", bytes(flipped))


def test_records_of_another_log_or_place_are_errors(tmp_path):
    path, header, _ = small(tmp_path)
    data, begins = path.read_bytes(), places(path)
    other = write(tmp_path / "other", replace(header, seed=1), steps_of(4))
    theirs, places_ = other.read_bytes(), places(other)
    path.write_bytes(data[: begins[1]] + theirs[places_[1] : places_[3]] + data[begins[1] :])
    with pytest.raises(ValueError, match="record 1 at byte"):
        read_log(path)
    path.write_bytes(data[: begins[1]] + data[begins[4] :])
    with pytest.raises(ValueError, match=f"record 1 at byte {begins[1]}: expected .*, got 3"):
        read_log(path)
    path.write_bytes(data[: begins[1]] + data[begins[2] :])
    with pytest.raises(ValueError, match="expected a mark of steps numbered 1, got 2"):
        read_log(path)


def rewrite(path, change):
    """Change the header's JSON and put a right checksum behind it."""
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    record = json.loads(data[16 : 16 + length])
    change(record)
    text = json.dumps(record).encode()
    head = data[:12] + struct.pack("<I", len(text)) + text
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_spec": 99}, f"noise_spec: expected {NOISE_SPEC}, which .*got 99: the log needs"),
        ({"mode": "mezo"}, "mode 'mezo' cannot be replayed: its evaluations round"),
        ({"mode": "magic"}, "mode: expected one of"),
        ({"arithmetic": "master"}, "arithmetic: expected 'stochastic' in mode 'streamed', got 'm"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        ({"distribution": "cauchy"}, "distribution: expected one of"),
        ({"base": "xyz"}, "base: expected a fingerprint of 32"),
        ({"groups": []}, "groups: expected at least one"),
        ({"groups": [{}]}, "header: expected the fields of this format"),
        ({"colour": 1}, "header: expected the fields of this format"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_headers_are_named(tmp_path, change, message):
    path, _, _ = small(tmp_path)
    rewrite(path, lambda record: record.update(change))
    with pytest.raises(ValueError, match=message):
        read_log(path)


def test_other_files_are_no_logs(tmp_path):
    path, _, _ = small(tmp_path)
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"byte 8: expected format 1, which this .* got 2"):
        read_log(path)
    path.write_text('{"step": 0}')
    with pytest.raises(ValueError, match=r"byte 0: expected a log of zo_kernels, got b'{\"step"):
        read_log(path)
    with pytest.raises(OSError, match="expected an ordinary file, got /dev/zero"):
        read_log("/dev/zero")


def test_resume_goes_on_and_drops_a_torn_tail(tmp_path):
    path, header, steps = small(tmp_path)
    data, begins = path.read_bytes(), places(path)
    path.write_bytes(data[: begins[4] + 20])  # three whole steps and a piece of the fourth
    given = replace(header, base=None, user={"try": 2})
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
    path, header, _ = small(tmp_path)
    data = path.read_bytes() + b"S"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"not the log of this run: {message}"):
        LogWriter.resume(path, change(header))
    assert path.read_bytes() == data
    assert LogWriter.resume(path, changed(header, unit=None)).steps == 4


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    header = header_of([TENSORS], queries=2)
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
from tiny_logs import header_of, steps_of
from test_replay_log import TENSORS
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


def test_fingerprint():
    """Order does not count; every bit, name, dtype and shape does."""
    one = fingerprint(TENSORS.items())
    assert len(one) == 32 and fingerprint(reversed(TENSORS.items())) == one
    a, b = TENSORS.values()
    for other in (
        {"a.weight": a.view(3, 2), "b.weight": b},
        {"a.weight": a, "c.weight": b},
        {"a.weight": a, "b.weight": b.half()},
        {"a.weight": a, "b.weight": -b},
        {"a.weight": a},
    ):
        assert fingerprint(other.items()) != one
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()}
    assert fingerprint(wrapped.items()) == one
    assert fingerprint({**TENSORS, "a.weight": a.t().contiguous().t()}.items()) == one
    with pytest.raises(ValueError, match="'a' twice"):
        fingerprint([("a", a), ("a", b)])
    with pytest.raises(ValueError, match="got 2 with 1 names"):
        fingerprint([("a", a), ("module.a", b)])
