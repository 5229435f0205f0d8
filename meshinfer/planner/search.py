"""Dynamic programming over cuts: the cheapest chain of blocks, by coarse estimates.

A state is where the values at a cut lie: in row bands, in channel slices, in a grid, or whole on
one device. Over chains whose split blocks all have the same devices the search is exhaustive. The
estimates only rank; ``meshinfer.cost.timeline`` chooses among finalists. Choosing cuts by dynamic
programming is the idea of AOFL (Zhou et al. 2019, "Adaptive Parallel Execution of Deep Neural
Networks on Heterogeneous Edge Devices").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshinfer.cost import DeviceProfile, variable_seconds
from meshinfer.cost.timeline import KEPT
from meshinfer.geometry import split_weighted
from meshinfer.identity import DeviceId
from meshinfer.planner.axes import Kind
from meshinfer.planner.bands import Block, groups_of
from meshinfer.planner.estimate import Read, Sample
from meshinfer.planner.space import HEAVY_A_BLOCK, Space

FEW = 3
"""A team of so few may have each of them compute a block alone."""


@dataclass(frozen=True, slots=True)
class State:
    """Where values lie: in parts of a kind, or whole on a device."""

    kind: Kind | None = None
    device: DeviceId | None = None


@dataclass(frozen=True, slots=True)
class Team:
    """Devices that share the work, fastest first, with their shares and the two ends.

    ``alone``: devices outside the team that may have to compute a block, for what is pinned there.
    """

    members: tuple[DeviceProfile, ...]
    shares: tuple[float, ...]
    source: DeviceProfile
    sink: DeviceProfile
    alone: tuple[DeviceProfile, ...] = ()

    @property
    def weights(self) -> dict[DeviceId, float]:
        return {p.id: w for p, w in zip(self.members, self.shares, strict=True)}

    @property
    def places(self) -> tuple[DeviceProfile, ...]:
        """Devices on which a whole block may run: the fastest, those at the ends, all of few."""
        few = self.members[:FEW] if len(self.members) <= FEW else self.members[:1]
        ends = [p for p in self.members if p.beside(self.source) or p.beside(self.sink)]
        return tuple(dict.fromkeys((*few, *ends, *self.alone)))


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks, one after another, and what they are estimated to take."""

    blocks: tuple[Block, ...]
    price_s: float


_Best = dict[State, tuple[float, Block | None, State | None]]


def search(
    space: Space, team: Team, *, most: int = HEAVY_A_BLOCK, spread: bool = False
) -> Chain | None:
    """The cheapest chain of blocks for this team; ``spread``: split wherever it is possible.

    A longer block that is whole does not swallow a heavy operator that could have been split. None
    where pins leave no chain.
    """
    prices, sums = Prices(space, team), space.sums
    several = len(team.members) > 1
    kinds = space.axes.kinds(len(team.members)) if several else ()
    if spread and space.batch < len(team.members):
        kinds = tuple(kind for kind in kinds if kind != "batch")  # it would leave some idle
    spread = spread and several
    splits = {0: 0}  # steps up to each cut with a heavy operator that can be split
    best: dict[int, _Best] = {0: {State(device=team.source.id): (0.0, None, None)}}
    for i in range(1, len(space.cuts)):
        stop, step = space.cuts[i], space.cuts[i - 1]
        here: _Best = {}
        by_kind = {kind: space.samples(i, kind, len(team.members), most) for kind in kinds}
        able = sums.heavy[stop] > sums.heavy[step] and any(step in by_kind[k] for k in kinds)
        splits[stop] = splits[step] + able
        for begin in space.starts(i, most):
            allowed = space.pins.allowed(begin, stop)
            together = allowed is None or all(p.id in allowed for p in team.members)
            fit = [kind for kind in kinds if together and begin in by_kind[kind]]
            for kind in fit:
                prices.extend(here, best[begin], Block(begin, stop, None, kind), by_kind[kind])
            if spread and (fit or splits[stop] > splits[begin]) and allowed is None:
                continue
            for place in team.places:
                if allowed is None or place.id in allowed:
                    prices.extend(here, best[begin], Block(begin, stop, place.id), {})
        best[stop] = here
    last = best[space.cuts[-1]]
    if not last:
        return None
    goal = min(last, key=lambda s: (last[s][0] + prices.gather(s), str(s)))
    return Chain(_chain(best, space.cuts[-1], goal), last[goal][0] + prices.gather(goal))


