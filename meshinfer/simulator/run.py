"""One seed: set up, a phase with faults, healing, and then an empty and healthy cluster is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.simulator import checkers
from meshinfer.simulator.checkers import Broken
from meshinfer.simulator.faults import NOISES, Faults, draw_kinds, draw_noise
from meshinfer.simulator.hardships import Hardships
from meshinfer.simulator.kernels import Kernels
from meshinfer.simulator.models import STYLES
from meshinfer.simulator.network import Noise
from meshinfer.simulator.newcomer import Newcomer
from meshinfer.simulator.node import Timing
from meshinfer.simulator.simulation import Mishap, Simulation
from meshinfer.simulator.streams import Streams
from meshinfer.simulator.users import Users

STEPS = 60_000
HEALED_S = 45.0
"""After all faults are over, everything is answered, and everybody well, within this time."""
FORGOTTEN_S = 3.0
"""A plan that another has replaced is forgotten by all within this time."""
_UNTOLD = (" Heartbeat(", " Alive(", " Echo(", " Echoed(", " MeasureLink(", " LinkMeasured(")
_LOOK_EVERY, _WELL_EVERY = 64, 16


@dataclass(frozen=True, slots=True)
class Result:
    """``log``: of all that happened. ``healed_s``: until the cluster was empty and well."""

    seed: int
    calm: bool
    log: str
    answered: int
    failed: int
    messages: int
    healed_s: float
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A promise that a seed broke: why, when, and the story of the request (or of the end)."""

    seed: int
    why: str
    at: float
    story: Sequence[str]


def run(seed: int, kernels: Kernels, *, story: bool = False) -> Result | Failed:
    """One seed. Never raises for what the cores do."""
    kernels.wrong.clear()
    scenario = Scenario(seed, kernels, story=story)
    try:
        return scenario.run()
    except Broken as broken:
        return scenario.failed(str(broken), broken.request)
    except Exception as error:  # an assertion of a core, or a defect in it
        return scenario.failed(f"{type(error).__name__}: {error}", "")


