"""All faults for a long time, beside a steady load: C24, and what any short run can be given."""

from __future__ import annotations

import time
from collections.abc import Callable

from chaos.arena import CORES, Run
from meshinfer import limits

RATE = 4.0
IN_FLIGHT = 8
HOUR_MINUTES = 60.0
QUIET_S = limits.KEEPALIVE_IDLE_S + 5 * limits.TCP_MAX_RETRANSMIT_MS / 1000.0
"""Until the kernel has told of every connection whose other end went without a word."""
LEFT = 2


def soak(run: Run, minutes: float) -> None:
    """Faults of every kind at random for so long; before and after it some time of nothing, in
    which memory, threads and descriptors can be compared."""
    run.deploy()
    run.calm(100, rate=RATE)
    if minutes >= HOUR_MINUTES:  # at that rate the table of ids would be full only after 34 of them
        run.calm(limits.JOURNALED_IDS, phase="warm", in_flight=IN_FLIGHT)
    for fault in FAULTS:  # which devices have connections depends on the plans that there were
        fault(run, run.rng.randrange(1, len(run.names)))
        run.heal()
    run.calm(100, phase="warm", in_flight=IN_FLIGHT)
    with run.sampled(2.0):
        _quiet(run, "before")
        until = time.monotonic() + 60.0 * minutes
        with run.load("faults", 10_000_000, rate=RATE, within_s=60.0 * minutes, deadline_s=60.0):
            while time.monotonic() < until:
                _one(run)
                run.pause(0.2, 3.0)
        run.heal()
        _quiet(run, "after")


def _quiet(run: Run, which: str) -> None:
    run.pause(QUIET_S)
    run.list_descriptors()
    run.history.write("quiet", which=which, span_s=QUIET_S)


def _one(run: Run) -> None:
    """A fault from beginning to end; those that leave fewer than enough devices wait."""
    ready = run.ready()
    if len(ready) <= LEFT:
        return
    run.rng.choice(FAULTS)(run, run.rng.choice(ready))


def _kill(run: Run, i: int) -> None:
    run.hurt("kill", i, lambda: run.cluster.crash(i))


def _power(run: Run, i: int) -> None:
    run.hurt("power", i, lambda: run.power_cycle(i))


def _freeze(run: Run, i: int) -> None:
    took_s = 0.2 * 25 ** run.rng.random()
    run.hurt("pause", i, lambda: run.cluster.pause(i), took_s=took_s)
    run.pause(took_s)
    run.hurt("resume", i, lambda: run.cluster.resume(i))


def _cut(run: Run, i: int) -> None:
    """Link down; not of the device that the user is on."""
    i = i or 1
    run.hurt("cut", i, lambda: run.lab.cut(i))
    run.pause(0.5, 6.0)
    run.hurt("healed", i, lambda: run.lab.heal(i))


def _part(run: Run, i: int) -> None:
    other = run.rng.choice([j for j in range(len(run.names)) if j != i])
    run.hurt("partition", i, lambda: run.lab.cut_between(i, other), other=other)
    run.pause(0.5, 6.0)
    run.hurt("healed", i, lambda: run.lab.heal(i))


def _lossy(run: Run, i: int) -> None:
    share = run.rng.uniform(0.01, 0.1)
    run.hurt("loss", i, lambda: run.lab.lose(i, share), share=share)
    run.pause(1.0, 5.0)
    run.hurt("healed", i, lambda: run.lab.heal(i))


def _slow(run: Run, i: int) -> None:
    run.hurt("slow", i, lambda: run.lab.set_cpu(i, 0.2 * CORES[i]))
    run.pause(2.0, 6.0)
    run.hurt("fast", i, lambda: run.lab.set_cpu(i, CORES[i]))


FAULTS: tuple[Callable[[Run, int], None], ...] = (
    _kill, _power, _freeze, _cut, _part, _lossy, _slow,
)  # fmt: skip
