"""The inspector of compiled kernels: its readers on small programs with known counts, its model,
and the promises about the code that Triton compiles for GPUs that need not be here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("triton")

from zo_kernels import cli
from zo_kernels.backends.triton import cost, gcn, inspect, sass
from zo_kernels.backends.triton.compile import TARGETS, Variant
from zo_kernels.pipeline import inspection

BF16 = Variant("combine bf16", None, {}, {}, (), 128, 4.0, 2)
PTX = "fma.rn.f32 a;\nfma.rn.f32 b;\nfma.rn.f32 c;\nmul.rn.f32 d;"  # what HOT was made of
GPUS = {gpu.name: gpu for gpu in cost.GPUS}


def disassembly(program: str) -> str:
    """As nvdisasm prints it; labels end in a colon."""
    lines = ["        .section        .text.kernel", ".text.kernel:"]
    for address, line in enumerate(line.strip() for line in program.strip().splitlines()):
        indented = f"        /*{address * 16:04x}*/                   {line} ;"
        lines.append(line if line.endswith(":") else indented)
    return "\n".join([*lines, ".L_x_99:", "        /*ffe0*/    BRA `(.L_x_99);"])


def nvidia(program: str, ptx: str = PTX, stack: int = 0, shared: int = 0) -> inspect.Report:
    """The report of a bfloat16 kernel in SASS."""
    usage = f" Function kernel:\n  REG:40 STACK:{stack} SHARED:{shared} LOCAL:0 CONSTANT[0]:592"
    return inspect.describe(BF16, "sm_90", sass.code(disassembly(program), usage, ptx))


SEARCH = """
MOV R1, c[0x0][0x28]
.L_x_0:
LDG.E.64 R2, desc[UR4][R2.64]
@!P0 BRA `(.L_x_0)
"""
HOT = """
.L_x_1:
IADD3 R0, R0, 0x1, RZ
BRA.U !UP0, `(.L_x_3)
@P1 BRA `(.L_x_2)
LDG.E.U16 R4, desc[UR4][R2.64]
LDG.E.U16 R5, desc[UR4][R2.64+0x2]
BRA `(.L_x_3)
.L_x_2:
LDG.E.128 R4, desc[UR4][R2.64]
.L_x_3:
IMAD.WIDE.U32 R8, R4, -0x2daee0ad, RZ
@!P2 BRA `(.L_x_5)
MOV R20, RZ
.L_x_4:
LDG.E R21, desc[UR4][R30.64]
FFMA R22, R21, R20, R22
FFMA R23, R21, R20, R23
@P3 BRA `(.L_x_4)
.L_x_5:
I2FP.F32.U32 R9, R8
FFMA R10, R9, R9, R9
@P4 FMUL R10, R10, R10
NOP
UIADD3 UR4, UR4, 0x1, URZ
@P1 STG.E.128 desc[UR4][R2.64], R4
@!P0 EXIT
BRA `(.L_x_1)
"""


def test_hot_loop_of_nvidia_code():
    """The wide path of the loop that stores counts, the inner loop by itself, the rest does not."""
    report = nvidia(SEARCH + HOT)
    assert (report.region, report.elements) == ("loop", 8)
    assert (report.loads, report.stores) == ((16,), (16,))
    # IADD3, 2 BRA, LDG, IMAD, BRA, I2FP, FFMA, FMUL, UIADD3, STG, EXIT, BRA
    assert report.instructions == 13 / 8
    assert {pipe: n * 8 for pipe, n in report.pipes.items()} == {
        "alu": 2, "control": 5, "lsu": 2, "wide": 1, "fma": 2, "uniform": 1
    }  # fmt: skip
    assert report.further == 4 / 8 and report.further_pipes["fma"] == 2 / 8
    assert report.fma == (3, 3) and report.machine_fma == 3 and report.contracted == 0
    assert (report.registers, report.shared, report.approximate) == (40, 0, {})
    assert report.narrow == 0 and inspect.broken_budgets([report]) == []


def test_every_instruction_is_counted():
    """An unknown opcode gets the slowest pipe and is named."""
    report = nvidia(HOT.replace("FMUL R10", "QUX.F32 R10"))
    assert report.unknown == {"QUX.F32": 1} and report.pipes["other"] == 1 / 8
    assert sum(report.pipes.values()) == report.instructions == 13 / 8
    assert "unknown: QUX.F32 1" in inspection._pipes(report)


def test_the_cheapest_of_equally_wide_loops():
    """A second loop for ragged ends does not count, but is reported."""
    first = HOT.replace("@!P0 EXIT\nBRA `(.L_x_1)", "@P0 BRA `(.L_x_1)")
    last = HOT.replace(".L_x_", ".L_x_1")
    padding = "\n".join(["IADD3 R7, R7, R7, R7"] * 16)
    for slow in (first, last):
        program = (first + last).replace(slow, slow.replace("NOP", padding))
        report = nvidia(program)
        assert report.instructions == (13 if slow is first else 12) / 8
        assert report.others == ((28 if slow is first else 29) / 8,)


def test_inner_loops_in_a_row_add_up():
    """A body of two chunks has a loop over directions for each."""
    twice = """
.L_x_1:
LDG.E.128 R4, desc[UR4][R2.64]
.L_x_2:
FFMA R22, R21, R20, R22
@P3 BRA `(.L_x_2)
STG.E.128 desc[UR4][R2.64], R4
LDG.E.128 R4, desc[UR4][R2.64]
.L_x_3:
FFMA R22, R21, R20, R22
@P3 BRA `(.L_x_3)
STG.E.128 desc[UR4][R2.64], R4
@P0 BRA `(.L_x_1)
EXIT
"""
    report = nvidia(twice)
    assert report.elements == 16 and report.instructions == 5 / 16 and report.further == 4 / 16


def test_narrow_accesses_are_found():
    """Scalar accesses only; and a wide store beside a narrow load."""
    report = nvidia("""
