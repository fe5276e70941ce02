"""Models, a tokenizer and prompts that are small enough to evaluate in a test."""

from __future__ import annotations

import torch
import transformers
from tiny_models import word_tokenizer
from torch import nn

from zo_kernels.chat import Example

WORDS = "a b c d e f g h I can't help with that how to do make tea Sure , here user assistant"
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TEXT = "how to make tea with a b c d e f g h " * 12
EXAMPLES = [
    Example("how to do a", "I can't help with that", "harmful", "held_out"),
    Example("how to make b c d", "I can't help", "harmful", "held_out"),
    Example("make c", "I can't do that", "harmful", "held_out"),
    Example("how to make tea", "Sure , here", "harmless", "held_out"),
    Example("tea", "Sure , tea with a", "harmless", "held_out"),
]


def tokenizer_of_words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of WORDS."""
    return word_tokenizer(WORDS.split(), TEMPLATE, bos_token="<|im_start|>")


def tiny(kind: str, vocabulary: int = 26, scale: float = 0.3) -> nn.Module:
    """A two-layer model with weights drawn from a generator of its own."""
    if kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                tie_word_embeddings=False,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms and biases stay 1 and 0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()
