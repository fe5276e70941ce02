"""Inline PTX as functions in LLVM IR.

Triton writes global accesses and some conversions as inline PTX. Loads, stores and moves become IR
here; any other instruction becomes a call of the runtime's function for its opcode. What has none
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llir.text import narrowed, widened

#: Bits of a register by its constraint letter.
REGISTERS = {"b": 1, "c": 16, "h": 16, "r": 32, "f": 32, "l": 64, "d": 64}
#: Modifiers of an access that change neither what is moved nor where.
HINTS = {"ca", "cg", "cs", "cv", "lu", "nc", "wb", "wt"}
HINTS |= {"L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate"}
#: What a register holds before an instruction sets it.
UNSET = 0x5A5A5A5A5A5A5A5A

_STATEMENT = re.compile(r"(?:@(!?)\$(\d+)\s+)?(\S+)\s*(.*)", flags=re.S)
_ACCESS = re.compile(r"(ld|st)\.(global|shared(?:::cta)?)((?:\.[\w:]+)*?)(?:\.v(\d))?\.[bu](\d+)$")
_ADDRESS = re.compile(r"\[ ?\$(\d+) ?(?:\+ ?(-?\d+) ?)?\]")


class Assembly:
    """One inline assembly as the IR function ``name(arguments, i32 site)``.

    Attributes:
        function: its text.
        result: the type that it returns.
        accesses: opcodes of its loads and stores; the k-th is at place site + k of the program.
    """

    def __init__(
        self,
        name: str,
        text: str,
        constraints: str,
        results: Sequence[str],
        arguments: Sequence[str],
        call: Callable[[str, int], str],
    ) -> None:
        """Translates.

        Args:
            name: of the function.
            text: of the assembly, lines apart.
            constraints: LLVM's: "=r,l,b".
            results: types of the outputs.
            arguments: types of the inputs.
            call: gives the runtime's function for an opcode with a number of operands.

        Raises:
            NotImplementedError: naming the instruction or operand that is unknown.
        """
        self._text, self._call = text, call
        letters = [c for c in constraints.split(",") if c and not c.startswith("~")]
        outputs = [c.lstrip("=&") for c in letters if c.startswith("=")]
        inputs = letters[len(outputs) :]
        if len(outputs) != len(results) or len(inputs) != len(arguments):
            raise NotImplementedError(f"constraints {constraints!r} of PTX {text!r}")
        sizes = [self._size(c) for c in outputs]
        # An input may be tied to an output, by its number.
        sizes += [sizes[int(c)] if c.isdigit() else self._size(c) for c in inputs]
        self._sizes = sizes
        self._values = [str(UNSET & ((1 << size) - 1)) for size in sizes]
        self._lines: list[str] = []
        self._block, self._count = "entry", 0
        self.accesses: list[str] = []
        for i, (constraint, kind) in enumerate(zip(inputs, arguments, strict=True)):
            register = len(outputs) + i
            self._lines += widened(f"in{i}", f"%{i}", kind, sizes[register])
            self._values[register] = f"%in{i}"
            if constraint.isdigit():
                self._values[int(constraint)] = f"%in{i}"
        for statement in re.split(r"[;\n]", re.sub(r"^\s*\{|\}\s*$", "", text)):
            if statement.strip():
                self._statement(statement.strip())
        self.result = results[0] if results else "void"
        if len(results) > 1:
            self.result = "{ " + ", ".join(results) + " }"
        self._return(results)
        parameters = ", ".join([*(f"{k} %{i}" for i, k in enumerate(arguments)), "i32 %site"])
        head = f"define internal {self.result} @{name}({parameters}) alwaysinline {{\nentry:"
        self.function = "\n".join([head, *self._lines, "}"])

    def _size(self, letter: str) -> int:
        if letter not in REGISTERS:
            raise NotImplementedError(f"constraint {letter!r} of PTX {self._text!r}")
        return REGISTERS[letter]

    def _register(self, text: str) -> int:
        if not re.fullmatch(r"\$\d+", text):
            raise NotImplementedError(f"operand {text!r} of PTX {self._text!r}")
        return int(text[1:])

    def _operand(self, text: str) -> str:
        if re.fullmatch(r"0x[0-9a-fA-F]+|-?\d+", text):
            return str(int(text, 0))
        return self._values[self._register(text)]

    def _new(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def _return(self, results: Sequence[str]) -> None:
        total = "poison"
        for i, kind in enumerate(results):
            self._lines += narrowed(f"out{i}", self._values[i], self._sizes[i], kind)
            if len(results) == 1:
                total = "%out0"
            else:
                add = f"insertvalue {self.result} {total}, {kind} %out{i}, {i}"
                self._lines.append(f"  %all{i} = {add}")
                total = f"%all{i}"
        self._lines.append(f"  ret {self.result} {total}" if results else "  ret void")

    def _statement(self, statement: str) -> None:
        negated, predicate, opcode, operands = _STATEMENT.match(statement).groups()
        access = _ACCESS.match(opcode)
        if access and set(filter(None, access[3].split("."))) <= HINTS:
            self._access(access, operands, predicate, bool(negated))
        elif access or predicate:
            raise NotImplementedError(f"PTX {statement}")
        else:
            target, *sources = (s.strip() for s in operands.split(","))
            register = self._register(target)
            if re.fullmatch(r"mov\.[bu](16|32|64)", opcode) and len(sources) == 1:
                self._values[register] = self._operand(sources[0])
            else:
                self._values[register] = self._other(opcode, sources, self._sizes[register])

    def _other(self, opcode: str, sources: list[str], size: int) -> str:
        """A call of the runtime's function, whose arguments and result have 32 bits."""
        symbol, result, given = self._call(opcode, len(sources)), self._new(), []
        for source in sources:
            argument = self._new()
            own = self._sizes[self._register(source)]
            self._lines += widened(argument, self._operand(source), f"i{own}", 32)
            given.append(f"i32 %{argument}")
        self._lines.append(f"  %{result}.c = call i32 @{symbol}({', '.join(given)})")
        self._lines += narrowed(result, f"%{result}.c", 32, f"i{size}")
        return f"%{result}"

    def _access(
        self, access: re.Match, operands: str, predicate: str | None, negated: bool
    ) -> None:
        kind, space, _, count, size = access.groups()
        space, count, size = space.removesuffix("::cta"), int(count or 1), int(size)
        address = _ADDRESS.search(operands)
        registers = [int(r) for r in re.findall(r"\$(\d+)", _ADDRESS.sub("", operands))]
        if not address or len(registers) != count:
            raise NotImplementedError(f"PTX {access[0]} {operands}")
        new, site, width = self._new(), len(self.accesses), count * size // 8
        self.accesses.append(access[0])
        if predicate:
            order = [f"label %{new}.yes", f"label %{new}.no"][:: -1 if negated else 1]
            self._lines.append(f"  br i1 {self._values[int(predicate)]}, {', '.join(order)}")
            self._lines.append(f"{new}.yes:")
        base = int(address[1])
        self._lines += [
            *widened(f"{new}.base", self._values[base], f"i{self._sizes[base]}", 64),
            f"  %{new}.at = add i64 %{new}.base, {address[2] or 0}",
            f"  %{new}.site = add i32 %site, {site}",
            f"  call void @llir_check_{space}(i64 %{new}.at, i64 {width}, i64 {width}, "
            f"i32 %{new}.site)",
        ]
        loaded = {}
        for i, register in enumerate(registers):
            piece, own = f"{new}.{i}", self._sizes[register]
            self._lines += [
                f"  %{piece}.a = add i64 %{new}.at, {i * size // 8}",
                f"  %{piece}.p = inttoptr i64 %{piece}.a to ptr",
            ]
            if kind == "st":
                self._lines += narrowed(piece, self._values[register], own, f"i{size}")
                self._lines.append(f"  store i{size} %{piece}, ptr %{piece}.p")
            else:
                self._lines.append(f"  %{piece}.v = load i{size}, ptr %{piece}.p")
                self._lines += widened(piece, f"%{piece}.v", f"i{size}", own)
                loaded[register] = f"%{piece}"
        if predicate:
            self._lines += [f"  br label %{new}.no", f"{new}.no:"]
            for register, value in loaded.items():
                loaded[register] = f"%{new}.join{register}"
                self._lines.append(
                    f"  {loaded[register]} = phi i{self._sizes[register]} "
                    f"[ {value}, %{new}.yes ], [ {self._values[register]}, %{self._block} ]"
                )
            self._block = f"{new}.no"
        for register, value in loaded.items():
            self._values[register] = value
