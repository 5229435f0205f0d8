"""How fast devices are as it runs: measured against expected, in windows, without jumping at noise.

What a whole model takes too long by, on all devices alike, is the cost model's error: it is taken
out first, so that only devices that differ from the others move work about.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment


@dataclass(slots=True)
class _Pace:
    """The last samples of a device: when, and how many times its expected time it took.

    ``idle_s``: how long it may give none until it is tried again; longer each time in vain.
    """

    samples: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=limits.PACE_SAMPLES)
    )
    idle_s: float = limits.PACE_FORGOTTEN_S

    def level(self, now: float, since: float = -math.inf) -> float | None:
        """By what was measured since then alone; None where that is too little, or too long ago."""
        if self.stale(now):
            return None
        return _level([ratio for at, ratio in self.samples if at > since])

    def known(self, now: float) -> bool:
        return len(self.samples) >= limits.PACE_SAMPLES_LEAST and not self.stale(now)

    def least(self, now: float, *, but: int) -> float:
        """What all but so many of the newest samples come to at least, however far they are apart;
        0 where they are too few, or too old."""
        newest = sorted(ratio for _, ratio in list(self.samples)[-limits.PACE_SAMPLES_LEAST :])
        wanted = limits.PACE_SAMPLES_LEAST - but
        return newest[-wanted] if len(newest) >= wanted and not self.stale(now) else 0.0

    @property
    def settled(self) -> bool:
        """Whether the newest samples agree: it does not just become another."""
        newest = [ratio for _, ratio in self.samples][-limits.PACE_SAMPLES_LEAST :]
        return not newest or max(newest) <= limits.PACE_GRAVE * max(min(newest), 1e-9)

    def stale(self, now: float) -> bool:
        return not self.samples or now - self.samples[-1][0] > self.idle_s


def _level(ratios: Sequence[float]) -> float | None:
    """The pace that samples, oldest first, come to; None of too few.

    Where the newest are all apart from all before, it has become another, and they alone count: a
    median over both would be the old pace, or something between, and plans made by it too mild.
    """
    if len(ratios) < limits.PACE_SAMPLES_LEAST:
        return None
    before, newest = ratios[: -limits.PACE_SAMPLES_LEAST], ratios[-limits.PACE_SAMPLES_LEAST :]
    apart = limits.PACE_DEVIATION
    if before and (min(newest) > apart * max(before) or apart * max(newest) < min(before)):
        return median_low(newest)
    return median_low(ratios)


class Balance:
    """Mutable: owned by the coordinator's core. ``count``: samples taken so far."""

    def __init__(self) -> None:
        self.count = 0
        self._paces: dict[str, _Pace] = {}
        self._seen = (-math.inf, 0, 1.0, 1.0)
        """When ``_common`` was looked at, at which count, and what it was."""
        self._bases: OrderedDict[Hashable, float | list[tuple[float, str, float]]] = OrderedDict()

    def note(self, made: Deployment, device: str, tasks: tuple[m.Done, ...], now: float) -> None:
        """What tasks took that a device has told of, where all of them were expected to take some
        time."""
        took = sum(max(done.compute_s, done.lasting_s) for done in tasks)
        expected = [made.seconds(done.place, device) for done in tasks]
        total = sum(each for each in expected if each is not None)
        if took > 0.0 and total > 0.0 and None not in expected:
            ratio = made.factors.get(device, 1.0) * took / total
            self.measured(made.kind, device, ratio, now)

    def measured(self, kind: Hashable, device: str, ratio: float, now: float) -> None:
        """``ratio``: measured over expected time of a device's tasks; ``kind``: of which model."""
        self.count += 1
        base = self._bases.setdefault(kind, [])
        self._bases.move_to_end(kind)
        while len(self._bases) > limits.PACES_KEPT:
            self._bases.popitem(last=False)
        if isinstance(base, float):
            self._note(device, ratio / base, now)
            return
        base.append((now, device, ratio))
        if len(base) < limits.PACE_SAMPLES:
            return
        middle = max(median_low(ratio for _, _, ratio in base), 1e-9)
        self._bases[kind] = middle
        for at, name, each in base:
            self._note(name, each / middle, at)

    def _note(self, device: str, ratio: float, now: float) -> None:
        pace = self._paces.setdefault(device, _Pace())
        if pace.samples and pace.stale(now):  # it was given work again, to see
            before = median_low(ratio for _, ratio in pace.samples)
            pace.samples.clear()
            again = before > limits.PACE_DEVIATION and ratio > limits.PACE_DEVIATION
            longer = min(2 * pace.idle_s, limits.PACE_FORGOTTEN_MOST_S)
            pace.idle_s = longer if again else limits.PACE_FORGOTTEN_S
        pace.samples.append((now, ratio))

    def factor(self, device: str, now: float) -> float:
        """How many times longer than its profile says a device takes, beside what all do. Where it
        is not known, what others do most likely holds for it, too: where most are faster than was
        thought, who has had no task yet would else count as slow, and get too little."""
        common, usual = self._common(now)
        known = self.level(device, now)
        return (usual if known is None else known) / common

    def seconds(self, made: Deployment, place: m.Place, device: str, now: float) -> float | None:
        """Of a task on a device as it is now; None where nothing was expected of it there."""
        expected = made.seconds(place, device)
        if expected is None:
            return None
        return expected * self.factor(device, now) / made.factors.get(device, 1.0)

    def _common(self, now: float) -> tuple[float, float]:
        """What all devices that are known take longer by, or less; and what most do. The base may
        have been taken in a bad moment; to plan for that would make kernels cheap beside messages,
        and a device of which nothing is known yet unlike all others."""
        if self._seen[:2] != (now, self.count):
            levels = [each for each in (p.level(now) for p in self._paces.values()) if each]
            least, most = min(levels, default=1.0), max(levels, default=1.0)
            common = max(least, 1.0) * min(most, 1.0) if len(levels) > 1 else 1.0
            usual = median_low(levels) if len(levels) > 1 else common
            self._seen = (now, self.count, common, usual)
        return self._seen[2:]

    def drift(
        self,
        devices: Iterable[str],
        planned: Mapping[str, float],
        since: float,
        now: float,
        idle: Collection[str] = (),
    ) -> float:
        """How many times devices have drifted apart since a plan was made with these factors, by
        what was measured since; 1 where nothing new is known.

        ``idle``: who has no task of it; that such a one is slower yet is nobody's loss.
        """
        drift, (common, usual) = [], self._common(now)
        for name in devices:
            pace, before = self._paces.get(name), planned.get(name, 1.0)
            known = self.level(name, now, since)
            ratio = 1.0 if known is None else known / common / before
            if pace is not None and pace.samples and pace.stale(now):
                ratio = usual / common / before
            drift.append(min(ratio, 1.0) if name in idle else ratio)
        return max(drift, default=1.0) / min(drift, default=1.0)

    def level(self, device: str, now: float, since: float = -math.inf) -> float | None:
        """Its pace as measured since then; None where that is not known."""
        pace = self._paces.get(device)
        return None if pace is None else pace.level(now, since)

    def slow(self, made: Deployment, now: float) -> Mapping[str, float]:
        """Devices that have become so slow since a plan was made that others may be sooner done
        with their tasks (``leaving``), and by how many times: three of their newest four samples
        are; and then until none is. Not where the user wants that plan."""
        if made.given or made.model.spread:
            return {}
        before, common, found = made.drift.slow, self._common(now)[0], dict[str, float]()
        for name in made.programs:
            if (pace := self._paces.get(name)) is not None:
                least = pace.least(now, but=limits.PACE_SAMPLES_LEAST - 1 if name in before else 1)
                times = least / common / made.factors.get(name, 1.0)
                found |= {name: times} if times > limits.PACE_LEFT else {}
        made.drift.slow = found
        return found

    def sure(self, device: str, now: float) -> bool:
        """Whether a device's pace is known, and is what it was."""
        pace = self._paces.get(device)
        return pace is not None and pace.known(now) and pace.settled

    def settled(self, devices: Iterable[str], now: float) -> bool:
        """Whether what is known of them is what they are now, and not on its way there."""
        known = (self._paces.get(name) for name in devices)
        return all(pace is None or pace.settled or pace.stale(now) for pace in known)

    def look(self, made: Deployment, now: float) -> None:
        """Note in a deployment by how much its devices have drifted apart, once there is news of
        most. What slows all down alike is seen of one before the others: it must be so twice."""
        seen, before = made.drift, made.drift.times
        if self.count < seen.looked + len(made.candidates):
            return
        seen.looked = self.count
        names = made.candidates
        if seen.by_one:  # of the others those that come to be tried
            names = tuple(n for n in names if self.level(n, now, made.since) is not None)
        seen.times = self.drift(names, made.factors, made.since, now, made.idle)
        seen.uneven = min(before, seen.times) > limits.PACE_DEVIATION

    def forget(self, device: str) -> None:
        """It has left; who comes back under its name may be another."""
        self._paces.pop(device, None)


def unusual(factors: Mapping[str, float]) -> dict[str, str]:
    """Of a log line: which devices were thought slower or faster than their profiles, if any."""
    odd = {n: f for n, f in factors.items() if max(f, 1 / max(f, 1e-9)) > limits.PACE_DEVIATION}
    said = ", ".join(f"{name} {factor:.2f}" for name, factor in sorted(odd.items()))
    return {"paces": said} if said else {}


def pause_of(search_s: float, in_vain: int, *, grave: bool, upset: bool) -> float:
    """Seconds from one plan to the next search for a better one: longer each time in vain, but for
    an ``upset``: what was in vain was so on other devices than they are now."""
    if upset:
        return limits.REPLAN_EVERY_S
    part = limits.REPLAN_SHARE_GRAVE if grave else limits.REPLAN_SHARE
    pause_s = max(limits.REPLAN_EVERY_S, search_s / part)
    return float(pause_s * 2 ** min(in_vain, limits.REPLAN_DOUBLINGS))
