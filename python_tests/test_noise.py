"""The noise contract: addresses, words, normals, and the constants shared by its three copies."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import make_noise_vectors
import pytest
import torch
from helpers import assert_same_bits, philox_words
from torch import Tensor, nn

import zo_kernels as zk
from zo_kernels import noise, vectors
from zo_kernels.backends import reference

CSRC = Path(__file__).parents[1] / "csrc"
ONES = 0xFFFFFFFF
# Random123's known answers for Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
VECTORS = vectors.read()
# Triton's interpreter takes a twentieth of a second per line: a part, with all types and roundings.
INTERPRETED = VECTORS[::5]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, words):
    """The tests' own Philox and the reference's are Philox4x32-10 as published."""
    block, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    address = {"seed": seed, "stream": counter[2], "direction": counter[3]}
    assert philox_words(block, **address) == words
    signed = block - (1 << 64) if block >> 63 else block
    assert tuple(w.item() for w in reference.philox(torch.tensor(signed), **address)) == words


@pytest.mark.parametrize("offset", [0, 1, 3, 2**32 - 6, 2**34 - 5, 2**40 + 3, 2**62 - 9])
def test_words_are_philox_at_the_stated_counter(backend, device, offset):
    """random_words is published Philox at counter (index // 4, stream, direction), word index % 4.

    The first address has the zero counter and key of the first known answer. The other two known
    answers have blocks beyond the largest index, 2^62, and are checked on the inner functions
    (above, and in test_emulated_isas.py for C++).
    """
    for seed, direction, stream in [
        (0, 0, 0),
        (2**64 - 1, ONES, ONES),
        (0x299F31D0A4093822, 0x03707344, 0x13198A2E),
    ]:
        address = {"seed": seed, "direction": direction, "stream": stream}
        actual = zk.random_words(9, **address, offset=offset, backend=backend, device=device)
        expected = [philox_words(i // 4, **address)[i % 4] for i in range(offset, offset + 9)]
        assert actual.tolist() == expected
    if offset == 0:
        first = zk.random_words(4, seed=0, direction=0, stream=0, backend=backend, device=device)
        assert tuple(first.tolist()) == KNOWN_ANSWERS[0][2]


def test_the_table_is_of_this_spec():
    """The package's vectors name this NOISE_SPEC, and their script still writes exactly them."""
    text = vectors.table_text()
    assert f"NOISE_SPEC {noise.NOISE_SPEC}." in text.splitlines()[0]
    assert text == make_noise_vectors.table() == make_noise_vectors.PATH.read_text()
    kinds = [vector.kind for vector in VECTORS]
    for part in (VECTORS, INTERPRETED):
        updates = [v.fields for v in part if v.kind == "update"]
        assert len({(f[4], f[9], f[8]) for f in updates}) == 9 * 2  # types and roundings
    assert kinds.count("normal") > 60 and kinds.count("update") == 9 * 7 * 2
    signs = [vector.fields[4] for vector in VECTORS if vector.kind == "rademacher"]
    assert len(signs) == 64 and 20 < signs.count("3f800000") < 44
    assert text.splitlines()[-len(VECTORS) :] == [str(vector) for vector in VECTORS]


def test_vectors_of_the_table(backend, device):
    """Every backend gives the words, normals and updates of the table, to the bit."""
    for vector in INTERPRETED if backend == "triton" and device == "cpu" else VECTORS:
        for op, call, expected in vector.calls(backend, device):
            assert_same_bits(call().cpu(), expected, (op, str(vector)))


def exact_box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radius and both normals of the words in float64."""
    # As the contract has it: u is rounded to binary32.
    u = ((a & 0xFFFFFF00) | 0x80).float().double() / 2**32
    radius = torch.sqrt(-2 * torch.log(u))
    t = (b & 0x7FFFFF00).double() * 2.0**-31 - 0.5 + 2.0**-24
    cosine = torch.where(b >= 2**31, -1.0, 1.0) * torch.cos(math.pi * t)
    return radius, radius * cosine, radius * torch.sin(math.pi * t)


@pytest.mark.parametrize("which", ["random", "largest u", "smallest u"])
def test_accuracy_against_float64(which):
    """Normals differ from float64 Box-Muller of the same words by at most 2^-16.48 radii.

    The fits allow 3.7e-6 (radius) + 0.4e-6 (root) + 6.7e-6 (cosine) = 2^-16.49, or 2^-17.69 with
    the sine's 0.6e-6; float32 rounding adds a few 2^-25. Measured: 2^-16.50 and 2^-17.65.
    """
    generator = torch.Generator().manual_seed(3)
    count = 1 << 18
    a = {
        "random": torch.randint(0, 2**32, (count,), generator=generator),
        "largest u": torch.arange(2**32 - (count << 8), 2**32, 256),
        "smallest u": torch.arange(count) << 8,
    }[which]
    b = torch.randint(0, 2**32, (count,), generator=generator)
    radius, e0, e1 = exact_box_muller(a, b)
    z0, z1 = reference.box_muller(a, b)
    assert ((z0 - e0).abs() <= 2**-16.48 * radius).all()
    assert ((z1 - e1).abs() <= 2**-17.63 * radius).all()


def test_the_tail_ends_at_588_sigma_and_the_centre_at_zero():
    """Word 0 gives the largest radius, 5.8871; u = 1 gives exactly zero and no NaN; signs flip."""
    b = torch.tensor([0x40000000, 0xC0000000, 0, 0x7FFFFF00])
    z0, z1 = reference.box_muller(torch.zeros_like(b), b)
    largest = math.sqrt(-2 * math.log(2.0**-25))
    assert abs(z0[0].item() / largest - 1) < 2**-16.48 and abs(largest - 5.887) < 1e-3
    assert z0[1] == -z0[0] and z1[1] == z1[0]
    assert abs(z1[2].item() / -largest - 1) < 2**-16.48 and z1[3] == -z1[2]
    for word in (0xFFFFFFFF, 0xFFFFFF00):
        z0, z1 = reference.box_muller(torch.full_like(b, word), b)
        assert (z0 == 0).all() and (z1 == 0).all()


def test_stream_id_is_sha256():
    """Streams are stable: the first four bytes, little-endian, of known SHA-256 digests."""
    assert zk.stream_id("") == 0x42C4B0E3  # e3b0c442...
    assert zk.stream_id("abc") == 0xBF1678BA  # ba7816bf...
    name = "model.layers.0.self_attn.q_proj.weight"
    assert zk.stream_id(name) != zk.stream_id("module." + name)


@pytest.mark.parametrize(
    "name, canonical",
    [
        ("model.norm.weight", "model.norm.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module._fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "a.w"),
        ("modules.a.module_list.w", "modules.a.module_list.w"),
        ("base_model.model.a.q_proj.base_layer.weight", "a.q_proj.weight"),
        (
            "base_model.model.a.q_proj.lora_A.default.weight",
            "base_model.model.a.q_proj.lora_A.weight",
        ),
        ("base_model.model.a.lora_embedding_B.other", "base_model.model.a.lora_embedding_B"),
    ],
)
def test_canonical_names(name, canonical):
    """Wrappers and PEFT leave no mark on the name of a base weight; saved names stay as saved."""
    assert noise.canonical_name(name) == canonical
    assert noise.canonical_name(canonical) == canonical


def test_assign_streams_resolves_collisions_whatever_the_order(monkeypatch):
    """With a 3-bit hash eight names collide, get eight streams, and the order does not matter."""
    monkeypatch.setattr(noise, "stream_id", lambda name: sum(name.encode()) % 8)
    names = [f"layer{i}.weight" for i in (7, 0, 3, 8, 1, 5, 2, 6)]
    assert len({noise.stream_id(name) for name in names}) < len(names)
    streams = noise.assign_streams(names)
    assert list(streams) == names and len(set(streams.values())) == len(names)
    assert noise.assign_streams(reversed(names)) == streams
    # The name that sorts first keeps its own stream.
    assert streams["layer0.weight"] == noise.stream_id("layer0.weight")


def test_assign_streams_without_collision_is_stream_id():
    """A wrapped model's streams are the bare model's; one parameter under two names is an error."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    bare = noise.model_streams(model)
    assert bare == {name: zk.stream_id(name) for name, _ in model.named_parameters()}
    wrapped = noise.model_streams(nn.ModuleDict({"module": model}))
    assert list(wrapped.values()) == list(bare.values())
    with pytest.raises(ValueError, match=r"distinct parameters, got 'w' and 'module\.w'"):
        noise.assign_streams(["w", "module.w"])


def test_directions_of_training_and_evaluation_never_meet():
    """Reserved ranges are disjoint, above all training directions and below 2^32."""
    starts = [
        noise.EVAL_WEIGHT_NOISE,
        noise.EVAL_ACTIVATION_NOISE,
        noise.LAYER_SCORING,
        noise.CALIBRATION,
        noise.RANDOM_WALK,
    ]
    assert starts[0] >= noise.DIRECTION_LIMIT == 2**31
    ends = [start + noise.RESERVED_RANGE for start in starts]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= 2**32


def test_training_direction():
    """step * queries + query, and an error at 2^31 and below 0."""
    assert noise.training_direction(5, 3, 2) == 17
    assert noise.training_direction(2**31 - 1, 1, 0) == 2**31 - 1
    with pytest.raises(ValueError, match=r"in \[0, 2\^31\), got 1073741824 \* 2 \+ 0"):
        noise.training_direction(2**30, 2, 0)
    with pytest.raises(ValueError, match="training_direction: expected"):
        noise.training_direction(-1, 2, 0)


def test_the_header_has_the_same_constants():
    """csrc/noise.h and zo_kernels/noise.py state the same numbers, exactly."""
    text = (CSRC / "noise.h").read_text()
    for name in ("PHILOX_M0", "PHILOX_M1", "PHILOX_W0", "PHILOX_W1", "RSQRT_SEED"):
        assert int(re.search(rf"\b{name} = (0x\w+)u\b", text)[1], 16) == getattr(noise, name), name
    assert int(re.search(r"PHILOX_ROUNDS = (\d+);", text)[1]) == noise.PHILOX_ROUNDS
    for name in ("RADIUS", "SQRT", "SINE", "COSINE"):
        listed = re.search(rf"float {name}\[\d\] = \{{([^}}]*)\}}", text)[1]
        values = [float.fromhex(v.strip().removesuffix("f")) for v in listed.split(",")]
        assert tuple(values) == getattr(noise, name), name
    assert "splat(0x1p-31f)" in text and noise.ANGLE_SCALE == 2.0**-31
    assert "splat(-0.5f + 0x1p-24f)" in text and noise.ANGLE_SHIFT == -0.5 + 2.0**-24


def test_the_polynomials_are_the_fitted_ones():
    """csrc/fit_polynomials.py still produces the constants, with the error bounds it prints."""
    spec = importlib.util.spec_from_file_location("fit", CSRC / "fit_polynomials.py")
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    radius, radius_bound = fit.radius()
    seed, root, root_bound = fit.square_root()
    sine, sine_bound = fit.sine()
    cosine, cosine_bound = fit.cosine()
    assert seed == noise.RSQRT_SEED
    fitted = [tuple(map(float, c)) for c in (radius, root, sine, cosine)]
    assert fitted == [noise.RADIUS, noise.SQRT, noise.SINE, noise.COSINE]
    assert radius_bound < 2**-18 and root_bound < 2**-21
    assert sine_bound < 2**-20.6 and cosine_bound < 2**-17.1
