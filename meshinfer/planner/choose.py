"""The planner's entry: checks what is asked, lets candidates compete, explains the one that won."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshinfer import limits
from meshinfer.cost import DeviceProfile, Timeline, timeline
from meshinfer.errors import ClusterUnavailable, InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.legality import validate
from meshinfer.plan import Plan
from meshinfer.planner.bands import Block
from meshinfer.planner.borders import settle
from meshinfer.planner.candidates import Candidate, Choice
from meshinfer.planner.notes import (
    TRIED_APART,
    idle,
    including,
    notes_of,
    pinned_fast,
    too_large,
    without,
)
from meshinfer.planner.pins import Pins
from meshinfer.planner.propose import finalists, single, spread_out
from meshinfer.planner.refine import balance, refine
from meshinfer.planner.space import Space

OBJECTIVES = ("latency", "throughput", "memory")
SURE_GAIN = 1.10
"""By how much a plan on several devices must be expected to beat the best single one. What one
device takes is known within a few per cent; of messages and waiting, which only several devices
have, the timeline has been 10 to 20 % too low. Nobody is to lose by adding devices."""
_QUANTISING = ("QuantizeLinear", "DynamicQuantizeLinear")


Paces = Mapping[DeviceId, float]
"""How many times longer than its profile says a device takes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plan was made from, for devices of these paces."""

    blocks: tuple[Block, ...]
    paces: Paces

    def leads_to(self, paces: Paces) -> bool:
        """Whether moving borders and devices makes a good plan of it for these paces: where all is
        shared, or where they are much as they were. What is whole on one device stays there."""
        if all(b.whole_on is None for b in self.blocks):
            return bool(self.blocks)
        ratios = [pace / self.paces.get(name, 1.0) for name, pace in paces.items()]
        return max(ratios) < limits.PACE_GRAVE * min(ratios)


ADAPTED = "made from plans of before, for the devices' present paces"
ADAPTING = 2_000
"""Of moving single borders of a known layout, see ``Choice.effort``."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, what is expected of it, and why it is this one, in lines for people."""

    plan: Plan
    timeline: Timeline
    notes: tuple[str, ...]
    blocks: tuple[Block, ...] = ()


def make_plan(
    graph: Graph,
    profiles: Sequence[DeviceProfile],
    source: DeviceId,
    sink: DeviceId,
    *,
    objective: str = "latency",
    fixed_cuts: Sequence[int] | None = None,
    spread: bool = False,
    pin: Mapping[str, Sequence[DeviceId]] | None = None,
) -> Planned:
    """The plan expected to be best on these devices; it passes ``validate``.

    ``source`` holds the input and ``sink`` gets the answer; neither need compute, nor have a
    profile. ``objective``: "latency" (seconds of one request), "throughput" (seconds between two
    answers) or "memory" (bytes of the fullest device). ``fixed_cuts``: op indices between the
    stages, all of them. ``spread``: use every computing device, and several stages, even where
    fewer are faster. ``pin``: values that never leave these devices, nor what merely rewrites them;
    a source or sink counts as the devices beside it. A strict graph gets no partial sums, and
    devices of one numeric class only. Raises ``ClusterUnavailable`` when no device computes,
    ``NotEnoughMemory`` when no plan fits, ``InvalidInput`` for an unknown objective, a cut that is
    none, a device given twice, or a pin that no plan keeps.
    """
    choice = _choice(graph, profiles, (source, sink), objective, fixed_cuts, pin)
    if not graph.ops:
        nothing = Plan(graph.digest, source, sink, ())
        return Planned(nothing, timeline(graph, nothing, profiles), ("nothing to compute",))
    best = _search(choice, spread=spread and len(choice.order) > 1)
    if best.breach:
        raise pinned_fast(choice)
    if choice.excess(best) > 0:
        raise too_large(choice, best)
    return _planned(choice, best, spread=spread)


