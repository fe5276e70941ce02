"""A model as if its weights were noisy or quantised, without touching them.

    with zk.perturbed(model, sigma=0.05, seed=0), zk.quantized(model, "int4", group_size=128):
        evaluate(model)

Within the block every operation that reads a chosen weight reads a changed copy, made for that
operation alone in a scratch buffer: the model is never modified, whatever happens, and the extra
memory is the largest weight. Contexts nest, inner ones changing what outer ones give: above, the
noisy weights are quantised. Both work through torch functions of the thread that entered them, so
a model compiled by ``torch.compile`` reads its weights as they are: that is a RuntimeError.

Noise has an address like all noise of this package: (seed, direction, stream, index) with
direction = ``EVAL_WEIGHT_NOISE`` + draw. That range is never used by training, so an evaluation
draw is never a direction the refinement has seen, and the same draw hits every checkpoint alike.
"""

from zo_kernels.views.noisy import NOISE_KINDS, held, noise_std, perturbed
from zo_kernels.views.rounded import QuantizedView, QuantizedWeights, quantized
from zo_kernels.views.selection import Selection, select

__all__ = [
    "NOISE_KINDS",
    "QuantizedView",
    "QuantizedWeights",
    "Selection",
    "held",
    "noise_std",
    "perturbed",
    "quantized",
    "select",
]
