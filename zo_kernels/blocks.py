"""The decoder blocks of a model, and the weights of their linear layers."""

from __future__ import annotations

from torch import nn


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks of a model by name.

    They are the elements of its outermost ``nn.ModuleList``s (``model.layers``,
    ``transformer.h``, ...) that have a linear layer below them.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()  # of an outer list
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        inside.update(id(m) for m in module.modules())
        for key, block in module.named_children():
            # A linear that is itself the list's element (a list of heads) is no block.
            if linear_layers(block):
                found[f"{name}.{key}" if name else key] = block
    if not found:
        raise ValueError(
            "no decoder blocks: expected an nn.ModuleList whose elements have nn.Linear or Conv1D "
            f"layers below them, got {type(model).__name__} without any"
        )
    return found


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers below a module, ``nn.Linear`` or transformers ``Conv1D``, by name."""
    return {
        name: module
        for name, module in block.named_modules()
        if name and (isinstance(module, nn.Linear) or is_conv1d(module))
    }


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 2-D weights of the linear layers inside the model's decoder blocks.

    Embeddings, the output head (tied or not), norms, biases and projections outside the blocks are
    left out. Names and order are those of ``model.named_parameters()``.

    Raises:
        ValueError: there are none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            excluded.update(id(p) for p in module.parameters(recurse=False))
    layers = [m for block in decoder_blocks(model).values() for m in linear_layers(block).values()]
    wanted = {id(layer.weight) for layer in layers} - excluded
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted and parameter.dim() == 2
    }
    if not found:
        raise ValueError(
            "no linear weights inside decoder blocks: expected some that are neither embeddings "
            f"nor the output head, got {type(model).__name__} without any; name the parameters"
        )
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Tell a transformers ``Conv1D`` (weight stored (in, out)) without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
