"""What of a graph the search needs, computed once for all sets of devices: cuts, samples, sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner.axes import Axes, Kind, axes_of
from meshinfer.planner.estimate import Cells, Sample, Sums, clean_cuts, samples, sums_of
from meshinfer.planner.pins import Pins

HEAVY_A_BLOCK = 12
CHANNEL_HEAVY = 2
"""Most heavy operators in a fused block; in channel slices each one more reads everything again."""


@dataclass
class Space:
    """``cuts``: where blocks may end, with both ends of the graph. ``pins``: what must not leave
    some devices."""

    graph: Graph
    cuts: tuple[int, ...]
    axes: Axes
    sums: Sums
    pins: Pins
    fixed: bool = False
    _samples: dict[tuple[int, Kind, int], tuple[int, dict[int, Sample]]] = field(
        default_factory=dict
    )
    _cells: Cells = field(default_factory=dict)
    _reads: dict[tuple[int, int], list[tuple[str, int]]] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: Graph,
        fixed_cuts: Sequence[int] | None = None,
        *,
        sums: bool = True,
        pins: Mapping[str, frozenset[DeviceId]] | None = None,
    ) -> Space:
        axes = axes_of(graph, sums=sums)
        cuts = clean_cuts(graph, axes) if fixed_cuts is None else tuple(sorted(set(fixed_cuts)))
        held = Pins.of(graph, pins or {})
        if fixed_cuts is None:
            cuts = tuple(sorted({*cuts, *held.borders(graph)}))
        ends = (0, *cuts, len(graph.ops))
        return Space(graph, ends, axes, sums_of(graph), held, fixed_cuts is not None)

    @property
    def batch(self) -> int:
        """Images in a request, at least."""
        sizes = (self.graph.whole(n)[a].size for n, a in self.axes.batch.items() if a is not None)
        return min(sizes, default=1)

    def starts(self, i: int, most: int) -> list[int]:
        """Starts of blocks that end at cut ``i``, descending, with at most so many heavy ops."""
        stop, found = self.cuts[i], [self.cuts[i - 1]]
        if self.fixed:
            return found
        for start in reversed(self.cuts[: i - 1]):
            if self.sums.heavy[stop] - self.sums.heavy[start] > most:
                break
            found.append(start)
        return found

    def samples(self, i: int, kind: Kind, parts: int, most: int) -> dict[int, Sample]:
        """Samples of the blocks that end at cut ``i``, remembered."""
        most = min(most, CHANNEL_HEAVY) if kind in ("channels", "slabs") else most
        key = (i, kind, parts)
        if self._samples.get(key, (0, {}))[0] < most:
            starts = self.starts(i, most)
            stop, axes = self.cuts[i], self.axes
            found = samples(self.graph, axes, stop, starts, kind, parts, self._cells)
            self._samples[key] = (most, found)
        return self._samples[key][1]

    def inputs(self, start: int, stop: int) -> list[tuple[str, int]]:
        """Values from outside that ops ``[start, stop)`` read, whole, with their bytes."""
        if (start, stop) not in self._reads:
            graph = self.graph
            names = dict.fromkeys(
                n for op in graph.ops[start:stop] for n in (*op.inputs, *op.captured) if n
            )
            self._reads[start, stop] = [
                (n, graph.nbytes(n))
                for n in names
                if graph.producer.get(n, -1) < start and not graph.is_initializer(n)
            ]
        return self._reads[start, stop]
