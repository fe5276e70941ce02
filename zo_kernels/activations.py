"""A model as if its activations were noisy or quantised: contexts, for evaluation.

    with zk.perturbed_activations(model, alpha=0.05, seed=0):
        evaluate(model)
    with zk.quantized(model, "int4"), zk.quantized_activations(model, "int4"):  # W4A4
        evaluate(model)

Both hang hooks on modules for the length of the block and take them off on any way out; weights are
not touched. They nest with each other and with ``zk.perturbed`` and ``zk.quantized``.

Activation noise has an address like all noise of this package: (seed, direction, stream, index)
with direction = ``EVAL_ACTIVATION_NOISE`` + draw, the stream of the block's name and
index = forward * 2^34 + the element's number in the block's output, where ``forward`` counts the
block's calls within the context. So z is fresh in every forward and every decoding step, the same
on every device, and the same again when the same calls are made in a new context; it is not the
same for an example in another batch or behind other padding. Within ``sequences`` it is: there
index = (2^27 + the sequence's number) * 2^34 + position * hidden + channel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels import ops
from zo_kernels.blocks import decoder_blocks, linear_layers
from zo_kernels.checks import expect_finite, expect_range
from zo_kernels.noise import EVAL_ACTIVATION_NOISE, RESERVED_RANGE, assign_streams
from zo_kernels.quantize import fake_quant

_FORWARD = 1 << 34  # elements of noise that a forward of a block, or a sequence, may take
_SEQUENCES = 1 << 27  # numbers below are forwards, from here on sequences


class _Sequences(threading.local):
    """The numbers and the padding of the rows that this thread's forwards have, if known."""

    def __init__(self) -> None:
        self.rows: tuple[tuple[int, int], ...] | None = None
        self.positions: dict[int, int] = {}  # columns seen so far, by the hook's id


_sequences = _Sequences()


@contextmanager
def sequences(numbers: Sequence[int], padding: Sequence[int]) -> Iterator[None]:
    """Give activation noise by sequence and position instead of by forward, in this thread.

    The block is one prefill and the decoding steps after it, or one forward: columns are counted
    from its start. The noise of a sequence is then the same in every batch, whatever its row, its
    neighbours and its padding. A number that is used again gives the same noise again.

    Args:
        numbers: one for each row of the batch, 0 <= number < 2**27.
        padding: columns of padding on the left of each row; they get no noise.

    Raises:
        ValueError: a number out of range, unequal lengths, or a ``sequences`` inside another;
            within the block, a forward of another number of rows.
    """
    if len(numbers) != len(padding) or not all(0 <= n < _SEQUENCES for n in numbers):
        raise ValueError(
            f"sequences: expected a number in 0..2^27-1 and a padding for each row, got {numbers} "
            f"and {padding}"
        )
    if _sequences.rows is not None:
        raise ValueError("sequences: expected no other around it")
    _sequences.rows = tuple(zip(numbers, padding, strict=True))
    try:
        yield
    finally:
        _sequences.rows, _sequences.positions = None, {}


@contextmanager
def perturbed_activations(
    model: nn.Module,
    *,
    alpha: float,
    seed: int,
    draw: int = 0,
    blocks: Sequence[str] | None = None,
    backend: str | None = None,
) -> Iterator[list[str]]:
    """Add Gaussian noise to the outputs of decoder blocks, for the length of a ``with`` block.

    h' = round(h + alpha * std(h) * z), in float32 and rounded once to the output's dtype, where
    std is over the hidden dimension of each token (population, in float32). Where alpha * std is
    0 (padding, alpha = 0) h' = h.

    Args:
        model: the model; a block's output is a tensor (..., hidden), or a tuple with it first.
        alpha: noise scale in units of each token's standard deviation, >= 0.
        seed: 0 <= seed < 2**64.
        draw: which draw, 0 <= draw < 2**28.
        blocks: names out of ``decoder_blocks(model)``; None: all of them.
        backend: of the noise, as in ``zk.normal``; None: by device.

    Yields:
        The names of the blocks.

    Raises:
        ValueError: alpha, seed or draw out of range, or a name that is no decoder block's.
        TypeError: alpha is no number, or seed or draw no int; within the block, if an output is not
            a floating-point tensor.
    """
    if expect_finite("alpha", alpha) < 0:
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha}")
    expect_range("draw", draw, RESERVED_RANGE)
    expect_range("seed", seed, 1 << 64)
    everything = decoder_blocks(model)
    streams = assign_streams(list(everything))
    names = list(everything) if blocks is None else list(blocks)
    unknown = [name for name in names if name not in everything]
    if unknown:
        raise ValueError(f"blocks: expected names out of {list(everything)}, got {unknown}")
    with ExitStack() as hooks:
        for name in names:
            noise = _Noise(
                alpha=alpha,
                seed=seed,
                direction=EVAL_ACTIVATION_NOISE + draw,
                stream=streams[name],
                name=name,
                backend=backend,
            )
            hooks.callback(everything[name].register_forward_hook(noise).remove)
        yield names