def adapt_plan(
    graph: Graph,
    profiles: Sequence[DeviceProfile],
    source: DeviceId,
    sink: DeviceId,
    layouts: Iterable[Layout],
    paces: Paces,
    *,
    objective: str = "latency",
    pin: Mapping[str, Sequence[DeviceId]] | None = None,
) -> Planned | None:
    """The best plan that follows from layouts of plans made before, with borders moved and devices
    left out or taken in: for devices whose paces (as in the profiles) have changed since, at a
    fourth of the effort of ``make_plan``. It was within 8 % of what that finds (YOLOv2, SqueezeNet
    and MobileNetV2 on four devices, one of them up to 20 times slower than before).

    Other arguments and errors as there. None where no layout leads there, or none is of these
    devices, keeps the pins and fits.
    """
    choice = _choice(graph, profiles, (source, sink), objective, None, pin)
    able = {p.id for p in choice.order}
    known = [
        x.blocks
        for x in layouts
        if x.leads_to(paces) and able.issuperset(d for b in x.blocks for d in b.devices)
    ]
    if not known:
        return None
    best = choice.best(balance(choice, choice.candidate("as before", x, {})) for x in known)
    best = _surely(choice, settle(choice, _members(choice, best), ADAPTING))
    if best.breach or choice.excess(best) > 0:
        return None
    found = _planned(choice, best, spread=False)
    return replace(found, notes=(ADAPTED, *found.notes))


def _choice(
    graph: Graph,
    profiles: Sequence[DeviceProfile],
    ends: tuple[DeviceId, DeviceId],
    objective: str,
    cuts: Sequence[int] | None,
    pin: Mapping[str, Sequence[DeviceId]] | None,
) -> Choice:
    """What is asked, once it is checked."""
    profiles = sorted(profiles, key=lambda p: p.id)
    _check(graph, profiles, objective, cuts)
    able = [p for p in profiles if p.able]
    if graph.strict:
        able = _one_class(able)
    if not able:
        raise ClusterUnavailable(
            f"none of the {len(profiles)} devices can compute",
            hint="start a worker with `meshinfer worker`, or the coordinator without --no-compute",
        )
    pins = _pins(graph, profiles, ends, pin or {})
    # What a partial sum changes in the last bit, a quantisation behind it may make a whole step.
    sums = not graph.strict and all(op.type not in _QUANTISING for op in graph.ops)
    space = Space.of(graph, cuts, sums=sums, pins=pins)
    choice = Choice(graph, tuple(profiles), ends, objective, space)
    choice.order = choice.ordered(able)
    return choice


def _planned(choice: Choice, best: Candidate, *, spread: bool) -> Planned:
    validate(choice.graph, best.plan)
    course = timeline(choice.graph, best.plan, choice.profiles)
    return Planned(best.plan, course, tuple(notes_of(choice, best, course, spread)), best.blocks)


def _search(choice: Choice, *, spread: bool) -> Candidate:
    if spread:
        best = _spread(choice)
        if best is not None:
            return best
    ranked = sorted(finalists(choice), key=choice.key)
    best = refine(choice, ranked[0])
    if choice.objective == "memory":
        best = choice.best([best, _quick(choice)])
    for rival in ranked[1:3]:  # what loses by a little may win when its borders are moved
        if len(rival.plan.devices()) > 1 and not rival.breach:
            best = choice.best([best, balance(choice, rival)])
    return _surely(choice, settle(choice, _members(choice, best)))


def _spread(choice: Choice) -> Candidate | None:
    """Over every device, but for those that cannot hold what they would be given: one that grants
    next to nothing does not spoil it for the others."""
    best, order = None, choice.order
    while found := list(spread_out(choice)):
        best = choice.best(found)
        small = choice.overfull(best)
        rest = tuple(p for p in choice.order if p.id not in small)
        if best.breach or not small or len(rest) < 2:
            break
        choice.order = rest
    choice.order = order
    return best


def _quick(choice: Choice) -> Candidate:
    """From what is soonest done, which may hold less: it comes in many small rounds, and a search
    by memory alone ends before them."""
    soon = Choice(choice.graph, choice.profiles, choice.ends, "latency", choice.space)
    soon.order, soon.parts = choice.order, choice.parts
    found = refine(soon, soon.best(finalists(soon)))
    return choice.candidate(found.name, found.blocks, {})


def _surely(choice: Choice, best: Candidate) -> Candidate:
    """The best single device, unless several are expected to gain more than predictions err."""
    if choice.objective != "latency" or len(best.plan.devices()) < 2:
        return best
    alone = choice.best(single(choice, p) for p in choice.order)
    lost = choice.key(alone)[:2] > choice.key(best)[:2]  # a pin broken, or memory exceeded
    return best if lost or choice.value(best) * SURE_GAIN < choice.value(alone) else alone


