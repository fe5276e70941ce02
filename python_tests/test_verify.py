"""doctor --verify: it sees wrong bits, survives what fails, and refuses before it measures."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils import collect_env
from twin_gpu import Twin

from zo_kernels import cli, noise, vectors
from zo_kernels.backends import native
from zo_kernels.pipeline import bug_report, cases, doctor, measure, rivals, rooms, timing, verify
from zo_kernels.pipeline.cases import CASES, RAGGED_OFFSET
from zo_kernels.pipeline.verify import Settings

FEW = ("normal", "perturb_ fp32")
SMALL = ["doctor", "--verify", "--device", "cpu", "--elements", 4096]
NOT_COMPILED = "left out of this test"


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled rival takes ten seconds: it has a test of its own."""
    monkeypatch.setattr(rivals, "compile_reason", lambda *arguments: NOT_COMPILED)


@pytest.fixture
def here(monkeypatch):
    """Devices are verified in this process, where a test can break a backend."""

    def verify_here(device, settings):
        return list(verify.whole(device, settings, verify.line_writer()))

    monkeypatch.setattr(verify, "verify_apart", verify_here)


@pytest.fixture
def few_cases(monkeypatch):
    """Two cases of one dtype instead of all, and torch's look at the system fails at once."""
    monkeypatch.setattr(verify, "CASES", [case for case in CASES if case.name in FEW])
    monkeypatch.setattr(collect_env, "get_env_info", lambda: int("no tools here"))


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def verdicts(report, kind):
    """(backend, isa, operation or case) -> the verdict."""
    return {
        (r["backend"], r["isa"], r.get("op") or r["case"]): r["bits"]
        for r in report["results"][kind]
    }


