"""Which faults a seed turns on, and each of them: swarm testing (Groce et al. 2012).

A random subset is on, since faults that are always on together hide what few of them would show.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.network import Noise
from meshinfer.simulator.node import Node
from meshinfer.simulator.simulation import HEAD, Mishap, Simulation

KINDS = (
    "crash", "power", "cut", "cut bulk", "partition", "partition of workers", "one way",
    "client away", "freeze", "freeze coordinator", "slow", "stop", "join", "deploy",
    "restart coordinator", "client crash",
)  # fmt: skip
NOISES = ("loss", "double", "overtake", "damage")


def draw_noise(rng: Random) -> Noise:
    """Of a seed that is not calm."""
    noise = Noise(slowest_s=rng.choice([0.002, 0.02, 0.2]))
    for name in NOISES:
        rate = rng.choice([0.01, 0.05, 0.15])
        if rng.random() < 0.4:
            setattr(noise, name, rate)
    return noise


def draw_kinds(rng: Random) -> tuple[str, ...]:
    """The kinds of faults of a seed: each with the same chance, but for a few at the least."""
    share = rng.choice([0.1, 0.3, 0.6])
    found = tuple(kind for kind in KINDS if rng.random() < share)
    return found or (rng.choice(KINDS),)


class Faults:
    """Strikes by a stream of its own. ``deploy`` and ``crash_client`` are the users'."""

    def __init__(
        self,
        world: Simulation,
        deploy: Callable[[], object],
        crash_client: Callable[[str], None],
        spare: tuple[str, ...],
        stream: str = "faults",
    ) -> None:
        self._world = world
        self._rng = world.streams[stream]
        self._deploy, self._crash_client = deploy, crash_client
        self._spare = list(spare)

    def strike(self, kind: str, seconds: float | None = None) -> None:
        """One fault, of so many seconds if it lasts; nothing where there is no victim."""
        world, rng = self._world, self._rng
        seconds = self._seconds() if seconds is None else seconds
        workers = [n for n in world.workers() if n.name != HEAD]
        clients = world.clients()
        worker = rng.choice(workers) if workers else None
        client = rng.choice(clients) if clients else None
        if COORDINATOR not in [n.name for n in world.living()] and kind != "crash":
            return
        until = world.now + seconds
        world.tell_story(lambda: f"FAULT {kind}")
        match kind:
            case "crash" | "power" if worker is not None:
                self._crash(worker, seconds, power=kind == "power")
            case "cut" if worker is not None:
                world.cut(rng.choice([worker.name, worker.name, HEAD]))
            case "cut bulk" if worker is not None:
                self._cut_bulk(worker)
            case "freeze" if worker is not None:
                world.freeze(worker.name, seconds)
            case "freeze coordinator":
                world.freeze(COORDINATOR, seconds)
                world.freeze(HEAD, seconds)
            case "slow" if worker is not None:
                world.slow[worker.name] = 20.0
                world.at(until, lambda: world.slow.pop(worker.name, None))
            case "stop" if worker is not None:
                world.stop(worker.name)
                until += 12.0
                world.at(until, lambda: self._back(worker.name))
            case "join" if self._spare:
                world.join(self._spare.pop())
            case "deploy":
                self._deploy()
            case "restart coordinator":
                until = world.now + min(seconds, 2.0)
                self._restart(until)
            case "client crash" if client is not None:
                self._crash_client(client.name)
            case "client away" if client is not None:
                self._part(client, self._near_coordinator(), seconds, both=True)
            case _:
                if worker is not None:
                    self._partition(kind, worker, workers, seconds)
        world.mishaps.append(Mishap(kind, world.now, until))

    def _seconds(self) -> float:
        return self._rng.choice([0.05, 0.3, 1.0, 2.0, 4.0]) * (0.5 + self._rng.random())

    def _crash(self, worker: Node, seconds: float, *, power: bool) -> None:
        if power:
            self._world.power_off(worker.name)
        else:
            self._world.kill(worker.name)
        self._world.at(self._world.now + seconds, lambda: self._back(worker.name))

    def _back(self, name: str) -> None:
        """Its supervisor starts it again."""
        node = self._world.nodes[name]
        if not node.here:
            self._world.join(name)

    def _cut_bulk(self, worker: Node) -> None:
        peers = [n.name for n in self._world.workers() if n.id in worker.links]
        if peers:
            self._world.cut_bulk(worker.name, self._rng.choice(peers))

    def _restart(self, until: float) -> None:
        """The coordinator and its device are one process."""
        world = self._world
        world.kill(COORDINATOR)
        if world.nodes[HEAD].here:
            world.kill(HEAD)
        world.at(until, self.coordinator_back)

    def coordinator_back(self) -> None:
        """It starts again, with its journal."""
        world = self._world
        if world.coordinator.here:
            return
        world.start_coordinator()
        if world.nodes[HEAD].here:
            world.kill(HEAD)
        world.join(HEAD, world.head_facts())

    # --- partitions

    def _near_coordinator(self) -> list[str]:
        return [COORDINATOR, HEAD]

    def _partition(self, kind: str, worker: Node, workers: list[Node], seconds: float) -> None:
        others = [n.name for n in workers if n is not worker]
        match kind:
            case "partition":  # from the coordinator's machine, or from all
                everybody = [*self._near_coordinator(), *(n.name for n in self._world.clients())]
                alone = self._rng.random() < 0.5
                peers = [*everybody, *others] if alone else self._near_coordinator()
                self._part(worker, peers, seconds, both=True)
            case "partition of workers":
                peers = [self._rng.choice([HEAD, *others])]
                self._part(worker, peers, seconds, both=True)
            case "one way":
                peers = self._rng.choice([[COORDINATOR], [HEAD], self._near_coordinator(), others])
                self._part(worker, peers, seconds, both=False)

    def _part(self, node: Node, peers: list[str], seconds: float, *, both: bool) -> None:
        forth = both or self._rng.random() < 0.5
        for peer in peers:
            if forth:
                self._world.block(node.name, peer, seconds)
            if both or not forth:
                self._world.block(peer, node.name, seconds)
