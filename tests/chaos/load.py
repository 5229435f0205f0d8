"""Cases in which devices become slow, or more is asked than can be done."""

from __future__ import annotations

from architectures import yolov2

from chaos.arena import CORES, MEMORY_BYTES, Run, names
from cluster.lab import DeviceSpec

SLOW = 0.2
VICTIM = 3
ROOM = 0.7
"""Of the usual quotas, which are more together than this machine's two cores: there, a plan for all
devices was no faster than one for three of them, and no plan was the best."""
THROTTLED = [
    DeviceSpec(n, ROOM * c, m) for n, c, m in zip(names(), CORES, MEMORY_BYTES, strict=True)
]
HEAVY = 256
"""Pixels a side of a model that is worth cutting for all devices, which the planner does unasked:
who asks for all of them gets all of them, slow ones too."""


def throttled(run: Run) -> None:
    """C10: one worker has a fifth of its processor for a while, then all of it again.

    What the best plan could do is bounded from below by what the other three do without it.
    """
    run.deploy(model=yolov2(HEAVY), size=HEAVY, spread=False)
    run.calm(10_000, in_flight=1, within_s=8.0)
    run.hurt("power off", VICTIM, lambda: run.cluster.kill(VICTIM))
    run.pause(3.0)
    run.user.call("load", name="net", phase="without", count=10_000, in_flight=1, within_s=8.0)
    run.hurt("power on", VICTIM, lambda: run.cluster.restart(VICTIM))
    run.user.call("load", name="net", phase="warm", count=run.count(20, 100), in_flight=1)
    victim = max(i for i, name in enumerate(run.names) if name in run.takes_part())
    cores = THROTTLED[victim].cpu
    assert cores == THROTTLED[VICTIM].cpu, "the plan has only the first device"
    spent_s = run.count(20, 60)
    with run.load("slow", 100_000, in_flight=1, within_s=spent_s):
        run.hurt("slow", victim, lambda: run.lab.set_cpu(victim, SLOW * cores))
    with run.load("back", 100_000, in_flight=1, within_s=spent_s):
        run.hurt("fast", victim, lambda: run.lab.set_cpu(victim, cores))
    run.heal()


def overload(run: Run) -> None:
    """C16: ten times what the cluster can do is asked of it."""
    spent_s = run.count(10, 60)
    run.deploy(size=224, name="small", spread=False)
    run.calm(run.count(50, 200), name="small", rate=5.0)
    with run.sampled():
        run.user.call(
            "load", name="small", phase="peak", count=100_000, in_flight=16, within_s=spent_s
        )
        rate = 10.0 * run.rate("peak")
        run.fault("overload", rate=rate)
        with run.load("faults", round(rate * spent_s), name="small", rate=rate, deadline_s=30.0):
            pass
    run.heal("small")
