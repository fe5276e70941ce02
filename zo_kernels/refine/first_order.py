"""One first-order step: the gradient of several micro-batches at weights that may be noisy.

The gradient is that of the mean loss over all completion tokens of the step's micro-batches, so k
micro-batches of b examples have the gradient of one batch of k b examples, up to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_kernels.blocks import linear_weights
from zo_kernels.chat import IGNORED, completion_loss
from zo_kernels.modes.base import uninterrupted
from zo_kernels.noise import model_streams, training_direction
from zo_kernels.refine.checkpoint import fast_dtype
from zo_kernels.refine.masters import Masters
from zo_kernels.views import held, noise_std

if TYPE_CHECKING:
    from zo_kernels.refine.align import AlignConfig

# float16 gradients: the loss is multiplied by this, by half as much where they overflow, and by
# twice as much again after so many steps in which they did not.
_LOSS_SCALE, _LOSS_SCALE_PERIOD = 2.0**16, 1000


class FirstOrder:
    """The optimizer of an alignment, its masters and its noise.

    Args:
        model: in eval mode; its trainable parameters are trained, all dtypes allowed.
        config: see ``AlignConfig``.

    Raises:
        ValueError: precision "float32" for a 16-bit model; nothing to train; with noise, a model
            without linear weights in decoder blocks.
    """

    def __init__(self, model: Any, config: AlignConfig) -> None:
        self.model, self.config = model, config
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model: expected parameters that require gradients, got none")
        self._mixed = _autocast(model, config.precision)
        self._noisy = linear_weights(model) if config.noise else {}
        self._streams = model_streams(model) if config.noise else {}
        self.masters = Masters(trained)
        self._good_steps = 0
        if self.masters.has_float16:
            self.masters.loss_scale = _LOSS_SCALE
        tensors = list(self.masters.tensors.values())
        options = {"lr": config.lr, "weight_decay": config.weight_decay}
        # fused: no temporaries of the weights' size, which the other implementations make.
        if config.optimizer == "adamw":
            self._optimizer: Any = torch.optim.AdamW(tensors, **options, fused=True)
        else:
            self._optimizer = torch.optim.SGD(
                tensors, **options, momentum=config.momentum, fused=True
            )

    def step(
        self, number: int, batches: Sequence[dict[str, Tensor]], lr: float
    ) -> dict[str, float | int]:
        """Take one step.

        Args:
            number: of the step in this run.
            batches: the step's micro-batches.
            lr: learning rate.

        Returns:
            loss (nats per completion token, before the update and under the noise), lr,
            gradient_norm (before clipping), tokens (of completions); loss_scale for float16.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are as before.
        """
        counts = torch.stack([(b["labels"] != IGNORED).sum() for b in batches]).tolist()
        try:
            loss, norm = self._gradient(number, batches, counts)
            while not math.isfinite(norm) and self.masters.loss_scale > 1:
                self.masters.loss_scale, self._good_steps = self.masters.loss_scale / 2, 0
                loss, norm = self._gradient(number, batches, counts)
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"alignment step {number}: expected a finite gradient, got norm {norm}"
                )
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            with uninterrupted():
                self._optimizer.step()
                self.masters.write_()
        finally:
            self.masters.drop_gradients()
        record = {"loss": loss, "lr": lr, "gradient_norm": norm, "tokens": sum(counts)}
        if self.masters.has_float16:
            record["loss_scale"] = self.masters.loss_scale
            self._good_steps += 1
            if self._good_steps % _LOSS_SCALE_PERIOD == 0:
                self.masters.loss_scale *= 2
        return record

    def _gradient(
        self, number: int, batches: Sequence[dict[str, Tensor]], counts: Sequence[int]
    ) -> tuple[float, float]:
        """Leave the masters with the clipped gradient; the loss, and the norm before clipping."""
        self.masters.drop_gradients()
        mean = 0.0
        with self._noise(number):
            for batch, count in zip(batches, counts, strict=True):
                with self._mixed:
                    loss = completion_loss(self.model, batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"alignment step {number}: expected a finite loss, got {value}"
                    )
                share = count / sum(counts)
                mean += value * share
                (loss * (share * self.masters.loss_scale)).backward()
        self.masters.finish_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.tensors.values(), self.config.clip_norm)
        return mean, float(norm)

    def _noise(self, number: int) -> AbstractContextManager[Any]:
        """The linear weights of the blocks are W + noise std(W) z within, W to the bit after."""
        if not self._noisy:
            return nullcontext()
        level = self.config.noise
        scales = {
            name: noise_std(weight.detach(), sigma=level, kind="rel_std", name=name)
            for name, weight in self._noisy.items()
        }
        names = [name for name, scale in scales.items() if scale > 0]
        return held(
            [self._noisy[name] for name in names],
            [scales[name] for name in names],
            seed=self.config.seed,
            direction=training_direction(number, 1, 0),
            streams=[self._streams[name] for name in names],
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: masters, optimizer, the loss's scale. Not copied."""
        return {
            "weights": {name: tensor.detach() for name, tensor in self.masters.tensors.items()},
            "optimizer": self._optimizer.state_dict(),
            "loss_scale": self.masters.loss_scale,
            "good_steps": self._good_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``, weights included.

        Raises:
            ValueError: it is of other parameters.
        """
        self.masters.load_(state["weights"])
        # A copy: the optimizer would keep what is read from a file as a view of it.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.masters.loss_scale, self._good_steps = state["loss_scale"], state["good_steps"]

    def close(self) -> None:
        """Take the hooks off the model."""
        self.masters.close()


def _autocast(model: Any, precision: str) -> AbstractContextManager[Any]:
    """The context in which a model's forwards run."""
    dtypes = {p.dtype for p in model.parameters()}
    device = next(model.parameters()).device
    if precision == "float32" and dtypes != {torch.float32}:
        raise ValueError(
            f"precision: expected auto or bfloat16 for a model in {sorted(map(str, dtypes))}, got "
            "'float32'; load it in float32"
        )
    fast = precision == "bfloat16" or (
        precision == "auto" and dtypes == {torch.float32} and fast_dtype(device) != torch.float32
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if fast else nullcontext()
