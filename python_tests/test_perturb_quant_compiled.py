"""The kernels of perturb_quant as compiled for sm_90: their code, and their bits on this CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_borders_intact, assert_same_bits, bordered
from test_fake_quant import hard_weights

import zo_kernels as zk

pytest.importorskip("triton")
import run_llir
from compile_kernels import PERTURB_QUANT
from compiled_route import Route, compile_set

from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import launch, perturb_quantize
from zo_kernels.pipeline import inspection

KERNELS = ("perturb_groups_kernel", "perturb_streamed_kernel")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, run_llir.Compiled]:
    """The variants named in compile_kernels.PERTURB_QUANT."""
    if reason := run_llir.unavailable_reason():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("perturb_quant")
    compile_set("perturb_quant", path)
    return run_llir.Compiled.read(path)


@pytest.mark.parametrize("name", PERTURB_QUANT)
def test_bits_of_the_compiled_code(compiled, monkeypatch, name):
    """At several places of the parameter, in both orders of the threads."""
    for kernel in KERNELS:
        monkeypatch.setattr(
            perturb_quantize, kernel, Route(getattr(perturb_quantize, kernel), compiled)
        )
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    route = getattr(perturb_quantize, compiled[name].kernel)
    _, short, scheme, *words = name.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[short]
    group = int(next(word for word in words if word[-1].isdigit()).lstrip("g"))
    rows = {4096: 5, 11008: 3}.get(group, 133)
    distribution = "rademacher" if "rademacher" in words else "normal"
    symmetric = "asymmetric" not in words
    source = hard_weights(rows, group, dtype)
    for offset, backwards in ((0, False), (2**34 - rows * group, True), (5 * 2**34 + 8, False)):
        noise = {"seed": 2**63 + 5, "distribution": distribution}
        expected = torch.empty_like(source)
        zk.combine_(
            [expected], [source], [0.01], directions=[2**32 - 3], streams=[2**31 + 7],
            offsets=[offset], backend="native", **noise,
        )  # fmt: skip
        options = {"group_size": "row", "symmetric": symmetric, "backend": "reference"}
        zk.fake_quant(expected, scheme, out=expected, **options)
        buffer, out = bordered(torch.full_like(source, 7.0), shift=0)
        src = source.clone()
        route.backwards = backwards
        room.perturb_quant(
            out, src, 0.01, scheme, group=group, symmetric=symmetric, scales_of=None, look=None,
            direction=2**32 - 3, stream=2**31 + 7, offset=offset, **noise,
        )  # fmt: skip
        assert_same_bits(out, expected, offset)
        assert_borders_intact(buffer, out)
        assert_same_bits(src, source)
    assert route.launches == [name] * 3


CODE = [
    "perturb_quant bf16 int4 g128",
    "perturb_quant fp32 nf4 g64",
    "perturb_quant fp16 int8 row 4096",
    "perturb_quant bf16 int8 row 11008",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The machine code for sm_90, compiled in another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("inspect")))
        found = inspection.compile_reports({"sm_90": CODE}, lambda *step: None)
    return {report.variant: report for report in found}


@pytest.mark.parametrize("name", CODE)
def test_code(reports, name):
    """No spill, 16-byte accesses, nothing approximate or contracted; shared memory for the ends of
    groups that several warps have."""
    report = reports[name]
    assert set(report.spills.values()) == {0} and report.narrow == 0
    assert set(report.loads) == set(report.stores) == {16}
    assert report.approximate == {} and report.contracted == 0 and report.unknown == {}
    assert report.shared <= (1024 if "row" in name else 0)
