"""Cases in which the network fails."""

from __future__ import annotations

from chaos.arena import Run

RATE = 5.0


def partitions(run: Run) -> None:
    """C5: the coordinator's device and another hear nothing of each other for 1, 5 and 20 s."""
    spans = run.count(1, 4) * ([1.0, 5.0] if not run.full else [1.0, 5.0, 20.0])
    requests = round(RATE * (sum(spans) + 5.0 * len(spans)))
    run.deploy()
    run.calm(min(requests, 200), rate=RATE)
    with run.load("faults", requests, rate=RATE):
        for span_s in spans:
            victim = run.rng.randrange(1, len(run.names))
            run.hurt("partition", victim, lambda i=victim: run.lab.cut_between(0, i), took_s=span_s)
            run.pause(span_s)
            run.hurt("reconnect", victim, lambda i=victim: run.lab.heal(i), name=run.names[victim])
            run.pause(5.0)
    run.heal()


def halves(run: Run) -> None:
    """C6: two workers hear nothing of each other, and both hear everybody else; all the while."""
    requests = run.count(60, 400)
    run.deploy()
    run.calm(requests, rate=RATE)
    for one, other in run.rng.sample([(1, 2), (2, 3), (1, 3)], run.count(1, 3)):
        run.hurt("partition", one, lambda i=one, j=other: run.lab.cut_between(i, j), other=other)
        with run.load("faults", requests, rate=RATE, deadline_s=15.0):
            pass
        run.hurt("reconnect", one, lambda i=one: run.lab.heal(i), name=run.names[one])
    run.heal()
