"""A device that nobody knew: it joins by a token while requests run, works, and is revoked.

Of some seeds, by a stream of its own. It is stubborn, as a supervised worker is, and so is the
admin: a coordinator may be away, or its disk full.
"""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.protocol.token import hash_of
from meshinfer.simulator.simulation import Mishap, Simulation

NAME = "pi-7"
CHANCE = 0.2
_SECRET = b"0123456789abcdef"
_PATIENCE_S, _LOOKS_S = 2.0, 0.2
_DISK_FULL = "ClusterUnavailable"


class Newcomer:
    """``revoked``: it has been, and it was a member before."""

    def __init__(self, world: Simulation, *, calm: bool) -> None:
        self._world = world
        self._rng = world.streams["newcomer"]
        self._comes = self._rng.random() < CHANCE and not calm
        self._secrets, self._asked, self._expelled = 0, 0.0, ""
        self._joined = self._leaves = self._over = self.revoked = False
        world.on_stranger_told = self._told

    def begin(self, length_s: float) -> None:
        """Trouble lasts so long."""
        if not self._comes:
            return
        world, rng = self._world, self._rng
        joins = world.now + rng.random() * length_s / 2
        world.at(joins, self._have_token_made)
        world.at(joins + rng.random() * length_s, self._have_it_revoked)

    def end(self) -> None:
        """What is not under way does not begin any more."""
        self._over = True

    @property
    def settled(self) -> bool:
        """Whether no revocation is under way."""
        return not self._leaves or self.revoked

    # --- an admin

    def _ask(self, question: type[m.AddToken] | type[m.Expel], **said: object) -> str:
        clients = self._world.clients()
        return self._world.ask_for(clients[0].name, question, **said) if clients else ""

    def _answer(self, call: str) -> m.AdmittedNow | None:
        for node in self._world.nodes.values():
            for settled in node.settled.get(call, ()):
                if isinstance(settled.answer, m.AdmittedNow):
                    return settled.answer
        return None

    def _have_token_made(self) -> None:
        if self._over or self._joined:
            return
        self._secrets += 1
        ttl_s = {"ttl_s": 60.0, "reusable": self._rng.random() < 0.5}
        self._ask(m.AddToken, hash=hash_of(self._secret), role="worker", **ttl_s)
        self._world.at(self._world.now + _LOOKS_S, self._knock)

    @property
    def _secret(self) -> bytes:
        return _SECRET + bytes([self._secrets])

    def _have_it_revoked(self) -> None:
        """Again and again, until that is on disk; and before it has joined, not yet."""
        world = self._world
        if self.revoked or (self._over and not self._leaves):
            return
        answer = self._answer(self._expelled) if self._expelled else None
        if answer is not None and (answer.failure is None or answer.failure.error != _DISK_FULL):
            self.revoked = True
            if world.nodes[NAME].here:
                world.kill(NAME)
            return
        again = not self._expelled or world.now > self._asked + _PATIENCE_S
        if self._joined and (answer is not None or again):
            if not self._leaves:
                world.mishaps.append(Mishap("revoked", world.now, world.now))
            self._leaves = True
            self._asked, self._expelled = world.now, self._ask(m.Expel, id=NAME)
        world.at(world.now + _LOOKS_S, self._have_it_revoked)

    # --- the device

    def _knock(self) -> None:
        if self._over or self._joined:
            return
        if self._world.coordinator.here:
            self._world.knock(NAME, self._secret)
        self._world.at(self._world.now + _PATIENCE_S, self._knock)

    def _told(self, message: m.AnyMessage) -> None:
        match message:
            case m.Joined() if not self._joined and not self._over:
                self._joined = True
                self._world.join(NAME)
            case m.Refused() if not self._over:  # its token was never made, perhaps
                self._world.at(self._world.now + _PATIENCE_S, self._have_token_made)
            case _:
                pass
