"""pair_, advance_ and swap_ of the Triton backend as compiled for H100, run on this CPU.

As test_triton_compiled.py does for combine_: the backend's host code, the compiler's LLVM IR, every
access checked, both orders of the threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import assert_borders_intact, assert_same_bits, bordered, weights

import zo_kernels as zk

pytest.importorskip("triton")
import run_llir
from compile_kernels import ADVANCE, PAIR, advance_variant, combine_variant
from compiled_route import Route, compile_set
from run_llir import Compiled

from zo_kernels.backends import native
from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import advance, launch, perturb, updates

TILE_TABLE = launch.tile_table
KERNELS = [(perturb, "combine_kernel"), (advance, "advance_kernel")]
SIZES = [40_003, 8192, 5, 1024, 33_000, 4097, 1, 777, 0]
STREAMS = [(i * 0x9E3779B9) % 2**32 for i in range(len(SIZES))]
OFFSETS = [3, 0, 2**34 - 2, 2**40, 2**34 - 40_000, 5, 1, 7, 0]
SEED = 0xFEDCBA9876543210


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """The variants of the set "updates" of compile_kernels.py, by name."""
    if reason := run_llir.unavailable_reason():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("updates")
    compile_set("updates", path)
    return Compiled.read(path)


@pytest.fixture
def routed(compiled, monkeypatch) -> Callable[..., Route]:
    """Launches go to the compiled variants with so many steps per program.

    Gives the route of a module's kernel.
    """

    def route(module, name: str, steps: int) -> Route:
        for place, kernel in KERNELS:
            monkeypatch.setattr(place, kernel, Route(getattr(place, kernel), compiled))
        monkeypatch.setattr(launch, "STEPS", steps)
        monkeypatch.setattr(updates, "STEPS", steps)
        monkeypatch.setattr(launch, "tile_table", partial(TILE_TABLE, steps=steps))
        monkeypatch.setattr(launch, "_tables", OrderedDict())  # made with other steps
        return getattr(module, name)

    return route


def views(source: list[torch.Tensor], shift: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers with sentinels and views in them, at every misalignment."""
    return [bordered(s, shift=(i + shift) % 8) for i, s in enumerate(source)]


@pytest.mark.parametrize("case", PAIR, ids=[combine_variant(*case).name for case in PAIR])
def test_pair(routed, case):
    """Outputs at other misalignments than src, and at the same."""
    dtype, _, steps, options = case
    source = [weights(size, dtype, seed=size) for size in SIZES]
    scales = [3e-3 * (i + 1) for i in range(len(SIZES))]
    distribution = "rademacher" if options.get("rademacher") else "normal"
    call = {"seed": SEED, "streams": STREAMS, "offsets": OFFSETS, "distribution": distribution}
    expected = []
    for sign in (1, -1):
        made = [s.clone() for s in source]
        rows = [[sign * scale] for scale in scales]
        zk.combine_(made, made, rows, directions=[17], backend="native", **call)
        expected.append(made)
    route = routed(perturb, "combine_kernel", steps)
    for backwards, shifts in ((False, (0, 0, 0)), (True, (0, 1, 3))):
        outputs = views(expected[0], shifts[0]), views(expected[1], shifts[1])
        src = [view for _, view in views(source, shifts[2])]
        for _, view in (*outputs[0], *outputs[1]):
            view.fill_(7.0)
        plus, minus = ([view for _, view in output] for output in outputs)
        named = {"plus": plus, "minus": minus, "src": src}
        route.memory = {f"{n}[{i}]": t for n, ts in named.items() for i, t in enumerate(ts)}
        route.backwards = backwards
        room.pair_(plus, minus, src, scales, direction=17, **call)
        for output, wanted in zip(outputs, expected, strict=True):
            for (buffer, view), e, size in zip(output, wanted, SIZES, strict=True):
                assert_same_bits(view, e, size)
                assert_borders_intact(buffer, view)
        for view, s in zip(src, source, strict=True):
            assert_same_bits(view, s)
    assert len(route.launches) == 2


@pytest.mark.parametrize("case", ADVANCE, ids=[advance_variant(*case).name for case in ADVANCE])
def test_advance(routed, case):
    """As the native backend, in both orders of the threads; residuals at misalignments too."""
    dtype, steps, options = case
    source = [weights(size, dtype, seed=size) for size in SIZES]
    if options.get("changes"):  # sums say nothing where some are NaN
        source = [torch.where(s.abs() < 100, s, 1.0).to(dtype) for s in source]
    generator = torch.Generator().manual_seed(5)
    rests = [torch.randint(-128, 128, s.shape, generator=generator).to(torch.int8) for s in source]
    lengths = [1] * 6 if options.get("single", True) else [1, 3, 2]
    directions = [(2**32 - 3 + k) % 2**32 for k in range(6)]
    call = {
        "scales": [[1e-3 * (i + 1) * (k - 2.5) for k in range(6)] for i in range(len(SIZES))],
        "seed": SEED,
        "directions": directions,
        "lengths": lengths,
        "src_scales": [0.875 if options.get("scale_src") else 1.0] * len(lengths),
        "streams": STREAMS,
        "offsets": OFFSETS,
        "stochastic": options.get("stochastic", False),
        "distribution": "rademacher" if options.get("rademacher") else "normal",
    }
    expected, kept = [s.clone() for s in source], [r.clone() for r in rests]
    given = kept if options.get("residuals") else None
    made = [torch.empty(len(SIZES), 3, dtype=torch.float64) for _ in range(2)]
    changes = made if options.get("changes") else [None, None]
    native.advance_(expected, given, changes=changes[0], **call)
    route = routed(advance, "advance_kernel", steps)
    for backwards in (False, True):
        borders = views(source, 4 * backwards)
        found = [view for _, view in borders]
        # The first ones as the weights are, the others not.
        spaces = [torch.cat([r.new_zeros(16), r, r.new_zeros(16)]) for r in rests]
        low = [
            s[16 + (3 + i // 4) * (i > 3) :][: len(r)].copy_(r)
            for i, (s, r) in enumerate(zip(spaces, rests, strict=True))
        ]
        route.memory = {f"tensors[{i}]": t for i, t in enumerate(found)}
        if given is not None:
            route.memory |= {f"residuals[{i}]": t for i, t in enumerate(low)}
        route.backwards = backwards
        room.advance_(found, low if given else None, changes=changes[1], **call)
        for i, ((buffer, view), e) in enumerate(zip(borders, expected, strict=True)):
            assert_same_bits(view, e, SIZES[i])
            assert_borders_intact(buffer, view)
            assert torch.equal(low[i], kept[i])
        if changes[0] is not None:
            assert torch.equal(changes[0][:, 2], changes[1][:, 2])
            torch.testing.assert_close(changes[1], changes[0], rtol=1e-5, atol=0)
    assert len(route.launches) == 2
