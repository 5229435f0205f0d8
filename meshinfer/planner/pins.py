"""Values that must not leave some devices: which operators only those may compute.

That holds for whoever makes or reads such a value, and for what merely rewrites it: a picture cast,
scaled, transposed, or cut up and put together again is the picture still. The first convolution or
pooling behind it ends that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product

from meshinfer.graph import Graph, Op
from meshinfer.identity import DeviceId
from meshinfer.planner.estimate import HEAVY

COPIES = frozenset(("Concat", "Where", "ScatterElements", "ScatterND", "Max", "Min"))
"""Operators whose output has elements of each of its inputs as they were."""


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
            if _rewrites(graph, op, held):
                for name, read in product(op.outputs, reads):
                    held[name] = _meet(held.get(name), held[read])
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


def _rewrites(graph: Graph, op: Op, held: Collection[str]) -> bool:
    """Whether what an op makes is what is held, in another form: made of nothing else, or copied.

    Sums and products with something else count as features of both.
    """
    if op.type in HEAVY:
        return False
    computed = {n for n in (*op.inputs, *op.captured) if n and not graph.is_initializer(n)}
    of_it = {n for n in computed if n in held}
    return bool(of_it) and (of_it == computed or op.type in COPIES)
