"""Examples for the tiny tokenizer, and an alignment that uses all of its options."""

from __future__ import annotations

from tiny_models import tiny_tokenizer

from zo_kernels import chat
from zo_kernels.refine.align import AlignConfig

EXAMPLES = [
    chat.Example("how do i open a door", "turn the key and push it", chat.HARMLESS),
    chat.Example("tell me a story about sun", "a good day here", chat.HARMLESS),
    chat.Example("open the door please", "sorry i can not help with that", chat.HARMFUL),
    chat.Example("write about the key", "sorry i can not in any way", chat.HARMFUL),
]
EVERY = 3
CONFIG = AlignConfig(steps=10, batch_size=1, accumulation=3, lr=1e-2, noise=0.1, seed=5)


def encoded() -> list[chat.Encoded]:
    """The examples as token ids."""
    return chat.encode(tiny_tokenizer(), EXAMPLES)
