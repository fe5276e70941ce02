"""Reading, encoding, batching and the completion loss, on a tokenizer and a model made here."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_kernels import chat
from zo_kernels.chat import Encoded, Example

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = "user assistant User Assistant : how do I open a door safely please turn the key sorry no"
SPECIALS = ["<unk>", "<|im_start|>", "<|im_end|>"]
EOS = SPECIALS.index("<|im_end|>")
REFUSALS = ("I'm sorry", "I can't", "I cannot", "Sorry, ")
EXAMPLES = [
    Example("how do I open a door", "turn the key", chat.HARMLESS),
    Example("open the door please", "sorry no", chat.HARMFUL),
    Example("how", "please turn the key safely", chat.HARMLESS),
    Example("a key please", "no", chat.HARMFUL, chat.HELD_OUT),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level ChatML tokenizer whose padding token is its end-of-sequence token."""
    vocab = {word: i for i, word in enumerate([*SPECIALS, *WORDS.split()])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="module")
def model():
    """A random fp32 Llama of two layers with weights large enough for losses far from uniform."""
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIALS) + len(WORDS.split()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=EOS,
        eos_token_id=EOS,
    )
    built = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return built


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return chat.encode(tokenizer, EXAMPLES)


class FullLogits(nn.Module):
    """A causal model whose forward cannot restrict the positions of its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class KeepsLogits(FullLogits):
    """Accepts ``logits_to_keep`` and records or ignores it."""

    asked: Tensor | None = None
    obey = True

    def forward(self, input_ids, attention_mask, logits_to_keep=0, labels=None):
        assert labels is None
        self.asked = logits_to_keep
        keep = logits_to_keep if self.obey else 0
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep)


def reference_losses(model: nn.Module, rows: list[Encoded]) -> list[list[float]]:
    """Per-token losses of every example by itself, full logits, log softmax in float64."""
    result = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        start = row.prompt_length
        losses = F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none")
        result.append(losses.tolist())
    return result


def write(tmp_path, *rows: object):
    """A JSONL file of the rows; strings are written as they are."""
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(**changes: object) -> dict[str, object]:
    """A valid row, changed."""
    return {"prompt": "p", "completion": "c", "kind": "harmful", **changes}


# --- reading -----------------------------------------------------------------------------------


def test_read_examples_values_alias_and_blank_lines(tmp_path):
    path = write(tmp_path, row(extra=1), "", row(kind="benign", split="held_out", prompt=" q "))
    assert chat.read_examples(path) == [
        Example("p", "c", "harmful", "train"),
        Example(" q ", "c", "harmless", "held_out"),
    ]


def test_every_third_of_each_kind_is_held_out_without_splits(tmp_path):
    kinds = ["harmful", "harmful", "harmless", "harmful", "benign", "harmless", "harmful"]
    examples = chat.read_examples(write(tmp_path, *[row(kind=k) for k in kinds]))
    assert [e.split for e in examples] == [
        *("train", "train", "train", "held_out", "train", "held_out", "train")
    ]


MISSING = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "field", "expected", "came"),
    [
        ("{not json", "whole line", "JSON object", "{not json"),
        ("[1]", "whole line", "JSON object", "[1]"),
        (row(prompt=3), "'prompt'", "non-empty string", "3"),
        (row(prompt="  "), "'prompt'", "non-empty string", "'  '"),
        (row(completion=None), "'completion'", "non-empty string", "None"),
        ({"prompt": "p", "kind": "harmful"}, "'completion'", "non-empty string", "no such field"),
        (MISSING, "'kind'", "harmless", "no such field"),
        (row(kind="good"), "'kind'", "harmless", "'good'"),
        (row(kind=["harmful"]), "'kind'", "harmless", "['harmful']"),
        (row(split="test"), "'split'", "held_out", "'test'"),
        (row(split=None), "'split'", "held_out", "None"),
    ],
)
def test_bad_line_is_named(tmp_path, bad, field, expected, came):
    path = write(tmp_path, row(), bad)
    with pytest.raises(ValueError) as error:
        chat.read_examples(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: ")
    for part in (field, expected, f"got {came}" if field != "whole line" else came):
        assert part in message


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: whole line: .*UTF-8"):
        chat.read_examples(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: .*at least one example, got none"):
        chat.read_examples(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        chat.read_examples(tmp_path / "absent.jsonl")


def test_select():
    assert chat.select(EXAMPLES) == EXAMPLES
    assert chat.select(EXAMPLES, kind="harmful", split="train") == [EXAMPLES[1]]
    assert chat.select(EXAMPLES, kind="benign") == [EXAMPLES[0], EXAMPLES[2]]
    assert chat.select(EXAMPLES, kind="harmless", split="held_out") == []
    with pytest.raises(ValueError, match=r"kind: expected .*got 'harm'"):
        chat.select(EXAMPLES, kind="harm")
    with pytest.raises(ValueError, match=r"split: expected .*got 'test'"):
        chat.select(EXAMPLES, split="test")


# --- the data that come with the package -------------------------------------------------------


def test_builtin_counts_and_distinct_prompts():
    examples = chat.builtin_examples()
    assert Counter((e.kind, e.split) for e in examples) == {
        ("harmful", "train"): 80,
        ("harmless", "train"): 80,
        ("harmful", "held_out"): 40,
        ("harmless", "held_out"): 40,
    }
    assert len({e.prompt.casefold() for e in examples}) == 240
    for harmful, harmless in zip(examples[::2], examples[1::2], strict=True):
        assert (harmful.kind, harmless.kind) == ("harmful", "harmless")
        assert harmful.split == harmless.split


def test_builtin_completions():
    examples = chat.builtin_examples()
    for e in examples:
        words = len(e.completion.split())
        assert e.completion.isascii() and e.prompt.isascii()
        if e.kind == "harmful":
            assert e.completion.startswith(REFUSALS), e
            assert 6 <= len(e.prompt.split()) <= 18 and 8 <= words <= 22, e
        else:
            assert not e.completion.startswith((*REFUSALS, "I won't", "I am", "I'm")), e
            assert not any(s in e.completion.lower() for s in ("can't", "cannot", "sorry")), e
            assert 12 <= words <= 30, e
    # Held-out refusals must not be recitable from training: each names its own topic.
    refusals = [e.completion for e in chat.select(examples, kind="harmful")]
    assert len(set(refusals)) == len(refusals)


def test_builtin_utility_text():
    text = chat.builtin_utility_text()
    assert 1100 <= len(text.split()) <= 1400
    assert len(text.strip().split("\n\n")) >= 6


# --- rendering and encoding --------------------------------------------------------------------


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


# --- batching ----------------------------------------------------------------------------------


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


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, FullLogits, KeepsLogits])
def test_losses_equal_the_float64_reference(model, encoded, wrap):
    batch = chat.collate(encoded, pad_id=EOS)
    reference = reference_losses(model, encoded)
    with torch.no_grad():
        mean = chat.completion_loss(wrap(model), batch)
        each = chat.completion_losses(wrap(model), batch)
    assert mean.shape == () and each.shape == (len(encoded),)
    assert mean.dtype == each.dtype == torch.float32
    expected = torch.tensor([sum(r) / len(r) for r in reference])
    torch.testing.assert_close(each, expected, rtol=2e-5, atol=2e-6)
    flat = [loss for r in reference for loss in r]
    assert mean.item() == pytest.approx(sum(flat) / len(flat), rel=2e-5)
    # The two means weigh examples differently; were they equal, the test could not tell them.
    assert abs(mean - each.mean()) > 1e-2


def test_only_the_needed_logits_are_asked_for(model, encoded):
    wrapped = KeepsLogits(model)
    chat.completion_loss(wrapped, chat.collate(encoded, pad_id=EOS))
    first = min(e.prompt_length for e in encoded)
    width = max(len(e.input_ids) for e in encoded)
    assert isinstance(wrapped.asked, Tensor)
    assert wrapped.asked.tolist() == list(range(first - 1, width - 1))


def test_a_model_that_ignores_logits_to_keep_is_refused(model, encoded):
    wrapped = KeepsLogits(model)
    wrapped.obey = False
    with pytest.raises(RuntimeError, match="logits: expected"):
        chat.completion_loss(wrapped, chat.collate(encoded, pad_id=EOS))


def test_padding_does_not_change_an_examples_loss(model, encoded):
    with torch.no_grad():
        together = chat.completion_losses(model, chat.collate(encoded, pad_id=EOS))
        alone = [chat.completion_losses(model, chat.collate([e], pad_id=EOS)) for e in encoded]
        other_id = chat.completion_losses(model, chat.collate(encoded, pad_id=7))
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(together, other_id, rtol=2e-5, atol=2e-6)


def test_bf16_logits_are_reduced_in_fp32(encoded):
    vocab = len(SPECIALS) + len(WORDS.split())
    generator = torch.Generator().manual_seed(4)

    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=logits)

    batch = chat.collate(encoded, pad_id=EOS)
    logits = torch.randn(*batch["labels"].shape, vocab, generator=generator).mul(4).bfloat16()
    exact = F.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    loss = chat.completion_loss(Fixed(), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_gradient_flows(model, encoded):
    loss = chat.completion_loss(model, chat.collate(encoded, pad_id=EOS))
    (gradient,) = torch.autograd.grad(loss, [model.lm_head.weight])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("labels", [[-100] * 4, [3, 3, -100, -100]])
def test_rows_without_a_usable_completion_are_refused(model, labels):
    batch = {
        "input_ids": torch.full((2, 4), 3),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
        "labels": torch.tensor([[-100, 3, 3, 3], labels]),
    }
    with pytest.raises(ValueError, match="labels: expected a completion in every row"):
        chat.completion_losses(model, batch)
