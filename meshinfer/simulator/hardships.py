"""Faults that belong to a whole seed, or to a request: each turned on by a seed on its own, by its
own stream, so that what other faults a seed has does not change.

Requests that fail their kernels, that end their workers, a disk that is full, partitions that
outlast a connection, tasks that hang on a device which is well otherwise, a device that is lost or
silent while another is, a device whose results are wrong (of three, or more), pieces that come late
for the next attempt, a client that ends as it is answered, and clients on a device's host, which
may compute requests themselves until another version serves. A stream between two devices that
carries nothing more until the connection is made anew, and words of the coordinator or to it that
never come, on connections that live. Links on which all takes long, so that one device is sooner.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.faults import Faults
from meshinfer.simulator.granted import STALE_S
from meshinfer.simulator.simulation import HEAD, Mishap, Simulation
from meshinfer.simulator.users import Users

KINDS = (
    "kernel error", "bad input", "poison", "disk full", "long partition", "hang", "two at once",
)  # fmt: skip
CHANCE = 0.12
_COPIES_LOSSES, _COPIES_S = 4, 0.1
_BESIDE_CHANCE = 0.2
_DEAF_CHANCE, _DEAF_AFTER_S = 0.1, 0.7
_WORDS_CHANCE, _WORDS_TIMES = 0.1, 4
_LIAR_CHANCE, _LIAR_REQUESTS = 0.15, 40
_THICK_CHANCE, _THICK_REQUESTS = 0.1, 16
_BESIDE_A_FREEZE = ("freeze", "crash", "power", "partition", "cut")
_LONG = ("partition", "partition", "one way", "partition of workers", "client away")


class Hardships:
    """What a seed has of them. ``hosts``: workers on whose machines clients may be."""

    def __init__(self, world: Simulation, users: Users, hosts: list[str], *, calm: bool) -> None:
        self._world, self._users, self._calm = world, users, calm
        own = "hardships strike"
        self._faults = Faults(world, users.deploy, users.crash, (), own)
        self._hosts = hosts
        self._slowest_s = 0.0
        rng = self._rng = world.streams["hardships"]
        draws = [(kind, rng.random()) for kind in KINDS]
        self.kinds = () if calm else tuple(kind for kind, draw in draws if draw < CHANCE)
        self._deaf = not calm and world.streams["deaf"].random() < _DEAF_CHANCE
        self._words = not calm and world.streams["words"].random() < _WORDS_CHANCE
        self.thick = not calm and world.streams["thick"].random() < _THICK_CHANCE
        lies = world.streams["liar"]
        self._lies = not calm and len(hosts) >= 3 and lies.random() < _LIAR_CHANCE
        world.spares = world.spares or self._lies
        copies = world.streams["pieces again"].random() < CHANCE
        self._copies = copies and not calm and not self._lies
        world.spares = world.spares and not self._copies
        beside = self._where = world.streams["beside devices"]
        self._beside = beside.random() < _BESIDE_CHANCE
        if self._beside and beside.random() < 0.7:
            world.styles = ("one", beside.choice(world.styles))
        self._superseded = world.streams["next version"].random() < CHANCE
        if self._superseded:
            self._beside, world.styles = True, ("one",)

    def host(self) -> str:
        """Of the next client: a device's machine, or none."""
        rng = self._where
        if not self._beside or rng.random() < 0.3:
            return ""
        return self._hosts[-1] if rng.random() < 0.7 else rng.choice(self._hosts)

    def begin(self, length_s: float) -> None:
        """Trouble lasts so long."""
        world, rng = self._world, self._rng
        if self._lies:
            self._lie(length_s)
        if self._copies:
            self._copy(length_s)
        if self._superseded:
            self._supersede(length_s)
        answered = world.streams["answered"]
        if not self._calm and answered.random() < CHANCE:
            since = world.now + answered.random() * length_s
            world.at(since, self._crash_who_is_answered)
            world.at(since, self._users.submit)
        if self._deaf:
            world.at(world.now + _DEAF_AFTER_S * length_s, self._deafen)
        if self._words:
            self._lose_words(length_s)
        if self.thick:
            self._thicken(length_s)
        for kind in self.kinds:
            world.tell_story(lambda kind=kind: f"HARDSHIP {kind}")  # type: ignore[misc]
            since = world.now + rng.random() * length_s
            match kind:
                case "kernel error":
                    world.kernel_errors = rng.choice([0.02, 0.1])
                case "bad input" | "poison":
                    for _ in range(rng.randint(1, 2)):
                        at = world.now + rng.random() * length_s
                        world.at(at, lambda kind=kind: self._users.submit(kind=kind))  # type: ignore[misc]
                case "disk full":
                    seconds = rng.choice([0.05, 0.5, 2.0, 6.0])
                    world.at(since, lambda seconds=seconds: self._fill_disk(seconds))  # type: ignore[misc]
                case "long partition":
                    what, seconds = rng.choice(_LONG), rng.uniform(6.0, 15.0)
                    world.at(since, lambda w=what, s=seconds: self._faults.strike(w, s))  # type: ignore[misc]
                case "hang":
                    name, seconds = rng.choice(self._hosts), rng.choice([1.0, 5.0, 12.0])
                    world.at(since, lambda n=name, s=seconds: self._hang(n, s))  # type: ignore[misc]

                case "two at once":
                    for what in ("freeze", rng.choice(_BESIDE_A_FREEZE)):
                        at = max(world.now, since - rng.random() * 0.3)
                        seconds = rng.uniform(1.0, 5.0)
                        world.at(at, lambda w=what, s=seconds: self._faults.strike(w, s))  # type: ignore[misc]

    def _deafen(self) -> None:
        """Between two of those who are there, one of them perhaps the head. Nothing heals it."""
        world, rng = self._world, self._world.streams["deaf"]
        names = [node.name for node in world.workers()]
        if len(names) > 1:
            world.deafen(*rng.sample(names, 2))
            world.mishaps.append(Mishap("deaf", world.now, world.now))

    def _lose_words(self, length_s: float) -> None:
        """One or two at once, now and then; the last of them when the rest is over."""
        world, rng = self._world, self._world.streams["words"]

        def lose(count: int) -> None:
            world.words_to_lose += count

        def lost() -> None:
            world.mishaps.append(Mishap("word lost", world.now, world.now))

        world.on_word_lost = lost
        for at in (*(rng.random() for _ in range(_WORDS_TIMES)), 0.99):
            world.at(world.now + at * length_s, partial(lose, rng.choice([1, 1, 2])))

    def _thicken(self, length_s: float) -> None:
        """A message takes up to so long, the others behind it wait, and requests go on coming."""
        world, rng = self._world, self._world.streams["thick"]
        self._slowest_s = world.noise.slowest_s
        world.noise = replace(world.noise, slowest_s=rng.choice([0.2, 0.5]))
        for _ in range(_THICK_REQUESTS):
            world.at(world.now + rng.random() * length_s, self._users.submit)
        world.mishaps.append(Mishap("thick", world.now, world.now + length_s))

    def _lie(self, length_s: float) -> None:
        """From now on, to the end. More is asked, so that more is checked."""
        world, rng = self._world, self._world.streams["liar"]
        world.liar, world.lies = rng.choice(self._hosts), rng.choice([1.0, 0.3])
        world.tell_story(lambda: f"HARDSHIP {world.liar} lies, {world.lies:.0%}")
        for _ in range(_LIAR_REQUESTS):
            world.at(world.now + rng.random() * length_s, self._users.submit)
        world.mishaps.append(Mishap("liar", world.now, world.now + length_s))

    def _copy(self, length_s: float) -> None:
        """Requests begin again under other plans, and pieces of the first ones come late."""
        world, rng = self._world, self._world.streams["pieces again"]
        world.copied = rng.choice([0.3, 1.0])
        faults = Faults(world, self._users.deploy, self._users.crash, (), "pieces again strike")
        for _ in range(_COPIES_LOSSES):
            at = world.now + rng.random() * (length_s - _COPIES_S)
            world.at(at, self._users.submit)
            world.at(at + rng.random() * _COPIES_S, lambda: faults.strike("crash"))

    def _supersede(self, length_s: float) -> None:
        """What a client may compute itself is of a version that ends, and it goes on asking."""
        world, rng = self._world, self._world.streams["next version"]
        at = rng.random() * length_s / 2
        world.at(world.now + at, self._users.deploy)
        for when in (at / 2, at / 2, at + STALE_S + rng.random()):
            if when < length_s:
                world.at(world.now + when, self._users.submit)

    def _crash_who_is_answered(self) -> None:
        """The next client that is sent an answer ends before it hears of it, and asks again."""
        world = self._world

        def crash(peer: str) -> None:
            name = peer.partition("#")[0]
            if world.nodes[name].id == peer:
                world.mishaps.append(Mishap("client crash", world.now, world.now))
                self._users.crash(name)

        def answered(peer: str) -> None:
            world.word.on_answered = lambda client: None
            world.at(world.now, lambda: crash(peer))

        world.word.on_answered = answered

    def _fill_disk(self, seconds: float) -> None:
        world = self._world
        world.disk_full_until = world.now + seconds
        world.tell_story(lambda: f"FAULT {COORDINATOR}'s disk is full for {seconds:.2f} s")
        world.mishaps.append(Mishap("disk full", world.now, world.disk_full_until))

    def _hang(self, name: str, seconds: float) -> None:
        """What this machine begins to compute is not done before."""
        world = self._world
        assert name != HEAD
        world.hung[name] = world.now + seconds
        world.tell_story(lambda: f"FAULT {name}'s kernels hang for {seconds:.2f} s")
        world.mishaps.append(Mishap("hang", world.now, world.now + seconds))

    def end(self) -> None:
        """The trouble is over. What hangs still ends at its time; poison stays poison."""
        self._world.kernel_errors = self._world.disk_full_until = 0.0
        if self.thick:
            self._world.noise = replace(self._world.noise, slowest_s=self._slowest_s)
        self._world.hung.clear()
        self._world.copied = 0.0
        self._world.words_to_lose = 0
        self._world.word.on_answered = lambda client: None
