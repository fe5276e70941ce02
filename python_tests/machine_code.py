"""Small programs of known counts, as the disassembler prints them, and what is read from them."""

from __future__ import annotations

from zo_kernels.backends.triton import cost, inspect, sass
from zo_kernels.backends.triton.compile import Variant

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
