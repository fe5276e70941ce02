"""Triton's LLVM IR for an NVIDIA GPU as LLVM IR for x86-64, with every memory access checked.

The IR is what Triton's own compiler made, after all its layout and vectorisation work. Only what
is NVIDIA's is replaced: inline PTX, intrinsics, address spaces, and operations that NVIDIA defines
where LLVM does not. Whatever is not known to be exact is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llir import functions
from llir.ptx import Assembly
from llir.text import bits, split, typed, without_flags

TRIPLE = "x86_64-unknown-linux-gnu"
#: Intrinsics that mean the same on every machine: llvm.NAME or llvm.NAME.TYPES.
EXACT = {"assume", "fma", "fabs", "copysign", "sqrt", "floor", "ceil", "trunc", "rint", "nearbyint"}
EXACT |= {"roundeven", "minimum", "maximum", "smin", "smax", "umin", "umax", "abs"}
EXACT |= {"ctpop", "ctlz", "cttz", "bswap", "bitreverse", "fshl", "fshr"}
#: LLVM leaves the sign of a zero open where PTX's min and max have -0 below +0.
SIGNED_ZERO = {"minnum": "minimumnum", "maxnum": "maximumnum"}
#: Intrinsics that wait for other threads; the runtime's functions take their place as well.
TOGETHER = re.compile(r"llvm\.nvvm\.(shfl|redux|vote|ldmatrix|stmatrix|barrier|bar\.)")

_CALL = re.compile(r"(\s*(?:%[\w.]+ = )?)(?:(?:tail|musttail|notail) )?call (.*)")
_CALLEE = re.compile(r' asm (?:sideeffect )?"([^"]*)", "([^"]*)"\(| @([\w.$]+)\(')
_REFUSED = re.compile(
    r"\b(frem|atomicrmw|cmpxchg|fence|alloca|addrspacecast|invoke|callbr|va_arg|indirectbr)\b"
)
_FROM_TO = r"(<\d+ x \w+>|\w+) (.*) to (<\d+ x \w+>|\w+)$"
_BFLOAT = re.compile(r"(\s*%[\w.]+ = )(fptrunc|fpext) " + _FROM_TO)
_TO_INTEGER = re.compile(r"(\s*%[\w.]+ = )fpto([su])i " + _FROM_TO)
_FLOAT_WORD = re.compile(r"\b(f(?:add|sub|mul|div|rem|neg|cmp|ptosi|ptoui|pext|ptrunc)|[su]itofp) ")


@dataclass(frozen=True)
class Translated:
    """A kernel for x86-64.

    Attributes:
        ir: defines llir_entry(arguments), which runs one thread, and llir_sites_address().
        kernel: its name.
        parameters: LLVM type of each parameter, Triton's scratch pointers included.
        threads: per program.
        cooperative: whether threads wait for each other.
        sites: what is done at each place that reads or writes memory or waits.
    """

    ir: str
    kernel: str
    parameters: tuple[str, ...]
    threads: int
    cooperative: bool
    sites: tuple[str, ...]


class _Translation:
    """Instruction by instruction; gathers what the module needs besides."""

    def __init__(self, runtime: Callable[[str], bool], reflected: dict[str, int]) -> None:
        self.runtime, self.reflected = runtime, reflected
        self.helpers: dict[object, tuple[str, str]] = {}  # name and text
        self.assemblies: dict[object, tuple[str, Assembly]] = {}
        self.declarations: set[str] = set()
        self.sites: list[str] = []
        self.cooperative = False

    def line(self, line: str) -> str:
        """One instruction; bfloat is i16 afterwards."""
        line = without_flags(line)
        if match := _REFUSED.search(re.sub(r'"[^"]*"', "", line)):
            raise NotImplementedError(f"instruction {match[1]}: {line.strip()}")
        if "bfloat" in line:
            if match := _BFLOAT.match(line):
                return self.bfloat(*match.groups())
            if _FLOAT_WORD.search(line):
                raise NotImplementedError(f"bfloat arithmetic: {line.strip()}")
            line = re.sub(r"\b0xR([0-9A-F]{4})\b", lambda m: str(int(m[1], 16)), line)
            line = line.replace("bfloat", "i16")
        if match := _CALL.match(line):
            return self.call(match[1], match[2])
        if match := re.match(r"\s*(?:%[\w.]+ = )?(load|store) (.*)", line):
            return self.check(match[1], split(match[2])) + line
        if match := _TO_INTEGER.match(line):
            return self.to_integer(*match.groups())
        return line

    def check(self, verb: str, parts: list[str]) -> str:
        """The check before a load or store."""
        kind = parts[0] if verb == "load" else typed(parts[0])[0]
        space = re.match(r"ptr addrspace\(([13])\) (.*)", parts[1])
        align = re.fullmatch(r"align (\d+)", parts[2]) if len(parts) > 2 else None
        if not space or not align:
            raise NotImplementedError(f"{verb} {', '.join(parts)}")
        name, width = {"1": "global", "3": "shared"}[space[1]], -(-bits(kind) // 8)
        self.sites.append(f"{verb} {name} {kind}")
        return (
            f"  call void @llir_check_{name}_pointer(ptr {space[2]}, i64 {align[1]}, "
            f"i64 {width}, i32 {len(self.sites) - 1})\n"
        )

    def call(self, target: str, rest: str) -> str:
        """A call of inline PTX or of a function by name."""
        callee = _CALLEE.search(rest)
        if not callee:
            raise NotImplementedError(f"call {rest}")
        depth, end = 1, callee.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0)
            end += 1
        arguments = [typed(argument) for argument in split(rest[callee.end() : end - 1])]
        result = re.search(r"(\{[^}]*\}|<[^>]*>|\S+)$", rest[: callee.start()])[1]
        if callee[3] is None:
            return self.assembly(target, callee[1], callee[2], result, arguments)
        if callee[3].startswith("llvm.nvvm.read.ptx."):
            return self.register(target, callee[3].removeprefix("llvm.nvvm.read.ptx."))
        if callee[3].startswith("llvm.nvvm."):
            return self.intrinsic(target, callee[3], result, arguments)
        return self.exact(target, callee[3], result, arguments)

    def assembly(self, target, text, constraints, result, arguments) -> str:
        kinds = tuple(kind for kind, _ in arguments)
        key = (text, constraints, result, kinds)
        if key not in self.assemblies:
            name, lines = f"llir_asm_{len(self.assemblies)}", re.sub(r"\\0[9A]", "\n", text)
            results = split(result.strip("{} ")) if result.startswith("{") else [result]
            results = [] if result == "void" else results
            code = Assembly(name, lines, constraints, results, kinds, self.instruction)
            self.assemblies[key] = (name, code)
        name, code = self.assemblies[key]
        given = ", ".join([*(f"{k} {v}" for k, v in arguments), f"i32 {len(self.sites)}"])
        self.sites += code.accesses
        return f"{target}call {code.result} @{name}({given})"

    def instruction(self, opcode: str, operands: int) -> str:
        """The runtime's function for a PTX instruction."""
        symbol = "llir_ptx_" + opcode.replace(".", "_")
        if not self.runtime(symbol):
            raise NotImplementedError(f"PTX {opcode}")
        self.declarations.add(f"declare i32 @{symbol}({', '.join(['i32'] * operands)})")
        return symbol

    def register(self, target: str, name: str) -> str:
        """A special register: a variable of the runtime."""
        symbol = "llir_" + name.replace(".", "_")
        if not self.runtime(symbol):
            raise NotImplementedError(f"register {name}")
        self.declarations.add(f"@{symbol} = external global i32")
        return f"{target}load i32, ptr @{symbol}"

    def intrinsic(self, target, name, result, arguments) -> str:
        """NVIDIA's intrinsic as a call of the runtime's function, with its place if it waits."""
        symbol = name.replace("llvm.", "llir_", 1).replace(".", "_")
        if not self.runtime(symbol):
            raise NotImplementedError(f"intrinsic {name}")
        if TOGETHER.match(name):
            self.cooperative = True
            self.sites.append(name.removeprefix("llvm.nvvm."))
            arguments = [*arguments, ("i32", str(len(self.sites) - 1))]
        if name not in self.helpers:
            shim = f"llir_shim_{len(self.helpers)}"
            text, declaration = functions.shim(shim, symbol, result, [k for k, _ in arguments])
            self.declarations.add(declaration)
            self.helpers[name] = (shim, text)
        given = ", ".join(f"{k} {v}" for k, v in arguments)
        return f"{target}call {result} @{self.helpers[name][0]}({given})"

    def exact(self, target, name, result, arguments) -> str:
        """LLVM's own intrinsics, and NVIDIA's question whether to flush subnormals."""
        if name == "__nvvm_reflect" and arguments[0][1] in self.reflected:
            return f"{target}add i32 {self.reflected[arguments[0][1]]}, 0"
        if re.match(r"llvm\.fabs\.(v\d+)?bf16$", name):
            mask = "splat (i16 32767)" if result.startswith("<") else "32767"
            return f"{target}and {result} {arguments[0][1]}, {mask}"
        word = name.removeprefix("llvm.").split(".")[0]
        known = name.startswith("llvm.") and (word in EXACT or word in SIGNED_ZERO)
        known = known or name.startswith("llvm.vector.reduce.")
        half = re.search(r"\.(v\d+)?b?f16", name) and not re.match(r"llvm\.fabs\.(v\d+)?f16$", name)
        if not known or half:
            raise NotImplementedError(f"function {name}")
        name = name.replace(word, SIGNED_ZERO.get(word, word), 1)
        self.declarations.add(f"declare {result} @{name}({', '.join(k for k, _ in arguments)})")
        return f"{target}call {result} @{name}({', '.join(f'{k} {v}' for k, v in arguments)})"

    def bfloat(self, target: str, verb: str, source: str, value: str, kind: str) -> str:
        wide, narrow = (source, kind) if verb == "fptrunc" else (kind, source)
        if wide.replace("float", "bfloat") != narrow:
            raise NotImplementedError(f"{verb} {source} to {kind}")
        if (verb, wide) not in self.helpers:
            name = f"llir_{verb}_{len(self.helpers)}"
            self.helpers[verb, wide] = (name, functions.bfloat(name, verb, wide))
        source, kind = source.replace("bfloat", "i16"), kind.replace("bfloat", "i16")
        return f"{target}call {kind} @{self.helpers[verb, wide][0]}({source} {value})"

    def to_integer(self, target: str, sign: str, source: str, value: str, kind: str) -> str:
        """As PTX's cvt.rzi: NaN to 0, what is out of range to its end; 8 bits by way of 16."""

        def mangled(kind: str) -> str:
            lanes, scalar = re.match(r"(?:<(\d+) x )?(\w+)", kind).groups()
            short = {"float": "f32", "half": "f16", "double": "f64"}
            return (f"v{lanes}" if lanes else "") + short.get(scalar, scalar)

        wide = re.sub(r"\bi8\b", "i16", kind)
        name = f"llvm.fpto{sign}i.sat.{mangled(wide)}.{mangled(source)}"
        self.declarations.add(f"declare {wide} @{name}({source})")
        if wide == kind:
            return f"{target}call {kind} @{name}({source} {value})"
        middle = target.replace(" =", "").strip() + ".wide"
        first = f"  {middle} = call {wide} @{name}({source} {value})"
        return f"{first}\n{target}trunc {wide} {middle} to {kind}"


