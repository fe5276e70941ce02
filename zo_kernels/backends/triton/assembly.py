"""Machine code of any target: control flow, loops, and the path through the hot loop.

The hot loop is the innermost one that stores to global memory in the widest accesses of the kernel.
Of its body the path counts that moves the most bytes in its widest accesses, and of those the one
with the fewest instructions: what every iteration costs where the tensor is aligned and the index
is not at a ragged end. Predicated instructions count, as the GPU issues them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx


@dataclass(frozen=True)
class Access:
    """One access of a lane to global memory: direction, and width in bytes."""

    store: bool
    width: int


@dataclass(frozen=True)
class Instruction:
    """One instruction of the program.

    Attributes:
        opcodes: its name with modifiers; two names where one issue does two operations (RDNA3).
        pipe: the execution unit, in the words of zo_kernels/backends/triton/cost.py.
        target: label it may jump to.
        falls: whether control may also go on to the next instruction.
        access: the global memory it touches.
    """

    opcodes: tuple[str, ...]
    pipe: str
    target: str | None = None
    falls: bool = True
    access: Access | None = None


@dataclass
class Code:
    """What a reader finds in the output of one compilation.

    Attributes:
        instructions: in the order of the text; no-operations and scheduling hints are left out.
        labels: name -> index of the instruction that follows it.
        registers: vector registers per lane.
        scalar_registers: AMD's scalar registers per wave; None on NVIDIA.
        spills: kind -> bytes of a lane ("local", "stack", "scratch") or registers ("vgpr", "sgpr").
        shared: bytes of shared memory.
        approximate: instruction -> count, in all of the kernel.
        fma: fewest and most multiply-adds that the source asks for. They differ where it has
            packed ones, of which LLVM may leave a half undefined.
        machine_fma: multiply-adds in the machine code; another number means contraction.
        expansions: exact operations that become several instructions with multiply-adds of their
            own, such as div.rn.f32; contraction cannot be seen beside them.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    scalar_registers: int | None
    spills: dict[str, int]
    shared: int
    approximate: dict[str, int]
    fma: tuple[int, int]
    machine_fma: int
    expansions: list[str] = field(default_factory=list)


@dataclass
class HotPath:
    """One iteration of the hot loop.

    Attributes:
        body: instructions without those of loops inside the body.
        inner: instructions of one iteration of a loop inside the body, the longest of those that
            lie on the path; None if there is none.
        loop: False where the widest stores are in no loop; the path is then the whole kernel's.
        stored: bytes that a lane stores in its widest accesses.
    """

    body: list[Instruction]
    inner: list[Instruction] | None
    loop: bool
    stored: int


