"""The Triton backend's kernels as compiled for H100, run on this CPU: bits, faults, launches.

compile_kernels.py compiles in a process without the interpreter, run_llir.py runs the LLVM IR, and
the backend's own host code prepares the launches. test_inspect.py looks at the code itself.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_borders_intact, assert_same_bits, bits, bordered, weights
from torch import Tensor

import zo_kernels as zk

pytest.importorskip("triton")
import run_llir
from compile_kernels import COMBINE, combine_variant
from compiled_route import Route, compile_set
from run_llir import Compiled, MemoryFault

from zo_kernels import noise
from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import launch, perturb

KERNELS = {name: getattr(perturb, name) for name in ("combine_kernel", "emit_kernel")}
TILE_TABLE = launch.tile_table


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """The variants of compile_kernels.COMBINE, and those of emit_kernel, by name."""
    if reason := run_llir.unavailable_reason():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("combine")
    compile_set("combine", path)
    return Compiled.read(path)


@pytest.fixture
def routed(compiled, monkeypatch) -> Callable[..., Route]:
    """Launches go to the compiled variants; steps per program and one variant can be changed.

    Gives the route of combine_kernel; perturb.emit_kernel has one too.
    """

    def route(steps: int = perturb.STEPS, name: str | None = None, **changed) -> Route:
        variants = dict(compiled)
        if name is not None:
            variants[name] = replace(variants[name], **changed)
        for kernel, original in KERNELS.items():
            monkeypatch.setattr(perturb, kernel, Route(original, variants))
        monkeypatch.setattr(launch, "STEPS", steps)
        monkeypatch.setattr(launch, "tile_table", partial(TILE_TABLE, steps=steps))
        monkeypatch.setattr(launch, "_tables", OrderedDict())  # made with other steps
        return perturb.combine_kernel

    return route


def combine(route: Route, dst: list[Tensor], src: list[Tensor], memory=None, **call) -> None:
    """The Triton backend's combine_; kernels may touch dst and src, as ``memory`` has them."""
    route.memory = {f"dst[{i}]": tensor for i, tensor in enumerate(dst)}
    route.memory |= {f"src[{i}]": t for i, t in enumerate(src) if t is not dst[i]}
    route.memory |= memory or {}
    rounding, call["src_scale"] = call.pop("rounding"), call.get("src_scale", 1.0)
    call |= {"distribution": call.get("distribution", "normal"), "changes": call.get("changes")}
    room.combine_(dst, src, stochastic=rounding == "stochastic", **call)


def call_of(options: dict, tensors: int, directions: int) -> dict:
    """Arguments of combine_ for a case of compile_kernels.COMBINE."""
    offsets = [3, 0, 2**34 - 2, 2**40, 2**34 - 40_000, 5, 1, 7]
    return {
        "scales": [[3e-3 * (i + 1) / (k + 2) for k in range(directions)] for i in range(tensors)],
        "seed": 0xFEDCBA9876543210,
        "directions": [2**32 - 5, 0, 17, 2**31, 3][:directions],
        "streams": [(i * 0x9E3779B9) % 2**32 for i in range(tensors)],
        "offsets": [offsets[i % len(offsets)] for i in range(tensors)],
        "rounding": "stochastic" if options.get("stochastic") else "nearest",
        "distribution": "rademacher" if options.get("rademacher") else "normal",
        "src_scale": 0.875 if options.get("scale_src") else 1.0,
    }


CASES = [(*case, k) for case in COMBINE for k in ((1,) if case[3].get("single", True) else (2, 5))]


