"""What users do in a simulation: submit, give up, deploy, die and ask again by the same id."""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.simulator.models import model
from meshinfer.simulator.simulation import Asked, Simulation

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
        self._beside: dict[str, bool] = {}
        world.on_deployed = self._deployed

    def connect(self, name: str, *, beside: bool) -> None:
        self._beside[name] = beside
        self._world.connect(name, beside=beside)

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
        self._world.serving = [
            d for d in self._world.serving if self._versions.get(d, newest) == newest
        ]

    def submit(self, *, patient: bool = False) -> Asked | None:
        """A request of a random input; now and then somebody is in a hurry, or gives it up."""
        world, rng = self._world, self._rng
        clients = world.clients()
        if not clients:
            return None
        name = rng.choice(clients).name
        hurry = rng.random() < 0.2 and not patient and not self._calm
        deadline_s = rng.choice(SHORT_S) if hurry else PATIENT_S
        self._requests += 1
        asked = world.submit(name, rng.randrange(6), deadline_s, f"request-{self._requests}")
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
        self.connect(name, beside=self._beside[name])
        for asked in lost:
            if self._rng.random() < 0.7:
                world.submit(name, asked.seed, asked.deadline_s, asked.request)
