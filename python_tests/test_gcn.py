"""The inspector's reader of AMD's assembly, on a small program with known counts."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from machine_code import BF16

from zo_kernels.backends.triton import gcn, inspect

AMD = """
\t.globl\tkernel
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_cbranch_scc0 .LBB0_5
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\ts_cbranch_vccz .LBB0_3
\tglobal_load_ushort v3, v[0:1], off
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_1
\tglobal_store_short v[0:1], v3, off
\ts_branch .LBB0_1
.LBB0_3:                                ; %Flow
\tbuffer_load_dwordx4 v[0:3], v18, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)                   ; v_rcp_f32 in a comment
\ts_nop 1
\ts_delay_alu instid0(VALU_DEP_4)
\tv_mad_u64_u32 v[0:1], s[2:3], v4, v5, 0
\tv_cvt_f32_u32_e32 v2, v2
\tv_dual_fmac_f32 v1, v1, v1 :: v_dual_mul_f32 v2, v2, v2
\tv_pk_fma_f32 v[0:1], v[0:1], v[0:1], v[0:1]
\tglobal_store_b128 v[0:1], v[0:3], off
\ts_branch .LBB0_1
.LBB0_5:
\ts_endpgm
.Lfunc_end0:
\tv_exp_f32_e32 v0, v0
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 0
    .sgpr_count:     62
    .sgpr_spill_count: 5
    .vgpr_count:     44
    .vgpr_spill_count: 3
"""
LLIR = """
  %1 = call float @llvm.fma.f32(float %a, float %b, float %c)
  %2 = tail call <2 x float> @llvm.fma.v2f32(<2 x float> %a, <2 x float> %b, <2 x float> %c)
  %3 = fadd float %1, %1
"""


def test_amd_code():
    """The same counts from AMD's assembly; the packed multiply-add is two, the hints are none."""
    report = inspect.describe(BF16, "gfx942", gcn.code(AMD, LLIR))
    assert (report.region, report.elements) == ("loop", 8)
    assert (report.loads, report.stores) == ((16,), (16,))
    # 2 branches at the ends, one chosen, load, wait, 4 of arithmetic, store
    assert {pipe: n * 8 for pipe, n in report.pipes.items()} == {
        "control": 4, "vmem": 2, "vmul": 1, "vcvt": 1, "valu": 2
    }  # fmt: skip
    assert report.instructions == 10 / 8 and report.further is None
    assert report.fma == (2, 3) and report.machine_fma == 3 and report.contracted == 0
    assert (report.registers, report.scalar_registers, report.shared) == (44, 62, 0)
    assert report.approximate == {} and report.unknown == {}
    assert inspect.broken_budgets([report]) == [
        "combine bf16 on gfx942: 3 spilled bytes or registers, budget 0"
    ]


@pytest.mark.parametrize("opcode", ["v_rcp_f32_e32", "v_exp_f32_e32", "v_sqrt_f32", "v_mac_f32"])
def test_amd_approximations_are_found(opcode):
    text = AMD.replace("v_cvt_f32_u32_e32", opcode)
    assert gcn.code(text, LLIR).approximate == {opcode: 1}
    exact = text.replace("s_nop 1", "v_div_fixup_f32 v0, v0, v0, v0")
    assert bool(gcn.code(exact, LLIR).approximate) == (opcode != "v_rcp_f32_e32")


def test_amd_contraction_and_missing_metadata():
    """A multiplication by one of mixed types is an addition."""
    assert gcn.code(AMD, "").contracted == 3
    for operand, fma in (("1.0", 3), ("v3", 4)):
        mixed = f"v_fma_mix_f32 v1, v2, {operand}, v4 op_sel_hi:[1,1,0]"
        code = gcn.code(AMD.replace("s_nop 1", mixed), LLIR)
        assert (code.machine_fma, code.machine_adds) == (fma, 4 - fma)
    with pytest.raises(ValueError, match=r"expected \.vgpr_count"):
        gcn.code(AMD.replace(".vgpr_count", ".other"), LLIR)
