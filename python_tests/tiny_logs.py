"""Small logs of runs that no model took part in, and their weights step by step."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels.backends.reference_updates import join, round_joined, split
from zo_kernels.noise import assign_streams
from zo_kernels.replay import GroupStep, Header, LogWriter, Parameter, Step, fingerprint

SEED = 2**63 + 5
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.zeros(4).bfloat16()}
MARK = "0123456789abcdef" * 2


def header_of(
    groups: Sequence[Mapping[str, Tensor]],
    units: Mapping[str, float] | None = None,
    *,
    queries: int = 1,
    mode: str = "streamed",
    distribution: str = "normal",
    **fields: object,
) -> Header:
    """The header of a run over these tensors, with their fingerprint as base."""
    streams = assign_streams([name for group in groups for name in group])
    tables = tuple(
        tuple(Parameter.of(n, t, streams[n], (units or {}).get(n, 1.0)) for n, t in group.items())
        for group in groups
    )
    pairs = [pair for group in groups for pair in group.items()]
    fields = {"seed": SEED, "base": fingerprint(pairs), **fields}
    return Header(
        queries=queries, mode=mode, distribution=distribution, groups=tables, **fields
    )  # fmt: skip


def steps_of(
    count: int, *, queries: int = 1, groups: int = 1, size: float = 1e-2, skip: Sequence[int] = ()
) -> list[Step]:
    """Steps with numbers of their own; every third one decays, some are skipped."""
    made = []
    for n in range(count):
        made.append(
            Step(
                step=n,
                losses_plus=[1.0 + n + 0.125 * q for q in range(0 if n in skip else queries)],
                losses_minus=[2.0 - n / 3 + q for q in range(0 if n in skip else queries)],
                groups=[
                    GroupStep(
                        lr=1e-3 * (g + 1),
                        eps=0.1 + g,
                        decay=1.0 - 1e-3 * (n % 3 == 2),
                        coefficients=[
                            size * math.sin(1 + n + 7 * q + 31 * g) for q in range(queries)
                        ],
                    )
                    for g in range(groups)
                ],
                skipped=n in skip,
            )
        )
    return made


def write(
    path: Path, header: Header, steps: Sequence[Step], marks: Mapping[int, str] | None = None
) -> Path:
    """A log of these steps; marks by the number of steps before them."""
    marks = marks or {}
    with LogWriter(path, header) as writer:
        for step in steps:
            if step.step in marks:
                writer.write_mark(marks[step.step])
            writer.write_step(step)
        if len(steps) in marks:
            writer.write_mark(marks[len(steps)])
    return path


def weights_after(
    groups: Sequence[Mapping[str, Tensor]], header: Header, steps: Sequence[Step]
) -> dict[str, Tensor]:
    """The weights by one ``combine_`` per step and tensor, written from the definition."""
    weights = {n: t.detach().clone() for group in groups for n, t in group.items()}
    values = {n: t.float() for n, t in weights.items()}  # of master and master8

    def add(
        parameter: Parameter, scales: Sequence[float], directions: Sequence[int], decay: float
    ) -> None:
        target = (weights if header.arithmetic == "stochastic" else values)[parameter.name]
        zk.combine_(
            [target],
            [target],
            [scales],
            seed=header.seed,
            directions=directions,
            streams=[parameter.stream],
            src_scale=decay,
            rounding="stochastic" if header.arithmetic == "stochastic" else "nearest",
            distribution=header.distribution,
            backend="reference",
        )
        dtype = parameter.torch_dtype
        if header.arithmetic == "master8" and dtype != torch.float32:
            values[parameter.name] = round_joined(target, dtype)

    warm = header.warm_start
    for step in steps:
        directions = [step.step * header.queries + q for q in range(header.queries)]
        for group, table in zip(step.groups, header.groups, strict=True):
            products = [[p.unit * c for c in group.coefficients] for p in table]
            if step.skipped or (group.decay == 1.0 and not any(c for row in products for c in row)):
                continue
            for parameter, scales in zip(table, products, strict=True):
                add(parameter, scales, directions, group.decay)
        if warm is not None and not step.skipped:
            for table in header.groups:
                if any(any(warm.scales.get(p.name, ())) for p in table):
                    for parameter in table:
                        still = [0.0] * len(warm.directions)
                        scales = list(warm.scales.get(parameter.name, still))
                        add(parameter, scales, list(warm.directions), 1.0)
            warm = None
    for parameter in header.parameters():
        name, dtype = parameter.name, parameter.torch_dtype
        if header.arithmetic == "master8" and dtype != torch.float32:
            weight, residual = split(values[name], dtype)
            assert torch.equal(join(weight, residual), values[name])
            weights[name] = weight
        elif header.arithmetic != "stochastic":
            weights[name] = values[name].to(dtype)
    return weights


def small_log(tmp_path, count=4, **options):
    """A log with a mark in the middle and one at the end, and its steps."""
    header = header_of([TENSORS], queries=options.get("queries", 1))
    steps = steps_of(count, **options)
    path = write(tmp_path / "run.zolog", header, steps, {count // 2: MARK, count: MARK})
    return path, header, steps


def places(path):
    """Where each record begins, and the end of the file: found by the lengths alone."""
    data = path.read_bytes()
    offset = 16 + struct.unpack_from("<I", data, 12)[0] + 4
    found = [offset]
    while offset < len(data):
        offset += 5 + struct.unpack_from("<I", data, offset + 1)[0] + 4
        found.append(offset)
    assert found[-1] == len(data)
    return found
