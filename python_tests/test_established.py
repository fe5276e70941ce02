"""zk.fake_quant beside bitsandbytes and torchao, where they can be installed.

Deliberate differences: both multiply by reciprocals where zo_kernels/formats.py divides, which
decides the ties of scales of scales the other way now and then; a scale is one of 8 bits, so then
all of its group moves by a step.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, NAMES, assert_same_bits

import zo_kernels as zk


def weights(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(256, 512, generator=generator) * 0.02).to(dtype)


def groups_apart(a: torch.Tensor, b: torch.Tensor, group: int) -> float:
    """The share of groups in which two tensors differ."""
    return (a != b).view(-1, group).any(dim=1).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_nf4_of_bitsandbytes(dtype):
    """The same bits; with double quantisation but for a few blocks of 64, and there nearly."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights(dtype)
    for double in (False, True):
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double
        )
        theirs = functional.dequantize_4bit(packed, state)
        ours = zk.fake_quant(weight, "nf4", double_quant=double)
        if not double:
            assert_same_bits(ours, theirs)
            continue
        assert not torch.equal(ours, zk.fake_quant(weight, "nf4"))
        assert groups_apart(ours, theirs, 64) < 0.01
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES.get)
def test_mxfp4_of_torchao(dtype):
    """The same bits, with OCP's floor rule for scales."""
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = weights(dtype)
    theirs = mx_tensor.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(dtype)
    assert_same_bits(zk.fake_quant(weight, "mxfp4"), theirs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES.get)
def test_nvfp4_of_torchao(dtype):
    """The same bits but for blocks whose scale is at a tie of E4M3."""
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = weights(dtype)
    unit = module.per_tensor_amax_to_scale(weight.float().abs().max())
    theirs = module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=unit).dequantize(dtype)
    ours = zk.fake_quant(weight, "nvfp4")
    assert groups_apart(ours, theirs, 16) < 0.002
    assert (ours - theirs).abs().max() <= weight.abs().max() / 8
