"""The public operations: validate, dispatch by device, registered with torch.library.

One primitive does all the work:

    dst = round(src_scale * src + sum_k scales[k] * z_k),   z_k = normal(seed, directions[k], ...)

per element in binary32: ``acc = src_scale * float32(src)``, then ``acc = fma(scales[k], z_k, acc)``
for k in order, then one rounding to dst's dtype. All backends give the same bits.
"""

from zo_kernels.checks import DTYPES
from zo_kernels.ops.advance import Update, advance_
from zo_kernels.ops.combine import combine_, perturb_
from zo_kernels.ops.dispatch import BACKENDS, backend_for, backend_reasons
from zo_kernels.ops.emit import normal, rademacher, random_words
from zo_kernels.ops.pair import pair_
from zo_kernels.ops.perturb_quantize import perturb_quant
from zo_kernels.ops.swap import Held

__all__ = [
    "BACKENDS",
    "DTYPES",
    "Held",
    "Update",
    "advance_",
    "backend_for",
    "backend_reasons",
    "combine_",
    "normal",
    "pair_",
    "perturb_",
    "perturb_quant",
    "rademacher",
    "random_words",
]
