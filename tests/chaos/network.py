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
