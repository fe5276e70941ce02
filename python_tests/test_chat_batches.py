"""Rendering, encoding, batching and the order of batches."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tiny_chat import EOS, EXAMPLES, tokenizer_of_words

from zo_kernels import chat
from zo_kernels.chat import Encoded


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_words()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return chat.encode(tokenizer, EXAMPLES)


def test_render_uses_the_chat_template(tokenizer):
    expected = "<|im_start|> user how <|im_end|> <|im_start|> assistant"
    assert tokenizer.convert_ids_to_tokens(chat.render(tokenizer, "how")) == expected.split()


@pytest.mark.parametrize(
    "shape", [lambda i: {"input_ids": i}, lambda i: [i], lambda i: {"input_ids": [i]}, torch.tensor]
)
def test_render_accepts_what_other_versions_return(shape):
    other = SimpleNamespace(
        chat_template="x", apply_chat_template=lambda turns, **options: shape([4, 5, 6])
    )
    assert chat.render(other, "how") == [4, 5, 6]


def test_render_and_encode_without_a_template(tokenizer):
    calls = []

    class Plain:
        chat_template = None
        eos_token_id = EOS

        def __call__(self, text, add_special_tokens=True):
            calls.append((text, add_special_tokens))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids, EOS] if add_special_tokens else ids}

    (got,) = chat.encode(Plain(), EXAMPLES[:1])
    assert calls == [
        ("User: how do I open a door\nAssistant:", True),
        (" turn the key", False),
    ]
    prompt = [1, *tokenizer("User : how do I open a door Assistant :")["input_ids"]]
    assert list(got.input_ids) == [*prompt, *tokenizer("turn the key")["input_ids"], EOS]
    assert got.prompt_length == len(prompt)


def test_encode_appends_eos_and_truncates_from_the_right(tokenizer):
    (full,) = chat.encode(tokenizer, EXAMPLES[:1])
    completion = tokenizer("turn the key")["input_ids"]
    assert full.kind == "harmless"
    assert list(full.input_ids[full.prompt_length :]) == [*completion, EOS]
    for cut in (1, 3):
        (short,) = chat.encode(tokenizer, EXAMPLES[:1], max_length=len(full.input_ids) - cut)
        assert short.input_ids == full.input_ids[:-cut]
        assert short.prompt_length == full.prompt_length


def test_encode_errors(tokenizer):
    size = len(chat.render(tokenizer, EXAMPLES[0].prompt))
    chat.encode(tokenizer, EXAMPLES[:1], max_length=size + 1)
    with pytest.raises(ValueError, match=rf"example 0: .*1 to {size - 1} tokens.*got {size}"):
        chat.encode(tokenizer, EXAMPLES[:1], max_length=size)
    with pytest.raises(ValueError, match="eos_token_id, got None"):
        chat.encode(SimpleNamespace(eos_token_id=None), EXAMPLES)


def test_collate_masks_by_length_although_pad_is_eos():
    rows = [Encoded((5, EOS, 6, EOS), 2, "harmful"), Encoded((5, 6, 7, 8, 9, EOS), 3, "harmless")]
    batch = chat.collate(rows, pad_id=EOS)
    no = chat.IGNORED
    assert batch["input_ids"].tolist() == [[5, EOS, 6, EOS, EOS, EOS], [5, 6, 7, 8, 9, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[no, no, 6, EOS, no, no], [no, no, no, 8, 9, EOS]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_collate_errors(encoded):
    with pytest.raises(ValueError, match="at least one example, got none"):
        chat.collate([], pad_id=0)
    for bad in (None, -1):
        with pytest.raises(ValueError, match=f"pad_id: expected .*got {bad}"):
            chat.collate(encoded, pad_id=bad)


def test_batch_order_is_a_fixed_permutation():
    # Pinned: another order would silently break the resumption of old runs.
    assert batch_orders() == PINNED_ORDERS
    for epoch in range(3):
        assert sorted(chat.batch_order(101, seed=7, epoch=epoch)) == list(range(101))
    assert chat.batch_order(0, seed=0, epoch=0) == []


def batch_orders() -> list[list[int]]:
    """Orders that must differ by seed and by epoch."""
    return [chat.batch_order(8, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (-1, 0))]


PINNED_ORDERS = [
    [3, 4, 2, 6, 5, 0, 1, 7],
    [3, 7, 1, 0, 2, 6, 4, 5],
    [0, 5, 6, 4, 1, 2, 7, 3],
    [3, 0, 7, 1, 4, 5, 2, 6],
]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_batch_stream_resumes_identically(encoded, batch_size):
    options = {"batch_size": batch_size, "seed": 5, "pad_id": EOS}
    whole = list(islice(chat.batch_stream(encoded, **options), 9))
    for start in (0, 1, 4, 7):
        resumed = list(islice(chat.batch_stream(encoded, **options, start=start), 2))
        for old, new in zip(whole[start : start + 2], resumed, strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(old[key], new[key]) for key in old)


def test_batch_stream_covers_every_epoch_and_depends_on_the_seed():
    rows = [Encoded((1, 10 + i), 1, "harmful") for i in range(5)]

    def seen(seed: int) -> list[int]:
        stream = chat.batch_stream(rows, batch_size=3, seed=seed, pad_id=0)
        return [i for b in islice(stream, 5) for i in b["input_ids"][:, 1].tolist()]

    epochs = [seen(0)[k : k + 5] for k in (0, 5, 10)]
    assert all(sorted(epoch) == [10, 11, 12, 13, 14] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert seen(0) != seen(1)


def test_batch_stream_errors_come_at_once(encoded):
    for changes, message in (
        ({"batch_size": 0}, "batch_size: expected >= 1, got 0"),
        ({"start": -1}, "start: expected >= 0, got -1"),
        ({"encoded": []}, "encoded: expected at least one example"),
    ):
        arguments = {"encoded": encoded, "batch_size": 2, "start": 0, **changes}
        with pytest.raises(ValueError, match=message):
            chat.batch_stream(arguments.pop("encoded"), **arguments, seed=0, pad_id=EOS)
