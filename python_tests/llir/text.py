"""LLVM IR as text: types, operands, flags, and values as bare bits."""

from __future__ import annotations

import re

_TYPE = re.compile(r"(?:<(\d+) x (\w+)>|(\w+))$")
_SIZES = {"half": 16, "float": 32, "double": 64, "ptr": 64}
_FLAGS = re.compile(
    r"(= (?:fadd|fsub|fmul|fdiv|fneg|fcmp|select|phi|(?:(?:tail|musttail|notail) )?call) )"
    r"((?:(?:fast|reassoc|contract|arcp|afn|nsz|nnan|ninf) )+)"
)
_ATTRIBUTES = re.compile(
    r"(?:noundef|nonnull|signext|zeroext|readonly|readnone|writeonly|nofree|align \d+|"
    r"captures\(\w+\)|range\([^)]*\)) "
)


def bits(kind: str) -> int:
    """Size of a type: i1, float, ptr, <2 x half>.

    Raises:
        NotImplementedError: for aggregates and types unknown here.
    """
    match = _TYPE.match(kind)
    scalar = match and (match[2] or match[3])
    if match and scalar in _SIZES:
        size = _SIZES[scalar]
    elif match and re.fullmatch(r"i\d+", scalar):
        size = int(scalar[1:])
    else:
        raise NotImplementedError(f"type {kind}")
    return size * int(match[1] or 1)


def split(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def typed(text: str) -> tuple[str, str]:
    """Type and value of an operand: "i32 noundef %3", "<2 x i32> splat (i32 1)"."""
    text = re.sub(r"\bptr addrspace\([13]\)", "ptr", text)
    end = text.index({"<": ">", "{": "}"}[text[0]]) + 1 if text[0] in "<{" else text.find(" ")
    kind, value = text[:end], text[end:].strip() + " "
    while match := _ATTRIBUTES.match(value):
        value = value[match.end() :]
    return kind, value.strip()


def widened(name: str, value: str, kind: str, size: int) -> list[str]:
    """IR that makes %name, an integer of `size` bits, from the bits of a value of any type."""
    own = bits(kind)
    first = "ptrtoint" if kind == "ptr" else "bitcast"
    then = "bitcast" if own == size else "zext" if own < size else "trunc"
    return [
        f"  %{name}.own = {first} {kind} {value} to i{own}",
        f"  %{name} = {then} i{own} %{name}.own to i{size}",
    ]


def narrowed(name: str, value: str, size: int, kind: str) -> list[str]:
    """IR that makes %name, of any type, from the low bits of an integer of `size` bits."""
    own = bits(kind)
    first = "bitcast" if own == size else "zext" if own > size else "trunc"
    then = "inttoptr" if kind == "ptr" else "bitcast"
    return [
        f"  %{name}.own = {first} i{size} {value} to i{own}",
        f"  %{name} = {then} i{own} %{name}.own to {kind}",
    ]


def without_flags(line: str) -> str:
    """A floating-point instruction without the flags that an exact kernel may have.

    "No NaN" and "no infinity" promise what the kernel keeps. "No matter which zero" is harmless in
    minima and maxima, which are one instruction of PTX in any case. Other flags change results.

    Raises:
        NotImplementedError: naming the others.
    """
    match = _FLAGS.search(line)
    if not match:
        return line
    harmless = {"nnan", "ninf"} | ({"nsz"} if re.search(r"@llvm\.(min|max)num\.", line) else set())
    if flags := set(match[2].split()) - harmless:
        raise NotImplementedError(f"floating-point flags {sorted(flags)}: {line.strip()}")
    return line[: match.start(2)] + line[match.end(2) :]
