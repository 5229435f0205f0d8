"""Candidates: whole plans made from layouts of blocks, with timelines, and how they compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from meshinfer.cost import DeviceProfile, Load, Timeline, predict
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.planner.bands import Block, explicit
from meshinfer.planner.parts import Parts
from meshinfer.planner.search import Team
from meshinfer.planner.space import Space
from meshinfer.transfers import TaskRef

MOST_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout, its plan and what is expected of it. ``breach``: blocks on devices that a pin
    forbids."""

    name: str
    blocks: tuple[Block, ...]
    plan: Plan
    timeline: Timeline
    breach: int

    @property
    def shares(self) -> dict[DeviceId, float]:
        """Each device with its share of the split blocks, on average."""
        found: dict[DeviceId, float] = {}
        for block in self.blocks:
            total = sum(weight for _, weight in block.shares)
            for device, weight in block.shares:
                found[device] = found.get(device, 0.0) + weight / total
        return found


@dataclass
class Choice:
    """What one call of ``make_plan`` works on. ``order``: the devices that may compute, the most
    useful first; ``effort``: tasks placed on timelines so far, a message counting a quarter: a
    measure of the time spent that does not depend on the clock."""

    graph: Graph
    profiles: tuple[DeviceProfile, ...]
    ends: tuple[DeviceId, DeviceId]
    objective: str
    space: Space
    order: tuple[DeviceProfile, ...] = ()
    effort: int = 0
    seen: dict[tuple[Block, ...], Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_id = {p.id: p for p in self.profiles}
        self.parts = Parts(self.graph, self.space.axes)

    def profile(self, device: DeviceId) -> DeviceProfile:
        return self.by_id.get(device) or DeviceProfile(device, 0.0, computes=False)

    def ordered(self, able: Sequence[DeviceProfile]) -> tuple[DeviceProfile, ...]:
        """Most useful first: fast with a fast link; those at the ends before others, their link
        is saved."""
        flops = self.space.sums.flops[-1]
        largest = max((self.graph.nbytes(n) for n in self.graph.values), default=0)
        ends = [self.profile(d) for d in self.ends]

        def key(p: DeviceProfile) -> tuple[float, bool, str]:
            near = any(p.beside(end) for end in ends)
            moving = 0.0 if near else largest / p.bandwidth_bytes_per_s
            return (flops / p.flops_per_s + moving, not near, p.id)

        return tuple(sorted(able, key=key))

    def team(self, members: Sequence[DeviceProfile], shares: Mapping[DeviceId, float]) -> Team:
        """Devices for a search, with those outside that hold pinned values."""
        source, sink = (self.profile(d) for d in self.ends)
        pinned = set().union(*self.space.pins.by_op.values())
        alone = tuple(p for p in self.order if p.id in pinned and p not in members)
        return Team(tuple(members), tuple(shares[p.id] for p in members), source, sink, alone)

    def candidate(
        self, name: str, blocks: Sequence[Block], shares: Mapping[DeviceId, float]
    ) -> Candidate:
        """The candidate of a layout, remembered. ``shares``: for blocks that do not say."""
        layout = explicit(blocks, shares)
        if layout not in self.seen:
            stages = tuple(self.parts.stage(block) for block in layout)
            plan = Plan(self.graph.digest, *self.ends, stages)
            if self.objective == "throughput":
                window = min(MOST_IN_FLIGHT, 2 * len(plan.devices()))
                plan = Plan(plan.graph, *self.ends, stages, window)
            allowed = self.space.pins.allowed
            breach = sum(
                held is not None and not held.issuperset(block.devices)
                for block in layout
                for held in (allowed(block.start, block.stop),)
            )
            found = self._timeline(plan, layout)
            self.seen[layout] = Candidate(name, layout, plan, found, breach)
        return self.seen[layout]

    def _timeline(self, plan: Plan, layout: Sequence[Block]) -> Timeline:
        loads: dict[TaskRef, Load] = {}
        for s, block in enumerate(layout):
            for t, load in enumerate(self.parts.loads(block)):
                loads[self.parts.ref(s, t)] = load
        messages = self.parts.messages(layout)
        self.effort += len(loads) + len(messages) // 4
        return predict(plan, self.profiles, loads, messages, brief=True)

    def overfull(self, c: Candidate) -> dict[DeviceId, int]:
        """Of the devices of a candidate that grant less than they would hold: how much that is."""
        uses = ((u, self.by_id.get(u.id)) for u in c.timeline.devices)
        return {
            p.id: u.peak_bytes
            for u, p in uses
            if p is not None and 0 < p.memory_bytes < u.peak_bytes
        }

    def excess(self, c: Candidate) -> int:
        """Bytes by which a candidate's devices exceed what they granted, added up."""
        needs = self.overfull(c)
        return sum(needed - self.by_id[name].memory_bytes for name, needed in needs.items())

    def value(self, c: Candidate) -> float:
        """What the objective makes small, in seconds or bytes."""
        if self.objective == "throughput":
            return c.timeline.bottleneck_s
        if self.objective == "memory":
            return float(max(u.peak_bytes for u in c.timeline.devices))
        return c.timeline.total_s

    def key(self, c: Candidate) -> tuple[int, int, float, float, int, int]:
        """The smallest is the best: first what is allowed and fits."""
        used, stages = len(c.plan.devices()), len(c.plan.stages)
        return (c.breach, self.excess(c), self.value(c), c.timeline.total_s, used, stages)

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        return min(candidates, key=self.key)
