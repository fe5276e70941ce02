"""What Triton compiles of the kernels for GPUs that need not be here, and what was promised.

``python -m zo_kernels.backends.triton.inspect sm_90='combine*'`` prints a line of JSON per variant
and target. The command line and the tests read those from a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase

from zo_kernels.backends.triton import (
    gcn,
    holding,
    launch,
    perturb_quantize,
    quantize,
    sass,
    updates,
)
from zo_kernels.backends.triton.assembly import Code, Facts, Instruction, hot_path
from zo_kernels.backends.triton.compile import TARGETS, Variant, compile_variant

WIDE = 16  # bytes of the widest access that all targets have


def all_variants() -> list[Variant]:
    """The specialisations of all kernels that a user's call can reach.

    Raises:
        ValueError: if two have the same name.
    """
    rooms = (launch, updates, holding, quantize, perturb_quantize)
    variants = [variant for room in rooms for variant in room.variants()]
    twice = [name for name, n in Counter(v.name for v in variants).items() if n > 1]
    if twice:
        raise ValueError(f"all_variants: expected unique names, got {twice} more than once")
    return variants


def select(patterns: Iterable[str]) -> list[Variant]:
    """The variants whose name matches one of the patterns (as a shell's).

    Raises:
        ValueError: if there is none.
    """
    variants, patterns = all_variants(), list(patterns)
    chosen = [v for v in variants if any(fnmatchcase(v.name, p) for p in patterns)]
    if not chosen:
        names = ", ".join(v.name for v in variants)
        raise ValueError(f"kernel: expected patterns of {names}; got {', '.join(patterns)}")
    return chosen


def check_targets(targets: Iterable[str]) -> None:
    """Raise ValueError for a target that is not in TARGETS."""
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"target: expected some of {', '.join(TARGETS)}; got {', '.join(unknown)}")


@dataclass(frozen=True)
class Report(Facts):
    """One variant on one target: the facts of its compilation, and its hot path.

    Attributes:
        variant, target: the names.
        bytes_per_element: as in Variant.
        region: "loop", or "kernel" where the widest stores are in no loop and all of the kernel is
            counted, or None where it stores nothing.
        elements: elements of dst that a lane stores in one iteration.
        loads, stores: widths in bytes of the global accesses of one iteration.
        opcodes: instruction -> count in one iteration.
        instructions: per element, loops inside the body left out; None without a region.
        pipes: pipe -> instructions per element.
        unknown: instruction of no known pipe -> count in one iteration.
        further: instructions of one iteration of the loops inside the body, per element: the cost
            of each further direction. None if there is no such loop.
        further_pipes: pipe -> such instructions per element.
        others: instructions per element of the other loops that store as widely.
    """

    variant: str
    target: str
    bytes_per_element: float
    region: str | None = None
    elements: float = 0.0
    loads: tuple[int, ...] = ()
    stores: tuple[int, ...] = ()
    opcodes: dict[str, int] | None = None
    instructions: float | None = None
    pipes: dict[str, float] | None = None
    unknown: dict[str, int] | None = None
    further: float | None = None
    further_pipes: dict[str, float] | None = None
    others: tuple[float, ...] = ()

    @property
    def narrow(self) -> float:
        """Bytes per element that do not move in 16-byte accesses."""
        if not self.elements:
            return self.bytes_per_element
        wide = sum(width for width in (*self.loads, *self.stores) if width >= WIDE)
        return max(0.0, self.bytes_per_element - wide / self.elements)


@dataclass(frozen=True)
class Budget:
    """A promise about compiled code.

    Attributes:
        variants, targets: patterns of names, as a shell's.
        quantity: a key of QUANTITIES.
        limit: the largest value that keeps it.
        aim: what is hoped for.
        but: patterns of variants that it is not about.
    """

    variants: str
    targets: str
    quantity: str
    limit: float
    aim: float | None = None
    but: tuple[str, ...] = ()

    def covers(self, report: Report) -> bool:
        """Whether the promise is about this code."""
        named = fnmatchcase(report.variant, self.variants)
        return (
            named
            and fnmatchcase(report.target, self.targets)
            and not any(fnmatchcase(report.variant, pattern) for pattern in self.but)
        )

    def broken(self, report: Report) -> str | None:
        """How the code breaks the promise, with both numbers; None if it keeps it."""
        value = QUANTITIES[self.quantity](report)
        if value is not None and value <= self.limit:
            return None
        found = "no count of" if value is None else f"{value:.4g}"
        return (
            f"{report.variant} on {report.target}: {found} {self.quantity}, budget {self.limit:g}"
        )


#: Words for a number of a report -> how to get it; None where the code gives no such number.
QUANTITIES: dict[str, Callable[[Report], float | None]] = {
    # Spilled scalars of AMD stay in lanes of a vector register; what reaches memory is "scratch".
    "spilled bytes or registers": lambda r: sum(
        n for kind, n in r.spills.items() if kind != "sgpr"
    ),
    "approximate instructions": lambda r: sum(r.approximate.values()),
    "contracted multiply-adds": lambda r: r.contracted,
    "bytes per element outside 16-byte accesses": lambda r: r.narrow,
    "bytes of shared memory": lambda r: r.shared,
    "instructions per element": lambda r: r.instructions,
    "instructions per element and further direction": lambda r: r.further,
}

# What holds weights in place was fitted to sm_90: elsewhere it spills a few bytes (sm_80) or reads
# narrowly (gfx942), which the command shows and nothing promises away.
_HELD = ("hold*", "swap*", "release*")
BUDGETS = (
    Budget("*", "*", "spilled bytes or registers", 0, but=_HELD),
    *(Budget(variants, "sm_90", "spilled bytes or registers", 0) for variants in _HELD),
    Budget("*", "*", "approximate instructions", 0),
    Budget("*", "*", "contracted multiply-adds", 0),
    # From bfloat16 to float32 a lane, which owns 16 bytes of dst, reads 8 of src; and 8 elements
    # have 8 bytes of residuals.
    Budget(
        "*",
        "*",
        "bytes per element outside 16-byte accesses",
        0,
        but=("combine bf16-fp32", "advance*residuals*", *_HELD),
    ),
    *(
        Budget(variants, "sm_90", "bytes per element outside 16-byte accesses", 0, but=("* count",))
        for variants in _HELD
    ),
    Budget("advance*residuals*", "*", "bytes per element outside 16-byte accesses", 2),
    Budget("combine*", "*", "bytes of shared memory", 0),
    Budget("pair*", "*", "bytes of shared memory", 0),
    Budget("advance*", "*", "bytes of shared memory", 0),
    Budget("combine bf16", "sm_90", "instructions per element", 36, aim=33),
    Budget("combine fp32", "sm_90", "instructions per element", 36),
    Budget("combine*directions*", "sm_90", "instructions per element and further direction", 32),
    Budget("combine ???? rademacher", "sm_90", "instructions per element", 8),
    Budget("pair ????", "sm_90", "instructions per element", 38),
    # Each lane's place among the bytes of its step: a scan over the program's warps.
    Budget("hold*", "sm_90", "bytes of shared memory", 1024),
    Budget("swap*", "sm_90", "bytes of shared memory", 1024),
    Budget("hold ????", "sm_90", "instructions per element", 90),
    Budget("swap ????", "sm_90", "instructions per element", 120),
    # An update of one direction, rounding included.
    Budget("advance ????", "sm_90", "instructions per element and further direction", 36),
    Budget("advance ???? residuals", "sm_90", "instructions per element and further direction", 42),
)


def broken_budgets(reports: Iterable[Report]) -> list[str]:
    """One sentence per broken promise."""
    pairs = ((budget, report) for report in reports for budget in BUDGETS if budget.covers(report))
    return [sentence for budget, report in pairs if (sentence := budget.broken(report))]


def _per_element(path: Sequence[Instruction], elements: float) -> dict[str, float]:
    counts = Counter(instruction.pipe for instruction in path)
    return {pipe: n / elements for pipe, n in sorted(counts.items())}


def describe(variant: Variant, target: str, code: Code) -> Report:
    """The report of a variant whose compiled code has been read."""
    facts = {fact.name: getattr(code, fact.name) for fact in fields(Facts)}
    facts.update(variant=variant.name, target=target, bytes_per_element=variant.bytes_per_element)
    path = hot_path(code.instructions, code.labels)
    if path is None:
        return Report(**facts)
    elements = path.stored / variant.dst_itemsize
    accesses = [i.access for i in path.body if i.access]
    return Report(
        **facts,
        region="loop" if path.loop else "kernel",
        elements=elements,
        loads=tuple(a.width for a in accesses if not a.store),
        stores=tuple(a.width for a in accesses if a.store),
        opcodes=dict(sorted(Counter(op for i in path.body for op in i.opcodes).items())),
        instructions=len(path.body) / elements,
        pipes=_per_element(path.body, elements),
        unknown=dict(Counter(i.opcodes[0] for i in path.body if i.pipe == "other")),
        further=len(path.inner) / elements if path.inner else None,
        further_pipes=_per_element(path.inner, elements) if path.inner else None,
        others=tuple(cost * variant.dst_itemsize for cost in path.others),
    )


def examine(
    variants: Sequence[Variant],
    targets: Sequence[str],
    progress: Callable[[Report, int, int], None] | None = None,
) -> list[Report]:
    """Compile every variant for every target and read the machine code; no GPU is needed.

    Args:
        variants: see all_variants.
        targets: keys of TARGETS.
        progress: called after each with its report, how many are done, and of how many.

    Raises:
        RuntimeError: if the interpreter has taken the kernels' place in this process.
        ValueError: for a target that is not in TARGETS.
    """
    check_targets(targets)
    reports = []
    total = len(variants) * len(targets)
    for target in targets:
        for variant in variants:
            asm = compile_variant(variant, TARGETS[target]).asm
            if "cubin" in asm:
                code = sass.code(*sass.disassemble(asm["cubin"]), asm["ptx"])
            else:
                code = gcn.code(asm["amdgcn"], asm["llir"])
            reports.append(describe(variant, target, code))
            if progress:
                progress(reports[-1], len(reports), total)
    return reports


def main(arguments: Sequence[str]) -> None:
    """Compile what is named as TARGET=PATTERN (patterns apart by commas), and print a line
    {"report": ..., "done": ..., "total": ...} for each variant and target."""
    split = [argument.partition("=") for argument in arguments]
    work = [(target, select(patterns.split(","))) for target, _, patterns in split]
    total = sum(len(variants) for _, variants in work)
    done = 0

    def show(report: Report, *_: int) -> None:
        nonlocal done
        done += 1
        print(json.dumps({"report": asdict(report), "done": done, "total": total}), flush=True)

    for target, variants in work:
        examine(variants, [target], show)


if __name__ == "__main__":
    main(sys.argv[1:])
