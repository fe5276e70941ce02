"""Held weights of the Triton backend as compiled for H100, run on this CPU.

As test_updates_compiled.py does for the other operations. Perturbing copies is left to the native
backend: test_triton_compiled.py has it.
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
from compiled_route import Route, compile_set
from run_llir import Compiled

from zo_kernels.backends import native
from zo_kernels.backends import triton as room
from zo_kernels.backends.triton import held, holding, launch, perturb, swap

TILE_TABLE, STEPS = launch.tile_table, 4
SIZES = [40_003, 8192, 5, 1024, 33_000, 4097, 1, 777, 0]
OFFSETS = [3, 0, 2**34 - 2, 2**40, 2**34 - 20_000, 5, 1, 7, 0]
ADDRESS = {
    "seed": 0xFEDCBA9876543210,
    "direction": 2**31 + 5,
    "streams": [(i * 0x9E3779B9) % 2**32 for i in range(len(SIZES))],
    "offsets": OFFSETS,
}
KEPT = {"keep": True, "src_scale": 1.0, "stochastic": False, "changes": None}
EPS = [1e-3 * (1 + 0.1 * i) for i in range(len(SIZES))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    """The variants of compile_kernels.SWAP, by name."""
    if reason := run_llir.unavailable_reason():
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("swap")
    compile_set("swap", path)
    return Compiled.read(path)


@pytest.fixture
def route(compiled, monkeypatch) -> Route:
    """Launches of swap_kernel go to the compiled variants."""
    for module, kernel in ((swap, "swap_kernel"), (perturb, "combine_kernel")):
        monkeypatch.setattr(module, kernel, Route(getattr(module, kernel), compiled))
    monkeypatch.setattr(holding, "STEPS", STEPS)
    monkeypatch.setattr(holding, "ready", partial(partial, native.combine_))
    monkeypatch.setattr(launch, "tile_table", partial(TILE_TABLE, steps=STEPS))
    monkeypatch.setattr(launch, "_tables", OrderedDict())  # made with other steps
    return swap.swap_kernel


def originals(dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights as models have them, with a few special ones; one tensor has many."""
    generator = torch.Generator().manual_seed(4)
    made = [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in SIZES]
    for i, w in enumerate(made):
        special = weights(max(len(w) // 500, 1), dtype, seed=i)
        w[::500] = special[: len(w[::500])].new_tensor(special.tolist() * 2)[: len(w[::500])]
    made[7] = weights(777, dtype, seed=7)
    return made


def perturbed(source, scales, distribution, **options) -> list[torch.Tensor]:
    """Out of place by the native backend."""
    made = [s.clone() for s in source]
    call = {k: v for k, v in ADDRESS.items() if k != "direction"}
    zk.combine_(
        made, made, [[c] for c in scales], directions=[ADDRESS["direction"]], backend="native",
        distribution=distribution, **call, **options,
    )  # fmt: skip
    return made


def placed(route: Route, source: list[torch.Tensor], backwards: bool) -> tuple[list, list]:
    """The weights at every misalignment, where the kernel may touch them."""
    borders = [bordered(s, shift=(i + 4 * backwards) % 8) for i, s in enumerate(source)]
    views = [view for _, view in borders]
    route.memory = {f"tensors[{i}]": view for i, view in enumerate(views)}
    route.backwards = backwards
    return borders, views


def check(borders: list, expected: list[torch.Tensor], what: object) -> None:
    for (buffer, view), e in zip(borders, expected, strict=True):
        assert_same_bits(view, e, (what, len(e)))
        assert_borders_intact(buffer, view)


@pytest.mark.parametrize("backwards", [False, True])
def test_there_and_back(route, backwards):
    """Both points and w again, in both orders of the threads; a later hold foresees its bytes."""
    source = originals(torch.bfloat16)
    borders, views = placed(route, source, backwards)
    call = {**ADDRESS, "distribution": "normal"}
    minus = [-c for c in EPS]
    for _ in range(2):
        store = room.swap_(views, None, None, EPS, **call, **KEPT)
        check(borders, perturbed(source, EPS, "normal"), "plus")
        # The smallest, and one of special values, are no larger themselves.
        assert set(store.copies) <= {2, 6, 7}
        store = room.swap_(views, store, EPS, minus, **call, **KEPT)
        check(borders, perturbed(source, minus, "normal"), "minus")
        assert set(store.copies) <= {2, 6, 7}
        # A quarter of the usual tiles: twice the margins.
        assert 0.05 * sum(SIZES) < store.nbytes < 0.2 * sum(SIZES)
        room.swap_(views, store, minus, None, **call, **{**KEPT, "keep": False})
        check(borders, source, "w")
    names = [name.split()[0] + " count" * ("count" in name) for name in route.launches]
    # The second pass finds that the smallest are better copied, and makes them w first.
    first = ["hold count", "hold", "release", "swap", "release"]
    assert names == [*first, "hold", "swap", "release"]


def test_signs_in_float32(route):
    source = originals(torch.float32)
    borders, views = placed(route, source, False)
    call = {**ADDRESS, "distribution": "rademacher"}
    store = room.swap_(views, None, None, EPS, **call, **KEPT)
    assert set(store.copies) <= {2, 6, 7}
    check(borders, perturbed(source, EPS, "rademacher"), "plus")
    room.swap_(views, store, EPS, None, **call, **{**KEPT, "keep": False})
    check(borders, source, "w")


def test_update(route):
    """w scaled and updated in the pass that decodes it, and what changed."""
    source = originals(torch.bfloat16)
    source[7] = source[7].nan_to_num(0.5, 0.5, 0.5)
    source = [torch.where(s.abs() < 100, s, 1.0).to(s.dtype) for s in source]
    borders, views = placed(route, source, False)
    call = {**ADDRESS, "distribution": "normal"}
    update = [1e-4 * (i - 3) for i in range(len(SIZES))]
    changes = [torch.empty(len(SIZES), 3, dtype=torch.float64) for _ in range(2)]
    store = room.swap_(views, None, None, EPS, **call, **KEPT)
    options = {"src_scale": 0.875, "changes": changes[0]}
    room.swap_(
        views, store, EPS, update, **call, **KEPT | {"keep": False, "stochastic": True} | options
    )
    options["changes"] = changes[1]
    check(borders, perturbed(source, update, "normal", rounding="stochastic", **options), "update")
    assert torch.equal(changes[0][:, 2], changes[1][:, 2])
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("passes", [(0,), (1,)], ids=["hold", "swap"])
def test_regions_that_are_too_small(route, monkeypatch, passes):
    """Tiles that end early in either pass: their tensors are copied, the others keep regions."""
    capacities: Callable = held._capacities

    def too_small(state, exact):
        found = capacities(state, exact)
        if (exact and 0 in passes) or (not exact and 1 in passes):
            found[::5] = found[::5] * 3 // 5 // 16 * 16
        return found

    monkeypatch.setattr(held, "_capacities", too_small)
    source = originals(torch.bfloat16)
    borders, views = placed(route, source, False)
    call = {**ADDRESS, "distribution": "normal"}
    minus = [-c for c in EPS]
    store = room.swap_(views, None, None, EPS, **call, **KEPT)
    check(borders, perturbed(source, EPS, "normal"), "plus")
    assert (0 in store.copies) == (0 in passes) and store.regions
    store = room.swap_(views, store, EPS, minus, **call, **KEPT)
    check(borders, perturbed(source, minus, "normal"), "minus")
    assert 0 in store.copies and store.regions
    copied = sum(copy.nbytes for copy in store.copies.values())
    assert store.nbytes - copied < 0.3 * sum(SIZES)
    room.swap_(views, store, minus, None, **call, **{**KEPT, "keep": False})
    check(borders, source, "w")
