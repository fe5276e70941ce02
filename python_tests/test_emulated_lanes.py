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
