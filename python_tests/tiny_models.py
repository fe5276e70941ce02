"""Tiny random Hugging Face models of several architectures, and a tiny tokenizer, from config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIALS = ("<unk>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "how do i open a door safely please tell me turn the key and push it is sorry but can not help "
    "with that in any way write story about cat sun what why you here answer good day now"
).split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def word_tokenizer(
    words: Iterable[str], template: str, split: Any = pre_tokenizers.WhitespaceSplit, **options: Any
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template; its padding token is its end token.

    The unknown word and both marks of ChatML have the first ids, in this order.
    """
    ids = {word: i for i, word in enumerate([*SPECIALS, *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = split()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        **options,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of WORDS without a token of its own for the beginning."""
    words = ["user", "assistant", *dict.fromkeys(WORDS)]
    return word_tokenizer(words, CHATML, additional_special_tokens=["<|im_start|>"])


_COMMON = {"vocab_size": 64, "max_position_embeddings": 128}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "llama_tied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=32,
        ffn_dim=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    # Grouped matrix products want rows of a multiple of 16 bytes.
    "mixtral": lambda: MixtralConfig(
        **{**_LLAMA, "intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model in eval mode; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    return model.to(dtype).eval()


def tiny_batch(rows: int = 2, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights as bytes, to compare with ``torch.equal``."""
    return {
        name: tensor.detach().clone().contiguous().view(torch.uint8)
        for name, tensor in model.state_dict().items()
    }


def closure_of(model: Any) -> Callable[[], torch.Tensor]:
    """The model's loss on the tiny batch, to call again and again."""
    batch = tiny_batch()
    return lambda: model(**batch, use_cache=False).loss


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are those of an earlier ``bits``."""
    after = bits(model)
    return all(torch.equal(after[name], before[name]) for name in before)