def control_flow(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> nx.DiGraph:
    """The basic blocks that can be reached, named by first instruction; attribute ``code``."""
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(labels[instruction.target])
        if instruction.target is not None or not instruction.falls:
            starts.add(index + 1)
    order = sorted(start for start in starts if start < len(instructions))
    graph = nx.DiGraph()
    for start, end in zip(order, [*order[1:], len(instructions)], strict=True):
        graph.add_node(start, code=list(instructions[start:end]))
        last = instructions[end - 1]
        if last.target is not None and labels[last.target] < len(instructions):
            graph.add_edge(start, labels[last.target])
        if last.falls and end < len(instructions):
            graph.add_edge(start, end)
    return graph.subgraph(nx.descendants(graph, 0) | {0}).copy()


def natural_loops(graph: nx.DiGraph) -> dict[int, set[int]]:
    """Header -> blocks of every natural loop; loops that share a header are one."""
    parents = nx.immediate_dominators(graph, 0)
    loops: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        block: int | None = tail
        while block not in (header, 0, None):
            block = parents[block]
        if block != header:
            continue
        inside = graph.subgraph(set(graph) - {header})
        body = nx.ancestors(inside, tail) | {tail} if tail != header else set()
        loops.setdefault(header, {header}).update(body)
    return loops


class _Region:
    """A loop's body, or all of the kernel, with the loops inside it folded into empty blocks."""

    def __init__(self, graph: nx.DiGraph, header: int, blocks: set[int], loops: dict) -> None:
        inside = {h: body for h, body in loops.items() if body < blocks}
        self.inner = {
            h: body
            for h, body in inside.items()
            if not any(body < other for other in inside.values())
        }
        name = {block: h for h, body in self.inner.items() for block in body}
        self.header, self.loop = header, header in loops and blocks == loops[header]
        self.code = {
            name.get(b, b): [] if b in name else list(graph.nodes[b]["code"]) for b in blocks
        }
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(self.code)
        self.ends = set()
        for block in blocks:
            if self.loop and graph.has_edge(block, header):
                self.ends.add(name.get(block, block))
            elif not self.loop and graph.out_degree(block) == 0:
                self.ends.add(name.get(block, block))
            for after in graph.successors(block):
                pair = name.get(block, block), name.get(after, after)
                if after in blocks and pair[0] != pair[1] and not (self.loop and after == header):
                    self.flow.add_edge(*pair)

    def widest(self, store: bool) -> int:
        """Bytes of the widest store or load outside the inner loops, 0 if there is none."""
        found = [i.access for code in self.code.values() for i in code if i.access]
        return max((a.width for a in found if a.store == store), default=0)

    def path(self, weigh: Callable[[Iterable[Instruction]], int]) -> tuple[list[int], set[int]]:
        """The blocks of the heaviest path, the shortest of those; the inner loops that such a
        path can meet."""
        order = list(nx.topological_sort(self.flow))
        weight = {b: weigh(code) for b, code in self.code.items()}
        after: dict[int, tuple[int, int]] = {}  # weight and minus length of the best way to an end
        choice: dict[int, int | None] = {}
        for block in reversed(order):
            ways = [(*after[s], s) for s in self.flow.successors(block) if s in after]
            ways += [(0, 0, None)] if block in self.ends else []
            if ways:
                heaviest, length, choice[block] = max(ways, key=lambda way: way[:2])
                own = weight[block], -len(self.code[block])
                after[block] = heaviest + own[0], length + own[1]
        before = {self.header: 0}
        for block in order:
            for successor in self.flow.successors(block) if block in before else ():
                reached = before[block] + weight[block]
                before[successor] = max(before.get(successor, 0), reached)
        total = after[self.header][0]
        met = {
            h for h in self.inner if h in before and h in after and before[h] + after[h][0] == total
        }
        blocks, block = [], self.header
        while block is not None:
            blocks.append(block)
            block = choice[block]
        return blocks, met

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        """The code of blocks in order."""
        return [instruction for block in blocks for instruction in self.code[block]]


def hot_path(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> HotPath | None:
    """One iteration of the hot loop, or None if the code stores nothing in global memory.

    Where several loops store in the widest accesses, the one that stores the most bytes in an
    iteration is taken, and of equals the one with the most instructions.
    """
    graph = control_flow(instructions, labels)
    loops = natural_loops(graph)
    regions = [_Region(graph, header, blocks, loops) for header, blocks in loops.items()]
    whole = _Region(graph, 0, set(graph), loops) if 0 not in loops else None
    regions += [whole] if whole else []
    widest = max((region.widest(store=True) for region in regions), default=0)
    if not widest:
        return None
    candidates = [r for r in regions if r.widest(store=True) == widest]
    candidates = [r for r in candidates if r.loop] or candidates
    paths = [_path(region, graph, loops) for region in candidates]
    return max(paths, key=lambda path: (path.stored, len(path.body)))


def _path(region: _Region, graph: nx.DiGraph, loops: dict) -> HotPath:
    widths = {store: region.widest(store) for store in (False, True)}

    def wide_bytes(code: Iterable[Instruction]) -> int:
        accesses = [i.access for i in code if i.access]
        return sum(a.width for a in accesses if a.width == widths[a.store])

    blocks, met = region.path(wide_bytes)
    body = region.instructions(blocks)
    inner = []
    for header in met:
        inside = _Region(graph, header, region.inner[header], loops)
        inner.append(inside.instructions(inside.path(lambda code: 0)[0]))
    stored = sum(
        i.access.width for i in body if i.access and i.access == Access(True, widths[True])
    )
    return HotPath(body, max(inner, key=len) if inner else None, region.loop, stored)