def test_everything_is_right_on_this_cpu(here, uncompiled, tmp_path, capsys, monkeypatch):
    """All vectors, all cases, every instruction set; without the packages of an extra."""
    for name in ("rich", "rich.console", "transformers", "safetensors", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("ZO_KERNELS_CACHE", "somewhere")
    isa = native.isa()
    path = tmp_path / "new folder" / "report.json"
    assert run(*SMALL, "--out", path) == 0
    shown = capsys.readouterr()
    assert "cpu native scalar: published vectors" in shown.err and str(path) in shown.err
    assert "perturb_ bf16 stochastic" in shown.out and NOT_COMPILED in shown.out
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert native.isa() == isa

    report = json.loads(path.read_text())
    assert report["problems"] == [] and report["machine"]["noise_spec"] == noise.NOISE_SPEC
    assert report["machine"]["environment"]["ZO_KERNELS_CACHE"] == "somewhere"
    assert report["machine"]["collect_env"]["torch_version"] == torch.__version__
    places = [*(("native", isa) for isa in native.available_isas()), ("reference", None)]
    kernels = verdicts(report, "kernel")
    assert set(kernels) == {(*place, case.name) for place in places for case in CASES}
    for bits in [*kernels.values(), *verdicts(report, "vectors").values()]:
        assert bits["verdict"] == "ok" and bits["compared"] > 60
    for record in report["results"]["kernel"]:
        speed, size = record["speed"], record["elements"] * record["bytes_per_element"]
        assert 0 < speed["share_of_copy"] and speed["rounds"] == 5
        seconds = speed["seconds"]["median"]
        assert speed["elements_per_second"] == pytest.approx(record["elements"] / seconds)
        assert speed["gigabytes_per_second"] == pytest.approx(size / seconds / 1e9)
        assert speed["times_compiled"] is None
        passes = next(case.passes for case in CASES if case.name == record["case"])
        assert (speed["times_mezo"] is not None) == (passes > 0)
    named = {r["case"]: r for r in report["results"]["rival"] if r["dtype"] == "bfloat16"}
    assert named[measure.COPY]["speed"]["share_of_copy"] == 1
    assert named[measure.COMPILED]["reason"] == NOT_COMPILED


def flipped(original, element):
    """A backend's combine_ with the lowest bit of one element of the result flipped."""

    def combine_(dst, src, scales, **options):
        original(dst, src, scales, **options)
        if dst[0].numel() > element:
            bits = dst[0].view(-1).view(torch.int32 if dst[0].itemsize == 4 else torch.int16)
            bits[element] ^= 1

    return combine_


def test_one_flipped_bit_is_found(here, uncompiled, few_cases, tmp_path, capsys, monkeypatch):
    """The verdict says where, the exit status and a sentence say that, and the report is whole."""
    monkeypatch.setattr(native, "combine_", flipped(native.combine_, 1500))
    path = tmp_path / "report.json"
    assert run(*SMALL, "--out", path) == 1
    isa = native.available_isas()[0]
    place = f"native {isa} on cpu, perturb_ fp32: wrong bits at index {RAGGED_OFFSET + 1500}"
    assert place in (shown := capsys.readouterr()).err and "please attach" in shown.err
    assert "WRONG" in shown.out
    report = json.loads(path.read_text())
    assert len(report["problems"]) == len(native.available_isas())
    found = verdicts(report, "kernel")
    bits = found["native", isa, "perturb_ fp32"]
    assert int(bits["expected"], 16) ^ int(bits["got"], 16) == 1 and len(bits["got"]) == 8
    assert bits["differing"] == 1 and bits["run"] == "ragged"
    assert report["machine"]["collect_env"]["failed"].startswith("ValueError: invalid literal")
    assert found["native", isa, "normal"]["verdict"] == "ok"
    assert found["reference", None, "perturb_ fp32"]["verdict"] == "ok"
    assert all(record["speed"] for record in report["results"]["kernel"])


def test_a_bit_in_the_large_run_is_found(monkeypatch):
    """Only the timed buffer's end is wrong: longer than the ragged run, and not in one window."""
    case = next(case for case in CASES if case.name == "perturb_ bf16")
    count = (1 << 17) + 5
    memory = cases.buffers(case.dtype, count, "cpu", "native")
    assert cases.check(case, memory, cases.Reference())["verdict"] == "ok"
    monkeypatch.setattr(native, "combine_", flipped(native.combine_, count - 1))
    bits = cases.check(case, memory, cases.Reference())
    assert (bits["verdict"], bits["run"], bits["index"]) == ("wrong bits", "timed", count - 1)


def test_one_wrong_word_is_found(few_cases, monkeypatch):
    """A published word that a backend gets wrong, and no other operation."""
    original = native.random_words

    def random_words(count, **address):
        return original(count, **address) ^ (address["offset"] == 65539)

    monkeypatch.setattr(native, "random_words", random_words)
    room = rooms.Room("native", "cpu", 4096, "scalar")
    records = {record["op"]: record["bits"] for record in measure.check_vectors(room)}
    bits = records.pop("random_words")
    assert bits["verdict"] == "wrong bits" and bits["index"] == 65539
    assert int(bits["expected"], 16) ^ int(bits["got"], 16) == 1
    assert bits["vector"].startswith("normal ") and " 65539 " in bits["vector"]
    assert bits["differing"] > 1 and {b["verdict"] for b in records.values()} == {"ok"}


def test_a_backend_that_raises(here, uncompiled, few_cases, tmp_path, capsys, monkeypatch):
    """It is reported with its reason, and everything else is still measured."""

    def normal(count, **address):
        raise RuntimeError("the lights went out\nin the whole street")

    monkeypatch.setattr(native, "normal", normal)
    path = tmp_path / "report.json"
    assert run(*SMALL, "--out", path, "--json") == 1
    shown = capsys.readouterr()
    assert "failed: RuntimeError: the lights went out (and" in shown.err
    report = json.loads(path.read_text())
    assert report == json.loads(shown.out)
    found = verdicts(report, "kernel")["native", "scalar", "normal"]
    assert found["verdict"] == "failed" and "whole street" in found["traceback"]
    speeds = {(r["isa"], r["case"]): r["speed"] for r in report["results"]["kernel"]}
    assert speeds["scalar", "normal"] is None and speeds["scalar", "perturb_ fp32"]
    assert verdicts(report, "vectors")["native", "scalar", "normal"]["vector"]


def test_plain_doctor_sees_it_too(capsys, monkeypatch):
    """The quick look exits with 1 as well."""
    monkeypatch.setattr(doctor, "_QUICK", ("perturb_ fp32",))
    monkeypatch.setattr(native, "combine_", flipped(native.combine_, 100))
    assert run("doctor") == 1
    shown = capsys.readouterr()
    assert "  reference      ok" in shown.out and "M elements/s" in shown.out
    assert "native         WRONG in perturb_ fp32: wrong bits at index" in shown.out
    assert "backend native does not work" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verify", "--device", "cpu", "cuda:7"], "device: expected one of cpu, interpreter"),
        (["--verify", "--elements", 4095], "elements: expected at least 4096, got 4095"),
        (["--out", "report.json"], "out: expected together with --verify"),
        (["--elements", 4096], "elements: expected together with --verify"),
        (["--verify", "--out", "file/report.json"], "out: expected a file that can be written"),
        (["--verify", "--out", "folder"], "it is a folder"),
        (["--verify", "--out", "/proc/report.json"], "out: expected a file that can be written"),
    ],
)
def test_refusals_come_before_the_measuring(arguments, message, tmp_path, capsys, monkeypatch):
    """Each names the option, and nothing is measured or written."""
    monkeypatch.setattr(bug_report, "verify", lambda *a: pytest.fail("it measures"))
    monkeypatch.setattr(doctor, "examine", lambda *a: pytest.fail("it measures"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert run("doctor", *arguments) == 1
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_interrupted_run_leaves_the_earlier_report(few_cases, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bug_report, "verify", interrupted)
    path = tmp_path / "report.json"
    path.write_text("earlier")
    assert run(*SMALL, "--out", path) == 130
    assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_the_interpreter_has_a_process_of_its_own():
    """Its vectors and kernels are right, on sizes of its own, and nothing is compared with it."""
    settings = Settings(elements=1 << 20, cases=("perturb_ bf16 stochastic",))
    records = verify.verify(["interpreter"], settings)
    assert verify.problems(records) == []
    assert {r["op"] for r in records if r["kind"] == "vectors"} == {
        "random_words",
        "normal",
        "rademacher",
        "combine_",
    }
    (kernel,) = [r for r in records if r["kind"] == "kernel"]
    assert kernel["bits"]["verdict"] == "ok" and kernel["elements"] == rooms.INTERPRETED_ELEMENTS
    assert kernel["speed"]["rounds"] == 2 and kernel["speed"]["share_of_copy"] is None
    assert not [r for r in records if r["kind"] == "rival"]


@pytest.mark.parametrize(
    ("ending", "limit", "reason"),
    [
        ("os.kill(os.getpid(), 11)", 60, "its process was ended by SIGSEGV"),
        ("sys.exit(3)", 60, "its process ended with status 3"),
        ("time.sleep(60)", 4, "its process was stopped after 4 s"),
    ],
)
def test_a_device_that_kills_its_process(ending, limit, reason, monkeypatch):
    """What it had found stays, a torn record does not, and the end is a problem."""
    script = f"""if True:
        import os, sys, time
        print('{{"kind": "unavailable", "reason": "x"}}', flush=True)
        print('{{"kind": "ker', end='', flush=True)
        {ending}"""
    monkeypatch.setattr(verify, "worker_command", lambda *a: [sys.executable, "-c", script])
    records = verify.verify(["interpreter"], Settings(process_seconds=limit))
    assert [record["kind"] for record in records] == ["unavailable", "failure"]
    assert verify.problems(records) == [f"interpreter: {reason}"]


def test_the_gpus_path_on_a_twin(here, uncompiled, few_cases, tmp_path, monkeypatch):
    """A GPU whose kernels run in the interpreter here, timed by a twin's events."""
    twin = Twin()
    monkeypatch.setattr(timing, "_CLEARED", 1 << 16)
    monkeypatch.setattr(rooms, "gpus", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(rooms.Room, "place", "cpu")
    table = vectors.read()
    monkeypatch.setattr(vectors, "read", lambda: table[::40])  # the interpreter is slow
    timer = timing.EventTimer(torch.device("cpu"), twin)
    monkeypatch.setattr(measure, "timer_of", lambda device: timer)
    facts = SimpleNamespace(name="Twin", total_memory=1 << 30)
    module = SimpleNamespace(
        get_device_properties=lambda device: facts, mem_get_info=lambda device: (1 << 30, 1 << 30)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert rooms.devices() == ["cpu", "cuda:0", "cuda:1"]
    assert rooms.full_elements("cuda:0") == 1 << 24  # of 64 bytes
    settings = Settings(elements=4096, rounds=3, cases=("perturb_ fp32",))
    report = bug_report.write_report(tmp_path / "report.json", ["cuda:1"], settings, print)
    assert report["problems"] == []
    assert report["machine"]["devices"]["cuda:1"] == {"name": "Twin", "total_memory": 1 << 30}
    results = report["results"]
    rows = [(r["device"], r["backend"], r["elements"]) for r in results["kernel"]]
    assert rows == [("cuda:1", "triton", 4096), ("cuda:1", "reference", 4096)]
    speed = results["kernel"][0]["speed"]
    assert speed["rounds"] == 3 and speed["share_of_copy"] > 0 and speed["times_mezo"] > 0
    # Four calls in three rounds, two events each: both kernels, the copy and MeZO's loop.
    assert [what for what, _ in twin.log].count("record") == 4 * 3 * 2
    assert "cuda:1, float32" in bug_report.table(report)