.L_x_1:
LDG.E.U16 R4, desc[UR4][R2.64]
FADD R4, R4, R4
STG.E.U16 desc[UR4][R2.64], R4
@P0 BRA `(.L_x_1)
EXIT
""")
    assert (report.elements, report.instructions, report.narrow) == (1, 4, 4)
    narrow = nvidia(HOT.replace("LDG.E.128", "LDG.E.64"))
    assert narrow.loads == (8,) and narrow.narrow == 2
    assert inspect.broken_budgets([narrow]) == [
        "combine bf16 on sm_90: 2 bytes per element outside 16-byte accesses, budget 0"
    ]


def test_code_without_a_loop_and_without_a_store():
    """All of the kernel is counted, or nothing; both are said."""
    straight = nvidia("LDG.E.128 R4, [R2.64]\nFADD R4, R4, R4\nSTG.E.128 [R2.64], R4\nEXIT")
    assert (straight.region, straight.instructions) == ("kernel", 4 / 8)
    assert "no loop" in inspection._pipes(straight)
    split = nvidia(
        "LDG.E.128 R4, [R2.64]\nLDG.E.128 R4, [R2.64]\n@P0 EXIT\nSTG.E.128 [R2.64], R4\nEXIT"
    )
    assert split.elements == 8 and split.instructions == 5 / 8
    endless = nvidia(".L_x_1:\nSTG.E.128 [R2.64], R4\nBRA `(.L_x_1)")
    assert (endless.region, endless.instructions) == ("loop", 2 / 8)
    empty = nvidia("MOV R1, RZ\nEXIT")
    assert (empty.region, empty.instructions, empty.narrow) == (None, None, 4)
    assert "combine bf16 on sm_90: no count of instructions per element, budget 36" in (
        inspect.broken_budgets([empty])
    )
    with pytest.raises(ValueError, match="has no instruction counts"):
        cost.predict(empty, GPUS["H100 SXM"])


