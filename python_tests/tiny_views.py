"""Models to look at through contexts, and what their parameters hold and read as."""

from __future__ import annotations

import torch
import transformers
from torch import nn


def tiny_llama(dtype: torch.dtype = torch.float32, tie: bool = False) -> nn.Module:
    """A two-layer Llama with weights drawn from a generator of its own."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return randomised(transformers.LlamaForCausalLM(config), dtype)


def tiny_gpt2() -> nn.Module:
    """A two-layer GPT-2: Conv1D linears, tied head."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return randomised(transformers.GPT2LMHeadModel(config), torch.float32)


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill the parameters from a local generator, so no test depends on global randomness."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters as raw bytes."""
    return {
        name: p.detach().clone().contiguous().view(torch.uint8)
        for name, p in model.named_parameters()
    }


def read(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every parameter reads as here, as raw bytes."""
    return {n: (p * 1.0).contiguous().view(torch.uint8) for n, p in model.named_parameters()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of raw bytes are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