class Scenario:
    """The phases of one seed."""

    def __init__(self, seed: int, kernels: Kernels, *, story: bool) -> None:
        self.seed, self.calm = seed, seed % 4 == 0
        streams = Streams(seed)
        rng = self._rng = streams["scenario"]
        noise = Noise(slowest_s=rng.choice([0.002, 0.02, 0.1])) if self.calm else draw_noise(rng)
        self.kinds = () if self.calm else draw_kinds(rng)
        clocks = not self.calm and rng.random() < 0.3
        quiet = Noise(slowest_s=noise.slowest_s)
        timing = Timing(compute_s=rng.choice([0.002, 0.01, 0.05]))
        self.world = world = Simulation(streams, timing, quiet, kernels, clocks=clocks)
        world.keeps_story = story
        if rng.random() < 0.5:
            world.styles = (rng.choice(STYLES),)
        world.spares = rng.random() < 0.7
        self._noise = noise
        self._steps = 0
        self._supervised = False
        self._workers = [f"pi-{i + 1}" for i in range(rng.randint(1, 4))]
        self.users = Users(world, rng.randrange(2), calm=self.calm)
        self.faults = Faults(world, self.users.deploy, self.users.crash, ("pi-8", "pi-9"))
        hosts = list(self._workers)
        self.hardships = Hardships(world, self.users, hosts, calm=self.calm)
        self.newcomer = Newcomer(world, calm=self.calm)

    def run(self) -> Result:
        self._set_up()
        self._trouble()
        healed_s = self._heal()
        for check in checkers.AT_THE_END:
            check(self.world, self.calm)
        return self._result(healed_s)

    def failed(self, why: str, request: str) -> Failed:
        lines = [
            f"{at:9.4f} {line[:300]}"
            for at, line in self.world.story
            if not any(word in line for word in _UNTOLD)
            and (not request or f"'{request}'" in line or "request='" not in line)
        ]
        return Failed(self.seed, why, self.world.now, lines)

    # --- phases

    def _set_up(self) -> None:
        world, rng = self.world, self._rng
        for name in self._workers:
            world.join(name)
        for name in ("ann", "bob")[: rng.randint(1, 2)]:
            self.users.connect(name, beside=rng.random() < 0.4, host=self.hardships.host())
        self._until(lambda: all(world.joined(n) for n in world.living()), 10.0, "joining")
        call = self.users.deploy()
        self._until(lambda: any(call in n.settled for n in world.clients()), 10.0, "deploying")

    def _trouble(self) -> None:
        """Requests and faults at random times."""
        world, rng = self.world, self._rng
        world.noise = self._noise
        begun = world.now
        length_s = rng.choice([1.0, 4.0, 10.0])
        for _ in range(rng.randint(2, 8)):
            world.at(world.now + rng.random() * length_s, self.users.submit)
        if self.kinds:
            for _ in range(rng.randint(1, 6)):
                kind = rng.choice(self.kinds)
                world.at(world.now + rng.random() * length_s, partial(self.faults.strike, kind))
        if self.calm and rng.random() < 0.5:
            world.at(world.now + rng.random() * length_s, self.users.deploy)
        self.hardships.begin(length_s)
        self.newcomer.begin(length_s)
        self._pass(length_s)
        for what in NOISES:
            if getattr(self._noise, what):
                world.mishaps.append(Mishap(what, begun, world.now))

    def _heal(self) -> float:
        """All faults end; what is open is answered, all is forgotten, and the next is at once."""
        world = self.world
        world.heal()
        world.slow.clear()
        self.hardships.end()
        self.newcomer.end()
        begun = world.now
        self.faults.coordinator_back()
        self._supervised = True
        if not world.clients():
            self.users.connect("ann", beside=False)
        self._until(lambda: not world.open, HEALED_S, "answers")
        self._until(lambda: self.newcomer.settled, HEALED_S, "revoking")
        self._until(self._well, HEALED_S, "health")
        call = world.ask_for(world.clients()[0].name, m.ListDevices)
        self._until(lambda: any(call in n.settled for n in world.clients()), 2.0, "devices")
        if not world.core.catalogue.models:
            call = self.users.deploy()
            self._until(lambda: any(call in n.settled for n in world.clients()), 10.0, "deploying")
        last = [self.users.submit(patient=True) for _ in range(2)]
        # A piece of a blob that was lost as the faults ended is asked for again after 20 s.
        self._until(lambda: not world.open, checkers.RECOVERY_S + 10.0, "the last answers")
        for asked in last:
            assert asked is not None
            reply = asked.outcomes[0][1].reply
            assert isinstance(reply, m.Reply)
            # A liar may be found only now, and what waits for who is deaf may go to one device.
            waited = any("waited for links" in each for each in reply.reasons)
            deaf = any(f.what == "deaf" for f in world.mishaps)
            most = 1 + bool(world.liar or (deaf and waited))
            if reply.failure is not None or reply.attempts > most:
                raise Broken(f"after healing: {reply.failure or reply.attempts}", asked.request)
        # Who is deaf to another is found out by what the last answers send, after 3 s; and what was
        # lost on links on which all takes long may be sent again only now.
        later = world.deaf or self.hardships.thick
        self._pass(3.0 + (limits.ACK_TIMEOUT_S if later else 0.0))
        checkers.empty(world, self.calm)
        # A search that was waiting for quiet may just have put another plan in the place of one.
        self._until(self._forgotten, FORGOTTEN_S, "forgetting")
        if not checkers.healthy(self.world):
            raise Broken("after healing it was well, and then no more")
        return world.now - begun

    def _well(self) -> bool:
        """Everybody may work, and nothing is held. Looked at now and then."""
        if self._steps % _WELL_EVERY:
            return False
        if not checkers.healthy(self.world):
            return False
        try:
            checkers.empty(self.world, self.calm)
            checkers.forgotten(self.world, self.calm)
        except Broken:
            return False
        return True

    def _forgotten(self) -> bool:
        try:
            checkers.forgotten(self.world, self.calm)
        except Broken:
            return False
        return True

    # --- time

    def _until(self, holds: Callable[[], bool], within_s: float, what: str) -> None:
        world = self.world
        end = world.now + within_s
        while not holds():
            if world.now > end:
                waiting = world.open[0].request if world.open else ""
                self._raise_late(within_s, what, waiting)
            self._step()

    def _raise_late(self, within_s: float, what: str, request: str) -> None:
        why = f"{what}: not within {within_s} s"
        if what == "health":
            now = self.world.coordinator.last
            devices = self.world.core.members.devices.values()
            why += f"; {[(d.peer, d.state(now)) for d in devices]}"
            checkers.empty(self.world, self.calm)
        if what in ("health", "forgetting"):
            checkers.forgotten(self.world, self.calm)
        raise Broken(why, request)

    def _pass(self, seconds: float) -> None:
        end = self.world.now + seconds
        self.world.at(end, lambda: None)
        while self.world.now < end:
            self._step()

    def _step(self) -> None:
        self._steps += 1
        if self._steps > STEPS:
            raise Broken(f"more than {STEPS} steps")
        world = self.world
        world.step()
        for name in self._workers if self._supervised else ():
            if not world.nodes[name].here:
                world.join(name)
        if self._steps % _LOOK_EVERY == 0:
            for check in checkers.ALWAYS:
                check(self.world, self.calm)

    def _result(self, healed_s: float) -> Result:
        world = self.world
        ends = [o.reply for a in world.asked for _, o in a.outcomes]
        good = sum(isinstance(r, m.Reply) and r.failure is None for r in ends)
        faults = tuple(f.what for f in world.mishaps)
        messages = sum(world.sent.values())
        log = world.log.hexdigest()
        return Result(self.seed, self.calm, log, good, len(ends) - good, messages, healed_s, faults)