class _Noise:
    """The forward hook of one block."""

    def __init__(self, *, alpha: float, name: str, backend: str | None, **address: int) -> None:
        self._alpha, self._name, self._backend, self._address = alpha, name, backend, address
        self._forwards = 0

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not (isinstance(hidden, Tensor) and hidden.is_floating_point()):
            raise TypeError(
                f"'{self._name}': expected a floating-point tensor as output, or first in a tuple, "
                f"got {type(hidden).__name__}"
            )
        z = self._by_forward(hidden) if _sequences.rows is None else self._by_sequence(hidden)
        exact = hidden.float()
        scale = self._alpha * exact.std(dim=-1, correction=0, keepdim=True)
        noisy = torch.where(scale > 0, exact + scale * z, exact).to(hidden.dtype)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    def _by_forward(self, hidden: Tensor) -> Tensor:
        offset, self._forwards = self._forwards * _FORWARD, self._forwards + 1
        return self._normal(hidden.numel(), offset, hidden.device).view(hidden.shape)

    def _by_sequence(self, hidden: Tensor) -> Tensor:
        rows = _sequences.rows
        if hidden.dim() != 3 or len(rows) != hidden.shape[0]:
            raise ValueError(
                f"'{self._name}': expected an output of {len(rows)} sequences, as announced, got "
                f"one of shape {list(hidden.shape)}"
            )
        _, length, width = hidden.shape
        start = _sequences.positions.get(id(self), 0)
        _sequences.positions[id(self)] = start + length
        z = torch.zeros(hidden.shape, device=hidden.device)
        for row, (number, padding) in enumerate(rows):
            skipped = min(max(padding - start, 0), length)
            offset = (_SEQUENCES + number) * _FORWARD + (start + skipped - padding) * width
            if skipped < length:
                count = (length - skipped) * width
                z[row, skipped:] = self._normal(count, offset, hidden.device).view(-1, width)
        return z

    def _normal(self, count: int, offset: int, device: torch.device) -> Tensor:
        return ops.normal(
            count, **self._address, offset=offset, backend=self._backend, device=device
        )


@contextmanager
def quantized_activations(
    model: nn.Module, scheme: str = "int8", *, symmetric: bool = True, backend: str | None = None
) -> Iterator[list[str]]:
    """Fake-quantise the inputs of the decoder blocks' linears, for the length of a ``with`` block.

    Dynamic and per token: each token's vector is one group of ``zk.fake_quant``, whose scale comes
    from it alone. With ``zk.quantized`` this is W8A8, W4A4 and so on.

    Args:
        model: the model; inputs are float32, bfloat16 or float16.
        scheme, symmetric, backend: as in ``zk.fake_quant``.

    Yields:
        The names of the modules.

    Raises:
        ValueError, TypeError: as ``zk.fake_quant``, naming the module; unknown options at once,
            non-finite inputs within the block.
    """
    chosen = {
        f"{block}.{name}": module
        for block, part in decoder_blocks(model).items()
        for name, module in linear_layers(part).items()
    }
    options = {"group_size": "row", "symmetric": symmetric, "backend": backend}
    device = next(iter(chosen.values())).weight.device
    fake_quant(torch.zeros(1, 1, device=device), scheme, **options)  # so that errors come up here

    def hook_of(name: str) -> Any:
        def quantize(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0].detach()
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            result = fake_quant(rows, scheme, name=f"input of '{name}'", **options)
            return (result.view(x.shape), *arguments[1:])

        return quantize

    with ExitStack() as hooks:
        for name, module in chosen.items():
            hooks.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        yield list(chosen)
