"""Values that must not leave some devices: which operators only those may compute.

That holds for whoever makes or reads such a value, and for what merely rewrites it: a picture cast,
scaled or transposed is the picture still. The first convolution or pooling behind it ends that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshinfer.graph import Graph, Op
from meshinfer.identity import DeviceId
from meshinfer.planner.estimate import HEAVY


@dataclass
class Pins:
    """``by_op``: op -> the devices that may compute it, for those that touch a pinned value."""

    by_op: Mapping[int, frozenset[DeviceId]]
    by_value: Mapping[str, frozenset[DeviceId]]
    """Each pinned value, and what was rewritten from one."""
    _known: dict[tuple[int, int], frozenset[DeviceId] | None] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, pinned: Mapping[str, frozenset[DeviceId]]) -> Pins:
        held = dict(pinned)
        by_op: dict[int, frozenset[DeviceId]] = {}
        for op in graph.ops if held else ():
            reads = [n for n in (*op.inputs, *op.captured) if n in held]
            if len(reads) > 0 and _rewrites(graph, op):
                for name in op.outputs:
                    held[name] = _meet(held.get(name), held[reads[0]])
            for name in (*reads, *(n for n in op.outputs if n in held)):
                by_op[op.index] = _meet(by_op.get(op.index), held[name])
        return Pins(by_op, held)

    def borders(self, graph: Graph) -> tuple[int, ...]:
        """Cuts at which blocks that touch pinned values may end, so that they are short."""
        cuts = {cut for op in self.by_op for cut in (op, op + 1)}
        return tuple(c for c in graph.cut_points if c in cuts)

    def allowed(self, start: int, stop: int) -> frozenset[DeviceId] | None:
        """The devices that may compute ops ``[start, stop)``; None: any."""
        key = (start, stop)
        if key not in self._known:
            found = None
            for op, devices in self.by_op.items():
                if start <= op < stop:
                    found = _meet(found, devices)
            self._known[key] = found
        return self._known[key]


def _meet(one: frozenset[DeviceId] | None, other: frozenset[DeviceId]) -> frozenset[DeviceId]:
    return other if one is None else one & other


def _rewrites(graph: Graph, op: Op) -> bool:
    """Whether an op makes another form of its one computed input, and nothing of anything else."""
    computed = [n for n in (*op.inputs, *op.captured) if n and not graph.is_initializer(n)]
    return op.type not in HEAVY and len(set(computed)) == 1