@pytest.mark.parametrize(
    ("program", "ptx", "found"),
    [
        ("MUFU.EX2 R1, R1", "ex2.approx.ftz.f32 a, b;", {"ex2.approx.ftz.f32": 1, "MUFU.EX2": 1}),
        ("MUFU.RCP R1, R1", "div.full.f32 a, b, c;", {"div.full.f32": 1, "MUFU.RCP": 1}),
        ("MUFU.RCP R1, R1", "div.rn.f32 a, b, c;", {}),
        ("MUFU.RCP R1, R1", "rem.u32 a, b, c;", {}),
        ("MUFU.RSQ R1, R1", "sqrt.rn.f32 a, b;", {}),
        ("MUFU.RSQ R1, R1", "div.rn.f32 a, b, c;", {"MUFU.RSQ": 1}),
        ("F2I.FTZ.U32.TRUNC.NTZ R1, R1", "div.s32 a, b, c;", {}),
        ("EXIT\n$__internal_0_$__cuda_div_slowpath:\nMUFU.RSQ R1, -QNAN", "div.rn.f32 a;", {}),
        ("EXIT\n.L_x_7:\nMUFU.RSQ R1, -QNAN", "div.rn.f32 a;", {"MUFU.RSQ": 1}),
        ("FADD.FTZ R1, R1, R1", "add.ftz.f32 a, b, c;", {"add.ftz.f32": 1, "FADD.FTZ": 1}),
        ("I2F.U32 R1, R1", 'cvt.rn.f32.u32 a, b; // sin.approx\n.file 1 "cos.approx.py"', {}),
        ("FADD R1, R1, R1", "{ .reg .f32 t; lg2.approx.f32 t, a; }", {"lg2.approx.f32": 1}),
    ],
)
def test_approximations_are_found(program, ptx, found):
    """Also in inline assembly; but not inside exact divisions and roots."""
    report = nvidia(program + "\nEXIT", ptx)
    assert report.approximate == found
    broken = any("approximate instructions" in b for b in inspect.broken_budgets([report]))
    assert broken == bool(found)


@pytest.mark.parametrize(
    ("program", "ptx", "contracted"),
    [
        ("FFMA R1, R1, R1, R1", "fma.rn.f32 a;", 0),
        ("FFMA R1, R1, R1, R1", "mul.f32 a;\nadd.f32 b;", 1),
        ("FFMA R1, R1, R1, R1\nFFMA2 R2, R2, R2, R2", "fma.rn.f32 a;\nfma.rn.f32x2 b;", 0),
        ("FFMA R1, R1, R1, R1", "fma.rn.f32x2 b;", 0),
        ("FFMA R1, R1, R1, R1", "fma.rn.f32 a;\nfma.rn.f32 a;", 0),
        ("FFMA R1, R1, R1, R1", "fma.rn.f32 a;\nfma.rn.f32 a;\nmul.f32 a;\nadd.f32 b;", 1),
        ("FFMA R1, R1, R1, R1", "div.rn.f32 a;", 0),
    ],
)
def test_contraction_is_found(program, ptx, contracted):
    """More multiply-adds than asked for, or as many additions gone as duplicates could hide."""
    assert nvidia(program + "\nEXIT", ptx).contracted == contracted


def test_spills_and_shared_memory_break_promises():
    report = nvidia(HOT, stack=8, shared=512)
    assert inspect.broken_budgets([report]) == [
        "combine bf16 on sm_90: 8 spilled bytes or registers, budget 0",
        "combine bf16 on sm_90: 512 bytes of shared memory, budget 0",
    ]
    with pytest.raises(ValueError, match="expected REG, STACK"):
        sass.usage("no such kernel")


AMD = """
\t.globl\tkernel
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_cbranch_scc0 .LBB0_5
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\ts_cbranch_vccz .LBB0_3
\tglobal_load_ushort v3, v[0:1], off
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_1
\tglobal_store_short v[0:1], v3, off
\ts_branch .LBB0_1
.LBB0_3:                                ; %Flow
\tbuffer_load_dwordx4 v[0:3], v18, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)                   ; v_rcp_f32 in a comment
\ts_nop 1
\ts_delay_alu instid0(VALU_DEP_4)
\tv_mad_u64_u32 v[0:1], s[2:3], v4, v5, 0
\tv_cvt_f32_u32_e32 v2, v2
\tv_dual_fmac_f32 v1, v1, v1 :: v_dual_mul_f32 v2, v2, v2
\tv_pk_fma_f32 v[0:1], v[0:1], v[0:1], v[0:1]
\tglobal_store_b128 v[0:1], v[0:3], off
\ts_branch .LBB0_1
.LBB0_5:
\ts_endpgm
.Lfunc_end0:
\tv_exp_f32_e32 v0, v0
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 0
    .sgpr_count:     62
    .sgpr_spill_count: 5
    .vgpr_count:     44
    .vgpr_spill_count: 3
"""
LLIR = """
  %1 = call float @llvm.fma.f32(float %a, float %b, float %c)
  %2 = tail call <2 x float> @llvm.fma.v2f32(<2 x float> %a, <2 x float> %b, <2 x float> %c)
  %3 = fadd float %1, %1
"""


