"""What is checked and timed on every device: CASES, one line each.

A case is one pass over weights. Its result is compared with the reference backend's, bit for bit:
in windows of the buffer that is timed, and in a whole small run at a ragged, misaligned place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.quantize import fake_quant
from zo_kernels.vectors import bits, hexadecimal

SEED, DIRECTION, STREAM, SCALE = 0x0123456789ABCDEF, 5, 0xDEADBEEF, 1e-3
ALIGNMENT = 1 << 12  # windows begin and end at its multiples, so groups of quantization stay whole
# Elements compared at the start (more than one program of the Triton kernels has), middle and end.
WINDOWS = (5 * ALIGNMENT, ALIGNMENT, ALIGNMENT)
# A run across the index where the high counter word changes, one element off any alignment.
RAGGED_COUNT, RAGGED_OFFSET = 2003, (1 << 34) - 1003
_PERIOD = 1 << 16


@dataclass(frozen=True)
class Buffers:
    """The memory of a pass, and where in the full parameter it lies.

    Attributes:
        weights: (count,), float32, bfloat16 or float16; a pass in place writes it.
        scratch: the same shape and dtype, for passes out of place.
        backend: who works on them.
        offset: index of the first element.
    """

    weights: Tensor
    scratch: Tensor
    backend: str
    offset: int = 0

    def fill(self, start: int = 0) -> None:
        """Weights of a trained layer's size, the same for a start every time; scratch NaN."""
        values = _values(self.weights.dtype).to(self.weights.device).roll(-start % _PERIOD)
        whole = self.weights.numel() // _PERIOD * _PERIOD
        self.weights[:whole].view(-1, _PERIOD).copy_(values)
        self.weights[whole:].copy_(values[: self.weights.numel() - whole])
        self.scratch.fill_(torch.nan)

    def emit(self, op: Callable[..., Tensor]) -> Tensor:
        """One of the operations that return random numbers, as many as there are weights."""
        return op(
            self.weights.numel(),
            seed=SEED,
            direction=DIRECTION,
            stream=STREAM,
            offset=self.offset,
            backend=self.backend,
            device=self.weights.device,
        )

    def perturb(self, **options: Any) -> Tensor:
        """``ops.perturb_`` of the weights, in place."""
        ops.perturb_([self.weights], SCALE, direction=DIRECTION, **self._common(), **options)
        return self.weights

    def combine(self, dst: Tensor, directions: int = 1, **options: Any) -> Tensor:
        """``ops.combine_`` of the weights into dst, which is scratch or the weights."""
        numbers = [DIRECTION + k for k in range(directions)]
        scales = [SCALE] * directions
        ops.combine_([dst], [self.weights], scales, directions=numbers, **self._common(), **options)
        return dst

    def fake_quant(self, scheme: str, group: int) -> Tensor:
        """``fake_quant`` of the weights into scratch, without its look for infinities."""
        return fake_quant(
            self.weights.view(-1, group),
            scheme,
            group_size=group,
            out=self.scratch.view(-1, group),
            check_finite=False,
            backend=self.backend,
        )

    def perturb_quant(self, scheme: str, group: int) -> Tensor:
        """``ops.perturb_quant`` of the weights into scratch, without its look for infinities."""
        ops.perturb_quant(
            [self.scratch.view(-1, group)],
            [self.weights.view(-1, group)],
            [SCALE],
            scheme,
            direction=DIRECTION,
            group_size=group,
            check_finite=False,
            **self._common(),
        )
        return self.scratch

    def _common(self) -> dict[str, Any]:
        place = {"streams": [STREAM], "offsets": [self.offset]}
        return {"seed": SEED, "backend": self.backend, **place}


@dataclass(frozen=True)
class Case:
    """A pass.

    Attributes:
        name: the operation and what it works on, unique.
        dtype: of the weights.
        traffic: bytes per element that the pass has to read and write.
        run: makes the pass and returns what it wrote.
        passes: how many of MeZO's passes do the same; 0 if none does.
        multiple: the number of elements must be a multiple of it; it divides ALIGNMENT.
    """

    name: str
    dtype: torch.dtype
    traffic: int
    run: Callable[[Buffers], Tensor]
    passes: int = 1
    multiple: int = 1


