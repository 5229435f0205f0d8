"""How a holder's own key becomes admitted: it asks at the coordinator's join socket.

With a token it is admitted at once; without, a worker waits until an admin approves its id. Whom it
asks is proven by the key in the token; without one, the key is believed at the first time (and
pinned by ``coordinator_id``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

import meshinfer
from cluster import notify
from cluster.discovery import browse
from cluster.keyring import Keyring
from cluster.keys import KeyPair
from cluster.locate import NOT_FOUND_HINT, Where, parse_address
from cluster.sockets import CANNOT_CONNECT, FINAL, NO_ROUTE, WRONG_KEY, Endpoint, Lost, Plane
from cluster.transport import Transport
from meshinfer import limits
from meshinfer.errors import AuthError, ClusterUnavailable
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, decode, encode, error_of
from meshinfer.protocol.token import Role, client_name, device_id, short_id
from meshinfer.scheduler.telling import COORDINATOR

_LOOK_S: Final = 3.0
_PLACE_S: Final = 3.0  # for one of several addresses to answer
_BUSY_S: Final = 0.3
_NOBODY: Final = (CANNOT_CONNECT, NO_ROUTE)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked, and of whom. ``coordinator``: its public key; empty where the cluster does
    without encryption, None: not known yet. ``places``: HOST:PORT of join sockets; mDNS comes after
    them. ``patience_s``: None is for ever; ``proxy``: as of ``Transport``."""

    cluster: str
    role: Role
    name: str
    coordinator: str | None
    secret: bytes = b""
    places: tuple[str, ...] = ()
    coordinator_id: str = ""
    interfaces: Sequence[str] | None = None
    patience_s: float | None = None
    proxy: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    host: str
    port: int
    key: str
    given: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class TokenVoid(AuthError):
    """The coordinator itself says that the token is good for nothing, now and later."""


def enrol(key: KeyPair, wish: Wish) -> tuple[Keyring, Where]:
    """Ask until admitted: the keyring, and where the coordinator is.

    Raises ``AuthError`` when refused (``TokenVoid``: for good), ``ProtocolMismatch``; when
    ``patience_s`` are over, ``QueueFull`` where there was no room, else ``ClusterUnavailable``.
    """
    deadline = None if wish.patience_s is None else time.monotonic() + wish.patience_s
    search = _Search(wish)
    told: AuthError | None = None
    for place in search.places(deadline):
        if place is None:  # all were asked, and mDNS as well
            if told is not None:
                raise told
            continue
        asking = _Asking(key, wish, place)
        joined = asking.until_answered(deadline)
        if isinstance(joined, m.Joined):
            name = joined.name if joined.role == "worker" else client_name(key.public)
            plaintext = wish.coordinator == ""
            proven = joined.key if plaintext else place.key
            ring = Keyring(wish.cluster, proven, key, joined.role, name, plaintext)
            return ring, Where(place.host, joined.port, place.port)
        if asking.waited:
            search.key = place.key  # trusted once, and no other from now on
        if joined is not None and place.given:
            told = joined
        elif joined is not None:  # whoever announced that may be a liar
            structlog.get_logger().warning("passed over", where=str(place), why=joined.message)
    raise told or ClusterUnavailable(
        f"no coordinator of cluster {wish.cluster!r} answers to be joined",
        hint=NOT_FOUND_HINT,
    )


class _Search:
    """Where to ask. ``key``: the coordinator's, as far as it is known."""

    def __init__(self, wish: Wish) -> None:
        self._wish, self.key = wish, wish.coordinator or None
        self._in_vain: set[_Place] = set()  # of what mDNS told
        self._believed = ""
        if wish.coordinator is None and wish.interfaces == ():
            raise AuthError(
                "without a token, the coordinator is to be found over mDNS, which is not used",
                hint="make a token on its machine: meshinfer token",
            )

    def places(self, deadline: float | None) -> Iterator[_Place | None]:
        """Again and again: the places given, then what mDNS tells; None after each round."""
        wish = self._wish
        while deadline is None or time.monotonic() < deadline:
            notify.alive("looks for the coordinator, to join it")
            if wish.coordinator is not None:
                for text in wish.places:
                    yield _Place(*parse_address(text), self.key or _NO_KEY, given=True)
            if wish.interfaces == ():
                time.sleep(limits.RECONNECT_MS / 1000)
            else:
                left_s = _LOOK_S if deadline is None else max(0.1, deadline - time.monotonic())
                place = self._heard(min(_LOOK_S, left_s))
                if place is not None:
                    yield place
                    self._in_vain.add(place)
            yield None

    def _heard(self, timeout_s: float) -> _Place | None:
        """A coordinator with the key that is known, or with the id that was given; another than
        those who were asked in vain, if there is one."""
        wish = self._wish
        several = self._in_vain or (self.key is None and wish.coordinator_id)
        for found in browse(
            wish.cluster,
            timeout_s=timeout_s,
            interfaces=wish.interfaces,
            until=None if several else 1,
            key=self.key,
        ):
            place = _Place(found.host, found.join_port, found.key)
            right = self.key or device_id(found.key).startswith(wish.coordinator_id.lower())
            if right and place not in self._in_vain:
                self._say_whom_it_believes(place)
                return place
        if not self._in_vain:
            structlog.get_logger().info(
                "no coordinator yet",
                cluster=wish.cluster,
                asked=", ".join(wish.places) or "mDNS",
                hint=NOT_FOUND_HINT,
            )
        self._in_vain.clear()
        return None

    def _say_whom_it_believes(self, place: _Place) -> None:
        wish = self._wish
        if wish.coordinator is None and not wish.coordinator_id and self._believed != place.key:
            self._believed = place.key
            structlog.get_logger().warning(
                "without a token, the coordinator that is found first is trusted",
                where=str(place),
                id=short_id(place.key),
                hint="compare this id with what the coordinator says as it starts, or give it with "
                "--coordinator-id",
            )


