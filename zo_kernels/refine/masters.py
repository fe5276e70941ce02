"""Float32 masters of 16-bit weights: steps are taken on them, the weights are their rounding.

A first-order step is far below the spacing of 16-bit numbers around most weights, so in such
weights it would be lost. Here gradients are added up in float32 and the optimizer holds and moves
float32 numbers, whatever the dtype of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_16_BIT = (torch.bfloat16, torch.float16)


class Masters:
    """What an optimizer gets for a model's parameters.

    A parameter of 16 bits has a float32 master. As soon as a backward pass has its gradient, that
    goes to the master's, divided by ``loss_scale``, and is let go: 16-bit gradients of all
    parameters never lie side by side. Other parameters are their own masters.

    Extra memory: 4 bytes per 16-bit weight, and 4 for its gradient.

    Args:
        parameters: the trainable ones by name.

    Attributes:
        tensors: the masters by name, for the optimizer.
        loss_scale: the factor that the loss has before a backward pass, a power of two.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.loss_scale = 1.0
        self._parameters = dict(parameters)
        self.tensors: dict[str, Tensor] = {}
        self._hooks = []
        for name, parameter in parameters.items():
            if parameter.dtype not in _16_BIT:
                self.tensors[name] = parameter
                continue
            master = parameter.detach().to(torch.float32, copy=True)
            self.tensors[name] = master
            hook = functools.partial(self._collect, master)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    @property
    def has_float16(self) -> bool:
        """Whether a gradient can leave the range of its dtype."""
        return any(p.dtype == torch.float16 for p in self._parameters.values())

    @torch.no_grad()
    def _collect(self, master: Tensor, parameter: Tensor) -> None:
        """Add a parameter's gradient to its master's and let it go."""
        if master.grad is None:
            master.grad = parameter.grad.to(torch.float32).div_(self.loss_scale)
        else:
            master.grad.add_(parameter.grad, alpha=1 / self.loss_scale)
        parameter.grad = None

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the step's last backward pass: no gradient has the loss's scale any more."""
        for name, parameter in self._parameters.items():
            if self.tensors[name] is parameter and parameter.grad is not None:
                parameter.grad.div_(self.loss_scale)

    def drop_gradients(self) -> None:
        """Let all gradients go."""
        for name, parameter in self._parameters.items():
            parameter.grad = self.tensors[name].grad = None

    @torch.no_grad()
    def write_(self) -> None:
        """Write the masters, rounded to nearest, into the weights."""
        for name, parameter in self._parameters.items():
            if self.tensors[name] is not parameter:
                parameter.copy_(self.tensors[name])

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set masters and weights to saved masters.

        Raises:
            ValueError: other names, shapes or dtypes; names the first. Nothing is written then.
        """
        own = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        saved = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for name in {**own, **saved}:
            if own.get(name) != saved.get(name):
                raise ValueError(f"'{name}': expected {own.get(name)}, got {saved.get(name)}")
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.write_()

    def close(self) -> None:
        """Leave the parameters' gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
