"""Single operations of each SIMD wrapper, lane by lane, against what simd_scalar.h says.

AVX2 is compiled as it is, for processors that have it; emulated.py says what the others prove.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from emulated import FLAGS, compiled, rounding_patterns
from helpers import assert_same_bits

from zo_kernels.backends import native

OPTIONS = {
    **{isa: [f'-DZO_SIMD="simd_{isa}.h"', *flags] for isa, flags in FLAGS.items()},
    "avx2": ['-DZO_SIMD="simd_avx2.h"', "-mavx2", "-mfma", "-mf16c"],
}
del OPTIONS["avx512bf16"]  # the same wrapper as avx512 but for one store
WIDTHS = {"scalar": 1, "neon": 4, "avx2": 8, "avx512": 16}
EDGES = [0, 1, 2, 126, 127, 254, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFF800000]
EDGES += [0x00800000, 0x38800000, 0x7F800000, 0xFFFFFFFE, 0xFFFFFFFF]


@pytest.fixture(scope="module", params=OPTIONS)
def lanes(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The operations of one wrapper."""
    if request.param == "avx2" and "avx2" not in native.available_isas():
        pytest.skip("no AVX2 here")
    loaded = compiled("lanes.cpp", OPTIONS[request.param])
    assert loaded.width() == WIDTHS[request.param]
    return loaded


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def misaligned(array: np.ndarray) -> np.ndarray:
    """A copy, one element away from where memory was given."""
    buffer = np.empty(array.size + 1, array.dtype)
    buffer[1:] = array
    return buffer[1:]


def run(function, *arrays: np.ndarray) -> np.ndarray:
    """The operation on arrays of uint32, whose sizes are multiples of 16."""
    out = misaligned(np.zeros_like(arrays[0]))
    function(*map(address, arrays), address(out), ctypes.c_size_t(out.size))
    return out


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """All pairs of edges, and as many random ones."""
    edges = np.array(EDGES, dtype=np.uint32)
    a, b = (grid.flatten() for grid in np.meshgrid(edges, edges))
    generator = np.random.default_rng(1)
    count = -a.size % 16 + 16 * 20
    more = generator.integers(0, 2**32, (2, count), dtype=np.uint32)
    return misaligned(np.append(a, more[0])), misaligned(np.append(b, more[1]))


def test_comparisons(lanes):
    """max_u32 and min_u32 without sign, less with it; all bits of the lanes where it is so."""
    a, b = pairs()
    assert (run(lanes.maxima, a, b) == np.maximum(a, b)).all()
    assert (run(lanes.minima, a, b) == np.minimum(a, b)).all()
    every = np.uint32(0xFFFFFFFF)
    assert (run(lanes.smaller, a, b) == (a.view(np.int32) < b.view(np.int32)) * every).all()
    assert (run(lanes.equals, a, b) == (a == b) * every).all()
    assert (a == b).sum() >= len(EDGES)


def test_what_fake_quantisation_needs(lanes):
    """Signed maxima and minima of 32-bit and 16-bit lanes, orders of halves, float comparisons."""
    a, b = pairs()
    x, y = a.view(np.int32), b.view(np.int32)
    assert (run(lanes.signed_maxima, a, b).view(np.int32) == np.maximum(x, y)).all()
    assert (run(lanes.signed_minima, a, b).view(np.int32) == np.minimum(x, y)).all()
    assert (run(lanes.picked, a, b) == np.where(x < y, a, b)).all()
    x, y = a.copy().view(np.int16), b.copy().view(np.int16)
    assert (run(lanes.half_maxima, a, b).view(np.int16) == np.maximum(x, y)).all()
    assert (run(lanes.half_minima, a, b).view(np.int16) == np.minimum(x, y)).all()
    assert (run(lanes.half_orders, a).view(np.int16) == np.where(x < 0, x ^ 0x7FFF, x)).all()
    x, y = a.copy().view(np.float32), b.copy().view(np.float32)
    every = np.uint32(0xFFFFFFFF)
    assert (run(lanes.above_as_floats, a, b) == (x > y) * every).all()
    with np.errstate(all="ignore"):
        expected = x / y
    found = run(lanes.quotients, a, b).view(np.float32)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert (found[numbers].view(np.uint32) == expected[numbers].view(np.uint32)).all()


