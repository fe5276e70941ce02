"""zo_kernels: zeroth-order refinement of large language models.

import zo_kernels as zk

optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
loss = optimizer.step(lambda: model(**batch).loss)
"""

from zo_kernels.activations import perturbed_activations, quantized_activations
from zo_kernels.noise import NOISE_SPEC, stream_id
from zo_kernels.ops import combine_, normal, perturb_, rademacher, random_words
from zo_kernels.optim import ZOSGD, StepRecord
from zo_kernels.quantize import fake_quant
from zo_kernels.views import perturbed, quantized

__version__ = "0.1.0"

__all__ = [
    "NOISE_SPEC",
    "ZOSGD",
    "StepRecord",
    "combine_",
    "fake_quant",
    "normal",
    "perturb_",
    "perturbed",
    "perturbed_activations",
    "quantized",
    "quantized_activations",
    "rademacher",
    "random_words",
    "stream_id",
]
