"""A device that becomes slow and recovers costs one plan each time, noise none, and a wrong first
figure is found out. Virtual time and real cores; task times are as noisy as those of real ones.
"""

from __future__ import annotations

import random

import pytest
from cores import Cluster, banded, conv_net, image

from meshinfer import limits
from meshinfer.graph import Graph
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m

SIZE = (96, 40)
MODEL = conv_net(SIZE)
NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")
NOISE = 0.15
FLOPS = 3e7


class Noisy(Cluster):
    """Tasks take so much more or less than they should. Devices that are this many times slower
    than the fastest get none of them."""

    useless = 3.0

    def __init__(self, seed: int) -> None:
        super().__init__(())
        self.by_work, self.rng = True, random.Random(seed)
        self.made: list[tuple[float, dict[str, float]]] = []
        """When a plan was looked for, and by which paces."""
        for name in NAMES:
            self.join(name, m.Facts(flops_per_s=FLOPS, host=name))
        self.settle(lambda: len(self.core.members.devices) == 1 + len(NAMES))
        self.pass_time(1.0)

    def _seconds(self, node, job):  # type: ignore[no-untyped-def]
        return super()._seconds(node, job) * self.rng.uniform(1 - NOISE, 1 + NOISE)

    def _plan(self, node, effect):  # type: ignore[no-untyped-def]
        paces = {c.device: c.slowdown for c in effect.candidates}
        self.made.append((self.now, paces))
        best = min(paces.values())
        used = [n for n, pace in paces.items() if pace < self.useless * best]
        speeds = [1.0 / round(paces[n], 2) for n in used]

        def planner(graph: Graph, names) -> Plan:  # type: ignore[no-untyped-def]
            return banded(graph, used, effect.head, speeds)

        self.planner = planner
        return super()._plan(node, effect)

    def stream(self, seconds: float) -> list[m.Reply]:
        end, replies, arrays = self.now + seconds, [], image(size=SIZE)
        while self.now < end:
            replies.append(self.reply(self.submit(arrays)))
            assert replies[-1].failure is None and replies[-1].attempts == 1
        return replies

    def plans(self) -> set[str]:
        return {made.plan for made in self.core.catalogue.deployments.values()}


def test_x() -> None:
    import time
    for seed in range(3):
        t = time.time()
        made = Noisy(seed)
        made.deployed(model=MODEL)
        fast = made.stream(15.0)
        n0 = made.plans_asked
        t1 = made.now
        made.slowness["pi-3"] = 5.0
        slow = made.stream(60.0)
        n1 = made.plans_asked
        t2 = made.now
        made.slowness["pi-3"] = 1.0
        back = made.stream(60.0)
        n2 = made.plans_asked
        print(seed, n0, n1, n2, len(fast), len(slow), len(back), time.time() - t, made.sent["Try"])
        for at, paces in made.made:
            print("   ", round(at - t1, 1), round(at - t2, 1), {k: round(v, 2) for k, v in paces.items()})
    assert 0
