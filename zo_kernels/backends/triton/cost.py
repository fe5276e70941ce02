"""How many elements per second a GPU can do of a kernel: a roofline, not validated on hardware.

    memory  = bandwidth * ACHIEVABLE / bytes per element
    compute = units * clock / max over pipes (sum of weight * instructions per element / lanes)

Every instruction of a wave takes a lane's slot in its pipe and in the issue pipe, and a pipe passes
``lanes`` slots per clock and unit (SM or CU). Nothing is lost to latency, occupancy or launches, so
``compute`` is an upper bound; where it is close to ``memory``, expect less than either. ASSUMPTIONS
states every number with its source.

The high half of an integer product (IMAD.WIDE, IMAD.HI, v_mad_u64_u32, v_mul_hi_u32) is not in the
vendors' tables. It is taken at its slow rate, and the prediction for its fast rate stands beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zo_kernels.backends.triton.inspect import Report

ACHIEVABLE = 0.92  # share of the bandwidth that the best copies reach


@dataclass(frozen=True)
class Pipe:
    """An execution unit.

    Attributes:
        name: as printed.
        lanes: slots per clock and unit.
        weights: kind of instruction -> slots of one lane; every kind weighs 1 where it is None.
        fast: the same where the high half of a product is fast; None if equal.
    """

    name: str
    lanes: int
    weights: Mapping[str, float] | None
    fast: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: product.
        target: architecture, a key of compile.TARGETS.
        units: SMs or CUs.
        clock: Hz, as sustained.
        bandwidth: bytes per second of the memory's data sheet.
        pipes: execution units of one SM or CU.
        source: where units, clock and bandwidth come from.
    """

    name: str
    target: str
    units: int
    clock: float
    bandwidth: float
    pipes: tuple[Pipe, ...]
    source: str


@dataclass(frozen=True)
class Prediction:
    """Elements per second of a kernel on a GPU.

    Attributes:
        gpu: its name.
        memory: limit of the memory.
        compute: limit of the busiest pipe, high products slow.
        compute_fast: the same, high products fast.
        pipe: the busiest pipe, high products slow.
        binds: "memory" or "compute", whichever is lower.
        share: part of the memory limit that the kernel can reach, at most 1.
        share_fast: the same, high products fast.
        further: limit of the busiest pipe for each further direction in the same pass, elements
            per second; None for kernels without such a loop.
    """

    gpu: str
    memory: float
    compute: float
    compute_fast: float
    pipe: str
    binds: str
    share: float
    share_fast: float
    further: float | None


_COMMON = (
    Pipe("alu", 64, {"alu": 1}),
    Pipe("xu", 16, {"xu": 1, "other": 1}),
    Pipe("lsu", 32, {"lsu": 1}),
    Pipe("uniform", 32, {"uniform": 1}),
    Pipe("issue", 128, None),
)
_GA100 = (
    Pipe("fma", 64, {"fma": 1, "imad": 1, "wide": 2}, {"fma": 1, "imad": 1, "wide": 1}),
    *_COMMON,
)
_GH100 = (
    Pipe("fma", 128, {"fma": 1, "imad": 1, "wide": 2}, {"fma": 1, "imad": 1, "wide": 1}),
    Pipe("fma heavy", 64, {"imad": 1, "wide": 2}, {"imad": 1, "wide": 1}),
    *_COMMON,
)
_VALU = {"valu": 1.0, "vmul": 4.0, "vcvt": 4.0, "vtrans": 4.0, "other": 4.0}
_CDNA3 = (
    Pipe("valu", 64, _VALU, {**_VALU, "vmul": 1.0}),
    Pipe("salu", 64, {"salu": 1, "smem": 1, "control": 1}),
    Pipe("vmem", 16, {"vmem": 1, "lds": 1}),
)

_NVIDIA_TABLE = (
    "https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/"
    "#throughput-of-native-arithmetic-instructions"
)
_MEASURED_PIPES = (
    "https://github.com/ademeure/QuickRunCUDA/blob/main/ULTRA_DENSE_B300_PIPE_CATALOG.md"
)

GPUS = (
    Gpu("A100 SXM 80GB", "sm_80", 108, 1.41e9, 2.039e12, _GA100,
        "https://www.nvidia.com/en-us/data-center/a100/ (1.41 GHz is its highest clock)"),
    Gpu("H100 SXM", "sm_90", 132, 1.755e9, 3.35e12, _GH100,
        "https://www.nvidia.com/en-us/data-center/h100/ (1.755 GHz is assumed; at most 1.98)"),
    Gpu("H200 SXM", "sm_90", 132, 1.755e9, 4.8e12, _GH100,
        "https://www.nvidia.com/en-us/data-center/h200/ (1.755 GHz is assumed; at most 1.98)"),
    Gpu("MI300X", "gfx942", 304, 2.1e9, 5.3e12, _CDNA3,
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html "
        "(2.1 GHz is its highest clock)"),
)  # fmt: skip

