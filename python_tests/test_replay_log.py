"""The log's file: what is written is read, and nothing else ever is."""

from __future__ import annotations

import json
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from tiny_logs import MARK, TENSORS, header_of, places, small_log, steps_of, write

from zo_kernels.noise import NOISE_SPEC
from zo_kernels.replay import LogWriter, fingerprint, read_log
from zo_kernels.replay.log import STEP, encode_record, parse_log, step_dtype


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
    path, _, _ = small_log(tmp_path)
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
    path, _, _ = small_log(tmp_path)
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
    path, _, _ = small_log(tmp_path)
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
    path, _, _ = small_log(tmp_path, queries=queries)
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
        for mark in (MARK, MARK[::-1], MARK):
            writer.write_mark(mark)
    begins, data = places(tmp_path / "m"), (tmp_path / "m").read_bytes()
    for place in range(begins[1], begins[3]):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(ValueError, match=r"record [12] at byte"):
                parse_log(tmp_path / "m", bytes(flipped))


def test_records_of_another_log_or_place_are_errors(tmp_path):
    path, header, _ = small_log(tmp_path)
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
    path, _, _ = small_log(tmp_path)
    rewrite(path, lambda record: record.update(change))
    with pytest.raises(ValueError, match=message):
        read_log(path)


def test_other_files_are_no_logs(tmp_path):
    path, _, _ = small_log(tmp_path)
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