@pytest.mark.parametrize(
    ("src_dtype", "dst_dtype", "steps", "options", "directions"),
    CASES,
    ids=[f"{combine_variant(*case).name}, {k}".replace(" ", "-") for *case, k in CASES],
)
def test_bits(routed, src_dtype, dst_dtype, steps, options, directions):
    """A ragged list at every misalignment, in place or not, in both orders of the threads."""
    sizes = [40_003, 8192, 5, 1024, 33_000, 4097, 1, 777, 0]
    call = call_of(options, len(sizes), directions)
    source = [weights(size, src_dtype, seed=size) for size in sizes]
    if options.get("changes"):  # sums say nothing where some are NaN
        source = [torch.where(s.abs() < 100, s, 1.0).to(src_dtype) for s in source]
    expected = [torch.empty_like(s, dtype=dst_dtype) for s in source]
    changes = [torch.empty(len(sizes), 3, dtype=torch.float64) for _ in range(3)]
    given = (lambda n: {"changes": changes[n]}) if options.get("changes") else lambda n: {}
    zk.combine_(expected, source, backend="native", **call, **given(0))
    for backwards in (False, True):
        route = routed(steps=steps)
        shift = 4 * backwards
        src = [bordered(s, shift=(3 * i + shift) % 8)[1] for i, s in enumerate(source)]
        borders = [bordered(e, shift=(i + shift) % 8) for i, e in enumerate(expected)]
        if src_dtype == dst_dtype:
            borders = [bordered(s, shift=(i + shift) % 8) for i, s in enumerate(source)]
            src = [view for _, view in borders]
        dst = [view for _, view in borders]
        places = {d.data_ptr() % 16 // d.element_size() for d in dst[:-1]}
        assert places == set(range(16 // dst_dtype.itemsize))
        route.backwards = backwards
        combine(route, dst, src, **call, **given(1 + backwards))
        assert len(route.launches) == 1
        for (buffer, view), e, size in zip(borders, expected, sizes, strict=True):
            assert_same_bits(view, e, size)
            assert_borders_intact(buffer, view)
        if options.get("changes"):
            found = changes[1 + backwards]
            assert torch.equal(found[:, 2], changes[0][:, 2])
            torch.testing.assert_close(found, changes[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_million_elements(routed, dtype):
    tensor = weights(10_000_003, dtype, seed=1)
    expected = tensor.clone()
    call = call_of({"stochastic": True}, 1, 1)
    combine(routed(), [tensor], [tensor], **call)
    zk.combine_([expected], [expected], backend="native", **call)
    assert_same_bits(tensor, expected)


@pytest.mark.parametrize("largest", [100_000, 1000])
def test_three_hundred_tensors(routed, monkeypatch, largest):
    """One launch per dtype, whatever the sizes and alignments; the interpreter agrees.

    It takes a second per ten tensors, so it gets the small ones only.
    """
    generator = torch.Generator().manual_seed(9)
    exponents = torch.rand(300, generator=generator) * math.log2(1.2 * largest)
    sizes = (2**exponents).long().clamp(max=largest).tolist()
    sizes[::60] = [0] * 5
    source = mixed(sizes)
    call = call_of({"stochastic": True}, 300, 1)
    expected = [s.clone() for s in source]
    zk.combine_(expected, expected, backend="native", **call)
    if largest <= 1000:
        launches = []
        hooks = [lambda *given, **_: launches.append(given)]
        monkeypatch.setattr(perturb.combine_kernel, "pre_run_hooks", hooks)
        check_list(partial(zk.combine_, backend="triton"), source, expected, call)
        assert len(launches) == 3
    route = routed()
    check_list(partial(combine, route), source, expected, call)
    assert len(route.launches) == len(set(route.launches)) == 3


def mixed(sizes: list[int]) -> list[Tensor]:
    """Weights of the three dtypes in turn."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [weights(size, dtypes[i % 3], seed=i) for i, size in enumerate(sizes)]


def check_list(function: Callable, source: list[Tensor], expected: list[Tensor], call) -> None:
    """function in place on the source at all misalignments gives what is expected."""
    borders = [bordered(s, shift=i // 3 % 8) for i, s in enumerate(source)]
    views = [view for _, view in borders]
    function(views, views, **call)
    for i, ((buffer, view), e) in enumerate(zip(borders, expected, strict=True)):
        assert_same_bits(view, e, i)
        assert_borders_intact(buffer, view)


@pytest.mark.parametrize(
    ("what", "offset"),
    [("normal", 6), ("normal", 2**40 + 5), ("rademacher", 2**39 - 9), ("random_words", 2**34 - 9)],
)
def test_emitted(routed, what, offset):
    routed()
    address = {"seed": 2**63 + 5, "direction": 2**31 + 1, "stream": 7, "offset": offset}
    found = getattr(room, what)(3001, **address, device=torch.device("cpu"))
    assert torch.equal(found, getattr(zk, what)(3001, backend="reference", **address))
    assert len(perturb.emit_kernel.launches) == 1


MUTATIONS = {
    "philox": (noise.PHILOX_M1, noise.PHILOX_M1 + 2),
    "radius": (noise.RADIUS[0], noise.RADIUS[0] + 1.0),
    "sine": (noise.SINE[1], noise.SINE[1] + 2.0**-21),
}


def spellings(value: int | float) -> list[str]:
    """A constant as LLVM writes it; floats as bits of binary32, in older versions of binary64."""
    if isinstance(value, int):
        return [str(value)]
    return [f"{p}0x{struct.pack(f, value).hex().upper()}" for p, f in (("f", ">f"), ("", ">d"))]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_constant_is_caught(compiled, routed, mutation):
    """A wrong multiplier, and polynomial coefficients that are wrong in the last place."""
    variant = compiled["combine fp32 16 steps"]
    ir = variant.ir
    for old, new in zip(*map(spellings, MUTATIONS[mutation]), strict=True):
        ir = re.sub(rf"\b{old}\b", new, ir)
    assert ir != variant.ir
    source, call = torch.zeros(50_000), call_of({}, 1, 1)
    expected = source.clone()
    zk.combine_([expected], [expected], backend="native", **call)
    shares = []
    for changed in ({}, {"ir": ir}):
        found = source.clone()
        combine(routed(name=variant.name, **changed), [found], [found], **call)
        shares.append((bits(found) != bits(expected)).double().mean().item())
    assert shares[0] == 0 and shares[1] > (0.99 if mutation == "philox" else 0.05), shares


@pytest.mark.parametrize("name", ["combine bf16 stochastic 16 steps", "combine fp32 16 steps"])
def test_skipped_alignment_test_is_caught(compiled, routed, name):
    """The kernel without its look at the low bits of addresses, on a misaligned view."""
    ir, hits = re.subn(r"(\band i\d+ %[\w.]+, )(15|14|12)\b", r"\g<1>0", compiled[name].ir)
    assert hits >= 2  # of dst and of src
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    tensor, call = weights(10_001, dtype)[1:], call_of({"stochastic": True}, 1, 1)
    combine(routed(), [tensor], [tensor], **call)
    with pytest.raises(MemoryFault, match=f"{name}, .*misaligned: .*v4.b32, 16 bytes.* of dst.0."):
        combine(routed(name=name, ir=ir), [tensor], [tensor], **call)


@pytest.mark.parametrize(("count", "width"), [(8192, 16), (8191, 2)])
def test_short_tensor_is_caught(routed, count, width):
    """A tensor with one element less than the table says."""
    tensor, call = weights(count, torch.bfloat16), call_of({"stochastic": True}, 1, 1)
    call["offsets"] = [0]
    last = bits(tensor[-1:]).clone()

    fault = f"out of bounds: .*, {width} bytes .* of dst.0., which has {tensor[1:].nbytes} bytes"
    with pytest.raises(MemoryFault, match=fault):
        combine(routed(), [tensor], [tensor], memory={"dst[0]": tensor[:-1]}, **call)
    assert torch.equal(bits(tensor[-1:]), last)