_NO_KEY: Final = "0" * 40
"""Stands for the coordinator's key where a cluster has none."""


class _Asking:
    """One connection to a join socket. ``waited``: it has said that an admin has to approve."""

    def __init__(self, key: KeyPair, wish: Wish, place: _Place) -> None:
        self._key, self._wish, self._place = key, wish, place
        self._full: m.Failure | None = None
        self.waited = False

    def until_answered(self, deadline: float | None) -> m.Joined | AuthError | None:
        """None: nobody answers there (now); an error: somebody does who is not the coordinator.
        Raises what the coordinator refuses with."""
        plaintext = self._wish.coordinator == ""
        transport = Transport("join#0", self._key, plaintext=plaintext, proxy=self._wish.proxy)
        try:
            return self._ask(transport, deadline)
        finally:
            transport.close()

    def _ask(self, transport: Transport, deadline: float | None) -> m.Joined | AuthError | None:
        endpoint = Endpoint(self._place.host, self._place.port, self._place.key)
        transport.connect(Plane.JOIN, COORDINATOR, endpoint)
        ask_at, silent_at = time.monotonic(), time.monotonic() + _PLACE_S
        while True:
            now = time.monotonic()
            notify.alive()
            if now >= ask_at:
                transport.connect(Plane.JOIN, COORDINATOR, endpoint)  # anew, if it was too busy
                transport.send(Plane.JOIN, COORDINATOR, encode(self._message()))
                ask_at = now + limits.JOIN_AGAIN_S
            if deadline is not None and now >= deadline and self._full is not None:
                raise error_of(self._full)  # somebody answers: that is no silence
            if now >= silent_at or (deadline is not None and now >= deadline):
                return None
            until = min(ask_at, silent_at if deadline is None else min(silent_at, deadline))
            for incoming in transport.receive(max(0.0, until - now)):
                if isinstance(incoming, Lost):
                    if incoming.reason in FINAL:
                        return self._not_ours(incoming.reason)
                    if incoming.reason in _NOBODY:
                        return None
                    ask_at = time.monotonic() + _BUSY_S
                    continue
                with suppress(ProtocolError):
                    match decode(incoming.frames)[0]:
                        case m.Joined() as joined:
                            return joined
                        case m.Refused(failure=failure) if failure.error == "QueueFull":
                            self._finds_it_full(failure)
                            again_s = failure.retry_after_s or limits.WAITS_S
                            ask_at = time.monotonic() + min(again_s, limits.WAITS_S)
                            silent_at = ask_at + _PLACE_S
                        case m.Refused(failure=failure, void=True):
                            raise TokenVoid(failure.message, hint=failure.hint)
                        case m.Refused(failure=failure):
                            raise error_of(failure)
                        case m.Wait(id=own, again_s=again_s):
                            self._full = None
                            self._waits(own)
                            ask_at = time.monotonic() + again_s
                            silent_at = ask_at + _PLACE_S

    def _not_ours(self, reason: str) -> AuthError:
        what = {
            WRONG_KEY: f"the coordinator at {self._place} does not hold the key that the token "
            "names",
        }.get(reason, f"cannot join at {self._place}: {reason}")
        return AuthError(what, hint="make a new token on the coordinator: meshinfer token")

    def _message(self) -> m.Join:
        wish = self._wish
        return m.Join(
            cluster=wish.cluster,
            name=wish.name,
            role=wish.role,
            protocol=m.PROTOCOL,
            version=meshinfer.__version__,
            secret=wish.secret,
        )

    def _finds_it_full(self, failure: m.Failure) -> None:
        notify.alive(f"asks again to join: {failure.message}")
        if self._full is None:
            where = {"coordinator": str(self._place), "hint": failure.hint}
            structlog.get_logger().warning("asks again to join", why=failure.message, **where)
        self._full = failure

    def _waits(self, own: str) -> None:
        if self.waited:
            return
        self.waited = True
        notify.alive(f"waits to be admitted: meshinfer devices approve {own}")
        structlog.get_logger().warning(
            "waits to be admitted: on the coordinator's machine, run this",
            command=f"meshinfer devices approve {own}",
            id=own,
            coordinator=str(self._place),
        )