def _chain(best: Mapping[int, _Best], stop: int, state: State) -> tuple[Block, ...]:
    blocks: list[Block] = []
    while stop:
        _, block, before = best[stop][state]
        assert block is not None and before is not None
        blocks.append(block)
        stop, state = block.start, before
    return tuple(reversed(blocks))


class Prices:
    """Estimated seconds of one block after another, for one team.

    The price of a block depends on where the block before left its values, and on nothing else.
    """

    def __init__(self, space: Space, team: Team) -> None:
        self.space, self.team = space, team
        self.latency = max(p.latency_s for p in (*team.members, team.source, team.sink))
        self.message_s = max(p.message_s for p in team.members)
        self.byte_s = max(p.byte_s for p in team.members)
        self.report_s = team.sink.report_s
        self.link = min(p.bandwidth_bytes_per_s for p in team.members)
        if any(p.links for p in team.members):  # neighbours exchange halos, so by the slowest pair
            pairs = zip(team.members, team.members[1:], strict=False)
            self.link = min([self.link, *(a.rate_to(b) for a, b in pairs if not a.beside(b))])
        known = (*team.alone, team.source, team.sink, *team.members)
        self.ends = {p.id: p for p in known}
        self.weights = team.weights
        self.total = sum(self.weights.values())
        self._sums: dict[DeviceId, list[float]] = {}
        self._portions: dict[tuple[Kind, int, int], list[float]] = {}

    def of(self, blocks: Sequence[Block], most: int = HEAVY_A_BLOCK) -> float:
        """Seconds of a whole chain, to the answer at the sink."""
        state, seconds = State(device=self.team.source.id), 0.0
        for block in blocks:
            i = self.space.cuts.index(block.stop)
            found = self.space.samples(i, block.kind, len(self.team.members), most)
            seconds += self.body(block, found) + self.fetch(block, found, state)
            state = _left(block)
        return seconds + self.gather(state)

    def extend(
        self, here: _Best, earlier: _Best, block: Block, found: Mapping[int, Sample]
    ) -> None:
        """Put the chains that end with this block where they are the cheapest."""
        body, state = self.body(block, found), _left(block)
        for before, (cost, _, _) in earlier.items():
            known = here.get(state)
            if known is not None and cost + body >= known[0]:
                continue
            price = cost + body + self.fetch(block, found, before)
            if known is None or price < known[0]:
                here[state] = (price, block, before)

    def portions(self, kind: Kind, size: int, inner: int) -> list[float]:
        """The share that each device really gets of axes of these sizes: whole elements only."""
        key = (kind, size, inner)
        if key not in self._portions:
            weights, first = list(self.weights.values()), 0
            groups = groups_of(kind, len(weights))
            members = []
            for count in groups:
                members.append(weights[first : first + count])
                first += count
            bands = split_weighted(size, [sum(each) for each in members])
            self._portions[key] = [
                band.size / size * (r.size / inner if len(own) > 1 else 1.0)
                for band, own in zip(bands, members, strict=True)
                for r in split_weighted(inner, own)
            ]
        return self._portions[key]

    def body(self, block: Block, found: Mapping[int, Sample]) -> float:
        """Seconds until the slowest has computed a block; what the sample computes beyond its share
        is the overlap of any part."""
        start, stop = block.start, block.stop
        if block.whole_on is not None:
            place = self.ends[block.whole_on]
            return self._seconds(place, start, stop) + place.overhead_s + self.report_s
        sample, slowest = found[start], 0.0
        portions = self.portions(block.kind, sample.size, sample.inner)
        for g, p in zip(portions, self.team.members, strict=True):
            if g > 0:
                whole = self._seconds(p, start, stop)
                more = variable_seconds(sample.work, p.unit_costs) - sample.share * whole
                slowest = max(slowest, g * whole + max(0.0, more) + p.overhead_s)
        return slowest + sum(g > 0 for g in portions) * self.report_s

    def _seconds(self, p: DeviceProfile, start: int, stop: int) -> float:
        """Seconds of ops ``[start, stop)`` computed whole, without the fixed cost of a task."""
        if p.id not in self._sums:
            costs = p.unit_costs
            self._sums[p.id] = [variable_seconds(w, costs) for w in self.space.sums.work]
        sums = self._sums[p.id]
        return sums[stop] - sums[start]

    def fetch(self, block: Block, found: Mapping[int, Sample], before: State) -> float:
        """Seconds until every device of a block has its inputs."""
        if block.whole_on is not None:
            return self._whole(block, before)
        return self._parts(found[block.start].reads, before, block.kind)

    def _parts(self, reads: Sequence[Read], before: State, kind: Kind) -> float:
        members, seconds = self.team.members, 0.0
        near: dict[DeviceId, float] = {}
        crossing: dict[DeviceId, float] = {}  # bytes on links, where fewer than processors see
        halo = halo_wire = kept = 0.0
        for read in reads:
            made = self.space.graph.producer.get(read.value, -1) >= 0
            share = self.space.graph.wire_share(read.value) if made else 1.0
            if made and before.kind is not None:
                halo += read.missing[before.kind]
                halo_wire += read.missing[before.kind] * share
                kept += read.need - read.missing[before.kind]
            else:
                holder = self._holder(made, before)
                near[holder.id] = near.get(holder.id, 0.0) + read.need
                crossing[holder.id] = crossing.get(holder.id, 0.0) + read.need * share
        for name, need in near.items():  # to one member after another; each takes its own
            holder = self.ends[name]
            sent = sum(p.id != name for p in members)
            away = sum(not p.beside(holder) for p in members)
            seconds += crossing[name] * away / holder.bandwidth_bytes_per_s
            seconds += sent * self._toll(holder, need) + self.message_s + need * self.byte_s
        if halo:
            others = len(members) - 1
            beside = {"rows": 2, "batch": 2, "grid": 5}.get(kind, others)
            talk = min(others, beside) if before.kind == kind else others
            seconds += halo_wire / self.link + 2 * (talk * self.message_s + halo * self.byte_s)
        seconds += KEPT * kept * self.byte_s
        return seconds + (self.latency if halo or near else 0.0)

    def _toll(self, p: DeviceProfile, nbytes: float) -> float:
        """Seconds of a device's processor for one message."""
        return p.message_s + nbytes * p.byte_s

    def _holder(self, made: bool, before: State) -> DeviceProfile:
        return self.ends[before.device] if made and before.device else self.team.source

    def _whole(self, block: Block, before: State) -> float:
        place, count = self.ends[block.whole_on or self.team.source.id], len(self.team.members)
        moved = kept = spread = 0.0
        sent: dict[DeviceId, float] = {}
        for name, nbytes in self.space.inputs(block.start, block.stop):
            made = self.space.graph.producer.get(name, -1) >= 0
            share = self.space.graph.wire_share(name) if made else 1.0
            holder = self._holder(made, before)
            if made and before.kind is not None:
                own = self.weights.get(place.id, 0.0) / self.total
                moved += nbytes * (1 - own) * share
                spread += nbytes * (1 - own)
                kept += nbytes * own
            elif holder.id == place.id:
                kept += nbytes
            else:
                sent[holder.id] = sent.get(holder.id, 0.0) + nbytes
                moved += 0.0 if holder.beside(place) else nbytes * share
        seconds = self._move(moved, place) + KEPT * kept * place.byte_s
        for name, needed in sent.items():
            seconds += self._toll(self.ends[name], needed) + self._toll(place, needed)
        if spread:
            seconds += count * place.message_s + spread * (place.byte_s + self.byte_s / count)
        return seconds

    def gather(self, state: State) -> float:
        """Seconds until the sink has the answer."""
        graph, sink, count = self.space.graph, self.team.sink, len(self.team.members)
        nbytes = sum(graph.nbytes(n) for n in graph.outputs)
        if state.device is not None:
            place = self.ends[state.device]
            if place.id == sink.id:
                return KEPT * nbytes * sink.byte_s
            toll = self._toll(place, nbytes) + self._toll(sink, nbytes)
            return toll + (0.0 if place.beside(sink) else self._move(nbytes, sink))
        near = (w for p, w in self.weights.items() if self.ends[p].beside(sink))
        own = sum(near) / self.total
        toll = count * sink.message_s + nbytes * (sink.byte_s + self.byte_s / count)
        return self._move(nbytes * (1 - own), sink) + toll

    def _move(self, nbytes: float, to: DeviceProfile) -> float:
        if not nbytes:
            return 0.0
        return nbytes / min(self.link, to.bandwidth_bytes_per_s) + self.latency


def _left(block: Block) -> State:
    if block.whole_on is not None:
        return State(device=block.whole_on)
    return State(kind=block.kind)