#: Statement and source of each assumption; printed under the table.
ASSUMPTIONS = (
    *(
        (
            f"{gpu.name}: {gpu.units} units at {gpu.clock / 1e9:g} GHz, "
            f"{gpu.bandwidth / 1e12:g} TB/s",
            gpu.source,
        )
        for gpu in GPUS
    ),
    (
        f"{ACHIEVABLE:.0%} of the bandwidth can be had. Measured copies: 93 % on GH200, 78 % on "
        "MI300X, where the predicted share is therefore a low one",
        "https://github.com/mredenti/PowerCapping/blob/main/configuration/OpenCL_benchmark.md, "
        "https://github.com/samuel-bohman/AI-benchmarking-guide/blob/main/Azure_Results/"
        "ND_MI300X_v5_results.md",
    ),
    (
        "NVIDIA, lanes per clock and SM: issue 128; float32 64 (A100) or 128 (Hopper); integer "
        "multiply 64; other integer and logic 64; conversions of the special unit 16",
        _NVIDIA_TABLE,
    ),
    (
        "A100: float32 and integer multiply share one pipe. Hopper: two pipes of 64 lanes do "
        "float32, one of them (heavy) integer multiply as well",
        "https://forums.developer.nvidia.com/t/separate-cuda-core-pipeline-for-fp16-and-fp32/"
        "302018/7",
    ),
    (
        "Integer to float: I2F (sm_80) runs in the special unit, I2FP (sm_90) as integer logic; "
        "measured on Blackwell. Load-store 32, uniform 32 lanes, from the same measurements",
        _MEASURED_PIPES,
    ),
    (
        "IMAD.WIDE and IMAD.HI: 32 lanes (slow) or 64 (fast). On Blackwell WIDE measured fast and "
        "HI slow; not known for A100 and Hopper",
        _MEASURED_PIPES,
    ),
    (
        "MI300X: four SIMDs of 16 lanes, so 64 lanes per clock and CU; one scalar instruction per "
        "clock and CU; 16 lanes of memory access",
        "https://rocm.docs.amd.com/projects/rocprofiler-compute/en/develop/conceptual/cdna/"
        "pipeline-descriptions.html",
    ),
    (
        "MI300X: conversions at a quarter of the rate; 32x32-bit products at a quarter (slow, as "
        "on GCN) or at the full rate (fast, as LLVM's gfx942 model has it)",
        "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/AMDGPU/SISchedule.td",
    ),
    ("Unknown instructions are taken to be as slow as the special unit's", "this file"),
)


def _clocks(gpu: Gpu, counts: Mapping[str, float], fast: bool) -> tuple[float, str]:
    """Clocks of one unit for one element, and the pipe that takes them."""
    busy = []
    for pipe in gpu.pipes:
        weights = pipe.fast if fast and pipe.fast is not None else pipe.weights
        slots = sum(n * (1 if weights is None else weights.get(k, 0)) for k, n in counts.items())
        busy.append((slots / pipe.lanes, pipe.name))
    return max(busy)


def predict(report: Report, gpu: Gpu) -> Prediction:
    """Elements per second of the kernel that a report describes.

    Raises:
        ValueError: if the report is of another architecture, or has no instruction counts.
    """
    if report.target != gpu.target:
        raise ValueError(f"predict: expected a report of {gpu.target}, got one of {report.target}")
    if not report.pipes:
        raise ValueError(f"predict: {report.variant} on {report.target} has no instruction counts")
    per_second = gpu.units * gpu.clock
    slow, pipe = _clocks(gpu, report.pipes, fast=False)
    fast, _ = _clocks(gpu, report.pipes, fast=True)
    memory = gpu.bandwidth * ACHIEVABLE / report.bytes_per_element
    compute, compute_fast = per_second / slow, per_second / fast
    further = None
    if report.further_pipes:
        further = per_second / _clocks(gpu, report.further_pipes, fast=False)[0]
    return Prediction(
        gpu=gpu.name,
        memory=memory,
        compute=compute,
        compute_fast=compute_fast,
        pipe=pipe,
        binds="memory" if memory <= compute else "compute",
        share=min(1.0, compute / memory),
        share_fast=min(1.0, compute_fast / memory),
        further=further,
    )
