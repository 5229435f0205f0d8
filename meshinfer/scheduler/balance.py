"""How fast devices are as it runs: measured against expected, in windows, without jumping at noise.

What a whole model takes too long by, on all devices alike, is the cost model's error: it is taken
out first, so that only devices that differ from the others move work about.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping
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

    def factor(self, now: float) -> float:
        if len(self.samples) < limits.PACE_SAMPLES_LEAST or self.stale(now):
            return 1.0
        return median_low(ratio for _, ratio in self.samples)

    def stale(self, now: float) -> bool:
        return not self.samples or now - self.samples[-1][0] > self.idle_s


class Balance:
    """Mutable: owned by the coordinator's core. ``count``: samples taken so far."""

    def __init__(self) -> None:
        self.count = 0
        self._paces: dict[str, _Pace] = {}
        self._bases: OrderedDict[Hashable, float | list[tuple[float, str, float]]] = OrderedDict()

    def note(self, made: Deployment, device: str, tasks: tuple[m.Done, ...], now: float) -> None:
        """What tasks took that a device has told of, where all of them were expected to take some
        time."""
        took = sum(done.compute_s for done in tasks)
        expected = [made.seconds(done.place, device) for done in tasks]
        total = sum(each for each in expected if each is not None)
        if total > 0.0 and None not in expected:
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
        """How many times longer than its profile says a device takes; 1 where not known."""
        pace = self._paces.get(device)
        return 1.0 if pace is None else pace.factor(now)

    def drift(
        self, devices: Iterable[str], planned: Mapping[str, float], since: float, now: float
    ) -> float:
        """How many times devices have drifted apart since a plan was made with these factors; 1
        where nothing new is known."""
        drift = [self.factor(name, now) / planned.get(name, 1.0) for name in devices]
        fresh = any(self._fresh(name, since, now) for name in devices)
        return max(drift) / min(drift) if fresh else 1.0

    def look(self, made: Deployment, now: float) -> None:
        """Note in a deployment by how much its devices have drifted apart, once there is news of
        most. What slows all down alike is seen of one before the others: it must be so twice."""
        if self.count < made.looked + len(made.candidates):
            return
        before, made.looked = made.drift, self.count
        made.drift = self.drift(made.candidates, made.factors, made.since, now)
        made.uneven = min(before, made.drift) > limits.PACE_DEVIATION

    def _fresh(self, device: str, since: float, now: float) -> bool:
        pace = self._paces.get(device)
        if pace is None:
            return False
        newer = sum(at > since for at, _ in pace.samples)
        return newer >= limits.PACE_SAMPLES_LEAST or (bool(pace.samples) and pace.stale(now))

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
