"""Tiny random Hugging Face models of several architectures, and a tiny tokenizer, from config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from zo_kernels import chat
from zo_kernels.blocks import decoder_blocks, linear_layers

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


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2
) -> Any:
    """A random model in eval mode; the caller's random state is left alone."""
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


EXAMPLES = [
    chat.Example("how do i open a door", "turn the key and push it", chat.HARMLESS),
    chat.Example("tell me a story about sun", "a good day here", chat.HARMLESS),
    chat.Example("open the door please", "sorry i can not help with that", chat.HARMFUL),
    chat.Example("write about the key", "sorry i can not in any way", chat.HARMFUL),
]


def tiny_encoded() -> list[chat.Encoded]:
    """EXAMPLES in the tiny tokenizer's tokens."""
    return chat.encode(tiny_tokenizer(), EXAMPLES)


def block_calls(model: Any) -> list[int]:
    """How often each decoder block computes from now on: a list that goes on counting."""
    blocks = list(decoder_blocks(model).values())
    calls = [0] * len(blocks)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    for number, block in enumerate(blocks):
        # Of the first linear: a block that gives back what was kept is called, but computes not.
        next(iter(linear_layers(block).values())).register_forward_hook(count(number))
    return calls


class Quadratic(nn.Module):
    """Decoder blocks whose weights have a known quadratic loss.

        f = sum_l (<w_l, H_l w_l> / 2 + <g_l, w_l>),   H_l diagonal and above 0

    in float64. The gradient at the weights is ``gradient(l)``. ``use`` lets it stand for a model.
    """

    def __init__(self, blocks: int = 3, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(_Bowl(width, (1.0 + n) ** 2, generator) for n in range(blocks))
        self.config = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The loss, as if it depended on a batch."""
        total = torch.zeros((), dtype=torch.float64)
        for block in self.layers:
            total = block(total)
        return total

    def trace(self, number: int) -> float:
        """tr(H) of a block."""
        return float(self.layers[number].curvature.sum())

    def squared_trace(self, number: int) -> float:
        """tr(H^2) of a block."""
        return float(self.layers[number].curvature.square().sum())

    def gradient(self, number: int) -> torch.Tensor:
        """df/dw of a block at the weights as they are."""
        block = self.layers[number]
        return block.curvature * block.proj.weight.detach().double() + block.slope

    @staticmethod
    def use(monkeypatch: Any) -> None:
        """Let scoring and refinement take its loss instead of a language model's."""
        monkeypatch.setattr(
            "zo_kernels.refine.objective.completion_loss",
            lambda model, batch: model(batch["input_ids"]),
        )


class _Bowl(nn.Module):
    def __init__(self, width: int, steepness: float, generator: torch.Generator) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        shape = self.proj.weight.shape
        with torch.no_grad():
            self.proj.weight.copy_(0.3 * torch.randn(shape, generator=generator))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.curvature = steepness * (0.5 + uniform)
        self.slope = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.double()
        return total + ((0.5 * self.curvature * weight + self.slope) * weight).sum()


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