def test_ends_of_vectors(lanes):
    """The greatest and the least lane, wherever it is."""
    width = lanes.width()
    vectors = np.random.default_rng(2).integers(0, 2**32, (16, width), dtype=np.uint32)
    for lane in range(width):
        vectors[lane, lane] = 0x7FFFFFF0 if lane % 2 else 0x80000010
    flat = misaligned(vectors.flatten())
    signed = vectors.view(np.int32)
    assert (run(lanes.highests, flat).view(np.int32)[:16] == signed.max(axis=1)).all()
    assert (run(lanes.lowests, flat).view(np.int32)[:16] == signed.min(axis=1)).all()
    few = np.zeros((16, width), np.uint32)
    few[np.arange(1, 16), np.arange(1, 16) % width] = 1 << np.arange(1, 16)
    assert (run(lanes.any_bits, misaligned(few.flatten()))[:16] == (np.arange(16) > 0)).all()


def test_tables(lanes):
    """One of eight floats by its place; a search tree over all 16-bit integers."""
    eight = np.random.default_rng(3).random(9, dtype=np.float32)[1:]
    places = misaligned(np.arange(160, dtype=np.uint32) * 7 % 64)
    out = misaligned(np.zeros_like(places))
    lanes.chosen(*map(address, (eight, places, out)), ctypes.c_size_t(places.size))
    assert (out.view(np.float32) == eight[places % 8]).all()
    entries = np.sort(np.random.default_rng(4).integers(-(2**15), 2**15, 15)).astype(np.int16)
    entries[3] = entries[4]  # two with nothing between
    tree, steps = np.zeros(16, np.int16), np.arange(16, dtype=np.int16)
    for i in range(1, 16):
        depth = i.bit_length() - 1
        tree[i] = entries[(2 * (i - (1 << depth)) + 1 << 3 - depth) - 1]
    outcomes = np.arange(16, dtype=np.int16) * 4099 - 30000
    values = misaligned(np.arange(-(2**15), 2**15).astype(np.int16).view(np.uint32))
    out = misaligned(np.zeros_like(values))
    arrays = [address(a) for a in (tree + 5 * steps, -steps)]
    lanes.searched(*arrays, 5, *map(address, (outcomes, values, out)), ctypes.c_size_t(values.size))
    expected = outcomes[np.searchsorted(entries, values.view(np.int16), side="left")]
    assert (out.view(np.int16) == expected).all()


def test_shifts_and_loads(lanes):
    a, _ = pairs()
    assert (run(lanes.copies, a) == a).all()
    assert (run(lanes.left_0, a) == a).all()
    for by in (0, 5, 8, 13, 16):
        shifted = run(getattr(lanes, f"right_{by}"), a)
        assert (shifted.view(np.int32) == a.view(np.int32) >> by).all(), by


def test_masks(lanes):
    """The top bit of each lane, whatever the others are; the first lane's is the lowest."""
    a, _ = pairs()
    width = lanes.width()
    out = run(lanes.masks, a)[: a.size // width]
    assert (out == ((a >> 31).reshape(-1, width) << np.arange(width)).sum(axis=1)).all()
    assert lanes.all_lanes() == 2**width - 1


def test_bytes_of_the_lanes_in_a_mask(lanes):
    """Every mask, there and back; up to W bytes are written and what follows them is not."""
    width = lanes.width()
    masks = np.arange(2**width, dtype=np.uint32)
    rows, columns = ctypes.c_size_t(len(masks)), np.arange(2 * width)
    chosen = (masks[:, None] >> columns[:width] & 1).astype(bool)
    values = np.random.default_rng(2).integers(0, 256, chosen.shape, dtype=np.uint32)
    packed = np.full((len(masks), 2 * width), 77, dtype=np.uint8)
    lanes.compress(address(values), address(masks), address(packed), rows)
    first = columns < chosen.sum(axis=1)[:, None]
    assert (packed[first] == values[chosen]).all()
    assert (packed[:, width:] == 77).all()
    packed[~first] = 99  # the codes of later vectors
    back = np.full_like(values, 55)
    lanes.expand(address(packed), address(masks), address(back), rows)
    assert (back == np.where(chosen, values, 0)).all()


def test_rounding_to_half_and_back(lanes):
    """Ties and their neighbours at every exponent, subnormals, infinities and NaN."""
    patterns = rounding_patterns()
    assert len(patterns) % 16 == 0
    rounded = run(lanes.halves, misaligned(patterns.numpy().astype(np.uint32)))
    values = torch.from_numpy(patterns.numpy().astype(np.uint32).view(np.float32))
    assert_same_bits(torch.from_numpy(rounded.view(np.float32)), values.half().float())
