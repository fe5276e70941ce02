"""Reads NVIDIA's machine code (SASS), resource usage and PTX.

nvdisasm and cuobjdump come with the triton wheel; the text formats are those of CUDA 12 and 13.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

from zo_kernels.backends.triton.assembly import Access, Code, Instruction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# pipe -> opcodes without modifiers. Pipes as Nsight Compute names them, see cost.py.
_PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I FSWZADD HFMA2 HMUL2 HADD2 "
    "HFMA2_32I HMUL2_32I HADD2_32I",
    "imad": "IMAD IMUL IMUL32I IDP IDP4A",
    "alu": "LOP3 LOP LOP32I IADD IADD3 IADD32I VIADD ISCADD LEA SHF SHL SHR PRMT SEL MOV MOV32I "
    "ISETP FSETP HSETP2 FSEL FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 VIADDMNMX HMNMX2 VHMNMX FCHK FSET "
    "HSET2 I2FP F2FP F2IP I2IP IABS VABSDIFF VABSDIFF4 BMSK SGXT PLOP3 PSETP P2R R2P CS2R VOTE "
    "BFI BFE CREDUX",
    "xu": "MUFU I2F F2I F2F FRND I2I POPC FLO BREV REDUX MATCH",
    "lsu": "LDG STG LD ST LDS STS LDL STL LDC LDSM STSM LDGSTS ATOM ATOMG ATOMS RED REDG SHFL "
    "QSPC CCTL MEMBAR ERRBAR FENCE",
    "uniform": "R2UR",
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC DEPBAR LDGDEPBAR "
    "YIELD NANOSLEEP KILL BPT RPCMOV S2R S2UR ELECT ENDCOLLECTIVE ACQBULK PREEXIT CGAERRBAR",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
_ENDS = {"EXIT", "RET", "BRX", "JMX", "KILL"}
_NOT_COUNTED = {"NOP"}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Exact operations of PTX that ptxas builds from these approximations and corrections.
_EXPLAINS = {
    "MUFU.RCP": r"(div|rcp)\.rn\.|(div|rem)\.[us]",
    "F2I.FTZ.U32": r"(div|rem)\.[us]",
    "MUFU.RSQ": r"sqrt\.rn\.",
    "MUFU.SQRT": r"sqrt\.rn\.",
}
_PTX_FMA = re.compile(r"(?:fma|mad)\.(?:\w+\.)*f32(x2)?$")
_PTX_ADD = re.compile(r"(?:add|sub)\.(?:\w+\.)*f32(x2)?$")
_SASS_FMA = re.compile(r"FFMA(2)?(?:32I)?(?:\.|$)")
_SASS_ADD = re.compile(r"FADD(2)?(?:32I)?(?:\.|$)")
# ptxas's own functions for the rare cases of such operations; what they return is exact.
_OWN_FUNCTION = "$__internal_"
_EXPANDS = re.compile(r"(div|rcp|sqrt)\.rn\.")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^([^\s:]+):\s*$")


def pipe(opcode: str) -> str:
    """The pipe that executes an opcode; "other" if it is not known here.

    IMAD.WIDE and IMAD.HI, which give the high half of a product, are "wide".
    """
    base = opcode.partition(".")[0]
    if base == "IMAD" and opcode.startswith(("IMAD.WIDE", "IMAD.HI")):
        return "wide"
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return "uniform" if re.match(r"U[A-Z]|LDCU", base) else "other"


def read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of ``nvdisasm -c``, NOP left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _LINE.search(line):
            guard, opcode, operands = match.groups()
            if opcode.partition(".")[0] not in _NOT_COUNTED:
                instructions.append(_instruction(guard, opcode, operands.strip()))
    return instructions, labels


def _instruction(guard: str | None, opcode: str, operands: str) -> Instruction:
    base, *modifiers = opcode.split(".")
    target, falls, access = None, True, None
    if base in ("BRA", "JMP"):
        condition, _, label = operands.partition("`(")
        target = label.partition(")")[0]
        falls = guard is not None or bool(condition.strip())
    elif base in _ENDS:
        falls = guard is not None
    elif base in ("LDG", "STG", "LD", "ST", "LDGSTS"):
        width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)
        access = Access(base.startswith("ST"), width)
    return Instruction((opcode,), pipe(opcode), target, falls, access)


def usage(text: str) -> dict[str, int]:
    """Numbers of ``cuobjdump -res-usage`` for the only kernel: REG, STACK, SHARED, LOCAL."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected REG, STACK, SHARED, LOCAL, got {text!r}")
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, found.groups()), strict=True))


def ptx_opcodes(text: str) -> Counter[str]:
    """How often each instruction occurs in PTX, inline assembly included."""
    code = re.sub(r'//[^\n]*|"[^"]*"', "", text)
    return Counter(re.findall(r"(?<![\w.%$])[a-z][\w:]*(?:\.[\w:]+)+", code))


def _approximate(sass: Counter[str], ptx: Counter[str]) -> dict[str, int]:
    """Approximations in PTX, and those in SASS that no exact operation in PTX explains."""
    found = {op: n for op, n in ptx.items() if re.search(r"\.approx|\.ftz|^div\.full|^tanh\.", op)}
    for op, n in sass.items():
        explanation = next((e for start, e in _EXPLAINS.items() if op.startswith(start)), None)
        exact = explanation and any(re.match(explanation, name) for name in ptx)
        if (op.startswith("MUFU") or ".FTZ" in op) and not exact:
            found[op] = n
    return found


def code(sass: str, resources: str, ptx: str) -> Code:
    """Everything the inspector needs of one kernel."""
    instructions, labels = read(sass)
    numbers = usage(resources)
    own = [index for label, index in labels.items() if label.startswith(_OWN_FUNCTION)]
    end = min(own, default=len(instructions))
    machine = Counter(opcode for i in instructions[:end] for opcode in i.opcodes)
    source = ptx_opcodes(ptx)
    return Code(
        instructions=instructions,
        labels=labels,
        registers=numbers["REG"],
        scalar_registers=None,
        spills={"local": numbers["LOCAL"], "stack": numbers["STACK"]},
        shared=numbers["SHARED"],
        approximate=_approximate(machine, source),
        fma=(_count(source, _PTX_FMA, packed=1), _count(source, _PTX_FMA, packed=2)),
        machine_fma=_count(machine, _SASS_FMA, packed=2),
        adds=_count(source, _PTX_ADD, packed=1),
        machine_adds=_count(machine, _SASS_ADD, packed=2),
        expansions=sorted(op for op in source if _EXPANDS.match(op)),
    )


def _count(opcodes: Counter[str], kind: re.Pattern[str], packed: int) -> int:
    """Operations on float32; group 1 of the pattern marks instructions of two of them."""
    matches = ((kind.match(op), n) for op, n in opcodes.items())
    return sum(n * (packed if match[1] else 1) for match, n in matches if match)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Texts of ``nvdisasm -c`` and ``cuobjdump -res-usage``.

    Raises:
        FileNotFoundError: if this build of Triton comes without the tools.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = (["nvdisasm", "-c"], ["cuobjdump", "-res-usage"])
        return tuple(
            subprocess.run(
                [_TOOLS / tool, option, file], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in commands
        )
