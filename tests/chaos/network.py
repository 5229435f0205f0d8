"""Cases in which the network fails."""

from __future__ import annotations

from architectures import Builder, yolov2

from chaos.arena import Run
from chaos.spoiler import KINDS

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


WIDE_SIDE = 608
WIDE_RATE = 2.0
"""YOLOv2 of half its channels: the planner divides it where links are good."""


def lossy(run: Run) -> None:
    """C7: 1 to 10 % of all packets are lost, on every device. What the planner divides by itself,
    and may take back; and beside it what is forced onto all devices whatever their links do."""
    wide = yolov2(WIDE_SIDE, width=0.5)
    run.deploy("wide", wide, size=WIDE_SIDE, spread=False)
    _lossy(run, "wide", ("calm", "faults"), run.count(20, 100), WIDE_RATE)
    run.heal("wide")
    run.deploy()
    _lossy(run, "net", ("calm forced", "faults forced"), run.count(40, 300), RATE)
    run.heal()


def _lossy(run: Run, name: str, phases: tuple[str, str], requests: int, rate: float) -> None:
    run.calm(requests, name, phases[0], rate=rate)
    for share in [0.01, 0.03, 0.10] if run.full else [0.01, 0.10]:
        for i in range(len(run.names)):
            run.hurt("loss", i, lambda i=i, share=share: run.lab.lose(i, share), share=share)
        with run.load(phases[1], requests, name, rate=rate, deadline_s=60.0):
            pass


SIDE = 836
"""Pixels: 3 x 836 x 836 float32 are 8 MiB, in and out."""

THIN_BITS_PER_S = 5e6


def thin(run: Run) -> None:
    """C8: tensors of 8 MiB on a link of 5 Mbit/s, so that each takes 13 s on its way."""
    b = Builder(0)
    y = b.conv(b.input("image", [1, 3, SIDE, SIDE]), 3, 3, 3)
    model = b.model([b.rename(y, "y")])
    run.deploy("big", model, size=SIDE, plan=_on_one(run, "big", model, SIDE), spread=False)
    run.user.call("load", name="big", phase="calm", count=3, in_flight=1)
    run.hurt("thin", 1, lambda: run.lab.set_link(1, THIN_BITS_PER_S))
    with run.load(
        "faults", 1000, name="big", in_flight=2, within_s=run.count(20, 600), deadline_s=200.0
    ):
        pass
    run.log()
    run.heal("big")


def _on_one(run: Run, name: str, model: object, side: int) -> str:
    """A plan that has the second device do all of it."""
    import meshinfer as mi

    graph = mi.load(model)
    return "\n".join(
        (
            f"plan graph={graph.digest} source=head sink=head window=4",
            f"stage 0:{len(graph.ops)}",
            f"  task {run.names[1]}",
            f"    y [0:1,0:3,0:{side},0:{side}]",
            "",
        )
    )


def spoiled(run: Run) -> None:
    """C9: bits flip, bytes go missing, come twice or in another order, between plaintext peers:
    encryption would notice each by itself."""
    times = run.count(30, 1000)
    run.deploy()
    run.calm(run.count(50, 200), rate=RATE)
    before = sum(gate.ask("done") for gate in run.arena.gates)
    with run.load("faults", 100_000, rate=RATE, within_s=1200.0, deadline_s=60.0) as load:
        for n in range(times):
            victim = run.rng.randrange(len(run.names))
            kind, seed = KINDS[n % len(KINDS)], run.rng.randrange(1 << 30)
            gate = run.arena.gates[victim]
            run.hurt("spoil", victim, lambda g=gate, k=kind, s=seed: g.ask("spoil", kind=k, seed=s))
            run.pause(0.2, 0.8)
        load.stop()
    done = sum(gate.ask("done") for gate in run.arena.gates) - before
    run.fault("spoiled", count=done)
    run.log()
    run.heal()
