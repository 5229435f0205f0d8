"""Cases in which a model does not arrive, or not as it was."""

from __future__ import annotations

from architectures import resnet50
from onnx import ModelProto

from chaos.arena import Run

SIDE = 64
WIDTH = 0.5
VICTIM = 1


def loads(run: Run) -> None:
    """C21: a worker dies at each tenth of the bytes that it loads; then a blob on its disk rots."""
    run.deploy()
    run.calm(20, rate=5.0)
    whole = _loads(run, "m0", resnet50(SIDE, seed=run.seed * 100, width=WIDTH))
    tenths = range(1, 10, run.count(4, 1))
    for tenth in tenths:
        name = f"m{tenth}"
        model = resnet50(SIDE, seed=run.seed * 100 + tenth, width=WIDTH)
        for _ in range(300):  # what dies as it joins, time and again, is kept out for a while
            if VICTIM in run.ready():
                break
            run.pause(0.1)
        run.die_at(VICTIM, "mid-load", round(whole * tenth / 10))
        run.deploy(name, model, size=SIDE)
        run.until_dead(VICTIM, "mid-load", 1.0)
        run.user.call("load", name=name, phase="faults", count=5, in_flight=1, deadline_s=60.0)
    run.cluster.kill(VICTIM)
    blobs = sorted(run.cluster.state.glob(f"{run.names[VICTIM]}/blobs/*"))
    for blob in blobs:
        data = bytearray(blob.read_bytes())
        data[run.rng.randrange(len(data))] ^= 1 << run.rng.randrange(8)
        blob.write_bytes(data)
    run.fault("rot", VICTIM, blobs=len(blobs))
    run.cluster.restart(VICTIM)
    with run.load("rotten", run.count(50, 200), rate=5.0, deadline_s=60.0):
        pass
    run.heal()


def _loads(run: Run, name: str, model: ModelProto) -> int:
    """The bytes that the victim loads of a model: its part of the plan."""
    folder = run.cluster.state / run.names[VICTIM] / "blobs"

    def held() -> int:
        return sum(each.stat().st_size for each in folder.glob("*"))

    before = held()
    run.deploy(name, model, size=SIDE)
    return held() - before
