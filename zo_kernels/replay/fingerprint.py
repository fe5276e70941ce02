"""A fingerprint of weights: 128 bits over names, dtypes, shapes and bytes, in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor

from zo_kernels.noise import canonical_name

_PIECE = 1 << 24  # elements of a GPU tensor that are copied to the CPU at a time


class TensorDigest:
    """The digest of one tensor, whose elements may come in pieces.

    Args:
        name: of the parameter; its canonical name counts.
        dtype, shape: of the whole tensor.
    """

    def __init__(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        head = [canonical_name(name), str(dtype).removeprefix("torch."), list(shape)]
        self._hash = xxhash.xxh3_128((json.dumps(head) + "\n").encode())

    def update(self, piece: Tensor) -> None:
        """The next elements, in row-major order; on any device."""
        flat = piece.detach().reshape(-1)
        parts = (flat,) if flat.device.type == "cpu" else flat.split(_PIECE)
        for part in parts:
            if part.numel():
                self._hash.update(memoryview(part.cpu().view(torch.uint8).numpy()))

    def digest(self) -> bytes:
        """16 bytes."""
        return self._hash.digest()


def combine_digests(digests: Mapping[str, bytes]) -> str:
    """The fingerprint of tensors from their digests by name: 32 hexadecimal digits.

    Raises:
        ValueError: two names have the same canonical name.
    """
    by_canonical = {canonical_name(name): digest for name, digest in digests.items()}
    if len(by_canonical) != len(digests):
        raise ValueError(
            f"fingerprint: expected tensors of different names, got {len(digests)} with "
            f"{len(by_canonical)} names without wrappers"
        )
    parts = [digest for _, digest in sorted(by_canonical.items())]
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


def fingerprint(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """128 bits, as 32 hexadecimal digits, that any changed bit, name, dtype or shape changes.

    xxh3_128 (https://xxhash.com) of each tensor's canonical name, dtype, shape and bytes, and of
    the digests in the order of the names. It finds accidents; it is not cryptographic.

    Args:
        named_tensors: such as ``model.named_parameters()``, in any order, on any device.

    Raises:
        ValueError: two tensors have the same canonical name.
    """
    digests: dict[str, bytes] = {}
    for name, tensor in named_tensors:
        if name in digests:
            raise ValueError(
                f"fingerprint: expected tensors of different names, got '{name}' twice"
            )
        one = TensorDigest(name, tensor.dtype, tensor.shape)
        one.update(tensor)
        digests[name] = one.digest()
    return combine_digests(digests)
