"""The inspector's reader of NVIDIA's machine code, on small programs with known counts."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from machine_code import GPUS, HOT, nvidia

from zo_kernels.backends.triton import cost, inspect, sass
from zo_kernels.pipeline import inspection

SEARCH = """
MOV R1, c[0x0][0x28]
.L_x_0:
LDG.E.64 R2, desc[UR4][R2.64]
@!P0 BRA `(.L_x_0)
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
