"""Single instructions of an NVIDIA GPU on this CPU, from hand-written IR.

Compared with formulas from the PTX manual; what is unknown is refused, and what a GPU would answer
with an error stops the launch.
"""

from __future__ import annotations

import math
import re
from functools import reduce

import pytest
import torch
from helpers import assert_same_bits, weights

from zo_kernels.backends import reference

pytest.importorskip("triton")
import run_llir
from run_llir import Compiled, Kernel, LockstepFault, MemoryFault

if reason := run_llir.unavailable_reason():
    pytest.skip(reason, allow_module_level=True)


def probe(body: str, threads: int = 64, shared_bytes: int = 0) -> Kernel:
    """A kernel of hand-written IR: %x of `in` at the thread's place, %y to `out`."""
    ir = f"""@global_smem = external addrspace(3) global [0 x i8], align 16
define ptx_kernel void @probe(ptr addrspace(1) %in, ptr addrspace(1) %out, ptr addrspace(1) %s0,
  ptr addrspace(1) %s1) #0 {{
  %t = tail call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %p = getelementptr i32, ptr addrspace(1) %in, i32 %t
  %q = getelementptr i32, ptr addrspace(1) %out, i32 %t
  %x = load i32, ptr addrspace(1) %p, align 4
{body}
  store i32 %y, ptr addrspace(1) %q, align 4
  ret void
}}
attributes #0 = {{ nounwind "nvvm.reqntid"="{threads}" }}
"""
    ir = ir.replace(",\n  ptr", ", ptr")
    arguments = {"in": "*i32", "out": "*i32"}
    return Kernel(Compiled("probe", "probe", arguments, {}, [], shared_bytes, ir))


