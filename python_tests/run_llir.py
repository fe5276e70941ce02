"""Runs the LLVM IR that Triton makes for an NVIDIA GPU on this CPU, one thread after another.

The IR is what Triton's own compiler produced, after all its layout and vectorisation work; only its
target is changed to x86-64, by the LLVM inside libtriton, and its few lines of PTX (global loads
and stores) are replaced by loads and stores. Kernels that use shared memory, shuffles or barriers
cannot run so. What stays unproved is ptxas and the GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from triton._C import libtriton
from triton._C.libtriton import llvm

TRIPLE = "x86_64-unknown-linux-gnu"
HELPERS = """target triple = "x86_64-unknown-linux-gnu"
@thread = external global i32
@program = external global i32
define internal void @store4(i32 %x0, i32 %x1, i32 %x2, i32 %x3, ptr %p) alwaysinline {
STORES
  ret void
}
define internal { i32, i32, i32, i32 } @load4(ptr %p) alwaysinline {
  %v = load { i32, i32, i32, i32 }, ptr %p, align 16
  ret { i32, i32, i32, i32 } %v
}
"""
STORE4 = "\n".join(
    f"  %q{i} = getelementptr i32, ptr %p, i64 {i}\n  store i32 %x{i}, ptr %q{i}, align 4"
    for i in range(4)
)
MASKED = """define internal i{w} @load_{w}(i{w} %other, ptr %p, i1 %c) {{
  br i1 %c, label %yes, label %no
yes:
  %v = load i{w}, ptr %p
  ret i{w} %v
no:
  ret i{w} %other
}}
define internal void @store_{w}(i{w} %v, ptr %p, i1 %c) {{
  br i1 %c, label %yes, label %no
yes:
  store i{w} %v, ptr %p
  br label %no
no:
  ret void
}}
"""
RUNNER = """
extern int thread, program;
int thread, program;
/* What LLVM calls for float to bfloat16: the bits come back in the low half of xmm0. */
float __truncsfbf2(float x) {
  union { float f; unsigned u; } v = {x}, r;
  r.u = x != x ? 0x7fff : (v.u + 0x7fff + (v.u >> 16 & 1)) >> 16;
  return r.f;
}
void KERNEL(void *, void *, void *, int, int, int, int, float, void *, void *);
void run(int programs, int threads, void *table, void *scales, void *directions, int tensors,
         int count, int seed_lo, int seed_hi, float src_scale) {
  for (program = 0; program < programs; ++program)
    for (thread = 0; thread < threads; ++thread)
      KERNEL(table, scales, directions, tensors, count, seed_lo, seed_hi, src_scale, 0, 0);
}
"""


def _replace_ptx(match: re.Match) -> str:
    result, ptx, arguments = match.groups()
    wide = ".v4." in ptx
    if "ld.global" in ptx:
        if wide:
            return f"call {result} @load4({arguments})"
        if "@$" in ptx:
            return f"call {result} @load_{result[1:]}({arguments})"
        return f"load {result}, {arguments}, align 4"
    if "st.global" in ptx:
        if wide:
            return f"call void @store4({arguments})"
        return f"call void @store_{re.search(r'.b([0-9]+) ', ptx)[1]}({arguments})"
    raise NotImplementedError(ptx)


def to_x86(ir: str) -> str:
    """The same program for x86-64."""
    ir = re.sub(r"^(target|source_filename) .*$", "", ir, flags=re.M)
    ir = re.sub(r", !dbg !\d+| !dbg !\d+|^![\w.]+ = .*$", "", ir, flags=re.M)
    ir = ir.replace("ptx_kernel ", "").replace(" addrspace(1)", "")
    for register, variable in (("tid", "thread"), ("ctaid", "program")):
        call = rf"tail call i32 @llvm\.nvvm\.read\.ptx\.sreg\.{register}\.x\(\)"
        ir = re.sub(call, f"load i32, ptr @{variable}", ir)
    ir = re.sub(r"^declare .*@llvm\.nvvm.*$", "", ir, flags=re.M)
    call = r'tail call (\{[^}]*\}|\w+) asm sideeffect "([^"]*)", "[^"]*"\(([^)]*)\)(?: #\d+)?'
    ir = re.sub(call, _replace_ptx, ir)
    head = HELPERS.replace("STORES", STORE4)
    return head + "".join(MASKED.format(w=w) for w in (16, 32)) + ir


def load(path: Path, compiler: str) -> Callable[..., None]:
    """run(programs, threads, table, scales, directions, ...) of the combine_kernel in the file."""
    llvm.init_targets()
    library = ctypes.CDLL(libtriton.__file__)  # x86 is linked into it but not registered
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        getattr(library, f"LLVMInitializeX86{part}")()
    source = to_x86(path.read_text())
    code = llvm.translate_to_asm(source, TRIPLE, "x86-64-v3", "", [], False, True, False)
    path.with_suffix(".o").write_bytes(code)
    path.with_suffix(".c").write_text(RUNNER.replace("KERNEL", "combine_kernel"))
    shared = path.with_suffix(".so")
    inputs = [path.with_suffix(".c"), path.with_suffix(".o")]
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", *inputs, "-o", shared], check=True)
    run = ctypes.CDLL(str(shared)).run
    pointers, integers = [ctypes.c_void_p] * 3, [ctypes.c_int] * 4
    run.argtypes = [ctypes.c_int, ctypes.c_int, *pointers, *integers, ctypes.c_float]
    run.restype = None
    return run
