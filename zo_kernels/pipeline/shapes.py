"""What a model's config.json alone tells: its parameters, on torch's meta device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zo_kernels.blocks import decoder_blocks, is_conv1d, linear_layers
from zo_kernels.refine.checkpoint import skeleton

_ALIGNMENT = 64  # bytes, between two copies in one scratch: as ``modes.reads.Scratch``
_COMPOSED = ("gelu_new", "gelu_fast", "gelu_accurate")  # of many torch functions, not of one


@dataclass(frozen=True)
class BlockShape:
    """Widths (elements per token) of one decoder block.

    Attributes:
        hidden: of the residual stream.
        query, key: of all query heads, and of all key heads (values have the same).
        inner: of the MLP's product, the input of its last linear.
        gated: whether the MLP multiplies two halves.
        fused: whether one linear gives both halves.
        norms: sum of the widths that its norms work on.
        linears: number of reads of hidden states by linears, attention's and the MLP's.
        weights: parameters.
        linear_weights: of them, of linears.
    """

    hidden: int
    query: int
    key: int
    inner: int
    gated: bool
    fused: bool
    norms: int
    linears: int
    weights: int
    linear_weights: int


@dataclass(frozen=True)
class ModelShape:
    """A model without weights.

    Attributes:
        name: model_type of the config.
        model: transformers' model on the meta device.
        blocks: its decoder blocks by name.
        vocabulary: rows of the output head.
        heads: attention heads.
        root_mean_square: whether norms are composed of torch functions (RMSNorm), in float32.
        rotary: whether positions rotate queries and keys.
        activation: the function in the MLP, as transformers names it.
        eager: whether attention keeps its matrix of probabilities.
    """

    name: str
    model: Any
    blocks: dict[str, BlockShape]
    vocabulary: int
    heads: int
    root_mean_square: bool
    rotary: bool
    activation: str
    eager: bool

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    @property
    def composed(self) -> bool:
        """Whether the MLP's activation is composed of several torch functions."""
        return self.activation in _COMPOSED

    @property
    def kept_by_activation(self) -> int:
        """Tensors that a plain MLP's activation and the linear after it keep for the backward."""
        return 5 if self.composed else 1 if self.activation == "relu" else 2

    @property
    def elements(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())


def read_shape(config: str | os.PathLike[str], dtype: torch.dtype) -> ModelShape:
    """The shape of the model that a Hugging Face directory, or its config.json, describes.

    Args:
        config: the directory or the file.
        dtype: of the parameters.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: as of ``checkpoint.skeleton``, a model without attention heads, or decoder
            blocks in several lists, or that are not attention and one MLP of linears: names what.
    """
    model = skeleton(config, dtype)
    text = model.config.get_text_config()  # of models that see or hear it is a part of the config
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise ValueError(
            f"model: expected a config with num_attention_heads, got none in {text.model_type!r}, "
            "whose activations are not modelled"
        )
    keys = getattr(text, "num_key_value_heads", None) or heads
    activation = getattr(text, "hidden_act", None) or getattr(text, "activation_function", "")
    blocks = decoder_blocks(model)
    lists = dict.fromkeys(name.rpartition(".")[0] for name in blocks)
    if len(lists) > 1:
        raise ValueError(
            f"model: expected decoder blocks in one list, got {' and '.join(map(repr, lists))}, "
            "whose activations are not modelled"
        )
    norms = [m for m in next(iter(blocks.values())).modules() if _is_norm(m)]
    return ModelShape(
        name=model.config.model_type,
        model=model,
        blocks={name: _block_shape(name, block, heads, keys) for name, block in blocks.items()},
        vocabulary=model.get_output_embeddings().weight.shape[0],
        heads=heads,
        root_mean_square=any("RMS" in type(norm).__name__ for norm in norms),
        rotary=any("Rotary" in type(module).__name__ for module in model.modules()),
        activation=activation,
        eager=text._attn_implementation == "eager",
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(
        getattr(module, "weight", None), nn.Parameter
    )


def _block_shape(name: str, block: nn.Module, heads: int, keys: int) -> BlockShape:
    """Widths of one block; ValueError where it is not attention and one MLP of linears."""
    linears = linear_layers(block)
    for path, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        if own and path not in linears and not _is_norm(module):
            raise ValueError(
                f"model: expected decoder blocks of linears and norms, got '{name}.{path}' "
                f"({type(module).__name__}), whose activations are not modelled"
            )
    sizes = {path: _in_and_out(layer) for path, layer in linears.items()}
    attention = {p: size for p, size in sizes.items() if "attn" in p or "attention" in p}
    mlp = {p: size for p, size in sizes.items() if p not in attention}
    if len(attention) < 2 or len(mlp) < 2:
        raise ValueError(
            f"model: expected linears of attention and of an MLP in '{name}', got {sorted(sizes)}"
        )
    query, hidden = list(attention.values())[-1]
    key = query // heads * keys
    *first, (inner, _) = mlp.values()
    gated = sum(out for _, out in first) == 2 * inner
    norms = 0
    for path, module in block.named_modules():
        if _is_norm(module):
            width = module.weight.numel()
            of_head = query if "q" in path.rpartition(".")[2].partition("_")[0] else key
            norms += width if width == hidden else of_head
    return BlockShape(
        hidden=hidden,
        query=query,
        key=key,
        inner=inner,
        gated=gated,
        fused=gated and len(first) == 1,
        norms=norms,
        linears=len(sizes) - 2,
        weights=sum(p.numel() for p in block.parameters()),
        linear_weights=sum(layer.weight.numel() for layer in linears.values()),
    )


def _in_and_out(layer: nn.Module) -> tuple[int, int]:
    """Widths of what a linear layer takes and gives."""
    rows, columns = layer.weight.shape
    return (rows, columns) if is_conv1d(layer) else (columns, rows)


def largest_read(shape: ModelShape, chosen: dict[str, nn.Parameter], tokens: int) -> int:
    """Bytes of the perturbed copies that the largest operation of a forward reads.

    A layer's weight and bias are read together. Of an embedding only the rows that are looked up
    are perturbed, at most one per token, unless the table has no more; a head that is tied to it
    is perturbed whole.
    """
    ids = {id(parameter) for parameter in chosen.values()}
    largest = 0
    for module in shape.model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in ids]
        if not own:
            continue
        if isinstance(module, nn.Embedding) and tokens < module.num_embeddings:
            row = _aligned(module.embedding_dim * module.weight.element_size())
            largest = max(largest, tokens * row)
        else:
            sizes = (_aligned(p.numel() * p.element_size()) for p in own)
            largest = max(largest, sum(sizes))
    return largest


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
