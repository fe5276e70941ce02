"""Machine code of any target: control flow, loops, and the path through the hot loop.

The hot loop is an innermost one that stores to global memory in the widest accesses of the kernel;
of several the one with the fewest instructions per byte, as the others serve ragged ends and
misaligned views. Of its body the path counts that moves the most bytes in its widest accesses, and
of those the one with the fewest instructions. Predicated instructions count: the GPU issues them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

ENTRY = -1


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


@dataclass(frozen=True)
class Facts:
    """What the output of one compilation says of the kernel as a whole.

    Attributes:
        registers: vector registers per lane.
        scalar_registers: AMD's scalar registers per wave; None on NVIDIA.
        spills: kind -> bytes of a lane ("local", "stack", "scratch") or registers ("vgpr", "sgpr").
        shared: bytes of shared memory.
        approximate: approximate or flushing instruction -> count.
        fma: fewest and most multiply-adds that the source asks for. They differ where it has
            packed ones, of which LLVM may leave a half undefined.
        machine_fma: multiply-adds in the machine code; more mean contraction.
        adds, machine_adds: the same of additions, fewest in the source. A contraction takes one
            away.
        expansions: exact operations that become several instructions with multiply-adds of their
            own, such as div.rn.f32; contraction cannot be seen beside them.
    """

    registers: int
    scalar_registers: int | None
    spills: dict[str, int]
    shared: int
    approximate: dict[str, int]
    fma: tuple[int, int]
    machine_fma: int
    adds: int
    machine_adds: int
    expansions: list[str]

    @property
    def contracted(self) -> int:
        """Multiplications and additions that became one operation, as far as counts can tell.

        Counts tell nothing beside expansions. Compilers drop duplicates, which may hide as many
        contractions as additions have gone.
        """
        if self.expansions:
            return 0
        if self.machine_fma < self.fma[0]:
            return max(0, self.adds - self.machine_adds)
        return max(0, self.machine_fma - self.fma[1])


@dataclass(frozen=True)
class Code(Facts):
    """What a reader finds in the output of one compilation.

    Attributes:
        instructions: in the order of the text; no-operations and scheduling hints are left out.
        labels: name -> index of the instruction that follows it.
    """

    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass
class HotPath:
    """One iteration of the hot loop.

    Attributes:
        body: instructions without those of loops inside the body.
        inner: instructions of one iteration of each loop inside the body, where a path of the same
            accesses runs through them; None if there is none.
        loop: False where the widest stores are in no loop; the path is then the whole kernel's.
        stored: bytes that a lane stores in its widest accesses.
        others: instructions per stored byte of the other loops that store as widely.
    """

    body: list[Instruction]
    inner: list[Instruction] | None
    loop: bool
    stored: int
    others: list[float] = field(default_factory=list)


def control_flow(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> nx.DiGraph:
    """The basic blocks that can be reached, named by first instruction, after an empty one that no
    loop contains (ENTRY); attribute ``code``."""
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(labels[instruction.target])
        if instruction.target is not None or not instruction.falls:
            starts.add(index + 1)
    order = sorted(start for start in starts if start < len(instructions))
    graph = nx.DiGraph()
    graph.add_node(ENTRY, code=[])
    graph.add_edge(ENTRY, 0)
    for start, end in zip(order, [*order[1:], len(instructions)], strict=True):
        graph.add_node(start, code=list(instructions[start:end]))
        last = instructions[end - 1]
        if last.target is not None and labels[last.target] < len(instructions):
            graph.add_edge(start, labels[last.target])
        if last.falls and end < len(instructions):
            graph.add_edge(start, end)
    return graph.subgraph(nx.descendants(graph, ENTRY) | {ENTRY}).copy()


def natural_loops(graph: nx.DiGraph) -> dict[int, set[int]]:
    """Header -> blocks of every natural loop; loops that share a header are one."""
    parents = nx.immediate_dominators(graph, ENTRY)
    loops: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        block = tail
        while block not in (header, ENTRY):
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

    def path(self, weigh: Callable[[int], tuple[int, int]]) -> list[int]:
        """The blocks of the heaviest path to an end; weigh(block) has the major weight first."""
        best: dict[int, tuple[int, int]] = {}
        choice: dict[int, int | None] = {}
        for block in reversed(list(nx.topological_sort(self.flow))):
            ways = [(*best[s], s) for s in self.flow.successors(block) if s in best]
            ways += [(0, 0, None)] if block in self.ends else []
            if ways:
                major, minor, choice[block] = max(ways, key=lambda way: way[:2])
                own = weigh(block)
                best[block] = major + own[0], minor + own[1]
        blocks, block = [], self.header
        while block is not None:
            blocks.append(block)
            block = choice[block]
        return blocks

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        """The code of blocks in order."""
        return [instruction for block in blocks for instruction in self.code[block]]


def hot_path(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> HotPath | None:
    """One iteration of the hot loop, or None if the code stores nothing in global memory."""
    graph = control_flow(instructions, labels)
    loops = natural_loops(graph)
    regions = [_Region(graph, header, blocks, loops) for header, blocks in loops.items()]
    regions.append(_Region(graph, ENTRY, set(graph), loops))
    widest = max(region.widest(store=True) for region in regions)
    if not widest:
        return None
    candidates = [r for r in regions if r.widest(store=True) == widest]
    candidates = [r for r in candidates if r.loop] or candidates
    paths = [_path(region, graph, loops) for region in candidates]
    paths.sort(key=lambda path: len(path.body) / path.stored)
    paths[0].others = [len(path.body) / path.stored for path in paths[1:]]
    return paths[0]


def _path(region: _Region, graph: nx.DiGraph, loops: dict) -> HotPath:
    widths = {store: region.widest(store) for store in (False, True)}
    inside = {}
    for header, blocks in region.inner.items():
        loop = _Region(graph, header, blocks, loops)
        path = loop.path(lambda block, loop=loop: (0, -len(loop.code[block])))
        inside[header] = loop.instructions(path)

    def wide_bytes(block: int) -> int:
        """Bytes in the widest accesses; a path that stores outweighs one that loads."""
        accesses = [i.access for i in region.code[block] if i.access]
        wide = [access for access in accesses if access.width == widths[access.store]]
        return sum(access.width << (32 if access.store else 0) for access in wide)

    shortest = region.path(lambda block: (wide_bytes(block), -len(region.code[block])))
    longest = region.path(lambda block: (wide_bytes(block), len(inside.get(block, ()))))
    body = region.instructions(shortest)
    inner = [i for block in longest for i in inside.get(block, ())]
    stored = sum(i.access.width for i in body if i.access == Access(True, widths[True]))
    return HotPath(body, inner or None, region.loop, stored)