_F32, _BF16, _F16 = ops.DTYPES
_QUANTIZED = {"passes": 0, "multiple": 128}
CASES = (
    Case("random_words", _F32, 8, lambda b: b.emit(ops.random_words), passes=0),
    Case("normal", _F32, 4, lambda b: b.emit(ops.normal), passes=0),
    Case("rademacher", _F32, 4, lambda b: b.emit(ops.rademacher), passes=0),
    Case("perturb_ fp32", _F32, 8, lambda b: b.perturb()),
    Case("combine_ fp32, 4 directions", _F32, 8, lambda b: b.combine(b.weights, 4), passes=4),
    Case("perturb_ bf16", _BF16, 4, lambda b: b.perturb()),
    Case("perturb_ bf16 stochastic", _BF16, 4, lambda b: b.perturb(rounding="stochastic")),
    Case("perturb_ bf16 rademacher", _BF16, 4, lambda b: b.perturb(distribution="rademacher")),
    Case("combine_ bf16 out of place", _BF16, 4, lambda b: b.combine(b.scratch)),
    Case("combine_ bf16, 4 directions", _BF16, 4, lambda b: b.combine(b.weights, 4), passes=4),
    Case("fake_quant bf16 int4, g128", _BF16, 4, lambda b: b.fake_quant("int4", 128), **_QUANTIZED),
    Case("fake_quant bf16 nf4, g64", _BF16, 4, lambda b: b.fake_quant("nf4", 64), **_QUANTIZED),
    Case(
        "perturb_quant bf16 int4, g128",
        _BF16,
        4,
        lambda b: b.perturb_quant("int4", 128),
        **_QUANTIZED,
    ),
    Case("perturb_ fp16", _F16, 4, lambda b: b.perturb()),
    Case("perturb_ fp16 stochastic", _F16, 4, lambda b: b.perturb(rounding="stochastic")),
)


def buffers(
    dtype: torch.dtype, count: int, device: str, backend: str, offset: int = 0, shift: int = 0
) -> Buffers:
    """Memory for a pass over count elements, ``shift`` elements off its alignment; not filled."""
    pair = [torch.empty(count + shift, dtype=dtype, device=device)[shift:] for _ in range(2)]
    return Buffers(*pair, backend=backend, offset=offset)


def difference(got: Tensor, expected: Tensor, first: int = 0) -> dict[str, Any] | None:
    """The first element whose bits differ (any NaN equals any NaN), or None.

    Args:
        got, expected: (count,) of one dtype.
        first: index of element 0.

    Returns:
        {"index", "expected" and "got" in hexadecimal, "differing": how many}.

    Raises:
        TypeError, ValueError: the result has another dtype or shape than the right one.
    """
    if got.dtype != expected.dtype:
        raise TypeError(f"the result: expected {expected.dtype}, got {got.dtype}")
    if got.shape != expected.shape:
        raise ValueError(f"the result: expected shape {expected.shape}, got {got.shape}")
    got = got.detach().cpu()
    wrong = (bits(got) != bits(expected)) & ~(got.isnan() & expected.isnan())
    places = wrong.nonzero().flatten()
    if len(places) == 0:
        return None
    at = places[0].item()
    return {
        "index": first + at,
        "expected": hexadecimal(expected[at : at + 1]),
        "got": hexadecimal(got[at : at + 1]),
        "differing": len(places),
    }


class Reference:
    """What the reference backend gives on the CPU, computed once for each case and place."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], Tensor] = {}

    def __call__(self, case: Case, start: int, count: int, offset: int) -> Tensor:
        """Elements [start, start + count) of the case's result on weights that begin at offset."""
        key = (case.name, start, count, offset)
        if key not in self._known:
            part = buffers(case.dtype, count, "cpu", "reference", offset + start)
            part.fill(start)
            self._known[key] = case.run(part).view(-1)
        return self._known[key]


def windows(count: int) -> list[tuple[int, int]]:
    """Start and length of the parts of a buffer that are compared: all of a small one."""
    if count <= sum(WINDOWS):
        return [(0, count)]
    first, middle, last = WINDOWS
    starts = (0, count // 2 // ALIGNMENT * ALIGNMENT, (count - last) // ALIGNMENT * ALIGNMENT)
    return [(starts[0], first), (starts[1], middle), (starts[2], count - starts[2])]


def check(case: Case, timed: Buffers, reference: Reference) -> dict[str, Any]:
    """Verdict on a case: its pass over the buffers that will be timed, and a ragged run.

    Returns:
        {"verdict": "ok", "compared": elements}, or {"verdict": "wrong bits", "run": which of the
        two, and the fields of ``difference``}.
    """
    device = str(timed.weights.device)
    count = RAGGED_COUNT // case.multiple * case.multiple
    offset = RAGGED_OFFSET // case.multiple * case.multiple
    ragged = buffers(case.dtype, count, device, timed.backend, offset, shift=1)
    compared = 0
    for name, run, parts in (
        ("ragged", ragged, [(0, count)]),
        ("timed", timed, windows(timed.weights.numel())),
    ):
        run.fill()
        result = case.run(run).view(-1)
        for start, length in parts:
            expected = reference(case, start, length, run.offset)
            found = difference(result[start : start + length], expected, run.offset + start)
            if found:
                return {"verdict": "wrong bits", "run": name, **found}
            compared += length
    return {"verdict": "ok", "compared": compared}


@lru_cache
def _values(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(_PERIOD, generator=generator) * 0.02).to(dtype)
