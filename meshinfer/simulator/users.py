"""What users do in a simulation: submit, give up, deploy, die and ask again by the same id."""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.simulator.models import model
from meshinfer.simulator.simulation import BAD_INPUT, POISON, Asked, Simulation

PATIENT_S = 200.0
SHORT_S = (0.02, 0.2, 1.0, 4.0)


class Users:
    """Draws from the stream ``users``."""

    def __init__(self, world: Simulation, kind: int, *, calm: bool) -> None:
        self._world, self._kind, self._calm = world, kind, calm
        self._rng = world.streams["users"]
        self._version = 0
        self._versions: dict[bytes, int] = {}
        self._requests = 0
        self._where: dict[str, tuple[bool, str]] = {}
        world.on_deployed = self._deployed

    def connect(self, name: str, *, beside: bool, host: str = "") -> None:
        """``beside``: the coordinator; ``host``: the device on whose machine it is, if any."""
        self._where[name] = beside, host
        where = {"where": f"{host} h"} if host else {}
        self._world.connect(name, beside=beside, **where)

    def deploy(self) -> str:
        """The next version, by somebody who is there."""
        clients = self._world.clients()
        if not clients:
            return ""
        self._version += 1
        data = model(self._kind, self._version)
        return self._world.deploy(self._rng.choice(clients).name, self._kind, self._version, data)

    def _deployed(self, answer: m.Deployed) -> None:
        """Who submits now is not served by an earlier version than this."""
        data = self._world.data_of(answer.plan or "")
        if data is None:
            return
        self._versions[data] = answer.version
        newest = max(self._versions.values())
        still = [d for d in self._world.serving if self._versions.get(d, newest) == newest]
        for past in self._world.serving:
            if past not in still:
                self._world.served_until[past] = self._world.now
        self._world.serving = still

    def submit(self, *, patient: bool = False, kind: str = "") -> Asked | None:
        """A request of a random input; now and then somebody is in a hurry, or gives it up.
        ``kind``: a ``bad input`` or ``poison``."""
        world = self._world
        rng = world.streams["hard users"] if kind else self._rng
        clients = world.clients()
        if not clients:
            return None
        name = rng.choice(clients).name
        hurry = rng.random() < 0.2 and not patient and not self._calm
        deadline_s = rng.choice(SHORT_S) if hurry else PATIENT_S
        self._requests += 1
        seed = {"bad input": BAD_INPUT, "poison": POISON}.get(kind)
        seed = rng.randrange(6) if seed is None else seed
        asked = world.submit(name, seed, deadline_s, f"request-{self._requests}")
        if rng.random() < 0.1 and not patient:
            world.at(world.now + rng.choice([0.0, 0.01, 0.1, 1.0]), lambda: self._give_up(asked))
        return asked

    def _give_up(self, asked: Asked) -> None:
        if asked in self._world.open:
            self._world.cancel(asked)

    def crash(self, name: str) -> None:
        """A client's process ends; the next one asks for what was open, by the same ids."""
        world = self._world
        lost = [a for a in world.open if a.client == name]
        world.kill(name)
        beside, host = self._where[name]
        self.connect(name, beside=beside, host=host)
        for asked in lost:
            if self._rng.random() < 0.7:
                world.submit(name, asked.seed, asked.deadline_s, asked.request)