def _reflected(ir: str) -> dict[str, int]:
    """NVIDIA's answers to __nvvm_reflect by the question's global variable."""
    flush = re.search(r'!"nvvm-reflect-ftz", i32 (\d)', ir)
    strings = re.findall(r'^(@[\w.]+) = .*c"(\w+)\\00"', ir, flags=re.M)
    return {name: int(flush[1]) if flush else 0 for name, s in strings if s == "__CUDA_FTZ"}


def _entry(kernel: str, parameters: Sequence[str], sites: int) -> list[str]:
    """Functions that the runner calls: arguments come in slots of eight bytes."""
    loads, values = [], []
    for i, kind in enumerate(parameters):
        loads.append(f"  %p{i} = getelementptr i64, ptr %arguments, i64 {i}")
        loads.append(f"  %a{i} = load {kind}, ptr %p{i}")
        values.append(f"{kind} %a{i}")
    return [
        f"@llir_sites = internal global [{max(sites, 1)} x {{ i64, i64 }}] zeroinitializer",
        "define ptr @llir_sites_address() {\n  ret ptr @llir_sites\n}",
        "define void @llir_entry(ptr %arguments) {",
        *loads,
        f"  call void @{kernel}({', '.join(values)})",
        "  ret void\n}",
        '!0 = !{!"branch_weights", i32 1048576, i32 1}',
    ]