def _members(choice: Choice, best: Candidate) -> Candidate:
    """Leave out or take in one device at a time."""
    for _ in range(3):
        shares = best.shares
        least = sorted(shares, key=lambda d: (shares[d], d))[:TRIED_APART]
        fewer = [without(choice, best, d) for d in least if len(shares) > 2]
        found = choice.best([best, *fewer])
        if found is best:
            break
        best = balance(choice, found)
    for p in idle(choice, best)[:TRIED_APART]:
        more = including(choice, best, p)
        best = best if more is None else choice.best([best, more])
    return best


def refuse_pinned(
    graph: Graph,
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    pin: Mapping[str, Sequence[DeviceId]],
) -> None:
    """Raise ``InvalidInput`` if the plan takes a pinned value, or a rewritten one, elsewhere."""
    pins = pins_of(graph, plan, profiles, pin)
    for stage in plan.stages:
        allowed = pins.allowed(stage.start, stage.stop)
        others = sorted({d for t in stage.tasks for d in t.devices} - (allowed or set()))
        if allowed is not None and others:
            raise InvalidInput(
                f"the plan computes stage {stage.start}:{stage.stop} on {others[0]!r}, where what "
                f"is pinned must not go",
                hint=f"the values {sorted(pins.by_value)} may be on {sorted(allowed)} only",
            )


def pins_of(
    graph: Graph,
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    pin: Mapping[str, Sequence[DeviceId]],
) -> Pins:
    """Where values may be that are pinned, from this plan's source to its sink."""
    return Pins.of(graph, _pins(graph, profiles, (plan.source, plan.sink), pin))


def _one_class(able: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The numeric class that computes most operations a second together."""
    power: dict[str, float] = {}
    for p in able:
        power[p.numeric_class] = power.get(p.numeric_class, 0.0) + p.flops_per_s
    best = max(power, key=lambda name: (power[name], name), default="")
    return [p for p in able if p.numeric_class == best]


def _check(
    graph: Graph, profiles: Sequence[DeviceProfile], objective: str, cuts: Sequence[int] | None
) -> None:
    if objective not in OBJECTIVES:
        raise InvalidInput(
            f"objective {objective!r} is unknown", hint=f"choose one of {', '.join(OBJECTIVES)}"
        )
    names = [p.id for p in profiles]
    if len(set(names)) != len(names):
        raise InvalidInput(f"a device is given twice among {names}", hint="give each device once")
    wrong = sorted(set(cuts or ()) - set(graph.cut_points))
    if wrong:
        raise InvalidInput(
            f"{wrong} are no cut points of this graph", hint="choose among graph.cut_points"
        )


def _pins(
    graph: Graph,
    profiles: Sequence[DeviceProfile],
    ends: tuple[DeviceId, DeviceId],
    pin: Mapping[str, Sequence[DeviceId]],
) -> dict[str, frozenset[DeviceId]]:
    """The devices that may hold each pinned value: a source or sink with those on its host."""
    by_id = {p.id: p for p in profiles}
    beside = {
        end: {p.id for p in profiles if end in by_id and p.beside(by_id[end])} | {end}
        for end in ends
    }
    held = {}
    for value, devices in pin.items():
        if value not in graph.values:
            raise InvalidInput(
                f"pinned value {value!r} is not in the model",
                hint=f"pin an input ({', '.join(graph.inputs)}) or a value that some node makes",
            )
        unknown = sorted(set(devices) - {*by_id, *ends})
        if unknown or not devices:
            raise InvalidInput(
                f"{value!r} is pinned to {unknown or 'no device'}, which is not there",
                hint=f"devices are {sorted({*by_id, *ends})}",
            )
        allowed = set(devices)
        for end in ends:
            if end in devices:
                allowed |= beside[end]
            elif beside[end] & allowed:
                allowed.add(end)
        for end, names in zip(ends, (graph.inputs, graph.outputs), strict=True):
            if value in names and end not in allowed:
                raise InvalidInput(
                    f"{value!r} is pinned to {sorted(devices)}, but {end!r} must hold it as "
                    f"{'an input' if names is graph.inputs else 'an output'}",
                    hint=f"pin it to {end!r}, or to a device on the same host",
                )
        held[value] = frozenset(allowed)
    return held
