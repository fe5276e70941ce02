"""The inspector of compiled kernels: its model, its command, and the promises about the code that
Triton compiles for GPUs that need not be here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("triton")

from machine_code import GPUS, HOT, nvidia

from zo_kernels import cli
from zo_kernels.backends.triton import cost, inspect
from zo_kernels.backends.triton.compile import TARGETS
from zo_kernels.pipeline import inspection


def test_predictions_by_hand():
    """memory = bandwidth * 0.92 / bytes; compute = units * clock * lanes / slots, per pipe."""
    pipes = {"fma": 13.0, "imad": 2.0, "wide": 4.5, "alu": 12.5, "lsu": 0.25, "control": 0.25}
    report = replace(nvidia(HOT), pipes=pipes, further_pipes={"fma": 32.0})
    h100 = cost.predict(report, GPUS["H100 SXM"])
    assert h100.memory == 3.35e12 * 0.92 / 4
    assert h100.compute == h100.compute_fast == pytest.approx(132 * 1.755e9 * 128 / 32.5)
    assert (h100.pipe, h100.binds, h100.share) == ("issue", "memory", 1.0)
    assert h100.further == pytest.approx(132 * 1.755e9 * 128 / 32)
    h200 = cost.predict(report, GPUS["H200 SXM"])
    assert h200.binds == "compute" and h200.share == pytest.approx(h200.compute / h200.memory)
    a100 = cost.predict(replace(report, target="sm_80"), GPUS["A100 SXM 80GB"])
    assert a100.pipe == "fma" and a100.compute == pytest.approx(108 * 1.41e9 * 64 / 24)
    assert a100.compute_fast == pytest.approx(108 * 1.41e9 * 64 / 19.5)
    pipes = {"valu": 30.0, "vmul": 4.0, "vcvt": 1.5, "salu": 3.0, "vmem": 0.25}
    amd = replace(report, target="gfx942", pipes=pipes, further_pipes=None)
    amd = cost.predict(amd, GPUS["MI300X"])
    assert amd.compute == pytest.approx(304 * 2.1e9 * 64 / 52)
    assert amd.compute_fast == pytest.approx(304 * 2.1e9 * 64 / 40)
    with pytest.raises(ValueError, match="expected a report of gfx942, got one of sm_90"):
        cost.predict(report, GPUS["MI300X"])


# What the promises speak of, and every data type, rounding and target once: all of it takes long.
COMPILED = {
    "sm_80": ["combine bf16 stochastic"],
    "sm_90": [
        "combine bf16", "combine fp32", "combine bf16 directions", "combine bf16 rademacher",
        "pair bf16", "advance bf16", "advance bf16 residuals", "hold bf16", "swap bf16",
        "release bf16",
    ],
    "sm_100": ["combine bf16"],
    "gfx942": ["combine fp32"],
    "gfx1100": ["combine fp16"],
}  # fmt: skip
CASES = [(target, name) for target, names in COMPILED.items() for name in names]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[tuple[str, str], inspect.Report]:
    """Compiled in another process, though TRITON_INTERPRET is set in this one."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("inspect")))
        found = inspection.compile_reports(COMPILED, lambda *step: seen.append(step))
    assert [step[1:] for step in seen] == [(n + 1, len(CASES)) for n in range(len(CASES))]
    return {(report.target, report.variant): report for report in found}


@pytest.mark.parametrize(("target", "name"), CASES)
def test_compiled_code(reports, target, name):
    """16-byte accesses (residuals: 8); no spill, no shared memory, nothing approximate, contracted
    or unknown; and for normals exactly the operations that zo_kernels/noise.py lists."""
    report = reports[target, name]
    residuals = name.endswith("residuals")
    assert report.region == "loop"
    held = name.split()[0] in ("hold", "swap", "release")  # bytes of their own beside the weights
    assert (set(report.loads) | set(report.stores)) - ({1} if held else set()) == (
        {8, 16} if residuals else {16}
    )
    assert report.narrow == 2 * residuals
    assert (report.shared == 0) != held and set(report.spills.values()) == {0}
    assert report.approximate == {} and report.contracted == 0 and report.unknown == {}
    assert report.instructions == pytest.approx(sum(report.pipes.values()))
    advance = name.startswith("advance")
    inner = advance or name.endswith("directions") or name.startswith(("swap", "release"))
    assert (report.further is not None) == inner
    if target in ("sm_80", "sm_90") and not (advance or held or "rademacher" in name):
        # Of two elements: 16 fma and 7 mul in Box-Muller, and one fma per output to add.
        counts = {op: report.opcodes[op] / report.elements for op in ("FFMA", "FMUL")}
        assert counts == {"FFMA": 10 if name.startswith("pair") else 9, "FMUL": 3.5}


