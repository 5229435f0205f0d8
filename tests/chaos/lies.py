"""Cases in which a worker computes wrong, and says nothing of it."""

from __future__ import annotations

from chaos.arena import Run

AFTER = 100
"""Answers that are looked at once a liar is found."""


def liars(run: Run) -> None:
    """C23: one worker's results are always wrong, then a tenth of another's; both did enough tasks
    before that only one in a hundred is checked. It takes a while to find the second: not in CI."""
    run.deploy()
    run.calm(run.count(60, 200), in_flight=2)
    honest = list(run.names)
    for i, phase, share in ((1, "always", 1.0), (2, "tenth", 0.1))[: run.count(1, 2)]:
        name = run.names[i]
        told = run.arena.states / f"{name}.lies"
        with run.load(phase, run.count(1500, 6000), in_flight=4) as load:
            run.fault("lies", i, name=name, phase=phase)
            told.write_text(str(share))
            while not load.over:
                if run.states().get(name) == "quarantined":
                    run.fault("found", i, name=name)
                    break
                run.pause(0.05)
            load.stop()
        honest.remove(name)
        with run.load(f"after {phase}", AFTER, in_flight=4):
            pass
        told.unlink()
    run.log()
    run.history.write("healed")  # liars stay out: that is not healed by itself
    run.user.call("settle", names=honest, model="net", within_s=30.0)
