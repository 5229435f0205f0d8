"""Dynamic programming over cuts: the cheapest chain of blocks, by coarse estimates.

A state is where the values at a cut lie: in row bands, in channel slices, or whole on one device.
The estimates only rank; ``meshinfer.cost.timeline`` chooses among finalists. Choosing cuts by
dynamic programming is the idea of AOFL (Zhou et al. 2019, "Adaptive Parallel Execution of Deep
Neural Networks on Heterogeneous Edge Devices").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshinfer.cost import DeviceProfile, variable_seconds
from meshinfer.geometry import split_weighted
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner.bands import Axes, Block, Kind, axes_of
from meshinfer.planner.estimate import Read, Sample, Sums, clean_cuts, samples, sums_of

HEAVY_A_BLOCK = 12
CHANNEL_HEAVY = 2
"""Most heavy operators in a fused block; in channel slices each one more reads everything again."""


@dataclass(frozen=True, slots=True)
class State:
    """Where values lie: in parts of a kind, or whole on a device."""

    kind: Kind | None = None
    device: DeviceId | None = None


@dataclass
class Space:
    """What of a graph the search needs, computed once for all sets of devices."""

    graph: Graph
    cuts: tuple[int, ...]
    axes: Axes
    sums: Sums
    fixed: bool = False
    _samples: dict[tuple[int, Kind, int], tuple[int, dict[int, Sample]]] = field(
        default_factory=dict
    )

    @staticmethod
    def of(graph: Graph, fixed_cuts: Sequence[int] | None = None, *, sums: bool = True) -> Space:
        axes = axes_of(graph, sums=sums)
        cuts = clean_cuts(graph, axes) if fixed_cuts is None else tuple(sorted(set(fixed_cuts)))
        ends = (0, *cuts, len(graph.ops))
        return Space(graph, ends, axes, sums_of(graph), fixed_cuts is not None)

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
        most = min(most, CHANNEL_HEAVY) if kind == "channels" else most
        key = (i, kind, parts)
        if self._samples.get(key, (0, {}))[0] < most:
            starts = self.starts(i, most)
            found = samples(self.graph, self.axes, self.cuts[i], starts, kind, parts)
            self._samples[key] = (most, found)
        return self._samples[key][1]


@dataclass(frozen=True, slots=True)
class Team:
    """Devices that share the work, fastest first, with their shares and the two ends."""

    members: tuple[DeviceProfile, ...]
    shares: tuple[float, ...]
    source: DeviceProfile
    sink: DeviceProfile

    @property
    def weights(self) -> dict[DeviceId, float]:
        return {p.id: w for p, w in zip(self.members, self.shares, strict=True)}

    @property
    def places(self) -> tuple[DeviceProfile, ...]:
        """Devices on which a whole block may run: the fastest, and the ends if they compute."""
        ends = [p for p in (self.source, self.sink) if p in self.members]
        return tuple(dict.fromkeys((self.members[0], *ends)))


def search(
    space: Space, team: Team, *, most: int = HEAVY_A_BLOCK, spread: bool = False
) -> tuple[Block, ...]:
    """The cheapest chain of blocks for this team; ``spread``: split wherever it is possible.

    A longer block that is whole does not swallow a heavy operator that could have been split.
    """
    prices, sums, kinds = _Prices(space, team), space.sums, space.axes.kinds
    if spread and space.batch < len(team.members):
        kinds = tuple(kind for kind in kinds if kind != "batch")  # it would leave some idle
    spread = spread and len(team.members) > 1
    splits = {0: 0}  # steps up to each cut with a heavy operator that can be split
    start = State(device=team.source.id)
    best: dict[int, dict[State, tuple[float, Block | None, State | None]]] = {
        0: {start: (0.0, None, None)}
    }
    for i in range(1, len(space.cuts)):
        stop = space.cuts[i]
        here: dict[State, tuple[float, Block | None, State | None]] = {}
        by_kind = {kind: space.samples(i, kind, len(team.members), most) for kind in kinds}
        step = space.cuts[i - 1]
        able = sums.heavy[stop] > sums.heavy[step] and any(step in by_kind[k] for k in kinds)
        splits[stop] = splits[step] + able
        for begin in space.starts(i, most):
            fit = [kind for kind in kinds if begin in by_kind[kind]]
            for before, (cost, _, _) in best[begin].items():
                for kind in fit if len(team.members) > 1 else ():
                    price = prices.split(by_kind[kind][begin], begin, stop, before)
                    _keep(here, State(kind), cost + price, Block(begin, stop, None, kind), before)
                if spread and (fit or splits[stop] > splits[begin]):
                    continue
                for place in team.places:
                    price = prices.whole(begin, stop, before, place)
                    block = Block(begin, stop, place.id)
                    _keep(here, State(device=place.id), cost + price, block, before)
        best[stop] = here
    last = best[space.cuts[-1]]
    goal = min(last, key=lambda s: (last[s][0] + prices.gather(s), str(s)))
    return _chain(best, space.cuts[-1], goal)


def _keep(
    here: dict[State, tuple[float, Block | None, State | None]],
    state: State,
    cost: float,
    block: Block,
    before: State,
) -> None:
    if state not in here or cost < here[state][0]:
        here[state] = (cost, block, before)


def _chain(
    best: Mapping[int, Mapping[State, tuple[float, Block | None, State | None]]],
    stop: int,
    state: State,
) -> tuple[Block, ...]:
    blocks: list[Block] = []
    while stop:
        _, block, before = best[stop][state]
        assert block is not None and before is not None
        blocks.append(block)
        stop, state = block.start, before
    return tuple(reversed(blocks))


class _Prices:
    """Estimated seconds of one block after another, for one team."""

    def __init__(self, space: Space, team: Team) -> None:
        self.space, self.team = space, team
        self.latency = max(p.latency_s for p in (*team.members, team.source, team.sink))
        self.link = min(p.bandwidth_bytes_per_s for p in team.members)
        self.ends = {p.id: p for p in (team.source, team.sink, *team.members)}
        self.weights = team.weights
        self.total = sum(self.weights.values())
        self._sums: dict[DeviceId, list[float]] = {}
        self._portions: dict[int, list[float]] = {}
        self._reads: dict[tuple[int, int], list[tuple[str, int]]] = {}

    def portions(self, size: int) -> list[float]:
        """The share that each device really gets of an axis of this size: whole elements only."""
        if size not in self._portions:
            ranges = split_weighted(size, list(self.weights.values()))
            self._portions[size] = [r.size / size for r in ranges]
        return self._portions[size]

    def split(self, sample: Sample, start: int, stop: int, before: State) -> float:
        compute = max(
            self.band(p, g, sample, start, stop)
            for g, p in zip(self.portions(sample.size), self.team.members, strict=True)
            if g > 0
        )
        return compute + self.fetch(sample.reads, before)

    def band(self, p: DeviceProfile, g: float, sample: Sample, start: int, stop: int) -> float:
        """Seconds of a share ``g`` of a split block; what the sample computes beyond its share is
        the overlap of any band."""
        whole = self.block(p, start, stop)
        sampled = variable_seconds(sample.work, p.unit_costs)
        return g * whole + max(0.0, sampled - sample.share * whole) + p.overhead_s

    def block(self, p: DeviceProfile, start: int, stop: int) -> float:
        """Seconds of ops ``[start, stop)`` computed whole, without the fixed cost of a task."""
        if p.id not in self._sums:
            costs = p.unit_costs
            self._sums[p.id] = [variable_seconds(w, costs) for w in self.space.sums.work]
        sums = self._sums[p.id]
        return sums[stop] - sums[start]

    def fetch(self, reads: Sequence[Read], before: State) -> float:
        """Seconds until every device has its inputs."""
        near: dict[DeviceId, float] = {}
        halo = 0.0
        for read in reads:
            made = self.space.graph.producer.get(read.value, -1) >= 0
            if made and before.kind is not None:
                halo += read.missing[before.kind]
            else:
                holder = before.device if made else self.team.source.id
                assert holder is not None
                others = len(self.weights) - (holder in self.weights)
                near[holder] = near.get(holder, 0.0) + read.need * others
        seconds = halo / self.link
        seconds += sum(b / self.ends[d].bandwidth_bytes_per_s for d, b in near.items())
        return seconds + (self.latency if halo or near else 0.0)

    def inputs(self, start: int, stop: int) -> list[tuple[str, int]]:
        """Values from outside that ops ``[start, stop)`` read, whole, with their bytes."""
        if (start, stop) not in self._reads:
            graph = self.space.graph
            names = dict.fromkeys(
                n for op in graph.ops[start:stop] for n in (*op.inputs, *op.captured) if n
            )
            self._reads[start, stop] = [
                (n, graph.nbytes(n))
                for n in names
                if graph.producer.get(n, -1) < start and not graph.is_initializer(n)
            ]
        return self._reads[start, stop]

    def whole(self, start: int, stop: int, before: State, place: DeviceProfile) -> float:
        seconds = place.overhead_s + self.block(place, start, stop)
        moved = 0.0
        for name, nbytes in self.inputs(start, stop):
            made = self.space.graph.producer.get(name, -1) >= 0
            if made and before.kind is not None:
                moved += nbytes * (1 - self.weights.get(place.id, 0.0) / self.total)
            elif (before.device if made else self.team.source.id) != place.id:
                moved += nbytes
        return seconds + self._move(moved, place)

    def gather(self, state: State) -> float:
        """Seconds until the sink has the answer."""
        graph, sink = self.space.graph, self.team.sink
        if state.device == sink.id:
            return 0.0
        own = self.weights.get(sink.id, 0.0) / self.total if state.kind is not None else 0.0
        return self._move(sum(graph.nbytes(n) for n in graph.outputs) * (1 - own), sink)

    def _move(self, nbytes: float, to: DeviceProfile) -> float:
        if not nbytes:
            return 0.0
        return nbytes / min(self.link, to.bandwidth_bytes_per_s) + self.latency
