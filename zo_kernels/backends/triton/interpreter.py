"""Mends Triton's interpreter, so that kernels give on the CPU the bits they give on a GPU.

Up to Triton 3.9 the interpreter truncates float32 to bfloat16 and mangles bfloat16 subnormals
(``_convert_float``), where GPUs round to nearest even; measured, 51 % of casts differ. Up to 3.8
its fma rounds twice.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns (uint16), nearest even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    rounded = np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
    return rounded.reshape(values.shape)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Correctly rounded binary32 x * y + z: the exact product, a sum rounded to odd in binary64.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)
        addend = np.broadcast_to(z, product.shape).astype(np.float64)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        away = (error > 0) == (total > 0)
        nudged = np.where(away, np.int64(1), np.int64(-1)) + total.view(np.int64)
        odd = (error == 0) | ~np.isfinite(total) | (total.view(np.int64) & 1 != 0)
        return np.where(odd, total, nudged.view(np.float64)).astype(np.float32)


def mend() -> None:
    """Replace the interpreter's bfloat16 conversion and, before 3.9, its fma; once is enough."""
    original = interpreter._convert_float
    if getattr(original, "mended", False):
        return

    def convert(data, from_dtype, to_dtype, rounding):
        if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
            if rounding != interpreter._ir.ROUNDING_MODE.RTZ:
                return _to_bfloat16(data)
        elif from_dtype == tl.bfloat16 and to_dtype == tl.float32:
            return (data.astype(np.uint32) << np.uint32(16)).reshape(data.shape)
        return original(data, from_dtype, to_dtype, rounding)

    def create_fma(self, x, y, z):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        interpreter.InterpreterBuilder.create_fma = create_fma
    convert.mended = True
    interpreter._convert_float = convert
