"""Cases in which processes die or freeze."""

from __future__ import annotations

import signal

from chaos import poison
from chaos.arena import SIZE, Run

RATE = 5.0
SLOWER = 2.2
"""Requests a second where so many faults as the table asks for have to fit in beside them."""
LEFT = 2
"""So many workers at least are ready whenever one is killed: C12 is the case of none."""


def kills(run: Run) -> None:
    """C1: a random worker's process, or a random device's power, while requests come steadily."""
    requests = run.count(100, 1000)
    run.deploy()
    run.calm(run.count(100, 300), rate=RATE)
    killed = 0
    with run.load("faults", requests, rate=SLOWER if run.full else RATE) as load:
        while not load.over and killed < requests // 5:
            ready = run.ready()
            if len(ready) > LEFT:
                victim = run.rng.choice(ready)
                if run.rng.random() < 0.7:
                    run.hurt("kill", victim, lambda i=victim: run.cluster.crash(i))
                else:
                    run.hurt("power", victim, lambda i=victim: run.power_cycle(i))
                killed += 1
            run.pause(0.1, 1.3)
    run.heal()


def freezes(run: Run) -> None:
    """C2: a random worker is stopped for 0.2 to 5 s, one after another."""
    requests = run.count(100, 800)
    run.deploy()
    run.calm(run.count(100, 300), rate=RATE)
    most = run.count(8, 100)
    with run.load("faults", requests, rate=SLOWER if run.full else RATE) as load:
        stopped = 0
        while not load.over and stopped < most:
            victim = run.rng.choice(run.ready() or [0])
            took_s = 0.2 * 25 ** run.rng.random()
            run.hurt("pause", victim, lambda i=victim: run.cluster.pause(i), took_s=took_s)
            run.pause(took_s)
            run.hurt("resume", victim, lambda i=victim: run.cluster.resume(i))
            stopped += 1
            run.pause(0.1, 0.5)
    run.heal()


def nobody(run: Run) -> None:
    """C12: every worker is dead for 10 s, then one after another comes back."""
    run.deploy()
    run.calm(run.count(30, 200), rate=RATE)
    with run.load("faults", round(RATE * 16), rate=RATE, deadline_s=25.0):
        run.pause(1.0)
        for i in range(len(run.names)):
            run.hurt("power off", i, lambda i=i: run.cluster.kill(i))
        run.fault("nobody")
        run.pause(10.0)
        run.fault("somebody")
        for i in range(len(run.names)):
            run.hurt("power on", i, lambda i=i: run.cluster.restart(i, wait=False))
            run.pause(0.5)
    run.heal()


def coordinators(run: Run) -> None:
    """C13: the coordinator's process is killed again and again, and started again at once."""
    kills = run.count(4, 50)
    run.deploy()
    run.calm(run.count(50, 200), rate=RATE)
    with run.load("faults", round(RATE * (6 * kills + 5)), rate=RATE, deadline_s=60.0):
        for _ in range(kills):
            run.pause(0.5, 3.5)
            run.hurt("kill coordinator", 0, run.cluster.kill_coordinator)
            run.fault("coordinator")
            run.cluster.restart_coordinator()
            run.pause(3.0)
    run.heal()


def joins(run: Run) -> None:
    """C11: one worker dies a second after each time it has joined."""
    victim, times = 3, run.count(6, 30)
    run.deploy()
    run.calm(run.count(50, 200), rate=RATE)
    with run.load("faults", 100_000, rate=RATE, within_s=270.0) as load:
        for _ in range(times):
            while run.names[victim] not in run.states() and not load.over:
                run.pause(0.1)
            if load.over:
                break
            run.pause(1.0)
            run.hurt("kill", victim, lambda: run.cluster.crash(victim))
            run.pause(0.3)
        run.pause(3.0)
        load.stop()
    run.heal()


def poisoned(run: Run) -> None:
    """C15: a request that makes the kernel kill whoever computes it, beside harmless ones."""
    run.deploy()
    run.deploy("evil", poison.allocates(SIZE), spread=False)
    requests = run.count(60, 400)
    run.calm(requests, rate=RATE)
    with run.load("faults", requests, rate=RATE):
        run.pause(2.0)
        for _ in range(run.count(1, 5)):
            run.fault("poison")
            run.user.call("poison", name="evil", value=poison.MUCH)
    run.log()
    run.heal()


CAUSES = {"SIGSEGV": signal.SIGSEGV, "SIGABRT": signal.SIGABRT, "exit code 3": signal.SIGUSR2}


def causes(run: Run) -> None:
    """C4: workers end in every other way: a crash, an exit, no memory, a kernel that refuses."""
    run.deploy()
    run.deploy("evil", poison.allocates(SIZE), spread=False)
    run.deploy("picky", poison.looks_up(SIZE), spread=False)
    requests = run.count(60, 300)
    run.calm(requests, rate=RATE)
    with run.load("faults", requests, rate=RATE):
        for cause, number in CAUSES.items():
            victim = run.rng.choice(run.ready() or [1])
            name = run.names[victim]
            run.hurt(
                "die", victim, lambda i=victim, n=number: run.signal(i, n), cause=cause, name=name
            )
            run.pause(3.0)
        run.fault("die", cause="out of memory")
        run.user.call("poison", name="evil", value=poison.MUCH)
        run.fault("refuse")
        run.user.call("poison", name="picky", value=poison.FAR)
    run.heal()


STATES = ("before ack", "after compute", "mid-send", "mid-halo", "mid-load")


def states(run: Run) -> None:
    """C3: a worker dies at a chosen moment of its protocol, each state time and again."""
    left = dict.fromkeys(STATES, run.count(3, 20))
    run.deploy()
    run.calm(run.count(50, 200), rate=RATE)
    with run.load("faults", 100_000, rate=RATE, within_s=run.count(270, 900)) as load:
        for turn in range(3 * max(left.values())):
            for state in (state for state in STATES if left[state]):
                victim = run.rng.choice(run.until_busy(10.0) or [1])
                run.die_at(victim, state, run.rng.randrange(4))
                if state == "mid-load":  # what is loaded is a model that nobody has yet
                    run.deploy(f"new{turn}", seed=run.seed * 1000 + turn)
                left[state] -= run.until_dead(victim, state, 5.0)
                run.pause(0.5)
                if load.over:
                    break
            if load.over or not any(left.values()):
                break
        load.stop()
    run.heal()