def ramp(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def run(kernel: Kernel, values: torch.Tensor, count: int | None = None) -> torch.Tensor:
    out = torch.full((count or values.numel(),), -1, dtype=torch.int32)
    kernel.run((1,), {"in": values, "out": out})
    return out


SHUFFLES = [
    (mode, by, width)
    for mode in ("up", "down", "bfly", "idx")
    for by in (1, 5, 16)
    for width in (32, 8)
]


@pytest.mark.parametrize(("mode", "by", "width"), SHUFFLES)
def test_shuffle(mode, by, width):
    """CUDA's __shfl_*_sync with a width: a lane that asks beyond its segment keeps its own."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    call = f"@llvm.nvvm.shfl.sync.{mode}.i32(i32 -1, i32 %x, i32 {by}, i32 {clamp})"
    values, expected = ramp(64) * 3, []
    for t in range(64):
        first = t - t % width
        source = {"up": t - by, "down": t + by, "bfly": t ^ by, "idx": first + by % width}[mode]
        low = 0 if mode == "bfly" else first  # which may read earlier segments
        expected.append(source if low <= source < first + width else t)
    assert run(probe(f"  %y = call i32 {call}"), values).tolist() == [3 * s for s in expected]


@pytest.mark.parametrize("name", ["add", "and", "or", "xor", "min", "max", "umin", "umax"])
def test_redux(name):
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-(2**31), 2**31, (64,), generator=generator).to(torch.int32)
    function = {
        "add": lambda a, b: a + b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }.get(name, min if "min" in name else max)
    numbers = [v & 0xFFFFFFFF if name.startswith("u") else v for v in values.tolist()]
    expected = [reduce(function, numbers[32 * (t // 32) :][:32]) & 0xFFFFFFFF for t in range(64)]
    found = run(probe(f"  %y = call i32 @llvm.nvvm.redux.sync.{name}(i32 %x, i32 -1)"), values)
    assert [v & 0xFFFFFFFF for v in found.tolist()] == expected


def test_ballot():
    body = """  %b = trunc i32 %x to i1
  %y = call i32 @llvm.nvvm.vote.ballot.sync(i32 -1, i1 %b)"""
    values = torch.tensor([t * t // 3 for t in range(64)], dtype=torch.int32)
    words = [sum((values[32 * w + i].item() & 1) << i for i in range(32)) for w in (0, 1)]
    found = [v & 0xFFFFFFFF for v in run(probe(body), values).tolist()]
    assert found == [words[t // 32] for t in range(64)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("verb", ["ldmatrix", "stmatrix"])
def test_matrices(verb, trans):
    """Four 8x8 matrices of 16-bit elements between rows in shared memory and a warp's registers."""
    name = f"@llvm.nvvm.{verb}.sync.aligned.m8n8.x4{trans}.b16.p3"
    quad = "{ i32, i32, i32, i32 }"
    wide = "<4 x i32>"
    body = f"""  %t4 = shl i32 %t, 2
  %t16 = shl i32 %t, 4
  %from = getelementptr i32, ptr addrspace(1) %in, i32 %t4
  %to = getelementptr i32, ptr addrspace(1) %out, i32 %t4
  %row = getelementptr i8, ptr addrspace(3) @global_smem, i32 %t16
  %v = load {wide}, ptr addrspace(1) %from, align 16
"""
    if verb == "ldmatrix":
        body += f"""  store {wide} %v, ptr addrspace(3) %row, align 16
  call void @llvm.nvvm.bar.warp.sync(i32 -1)
  %r = call {quad} {name}(ptr addrspace(3) %row)
"""
        last, parts = "poison", [(f"extractvalue {quad} %r, {m}") for m in range(4)]
        for m, part in enumerate(parts):
            body += f"  %r{m} = {part}\n  %w{m} = insertelement {wide} {last}, i32 %r{m}, i32 {m}\n"
            last = f"%w{m}"
        body += f"  store {wide} %w3, ptr addrspace(1) %to, align 16\n"
    else:
        for m in range(4):
            body += f"  %v{m} = extractelement {wide} %v, i32 {m}\n"
        given = ", ".join(f"i32 %v{m}" for m in range(4))
        body += f"""  call void {name}(ptr addrspace(3) %row, {given})
  call void @llvm.nvvm.bar.warp.sync(i32 -1)
  %w = load {wide}, ptr addrspace(3) %row, align 16
  store {wide} %w, ptr addrspace(1) %to, align 16
"""
    body += "  %yp = load i32, ptr addrspace(1) %q, align 4\n  %y = add i32 %yp, 0"
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(-(2**31), 2**31, (128,), generator=generator).to(torch.int32)
    found = run(probe(body, threads=32, shared_bytes=512), words)
    halves = words.view(torch.int16)
    memory = torch.empty(256, dtype=torch.int16)  # (matrix, row, column)
    lanes = torch.empty(256, dtype=torch.int16)  # (lane, matrix, half)
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                at = [lane // 4, lane % 4 * 2 + half][:: -1 if trans else 1]
                place = matrix * 64 + at[0] * 8 + at[1]
                register = lane * 8 + matrix * 2 + half
                lanes[register] = halves[place]
                memory[place] = halves[register]
    expected = lanes if verb == "ldmatrix" else memory
    assert torch.equal(found.view(torch.int16), expected)


@pytest.mark.parametrize("flags", ["", "nsz ", "nnan ninf nsz "])
@pytest.mark.parametrize(("name", "expected"), [("minnum", -0.0), ("maxnum", 0.0)])
def test_zeros_in_order(name, expected, flags):
    """PTX has -0 below +0, whatever LLVM promises; a NaN gives way."""
    body = f"""  %f = bitcast i32 %x to float
  %g = call {flags}float @llvm.{name}.f32(float %f, float ZERO)
  %y = bitcast float %g to i32"""
    for value, zero in ((-0.0, "0.0"), (0.0, "-0.0")):
        found = run(probe(body.replace("ZERO", zero)), torch.full((64,), value).view(torch.int32))
        assert torch.equal(found, torch.full((64,), expected).view(torch.int32))
    if not flags:
        found = run(
            probe(body.replace("ZERO", "2.0")), torch.full((64,), torch.nan).view(torch.int32)
        )
        assert found.view(torch.float32).eq(2).all()


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, x * 0, x)


ARITHMETIC = {
    "add.rn.f": lambda a, b: a + b,
    "mul.rn.f": lambda a, b: a * b,
    "div.rn.f": lambda a, b: a / b,
    "rcp.rn.f": lambda a: 1 / a,
    "sqrt.rn.f": lambda a: a.double().sqrt().float(),  # torch.sqrt is not correctly rounded
    "fma.rn.f": lambda a, b, c: reference.fma(a, b, c),
    "fmin.xorsign.abs.f": lambda a, b: torch.fmin(a.abs(), b.abs()).copysign(
        torch.where(a.signbit() == b.signbit(), 1.0, -1.0)
    ),
    "floor.f": torch.floor,
    "ceil.f": torch.ceil,
    "trunc.f": torch.trunc,
    "round.f": torch.round,
    "floor.ftz.f": lambda a: torch.floor(flushed(a)),
    "ceil.ftz.f": lambda a: torch.ceil(flushed(a)),
    "trunc.ftz.f": lambda a: torch.trunc(flushed(a)),
    "round.ftz.f": lambda a: torch.round(flushed(a)),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    """Numbers of all magnitudes and special values, in many pairs, correctly rounded."""
    function, threads = ARITHMETIC[name], 1024
    arity = function.__code__.co_argcount if hasattr(function, "__code__") else 1
    numbers = weights(threads, torch.float32, seed=8)
    operands = [numbers.roll(37 * i) for i in range(arity)]
    body = ""
    for i in range(arity):
        body += f"""  %t{i} = sub i32 %t, {37 * i}
  %u{i} = and i32 %t{i}, {threads - 1}
  %p{i} = getelementptr float, ptr addrspace(1) %in, i32 %u{i}
  %f{i} = load float, ptr addrspace(1) %p{i}, align 4
"""
    given = ", ".join(f"float %f{i}" for i in range(arity))
    body += f"  %g = call float @llvm.nvvm.{name}({given})\n  %y = bitcast float %g to i32"
    found = run(probe(body, threads), numbers.view(torch.int32)).view(torch.float32)
    assert_same_bits(found, function(*operands))


def test_integers_from_floats():
    """NaN gives 0, what is out of range the nearest end: PTX's cvt.rzi, not LLVM's poison."""
    numbers = [1.5, -1.5, 3e9, -3e9, math.inf, -math.inf, math.nan, 2147483520.0]
    body = "  %f = bitcast i32 %x to float\n  %y = fptosi float %f to i32"
    found = run(probe(body), torch.tensor(numbers * 8).view(torch.int32))
    top, bottom = 2**31 - 1, -(2**31)
    assert found[:8].tolist() == [1, -1, top, bottom, top, bottom, 0, 2147483520]


def test_grid():
    """Programs are numbered as CUDA's blocks are."""
    register = "call i32 @llvm.nvvm.read.ptx.sreg"
    body = ""
    for i, axis in enumerate("xyz"):
        body += f"  %c{i} = {register}.ctaid.{axis}()\n  %n{i} = {register}.nctaid.{axis}()\n"
    body += """  %a = mul i32 %c2, %n1
  %b = add i32 %a, %c1
  %c = mul i32 %b, %n0
  %d = add i32 %c, %c0
  %e = mul i32 %d, 32
  %at = add i32 %e, %t
  %to = getelementptr i32, ptr addrspace(1) %out, i32 %at
  %z = mul i32 %n2, 1000
  %value = add i32 %z, %at
  store i32 %value, ptr addrspace(1) %to, align 4
  ret void
unused:
  %y = add i32 %x, 0"""
    out = torch.empty(32 * 30, dtype=torch.int32)
    probe(body, threads=32).run((2, 3, 5), {"in": ramp(32), "out": out})
    assert torch.equal(out, ramp(32 * 30) + 5000)


REFUSED = [
    ("  %y = call i32 @llvm.nvvm.mul24.i(i32 %x, i32 3)", "llvm.nvvm.mul24.i"),
    ("  %f = bitcast i32 %x to float\n  %g = call float @llvm.nvvm.div.full(float %f, float %f)\n"
     "  %y = bitcast float %g to i32", "llvm.nvvm.div.full"),
    ('  %y = call i32 asm "ex2.approx.f32 $0, $1;", "=r,r"(i32 %x)', "ex2.approx.f32"),
    ('  %y = call i32 asm sideeffect "ld.volatile.global.b32 { $0 }, [ $1 + 0 ];", "=r,l"'
     "(ptr addrspace(1) %p)", "ld.volatile.global.b32"),
    ("  %f = bitcast i32 %x to float\n  %g = fadd contract float %f, %f\n"
     "  %y = bitcast float %g to i32", "contract"),
    ("  %f = bitcast i32 %x to float\n  %g = fadd nsz nnan float %f, %f\n"
     "  %y = bitcast float %g to i32", "nsz"),
    ("  %f = bitcast i32 %x to float\n  %g = call float @llvm.exp2.f32(float %f)\n"
     "  %y = bitcast float %g to i32", "llvm.exp2.f32"),
    ("  %y = atomicrmw add ptr addrspace(1) %p, i32 1 seq_cst", "atomicrmw"),
    ("  %l = load i32, ptr addrspace(5) null, align 4\n  %y = add i32 %l, 0", "addrspace(5)"),
    ("  %y = call i32 @llvm.nvvm.read.ptx.sreg.clock()", "sreg.clock"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_unknown_is_refused(body, name):
    with pytest.raises(NotImplementedError, match=re.escape(name)):
        probe(body)


def test_memory_fault():
    """Just inside is fine; one element outside, or between elements, is not."""
    values = ramp(64)
    at = "  %a = getelementptr i8, ptr addrspace(1) %in, i32 {}\n"
    at += "  %y = load i32, ptr addrspace(1) %a, align 4"
    assert run(probe(at.format(252)), values).unique().tolist() == [63]
    for offset, kind in ((256, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")):
        with pytest.raises(MemoryFault) as caught:
            run(probe(at.format(offset)), values)
        message = str(caught.value)
        place = [hex(values.data_ptr() + offset), f"offset {offset} of in", "256 bytes"]
        for part in ["probe", kind, "program (0, 0, 0)", "thread 0", "4 bytes", *place]:
            assert part in message, (part, message)
    with pytest.raises(MemoryFault, match=r"thread 40: out of bounds: store global i32.* of out"):
        run(probe("  %y = add i32 %x, 0"), values, count=40)


@pytest.mark.parametrize(
    ("offset", "kind"), [(16, "out of bounds"), (-4, "out"), (2, "misaligned")]
)
def test_shared_memory_fault(offset, kind):
    body = f"  %a = getelementptr i8, ptr addrspace(3) @global_smem, i32 {offset}\n"
    body += "  store i32 %x, ptr addrspace(3) %a, align 4\n  %y = add i32 %x, 0"
    with pytest.raises(MemoryFault, match=f"{kind}.*has 16 bytes of shared memory"):
        run(probe(body, shared_bytes=16), ramp(64))


def test_threads_that_miss_each_other():
    shuffle = "call i32 @llvm.nvvm.shfl.sync.idx.i32(i32 {}, i32 %x, i32 0, i32 31)"
    branch = "  %c = icmp eq i32 %t, 3\n  br i1 %c, label %a, label %b\n"
    early = f"{branch}a:\n  ret void\nb:\n  %y = {shuffle.format(-1)}"
    with pytest.raises(LockstepFault, match=r"thread 0: waits at shfl\.sync\.idx\.i32"):
        run(probe(early), ramp(64))
    apart = f"{branch}a:\n  %k = {shuffle.format(-1)}\n  br label %e\nb:\n"
    apart += (
        f"  %l = {shuffle.format(-1)}\n  br label %e\ne:\n  %y = phi i32 [ %k, %a ], [ %l, %b ]"
    )
    with pytest.raises(LockstepFault, match="while others wait elsewhere"):
        run(probe(apart), ramp(64))
    with pytest.raises(LockstepFault, match="some threads only"):
        run(probe(f"  %y = {shuffle.format(15)}"), ramp(64))