@pytest.mark.parametrize("budget", inspect.BUDGETS, ids=lambda b: f"{b.variants}-{b.quantity}")
def test_promises(reports, budget):
    """No compiled kernel breaks a promise, and each promise is about one of them."""
    covered = [report for report in reports.values() if budget.covers(report)]
    assert covered and [b for report in covered if (b := budget.broken(report))] == []


def test_variants_have_names_of_their_own(monkeypatch):
    names = [variant.name for variant in inspect.all_variants()]
    assert {name for names in COMPILED.values() for name in names} <= set(names)
    twice = [*inspect.launch.variants(), inspect.launch.variants()[0]]
    monkeypatch.setattr(inspect.launch, "variants", lambda: twice)
    with pytest.raises(ValueError, match="expected unique names, got"):
        inspect.all_variants()


def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        inspect.examine(inspect.select(["combine bf16"]), ["sm_90"])


@pytest.fixture
def run(reports, monkeypatch, capsys):
    """The command on the reports at hand: status, stdout, stderr."""
    monkeypatch.setattr(
        inspection, "compile_reports",
        lambda work, progress: [r for r in reports.values() if r.variant in work.get(r.target, ())],
    )  # fmt: skip

    def command(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return command


def test_command_prints_a_table_and_json(run, tmp_path, reports):
    status, shown, _ = run("--out", tmp_path / "new" / "code.json")
    assert status == 0 and "combine bf16 rademacher" in shown and "MI300X" in shown
    for text, url in cost.ASSUMPTIONS:
        assert text in shown and url in shown
    record = json.loads((tmp_path / "new" / "code.json").read_text())
    assert [r["target"] for r in record["reports"]] == [target for target, _ in CASES]
    assert record["broken"] == [] and record["versions"]["triton"]
    status, shown, _ = run("--json", "--target", "sm_90", "--kernel", "c*bf16", "c*fp32")
    found = json.loads(shown)["reports"]
    assert status == 0 and [r["variant"] for r in found] == ["combine bf16", "combine fp32"]
    assert [p["gpu"] for p in found[0]["predictions"]] == ["H100 SXM", "H200 SXM"]
    assert found[0]["contracted"] == 0 and found[0]["machine_fma"] > 0
    known = inspect.Report(**json.loads(json.dumps(asdict(reports["sm_90", "combine bf16"]))))
    assert known.narrow == 0 and found[0]["instructions"] == known.instructions


def test_command_fails_on_a_broken_promise(run, monkeypatch, reports):
    limit = reports["sm_90", "combine bf16"].instructions - 1
    budget = inspect.Budget("combine bf16", "sm_90", "instructions per element", limit)
    missing = inspect.Budget("combine int4", "*", "bytes of shared memory", 0)
    monkeypatch.setattr(inspect, "BUDGETS", (budget, missing))
    status, shown, error = run("--target", "sm_90")
    assert status == 1 and "Not checked" in shown and "combine int4" in shown
    assert f"combine bf16 on sm_90: {limit + 1:.4g} instructions per element, budget" in error


def test_command_refuses_what_it_cannot_do(run, monkeypatch):
    status, _, error = run("--target", "sm_90", "sm_1")
    assert status == 1 and f"expected some of {', '.join(TARGETS)}; got sm_1" in error
    status, _, error = run("--kernel", "nothing*")
    assert status == 1 and "expected patterns of combine bf16" in error
    monkeypatch.setattr(inspection.importlib.util, "find_spec", lambda name: None)
    status, _, error = run()
    assert status == 1 and "Triton is not installed" in error


@pytest.mark.parametrize("out", ["folder", "file/code.json", "/proc/code.json"])
def test_a_file_that_cannot_be_written_is_refused_first(out, tmp_path, monkeypatch, capsys):
    """Before anything is compiled."""
    monkeypatch.setattr(inspection, "compile_reports", lambda *a: pytest.fail("it compiles"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert cli.main(["inspect", "--out", out]) == 1
    assert f"out: expected a file that can be written, got {out}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_failing_compiler_leaves_the_earlier_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "code.json"
    path.write_text("earlier")
    monkeypatch.setattr(inspection, "_MODULE", "no_such_module")
    assert cli.main(["inspect", "--kernel", "combine bf16", "--out", str(path)]) == 1
    assert "no_such_module" in capsys.readouterr().err
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_failing_compiler_is_reported(monkeypatch):
    monkeypatch.setattr(inspection, "_MODULE", "no_such_module")
    with pytest.raises(RuntimeError, match=r"(?s)stopped with status 1:.*no_such_module"):
        inspection.compile_reports({"sm_90": ["combine bf16"]})
