"""Who takes a task that may go to several devices: who is expected to be done, or free, first.

Greedy list scheduling (Graham 1969): what is open on each device, in seconds, is derived from the
attempts that run; nothing is stored, so nothing can be counted twice or forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.request import Try

Seconds = Callable[[Deployment, m.Place, str], float]
"""How long a task of a deployment takes on a device, as is known now."""


def choices_of(programs: Mapping[str, tuple[m.Program, ...]]) -> dict[m.Place, tuple[str, ...]]:
    """The devices of each task that may go to several, in plan order."""
    found = {p.place: p.devices for each in programs.values() for p in each if p.free}
    return dict(sorted(found.items()))


def open_work(running: Iterable[Try], seconds: Seconds) -> dict[str, float]:
    """Seconds of work that each device has been given and has not told of."""
    total: dict[str, float] = {}
    fixed: dict[int, list[tuple[m.Place, str]]] = {}  # of many devices, looked for once
    for tried in running:
        made = tried.deployment
        for place, devices in made.choices.items():
            for device in () if place in tried.tasks else tried.assigned.get(place, devices[:1]):
                total[device] = total.get(device, 0.0) + seconds(made, place, device)
        if made.number not in fixed:
            owned = ((p, device) for device, each in made.programs.items() for p in each)
            own = [(p.place, device) for p, device in owned if p.model and not p.free]
            fixed[made.number] = own
        for place, device in fixed[made.number]:
            if place not in tried.tasks:
                total[device] = total.get(device, 0.0) + seconds(made, place, device)
    return total


def assign(
    made: Deployment, busy: dict[str, float], seconds: Seconds, avoided: Collection[str] = ()
) -> dict[m.Place, str]:
    """A device for each task that has a choice, in plan order; ties go by the plan's order.

    With one request in flight it is the device that would be done first. A larger window asks for
    throughput: then it is the one that is free first, so that a slow one does its share too.
    ``busy`` is what ``open_work`` found; it is brought up to date. ``avoided``: get a task only
    where nobody else may take it.
    """
    found = {}
    for place, devices in made.choices.items():
        here = [d for d in devices if d in made.members]
        here = [d for d in here if d not in avoided] or here
        done = {d: busy.get(d, 0.0) + seconds(made, place, d) for d in here}
        when = done if made.window == 1 else busy
        found[place] = min(here, key=lambda d: when.get(d, 0.0))
        busy[found[place]] = done[found[place]]
    return found
