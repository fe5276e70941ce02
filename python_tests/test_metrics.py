"""Refusals, greedy answers and perplexity against the same computed token by token."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny_evaluation import TEXT, tiny, tokenizer_of_words
from torch import nn

from zo_kernels.chat import render
from zo_kernels.robustness.metrics import REFUSAL_LISTS, generate, is_refusal, perplexity


@pytest.fixture
def tokenizer():
    return tokenizer_of_words()


def test_refusal_lists() -> None:
    assert len(REFUSAL_LISTS["advbench-29"]) == len(set(REFUSAL_LISTS["advbench-29"])) == 29
    for text, prefix, advbench in (
        ("I'm sorry, but no.", True, True),
        ("  i CAN'T help with that.", True, False),  # not in the 29: only "provide" and "assist"
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t assist", True, True),
        ("Sure! It is illegal in some places, so check.", False, True),
        ("Sure, I cannot wait to help", False, True),
        ("sorry", True, False),
        ("Here is tea.", False, False),
        ("", False, False),
    ):
        assert is_refusal(text) is prefix, text
        assert is_refusal(text, "advbench-29") is advbench, text
    with pytest.raises(ValueError, match="advbench-29"):
        is_refusal("", "no-such-list")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_is_batch_independent_and_greedy(kind: str, tokenizer) -> None:
    model = tiny(kind).train()
    prompts = [
        "how to do a",
        "tea",
        "how to make b c d e f g h with tea",
        "a b",
        "b",
        "make c",
        "I can't help with that how to do make tea Sure",
    ]
    expected = [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 2  # otherwise a mixed-up order could not be seen
    seen = []
    for size in (1, 4, 7):
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=6,
            batch_size=size,
            progress=lambda *args: seen.append(args),
        )
        assert answers == expected, size
    assert seen[-1] == ("generate", 7, 7)
    assert all(module.training for module in model.modules())


def greedy_by_hand(model: nn.Module, tokenizer, prompt: str, limit: int) -> str:
    """Greedy decoding of one prompt without padding, cache or `generate`."""
    ids, answer = render(tokenizer, prompt), []
    model.eval()
    while len(answer) < limit:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        answer.append(token)
    model.train()
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_generate_stops_at_end_token(tokenizer) -> None:
    model = tiny("llama")
    free = generate(model, tokenizer, ["how to do a"], max_new_tokens=6, batch_size=1)[0].split()
    assert len(free) == 6
    # Name the third new token an end token: the answer is cut there, pad == eos or not.
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(free[2])]
    first = free.index(free[2])
    answers = generate(model, tokenizer, ["how to do a", "b"], max_new_tokens=6, batch_size=2)
    assert answers[0].split() == free[:first]


def test_generate_ignores_and_keeps_settings(tokenizer, caplog, recwarn) -> None:
    model = tiny("gpt2")
    plain = generate(model, tokenizer, ["a b c", "tea"], max_new_tokens=5, batch_size=2)
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=5.0
    )
    settings = model.generation_config
    side, state = tokenizer.padding_side, tokenizer.backend_tokenizer.to_str()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        again = generate(model, tokenizer, ["a b c", "tea"], max_new_tokens=5, batch_size=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert again == plain
    assert not caplog.records and not recwarn.list
    assert model.generation_config is settings and settings.repetition_penalty == 5.0
    assert tokenizer.padding_side == side and tokenizer.backend_tokenizer.to_str() == state
    with pytest.raises(ValueError, match="batch_size"):
        generate(model, tokenizer, ["a"], max_new_tokens=5, batch_size=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [None, 33, 17])
def test_perplexity_directly(kind: str, limit: int | None, tokenizer) -> None:
    model = tiny(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:limit]
    assert len(ids) == (limit or 156)
    total, count = 0.0, 0
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        for end in range(1, len(part)):  # one forward a token, nothing shared with the code
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([part[:end]])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[part[end]].item()
            count += 1
    got = perplexity(model, tokenizer, TEXT, window=16, max_tokens=limit)
    assert got == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_errors(tokenizer) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="window"):
        perplexity(model, tokenizer, TEXT, window=1)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(model, tokenizer, "tea")