def translate(ir: str, shared_bytes: int, runtime: Callable[[str], bool]) -> Translated:
    """The same kernel for x86-64.

    Args:
        ir: Triton's "llir" of one kernel.
        shared_bytes: per program, from Triton's metadata.
        runtime: whether the runtime has a function or variable of a name.

    Raises:
        NotImplementedError: naming the instruction, intrinsic or PTX that is not known to be exact.
    """
    if match := re.search(r'"(denormal-fp-math|nvptx-f32ftz|unsafe-fp-math"="true)[^"]*"', ir):
        raise NotImplementedError(f"attribute {match[0]}")
    heads = re.findall(r"^define (.*)$", ir, flags=re.M)
    head = re.match(r"ptx_kernel void @([\w.$]+)\((.*?)\)(?: local_unnamed_addr)? #", heads[0])
    threads = re.search(r'"nvvm\.reqntid"="(\d+)"', ir)
    if len(heads) != 1 or not head or not threads or int(threads[1]) % 32:
        raise NotImplementedError(f"functions {heads}, expected one kernel with nvvm.reqntid")
    parameters = [typed(parameter) for parameter in split(head[2])]
    reflected = _reflected(ir)
    self, lines = _Translation(runtime, reflected), []
    for line in ir.splitlines():
        line = re.sub(r",? ![\w.]+ !\d+", "", line)  # debug information
        line = re.sub(r" #\d+$", "", line).rstrip()
        if line.startswith("define "):
            given = ", ".join(f"{kind} {value}" for kind, value in parameters)
            lines.append(f"define internal void @{head[1]}({given}) alwaysinline {{")
        elif line.startswith("@"):
            shared = re.match(r"@global_smem = external .*addrspace\(3\)", line)
            if not shared and line.split(" ")[0] not in reflected:
                raise NotImplementedError(f"global variable {line}")
        elif line.startswith("  "):
            line = self.line(line).replace(
                "@global_smem", f"inttoptr (i64 {functions.SHARED} to ptr)"
            )
            line = re.sub(r" addrspace\([13]\)", "", line)
            if "addrspace" in line:
                raise NotImplementedError(line.strip())
            lines.append(line)
        elif re.match(r"[\w.%$-]+:|\}|$", line):  # labels, the end
            lines.append(line)
        elif not re.match(r"declare |attributes |target |source_filename |[!;]", line):
            raise NotImplementedError(line)
    kinds = tuple(kind for kind, _ in parameters)
    parts = [
        f'target triple = "{TRIPLE}"',
        functions.checks(shared_bytes),
        *sorted(self.declarations),
    ]
    parts += [text for _, text in self.helpers.values()]
    parts += [code.function for _, code in self.assemblies.values()]
    text = "\n".join([*parts, *lines, *_entry(head[1], kinds, len(self.sites)), ""])
    return Translated(text, head[1], kinds, int(threads[1]), self.cooperative, tuple(self.sites))