def test_amd_code():
    """The same counts from AMD's assembly; the packed multiply-add is two, the hints are none."""
    report = inspect.describe(BF16, "gfx942", gcn.code(AMD, LLIR))
    assert (report.region, report.elements) == ("loop", 8)
    assert (report.loads, report.stores) == ((16,), (16,))
    # 2 branches at the ends, one chosen, load, wait, 4 of arithmetic, store
    assert {pipe: n * 8 for pipe, n in report.pipes.items()} == {
        "control": 4, "vmem": 2, "vmul": 1, "vcvt": 1, "valu": 2
    }  # fmt: skip
    assert report.instructions == 10 / 8 and report.further is None
    assert report.fma == (2, 3) and report.machine_fma == 3 and report.contracted == 0
    assert (report.registers, report.scalar_registers, report.shared) == (44, 62, 0)
    assert report.approximate == {} and report.unknown == {}
    assert inspect.broken_budgets([report]) == [
        "combine bf16 on gfx942: 3 spilled bytes or registers, budget 0"
    ]


@pytest.mark.parametrize("opcode", ["v_rcp_f32_e32", "v_exp_f32_e32", "v_sqrt_f32", "v_mac_f32"])
def test_amd_approximations_are_found(opcode):
    text = AMD.replace("v_cvt_f32_u32_e32", opcode)
    assert gcn.code(text, LLIR).approximate == {opcode: 1}
    exact = text.replace("s_nop 1", "v_div_fixup_f32 v0, v0, v0, v0")
    assert bool(gcn.code(exact, LLIR).approximate) == (opcode != "v_rcp_f32_e32")


def test_amd_contraction_and_missing_metadata():
    """A multiplication by one of mixed types is an addition."""
    assert gcn.code(AMD, "").contracted == 3
    for operand, fma in (("1.0", 3), ("v3", 4)):
        mixed = f"v_fma_mix_f32 v1, v2, {operand}, v4 op_sel_hi:[1,1,0]"
        code = gcn.code(AMD.replace("s_nop 1", mixed), LLIR)
        assert (code.machine_fma, code.machine_adds) == (fma, 4 - fma)
    with pytest.raises(ValueError, match=r"expected \.vgpr_count"):
        gcn.code(AMD.replace(".vgpr_count", ".other"), LLIR)


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
    """16-byte accesses; no spill, no shared memory, nothing approximate, contracted or unknown; and
    for normals exactly the operations that zo_kernels/noise.py lists."""
    report = reports[target, name]
    combine = name.startswith("combine")
    assert report.region == ("loop" if combine else "kernel")
    assert set(report.loads) | set(report.stores) == {16}
    assert report.narrow == 0 and report.shared == 0 and set(report.spills.values()) == {0}
    assert report.approximate == {} and report.contracted == 0 and report.unknown == {}
    assert report.instructions == pytest.approx(sum(report.pipes.values()))
    assert (report.further is not None) == name.endswith("directions")
    if combine and target in ("sm_80", "sm_90") and "rademacher" not in name:
        # Of two elements: 16 fma and 7 mul in Box-Muller, and one fma each to add.
        counts = {op: report.opcodes[op] / report.elements for op in ("FFMA", "FMUL")}
        assert counts == {"FFMA": 9, "FMUL": 3.5}


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
    status, shown, _ = run("--json", "--target", "sm_90", "--kernel", "*bf16", "*fp32")
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
