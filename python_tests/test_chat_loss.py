"""The completion loss on a model made here, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_chat import EOS, EXAMPLES, WORDS, tokenizer_of_words
from tiny_models import SPECIALS
from torch import Tensor, nn

from zo_kernels import chat
from zo_kernels.chat import Encoded


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
def encoded():
    return chat.encode(tokenizer_of_words(), EXAMPLES)


class FullLogits(nn.Module):
    """A causal model whose forward cannot restrict the positions of its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class KeepsLogits(FullLogits):
    """Accepts ``logits_to_keep`` and obeys or ignores it."""

    obey = True

    def forward(self, input_ids, attention_mask, logits_to_keep=0, labels=None):
        assert labels is None
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


def heads_input(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """The shape of what the model's head gets for the loss of a batch."""
    shapes = []
    hook = model.lm_head.register_forward_pre_hook(
        lambda module, args: shapes.append(list(args[0].shape))
    )
    with hook:
        chat.completion_loss(model, batch)
    [shape] = shapes
    return shape


def test_only_completions_have_logits(model, encoded):
    tokens = sum(len(e.input_ids) - e.prompt_length for e in encoded)
    assert heads_input(model, chat.collate(encoded, pad_id=EOS)) == [1, tokens, 16]


def test_losses_of_a_compiled_model(model, encoded):
    compiled = torch.compile(model, backend="eager")
    for rows in (encoded, encoded[:2]):  # the second call has other shapes
        batch = chat.collate(rows, pad_id=EOS)
        assert torch.equal(
            chat.completion_losses(compiled, batch), chat.completion_losses(model, batch)
        )


@pytest.mark.parametrize("index", [(), (slice(1, None),), (0, slice(None))])
def test_a_model_that_takes_other_logits_is_refused(model, encoded, index):
    class Odd(nn.Module):
        def forward(self, input_ids, attention_mask, logits_to_keep=0):
            states = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
            place = (*index[:1], logits_to_keep, *index[1:])
            return SimpleNamespace(logits=states[place if index else logits_to_keep])

    with pytest.raises(RuntimeError, match="logits_to_keep: expected a model that takes"):
        chat.completion_loss(Odd(), chat.collate(encoded, pad_id=EOS))


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
