"""Perplexity and divergence against the same computed token by token."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_evaluation import TEXT, tiny, tokenizer_of_words

import zo_kernels as zk
from zo_kernels.robustness.utility import UtilityText


@pytest.fixture
def tokenizer():
    return tokenizer_of_words()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [None, 33, 9])
def test_perplexity_directly(kind: str, limit: int | None, tokenizer) -> None:
    model = tiny(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:limit]
    assert len(ids) == (limit or 156)
    total, count = 0.0, 0
    size = min(16, len(ids))
    for start in range(0, len(ids) - size + 1, size):
        part = ids[start : start + size]
        for end in range(1, len(part)):  # one forward a token, nothing shared with the code
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([part[:end]])).logits[0, -1].double()
            total -= torch.log_softmax(logits, -1)[part[end]].item()
            count += 1
    got = UtilityText(tokenizer, TEXT, window=16, max_tokens=limit).measure(model).perplexity
    assert got == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_errors(tokenizer) -> None:
    with pytest.raises(ValueError, match="window"):
        UtilityText(tokenizer, TEXT, window=1)
    with pytest.raises(ValueError, match="max_tokens >= 2 or None, got -5"):
        UtilityText(tokenizer, TEXT, max_tokens=-5)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        UtilityText(tokenizer, "tea")


def test_divergence_from_the_clean_model(tokenizer, monkeypatch) -> None:
    """KL(clean || noisy) by hand; 0 to the last bit for the model itself; the file is let go."""
    monkeypatch.setattr("zo_kernels.robustness.utility._ROWS", 5)  # several chunks a window
    model = tiny("llama")
    text = UtilityText(tokenizer, TEXT, window=16, max_tokens=40)
    assert text.measure(model).divergences is None
    text.keep_clean(model)
    own = text.measure(model)
    assert own.divergences == [0.0] * 2  # what is left after whole windows is left out
    with zk.perturbed(model, sigma=0.3, seed=1):
        noisy = text.measure(model)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[:40]
    for start, found in zip((0, 16), noisy.divergences, strict=True):
        part = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            clean = torch.log_softmax(model(input_ids=part).logits[0, :-1].double(), -1)
            with zk.perturbed(model, sigma=0.3, seed=1):
                other = torch.log_softmax(model(input_ids=part).logits[0, :-1].double(), -1)
        expected = (clean.exp() * (clean - other)).sum(-1).mean().item()
        assert found == pytest.approx(expected, rel=1e-4) and found > 0.01
    assert noisy.divergence == pytest.approx(sum(noisy.divergences) / 2)
    text.close()
    assert text.measure(model).divergence is None
    text.keep_clean(model)
    with pytest.raises(ValueError, match="expected 26 logits per token"):
        text.measure(tiny("llama", vocabulary=30))
    text.close()


def test_overflow_is_a_number(tokenizer) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert UtilityText(tokenizer, TEXT, max_tokens=20).measure(model).perplexity == math.inf


def test_a_full_disk_is_named(tokenizer, monkeypatch) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("tempfile.TemporaryFile", lambda prefix: Full())
    text = UtilityText(tokenizer, TEXT, window=16, max_tokens=40)
    with pytest.raises(OSError, match=r"room for 0 MB in .*TMPDIR.*No space left"):
        text.keep_clean(tiny("llama"))
    text.close()
