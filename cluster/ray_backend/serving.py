"""A plan on the nodes: its programs are brought to the actors, and it serves while they live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from cluster.blobs import BlobStore
from cluster.ray_backend.nodes import HEAD
from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of
from meshinfer.scheduler.calls import Call, Calls
from meshinfer.scheduler.catalogue import Model
from meshinfer.scheduler.events import PlanReady, Signature
from meshinfer.scheduler.request import moved

_UNDER_WAY_BYTES = 64 << 20
"""Of weights on their way to the actors: an object store may be small."""


@dataclass(slots=True, eq=False)
class Serving:
    """``actors``: who holds its programs. ``spares``: tasks that another device has prepared, and
    which. ``candidates``: who there was when it was planned, or looked at again. ``running``: how
    many requests use it; ``busy``: how many calls each device was given and has not answered."""

    number: int
    model: Model
    signature: Signature
    candidates: tuple[str, ...]
    made: PlanReady
    calls: Calls
    actors: dict[str, Any]
    spares: set[tuple[m.Place, str]] = field(default_factory=set)
    spares_tried: bool = False
    running: int = 0
    retired: bool = False
    busy: Counter[str] = field(default_factory=Counter)

    @property
    def most_running(self) -> int:
        return min(max(self.made.window, limits.RUNNING_REQUESTS), limits.WINDOW)

    def device(self, call: Call, is_current: Callable[[str, Any], bool]) -> str | None:
        """Who runs a task now: who is free first, or the first of those that live; None: nobody."""
        living = [
            name
            for i, name in enumerate(call.devices)
            if name in self.actors
            and (call.free or i == 0 or (call.place, name) in self.spares)
            and is_current(name, self.actors[name])
        ]
        if call.free:
            return min(living, key=lambda name: self.busy[name], default=None)
        return living[0] if living else None

    def is_whole(self, is_current: Callable[[str, Any], bool]) -> bool:
        """Whether every task has a device."""
        return all(self.device(call, is_current) is not None for call in self.calls.tasks)

    def plan(self, devices: Mapping[m.Place, str]) -> str:
        """Its text, with tasks where they ran."""
        went = {
            c.place: devices[c.place]
            for c in self.calls.tasks
            if not c.free and devices[c.place] != c.devices[0]
        }
        return moved(self.made.plan, tuple(sorted(went.items())))


def own_programs(made: PlanReady) -> dict[str, tuple[m.Program, ...]]:
    """What each device is to prepare before the plan serves."""
    found = {
        device: tuple(p for p in programs if p.model is not None)
        for device, programs in made.programs.items()
        if device != HEAD
    }
    return {device: programs for device, programs in found.items() if programs}


def spare_programs(made: PlanReady) -> dict[str, tuple[m.Program, ...]]:
    """What others prepare, should a device be lost."""
    found: dict[str, tuple[m.Program, ...]] = {}
    for program in (p for programs in own_programs(made).values() for p in programs):
        for device in program.spares:
            found[device] = (*found.get(device, ()), program)
    return found


def install(
    ray: Any,
    store: BlobStore,
    number: int,
    programs: Mapping[str, tuple[m.Program, ...]],
    actors: Mapping[str, Any],
) -> dict[str, Exception]:
    """Bring programs to the actors and have them prepared; who could not, and why.

    Weights go as arrays in the object store, each put there once, and only what an actor lacks.
    """
    failed: dict[str, Exception] = {}

    def ask(refs: Mapping[str, Any]) -> dict[str, Any]:
        answers = {}
        for name, ref in refs.items():
            try:
                answers[name] = ray.get(ref, timeout=limits.INSTALL_S)
            except Exception as error:
                failed[name] = error
        return answers

    wanted = {n: tuple({p.model: None for p in ps if p.model}) for n, ps in programs.items()}
    lacking = ask({name: actors[name].lacks.remote(models) for name, models in wanted.items()})
    for digests in _portions(store, programs, lacking):
        refs: dict[str, list[Any]] = {name: [] for name in lacking}
        for digest, names in digests.items():
            data = ray.put(np.fromfile(store.path(digest), np.uint8))
            for name in names:
                refs[name].append(actors[name].keep.remote(digest, data))
        for name, kept in refs.items():
            for ref in kept:
                failed |= _failures(ask({name: ref}))
    rest = [name for name in lacking if name not in failed]
    packed = {name: msgspec.msgpack.encode(programs[name]) for name in rest}
    answers = ask({name: actors[name].prepare.remote(number, packed[name]) for name in rest})
    return {**failed, **_failures(answers)}


def _portions(
    store: BlobStore,
    programs: Mapping[str, tuple[m.Program, ...]],
    lacking: Mapping[str, Iterable[str]],
) -> Iterable[dict[str, list[str]]]:
    """Blobs with the devices that are to have them, a few at a time."""
    wanted: dict[str, list[str]] = {}
    for name, models in lacking.items():
        missing = set(models)
        needs = (p for p in programs[name] if p.model in missing)
        for digest in dict.fromkeys(d for p in needs for d in (p.model, *p.weights) if d):
            wanted.setdefault(digest, []).append(name)
    portion: dict[str, list[str]] = {}
    size = 0
    for digest, names in wanted.items():
        nbytes = store.path(digest).stat().st_size
        if portion and size + nbytes > _UNDER_WAY_BYTES:
            yield portion
            portion, size = {}, 0
        portion[digest] = names
        size += nbytes
    if portion:
        yield portion


def _failures(answers: Mapping[str, bytes]) -> dict[str, Exception]:
    return {
        name: error_of(msgspec.msgpack.decode(told, type=m.Failure))
        for name, told in answers.items()
        if told
    }
