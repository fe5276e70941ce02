"""Reads AMD's assembly (CDNA and RDNA) as LLVM prints it, and LLVM's IR."""

from __future__ import annotations

import re
from collections import Counter

from zo_kernels.backends.triton.assembly import Access, Code, Instruction

# pipe -> pattern of opcodes, the first that matches; pipes as cost.py counts them.
_PIPES = {
    "vtrans": r"v_(exp|log|sin|cos|rcp|rsq|sqrt)_",
    "vmul": r"v_(mul_(lo|hi)_[iu]32|mad_[iu]64_[iu]32)(?!_[iu]24)",
    "vcvt": r"v_cvt_",
    "valu": r"v_",
    "smem": r"s_(load|buffer_load|store|buffer_store|dcache)_?",
    "control": r"s_(c?branch|endpgm|barrier|waitcnt|wait_|sleep|setprio|trap|sendmsg|setpc|swappc"
    r"|getpc|call|inst_prefetch|set_inst_prefetch|sethalt|ttracedata|icache)",
    "salu": r"s_",
    "vmem": r"(global|buffer|flat|scratch)_",
    "lds": r"ds_",
}
_NOT_COUNTED = re.compile(r"s_(nop|delay_alu|clause|code_end)$")
_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8,
           "dword": 4, "b32": 4, "ushort": 2, "sshort": 2, "short": 2, "b16": 2, "u16": 2,
           "i16": 2, "ubyte": 1, "sbyte": 1, "byte": 1, "b8": 1, "u8": 1, "i8": 1}  # fmt: skip
_GLOBAL = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:d16_(?:hi_)?)?([a-z0-9]+)")
_OPCODE = re.compile(r"^\s+([vs]_\w+|(?:global|buffer|flat|scratch|ds)_\w+)(.*)")
_LABEL = re.compile(r"^([.\w$]+):")
# v_mac and v_mad round twice and flush subnormals; v_rcp_iflag serves integer division.
_APPROXIMATE = re.compile(r"v_(exp|log|sin|cos|rcp|rsq|sqrt)_|v_(mac|mad)(_legacy|_mix)?_f")
_FMA = re.compile(r"v_(?:dual_)?(pk_)?fma(?:c|ak|mk)?_f32|v_fma_mix(?:lo|hi)?_f\d+$")

_ADD = re.compile(r"v_(?:dual_)?(pk_)?(?:add|sub|subrev)_f32|v_fma_mix\w+ 1\.0")
_LLVM_FMA = re.compile(r"call [^\n]*@llvm\.fma(?:uladd)?\.(?:v(\d+))?f32")
_LLVM_ADD = re.compile(r"= f(?:add|sub) (?:\w+ )*(?:float|<\d+ x float>) ")


def pipe(opcode: str) -> str:
    """The pipe that executes an opcode; "other" if it is not known here."""
    return next((name for name, start in _PIPES.items() if re.match(start, opcode)), "other")


def read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and labels of the kernel; no-operations and scheduling hints are left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition(";")[0].rstrip()
        if line.startswith(".Lfunc_end"):
            break
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _OPCODE.match(line):
            if not _NOT_COUNTED.match(match[1]):
                instructions.append(_instruction(match[1], match[2].strip()))
    return instructions, labels


def _instruction(opcode: str, operands: str) -> Instruction:
    opcodes = (opcode, *re.findall(r"::\s*(v_dual_\w+)", operands))
    target, falls, access = None, True, None
    if opcode.startswith(("s_branch", "s_cbranch")):
        target, falls = operands, opcode != "s_branch"
    elif opcode.startswith(("s_endpgm", "s_setpc")):
        falls = False
    elif opcode.startswith("v_fma_mix") and re.search(r",\s*1\.0,", operands):
        opcodes = (f"{opcode} 1.0",)  # an addition of mixed types
    elif match := _GLOBAL.match(opcode):
        access = Access(match[1] == "store", _WIDTHS.get(match[2], 4))
    return Instruction(opcodes, pipe(opcode), target, falls, access)


def _metadata(text: str, name: str) -> int:
    found = re.findall(rf"^\s+\.{name}:\s+(\d+)", text, flags=re.M)
    if not found:
        raise ValueError(f"AMD assembly: expected .{name} in the kernel's metadata, found none")
    return max(map(int, found))


def _machine_count(opcodes: Counter[str], kind: re.Pattern[str]) -> int:
    """Operations on float32; group 1 of the pattern marks instructions of two of them."""
    matches = ((kind.match(op), n) for op, n in opcodes.items())
    return sum(n * (2 if match[1] else 1) for match, n in matches if match)


def code(assembly: str, llir: str) -> Code:
    """Everything the inspector needs of one kernel."""
    instructions, labels = read(assembly)
    machine = Counter(opcode for i in instructions for opcode in i.opcodes)
    integer_division = re.search(r"= [us](div|rem) ", llir) is not None
    exact_division = any(op.startswith("v_div_fixup") for op in machine)
    approximate = {}
    for op, n in machine.items():
        exact = integer_division and op.startswith("v_rcp_iflag")
        exact = exact or (exact_division and op.startswith("v_rcp_f"))
        if _APPROXIMATE.match(op) and not exact:
            approximate[op] = n
    widths = [int(width or 1) for width in _LLVM_FMA.findall(llir)]
    return Code(
        instructions=instructions,
        labels=labels,
        registers=_metadata(assembly, "vgpr_count"),
        scalar_registers=_metadata(assembly, "sgpr_count"),
        spills={
            "vgpr": _metadata(assembly, "vgpr_spill_count"),
            "sgpr": _metadata(assembly, "sgpr_spill_count"),
            "scratch": _metadata(assembly, "private_segment_fixed_size"),
        },
        shared=_metadata(assembly, "group_segment_fixed_size"),
        approximate=approximate,
        fma=(len(widths), sum(widths)),
        machine_fma=_machine_count(machine, _FMA),
        adds=len(_LLVM_ADD.findall(llir)),
        machine_adds=_machine_count(machine, _ADD),
        expansions=["division"] if exact_division else [],
    )
