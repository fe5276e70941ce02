"""zo_kernels: zeroth-order refinement of large language models.

import zo_kernels as zk

optimizer = zk.ZOSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
loss = optimizer.step(lambda: model(**batch).loss)

``align``, ``score`` and ``ZORefiner`` with their configurations are imported when they are first
asked for: a program that only optimizes pays for no pipeline.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from zo_kernels.activations import perturbed_activations, quantized_activations
from zo_kernels.noise import NOISE_SPEC, stream_id
from zo_kernels.ops import combine_, normal, perturb_, rademacher, random_words
from zo_kernels.optim import ZOSGD, StepRecord
from zo_kernels.quantize import fake_quant
from zo_kernels.views import perturbed, quantized

if _TYPE_CHECKING:
    from zo_kernels.refine.align import AlignConfig, align
    from zo_kernels.refine.config import RefineConfig
    from zo_kernels.refine.refiner import ZORefiner
    from zo_kernels.refine.scores import ScoreConfig
    from zo_kernels.refine.scoring import score

__version__ = "0.1.0"

__all__ = [
    "NOISE_SPEC",
    "ZOSGD",
    "AlignConfig",
    "RefineConfig",
    "ScoreConfig",
    "StepRecord",
    "ZORefiner",
    "align",
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
    "score",
    "stream_id",
]

_STAGES = {
    "AlignConfig": "zo_kernels.refine.align",
    "RefineConfig": "zo_kernels.refine.config",
    "ScoreConfig": "zo_kernels.refine.scores",
    "ZORefiner": "zo_kernels.refine.refiner",
    "align": "zo_kernels.refine.align",
    "score": "zo_kernels.refine.scoring",
}


def __getattr__(name: str) -> _Any:
    """One of the three stages, from its module (PEP 562)."""
    if name not in _STAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_STAGES[name]), name)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    """What is there, and what is imported when it is asked for."""
    return sorted({*globals(), *_STAGES})
