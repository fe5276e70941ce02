"""The noise contract: every random number of a run has an address.

    z = normal(seed: u64, direction: u32, stream: u32, index: u64)

The four fields are the 192 input bits of Philox4x32-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC'11): key = seed, counter = (block lo, block hi, stream, direction), with
``block = index // 4`` and ``index`` the element's flat row-major index in the full, unsharded
parameter. Word ``index % 4`` of the block belongs to the element; normals come from the word pairs
(w0, w1) and (w2, w3) by Box-Muller, in binary32 and integer arithmetic only:

    V  = float32((a & ~0xff) | 0x80)                radius: top 24 bits of a, half-bit centred
    u  = bits(V);  d = float32(0x4f800000 - u)      bit distance below 2^32
    h  = float((u & 0x7fffff) | 0x3f800000) - 1.5   mantissa of V, centred
    y  = fma(fma(h, h, -1/4), R(h), d)              -log2(V / 2^32) * 2^23
    s  = float(RSQRT_SEED - (bits(y) >> 1))         integer seed of 1 / sqrt(y)
    g  = y * s;  w = g * s;  r = g * S(w)           sqrt(2 ln 2 * 2^-23 * y)
    t  = fma(float32(b & 0x7fffff00), 2^-31, -1/2 + 2^-24);  x = t * t
    z0 = r * (C(x), with its sign flipped by bit 31 of b);  z1 = r * (P(x) * t)

R, S, P, C are the polynomials below in Horner form with fma, highest power first. The polynomials
are the definition; csrc/fit_polynomials.py prints them with their error bounds. The low bytes that
the normals do not use are the elements' 16 rounding bits: (lo(a) << 8 | lo(b)) for the first of a
pair, (lo(b) << 8 | lo(a)) for the second.

Rademacher directions have signs z = +1 or -1 at the same addresses, 128 to a Philox call:

    s = index // 4096;  g = index % 4096 // 256;  l = index % 256 // 8;  e = index % 8
    counter = (b lo, b hi | 2^31, stream, direction) with b = 32 s + l
    z = 1 - 2 * (bit e of byte g of the four words, byte 0 the lowest of w0)

so a machine that computes 32 neighbouring calls at once finds the signs of 8 contiguous elements
in one byte of one of them. The top bit of the second word keeps these calls apart from those of
normals. Rounding bits are those of the normals at the same address, whatever the distribution.

This module states constants and addresses; the arithmetic is in backends/reference.py,
csrc/noise.h and backends/triton/noise.py, and gives the same bits in all three.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: Version of the contract. Any change of an output bit is a new number.
NOISE_SPEC = 1

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10


def _floats(*hexadecimal: str) -> tuple[float, ...]:
    return tuple(float.fromhex(text) for text in hexadecimal)


#: Polynomials, lowest power first; every value is exact in binary32.
RADIUS = _floats("0x1.5bfe7ep+21", "-0x1.38d5dp+20", "0x1.3e40b8p+19", "-0x1.6614e4p+18",
                 "0x1.43b97ep+17")  # fmt: skip
SQRT = _floats("0x1.056beep-10", "-0x1.489ed2p-10", "0x1.ef6cc2p-11", "-0x1.283786p-12")
SINE = _floats("0x1.921f5cp+1", "-0x1.4ab276p+2", "0x1.455cd6p+1", "-0x1.1bf83ep-1")
COSINE = _floats("0x1.ffff2p-1", "-0x1.3bc5a8p+2", "0x1.02a486p+2", "-0x1.38de84p+0")
RSQRT_SEED = 0x5F1FF800
ANGLE_SCALE = 2.0**-31
ANGLE_SHIFT = -0.5 + 2.0**-24

#: What z can be.
DISTRIBUTIONS = ("normal", "rademacher")
#: Second counter word of Rademacher calls: their blocks are no normals' blocks.
RADEMACHER_DOMAIN = 1 << 31
#: Elements of 32 Rademacher calls, and how many contiguous ones of them share a byte.
RADEMACHER_SPAN, RADEMACHER_GROUP = 4096, 8

#: Training directions are below this; those above are reserved, each range for one use.
DIRECTION_LIMIT = 1 << 31
#: Weight noise of evaluations: EVAL_WEIGHT_NOISE + draw.
EVAL_WEIGHT_NOISE = 0x8000_0000
#: Activation noise of evaluations: EVAL_ACTIVATION_NOISE + draw.
EVAL_ACTIVATION_NOISE = 0x9000_0000
#: Draws that score layers: LAYER_SCORING + draw.
LAYER_SCORING = 0xA000_0000
#: Draws that calibrate a learning rate or estimate curvature: CALIBRATION + draw.
CALIBRATION = 0xB000_0000
#: Random-walk control arms: RANDOM_WALK + step.
RANDOM_WALK = 0xC000_0000
#: Length of each reserved range.
RESERVED_RANGE = 1 << 28

_WRAPPER_SEGMENTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# PEFT keeps an adapter's parameters under its name and saves them without it: a module dictionary
# (lora_A.default.weight -> lora_A.weight) or a parameter dictionary (lora_embedding_A.default).
_PEFT_ADAPTER = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?=\.)|\.(lora_embedding_[AB])\.[^.]+$"
)
_PEFT_SEGMENT = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_PEFT_PREFIX = "base_model.model."


def canonical_name(name: str) -> str:
    """The name of a parameter as the bare Hugging Face model's ``named_parameters()`` has it.

    Segments added by DDP, FSDP, torch.compile and activation checkpointing are removed. Base
    weights inside a PEFT model lose PEFT's prefix and ``base_layer`` segment; adapter weights keep
    the name PEFT saves them under (prefix kept, adapter name removed).
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)
    if _PEFT_SEGMENT.search(name):
        return _PEFT_ADAPTER.sub(lambda match: "." + (match[1] or match[2]), name)
    return name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def stream_id(name: str) -> int:
    """Stream of a parameter: the first four bytes, little-endian, of SHA-256 of its name (UTF-8).

    ``name`` is taken as it is; see ``canonical_name`` for names inside wrappers.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def assign_streams(names: Iterable[str]) -> dict[str, int]:
    """One stream per name, all different; keys and order as given.

    The stream of a name is ``stream_id(canonical_name(name))``. Where two canonical names of one
    model collide, the one that sorts later is hashed again with ``#1``, ``#2``, ... appended until
    it is free, so the result does not depend on the order of the names.

    Raises:
        ValueError: if two names have the same canonical name.
    """
    names = list(names)
    by_canonical: dict[str, str] = {}
    for name in names:
        other = by_canonical.setdefault(canonical_name(name), name)
        if other != name:
            raise ValueError(
                f"assign_streams: expected distinct parameters, got '{other}' and '{name}', "
                f"which are both '{canonical_name(name)}' without wrappers"
            )
    taken: dict[int, str] = {}
    for canonical in sorted(by_canonical):
        attempt, stream = 0, stream_id(canonical)
        while stream in taken:
            attempt += 1
            stream = stream_id(f"{canonical}#{attempt}")
        taken[stream] = by_canonical[canonical]
    streams = {name: stream for stream, name in taken.items()}
    return {name: streams[name] for name in names}


def model_streams(model: nn.Module) -> dict[str, int]:
    """``assign_streams`` of all of a model's parameters (tied ones once, under the first name)."""
    return assign_streams(name for name, _ in model.named_parameters())


def training_direction(step: int, queries: int, query: int) -> int:
    """Direction of one query of one step: ``step * queries + query``.

    Raises:
        ValueError: if the run has used up its 2^31 directions.
    """
    direction = step * queries + query
    if not 0 <= direction < DIRECTION_LIMIT:
        raise ValueError(
            f"training_direction: expected step * queries + query in [0, 2^31), got "
            f"{step} * {queries} + {query} = {direction}"
        )
    return direction
