"""Requests that a client in a simulation computes itself, as ``cluster.on_device`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.simulator.kernels import Array
from meshinfer.simulator.node import Node

if TYPE_CHECKING:
    from meshinfer.simulator.simulation import Asked, Simulation

STALE_S = 1.3 * limits.DEAD_AFTER_S + 0.5
"""How long after another version serves a client may still answer by the one that was granted: a
lease by a slow clock, and the way of a message."""


class Granted:
    """``ran``: answered so, by process. ``counted``: of those, what the coordinator was told."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self.ran: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self._untold: dict[str, list[tuple[int, float]]] = {}
        self._busy: set[str] = set()

    def runs(self, node: Node, asked: Asked, header: m.Submit, arrays: Mapping[str, Array]) -> bool:
        """Begin a request here, if this process may and is not at another."""
        if node.clock.local(self._world.now) >= node.lease or node.id in self._busy:
            return False
        asks = header.version, header.inputs, header.picture, header.outputs
        fitting = (n for n, task in node.granted.items() if task.serves(*asks))
        number = next(fitting, None)
        return number is not None and self._begin(node, asked, number, arrays)

    def _begin(self, node: Node, asked: Asked, number: int, arrays: Mapping[str, Array]) -> bool:
        world, task = self._world, node.granted[number]
        data, made = world.plan_by_number(number, task.grant.program)
        prepared = world.kernels.prepare(data, made, task.grant.program)
        if world.fails(asked.seed):
            return False  # a device may manage, or tell why not
        outputs = task.run(arrays, lambda given: world.kernels.run(prepared, given, asked.seed))
        took = world.timing.compute_s * (0.5 + world.streams["granted"].random())
        over = e.Resolve(asked.request, task.reply(asked.request, took, took), outputs)
        world.tell_story(lambda: f"    {node} computes {asked.request} itself")
        asked.here = True
        asked.datas = tuple(dict.fromkeys((*asked.datas, *world.served_within(STALE_S))))
        self._busy.add(node.id)
        world.at(world.now + took, lambda: self._done(node, asked, number, took, over))
        return True

    def _done(self, node: Node, asked: Asked, number: int, took: float, over: e.Resolve) -> None:
        self._busy.discard(node.id)
        if not node.here:
            return
        self.ran[node.id] += 1
        self._untold.setdefault(node.id, []).append((number, took))
        if not asked.cancelled:
            asked.outcomes.append((self._world.now, over))

    def told(self, node: Node) -> None:
        """With each lease: what was computed since the last."""
        by_number: dict[int, list[float]] = {}
        for number, took in self._untold.pop(node.id, []):
            by_number.setdefault(number, []).append(took)
        for number, times in by_number.items():
            ran = e.RanHere(number, len(times), sum(times) / len(times))
            self._world.post(node, ran, 0.0)
