"""Plans whose tasks may go to any device: whole requests, and bands with halos."""

from __future__ import annotations

from collections.abc import Sequence

from cores import _imported, conv_net

from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.scheduler import events as e
from meshinfer.simulator.models import for_any

HEAD = DeviceId("head")


def graph() -> Graph:
    return _imported(conv_net(), None, e.Signature(False, (("x", (1, 3, 12, 10)),)))


def whole(g: Graph, names: Sequence[str], window: int) -> Plan:
    """One task: whole requests to free devices."""
    live = g.live_outputs(0, len(g.ops))
    shards = tuple(Shard(name, g.whole(name)) for name in live)
    task = Task(tuple(map(DeviceId, names)), shards)
    return Plan(g.digest, HEAD, HEAD, (Stage(0, len(g.ops), (task,)),), window)


def bands(g: Graph, names: Sequence[str], count: int, window: int = 1) -> Plan:
    """A stage for each two operators, in bands that anybody may take; what has no rows is whole."""
    devices = tuple(map(DeviceId, names))
    cuts = [0, *(c for c in g.cut_points if c % 2 == 0), len(g.ops)]
    return for_any(g, devices, HEAD, cuts, count, window=window)


def bands_for_all(g: Graph, names: Sequence[str]) -> Plan:
    return bands(g, names, count=len(names) + 2)
