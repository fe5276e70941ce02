"""Greedy answers against the same computed token by token, and what is told from their text."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_evaluation import tiny, tokenizer_of_words
from torch import nn

import zo_kernels as zk
from zo_kernels.chat import render
from zo_kernels.robustness import answers as answers_module
from zo_kernels.robustness.answers import generate
from zo_kernels.robustness.degenerate import degenerate
from zo_kernels.robustness.refusals import REFUSAL_LISTS, refusal_list


@pytest.fixture
def tokenizer():
    return tokenizer_of_words()


PROMPTS = [
    "how to do a",
    "tea",
    "how to make b c d e f g h with tea",
    "a b",
    "b",
    "make c",
    "I can't help with that how to do make tea Sure",
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_is_batch_independent_and_greedy(kind: str, tokenizer) -> None:
    model = tiny(kind).train()
    expected = [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 2  # otherwise a mixed-up order could not be seen
    seen = []
    for size in (1, 4, 7):
        answers = generate(
            model,
            tokenizer,
            PROMPTS,
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
def test_a_tie_is_decided_alone(kind: str, tokenizer, monkeypatch) -> None:
    """An answer with a close choice is given again in a batch of one; of 16-bit models none is."""
    rows: list[int] = []
    decode = answers_module._decode

    def counted(model, batch, *rest):
        rows.append(len(batch))
        return decode(model, batch, *rest)

    monkeypatch.setattr(answers_module, "_decode", counted)
    monkeypatch.setattr(answers_module, "TIE", 10.0)  # every choice is one
    model = tiny(kind)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert rows == [4, 3, *[1] * 7]
    alone = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=1)
    assert together == alone and rows[9:] == [1] * 7
    rows.clear()
    generate(model.bfloat16(), tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert rows == [4, 3]


def test_ties_are_seen_up_to_the_end_token() -> None:
    """The mark is of the choices that made the answer, not of what follows its end."""
    watch = answers_module._Ties()
    for scores in ([[1.0, 0.5], [1.0, 1.0 - 1e-6]], [[1.0, torch.nan], [100.0, 99.0]]):
        watch(None, torch.tensor(scores))
    assert torch.stack(watch.close, dim=1).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_noise_goes_with_the_prompt(kind: str, tokenizer) -> None:
    """The same noisy answers at every batch size; other ones for other numbers."""
    model = tiny(kind)

    def noisy(size: int, first: int = 0) -> list[str]:
        with zk.perturbed_activations(model, alpha=0.5, seed=3):
            return generate(
                model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=size, first_number=first
            )

    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    assert noisy(1) == noisy(3) == noisy(7) != plain
    assert noisy(3, first=100) != noisy(3)


def test_refusal_lists() -> None:
    sizes = {"advbench-29": 29, "jailbreakbench-13": 13, "gcg-10": 10, "wei-31": 31}
    for name, size in {**sizes, "xstest-21": 21}.items():
        assert len(set(REFUSAL_LISTS[name].strings)) == size, name
    names = ("prefix-1", "xstest-21", "advbench-29", "wei-31")
    for text, *expected in (
        ("I'm sorry, but no.", True, True, True, True),
        (
            "  i CAN'T help with that.",
            True,
            True,
            False,
            True,
        ),  # of the 29 only "provide", "assist"
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t assist", True, True, True, True),
        ("Sure! It is illegal in some places, so check.", False, False, True, True),
        ("Sure, I cannot wait to help", False, False, True, True),
        ("sorry", True, True, False, True),
        ("No, that is wrong", False, True, False, True),
        ("Here is tea.", False, False, False, True),  # under 20 words
        ("Here is tea " + "with milk and " * 20, False, False, False, False),
        ("However you like " + "with milk and " * 20, False, False, False, True),
        ("", False, False, False, True),
    ):
        assert [refusal_list(name)(text) for name in names] == expected, text
    with pytest.raises(ValueError, match="advbench-29"):
        refusal_list("no-such-list")


def test_degenerate_answers() -> None:
    loop = "You can do that. " * 12
    text = "Put the kettle on, wait until the water boils and pour it over the leaves."
    assert degenerate(text, 1.2) is None and degenerate(text, None) is None
    assert degenerate(" \n", None) == "empty"
    assert degenerate(loop, 0.1) == "repetitive"
    assert degenerate("no no no", 0.1) is None  # too short to tell
    assert degenerate(text, 4.1) == degenerate(text, float("nan")) == "incoherent"
