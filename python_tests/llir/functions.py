"""Functions in LLVM IR that take the place of what NVIDIA defines and LLVM for x86-64 does not."""

from __future__ import annotations

from collections.abc import Sequence

from llir.text import narrowed, widened

#: Where the shared memory lies: kShared in threads.h.
SHARED = 0x20000000

#: The checks before an access: SPACE, INSIDE (of %offset), and the runtime's part for the rest.
_CHECK = """declare void @llir_SPACE_access(i64, i64, i64, i32)
define internal void @llir_check_SPACE(i64 %a, i64 %align, i64 %width, i32 %site) alwaysinline {
INSIDE
  %mask = sub i64 %align, 1
  %low = and i64 %a, %mask
  %even = icmp eq i64 %low, 0
  %good = and i1 %inside, %even
  br i1 %good, label %done, label %look, !prof !0
look:
  call void @llir_SPACE_access(i64 %a, i64 %align, i64 %width, i32 %site)
  br label %done
done:
  ret void
}
define internal void @llir_check_SPACE_pointer(ptr %p, i64 %align, i64 %width, i32 %site)
    alwaysinline {
  %a = ptrtoint ptr %p to i64
  call void @llir_check_SPACE(i64 %a, i64 %align, i64 %width, i32 %site)
  ret void
}
"""
# A global access is compared with where the last one of its place fell.
_INSIDE_GLOBAL = """  %place = getelementptr { i64, i64 }, ptr @llir_sites, i32 %site
  %rest = getelementptr i64, ptr %place, i64 1
  %base = load i64, ptr %place
  %limit = load i64, ptr %rest
  %offset = sub i64 %a, %base
  %inside = icmp ult i64 %offset, %limit"""
_INSIDE_SHARED = f"""  %offset = sub i64 %a, {SHARED}
  %after = add i64 %offset, %width
  %begins = icmp ult i64 %offset, BYTES
  %ends = icmp ule i64 %after, BYTES
  %inside = and i1 %begins, %ends"""


def checks(shared_bytes: int) -> str:
    """llir_check_global and llir_check_shared, of an address or a pointer."""
    shared = _INSIDE_SHARED.replace("BYTES", str(shared_bytes))
    result = ""
    for space, inside in (("global", _INSIDE_GLOBAL), ("shared", shared)):
        result += _CHECK.replace("SPACE", space).replace("INSIDE", inside)
    return result


def bfloat(name: str, verb: str, wide: str) -> str:
    """fpext or fptrunc between float, or a vector of them, and bfloat, whose type here is i16.

    LLVM for x86-64 calls a library instead. Truncation is to nearest even; a NaN becomes 0x7fff.
    """
    i32, i16, i1 = (wide.replace("float", f"i{n}") for n in (32, 16, 1))
    n = {k: f"splat (i32 {k})" if "<" in wide else str(k) for k in (1, 16, 32767)}
    if verb == "fpext":
        return f"""define internal {wide} @{name}({i16} %x) alwaysinline {{
  %word = zext {i16} %x to {i32}
  %high = shl {i32} %word, {n[16]}
  %y = bitcast {i32} %high to {wide}
  ret {wide} %y
}}"""
    return f"""define internal {i16} @{name}({wide} %x) alwaysinline {{
  %u = bitcast {wide} %x to {i32}
  %high = lshr {i32} %u, {n[16]}
  %odd = and {i32} %high, {n[1]}
  %half = add {i32} %u, {n[32767]}
  %sum = add {i32} %half, %odd
  %rounded = lshr {i32} %sum, {n[16]}
  %nan = fcmp uno {wide} %x, %x
  %word = select {i1} %nan, {i32} {n[32767]}, {i32} %rounded
  %y = trunc {i32} %word to {i16}
  ret {i16} %y
}}"""


def shim(name: str, symbol: str, result: str, kinds: Sequence[str]) -> tuple[str, str]:
    """A function with LLVM's types that calls the runtime's with C's, and the latter's declaration.

    i1, i8, i16 and vectors of 32 bits or less become integers of 32 bits, as does a result of i1;
    an aggregate comes back through a pointer.
    """
    lines, passed = [], []
    for i, kind in enumerate(kinds):
        if kind in ("i32", "i64", "float", "double", "ptr"):
            passed.append((kind, f"%{i}"))
        else:
            lines += widened(f"w{i}", f"%{i}", kind, 32)
            passed.append(("i32", f"%w{i}"))
    returned, value = result, "%c"
    if result.startswith("{"):
        lines.insert(0, f"  %out = alloca {result}")
        passed.insert(0, ("ptr", "%out"))
        returned, value = "void", "%r"
    elif result == "i1":
        returned, value = "i32", "%r"
    call = f"call {returned} @{symbol}({', '.join(f'{k} {v}' for k, v in passed)})"
    lines.append(f"  {call}" if returned == "void" else f"  %c = {call}")
    if result.startswith("{"):
        lines.append(f"  %r = load {result}, ptr %out")
    elif result == "i1":
        lines += narrowed("r", "%c", 32, "i1")
    lines.append("  ret void" if result == "void" else f"  ret {result} {value}")
    parameters = ", ".join(f"{kind} %{i}" for i, kind in enumerate(kinds))
    head = f"define internal {result} @{name}({parameters}) alwaysinline {{\nentry:"
    declaration = f"declare {returned} @{symbol}({', '.join(k for k, _ in passed)})"
    return "\n".join([head, *lines, "}"]), declaration
