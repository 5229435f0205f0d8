"""What an admin asks of a coordinator: tokens, and who may connect."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from cluster.discovery import interface_addresses
from cluster.keyring import Keyring
from cluster.tokens import new_secret, places_of, token_for
from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import Role, Token, hash_of

Ask = Callable[[m.AnyMessage], m.AnyMessage]


class Admitting:
    """Of one client. All of it raises ``AuthError`` unless its keyring is an admin's."""

    def __init__(self, ring: Keyring, host: str, ask: Ask) -> None:
        self._ring, self._host, self._ask = ring, host, ask

    def token(
        self, role: Role = "worker", *, ttl_s: float = limits.TOKEN_S, reusable: bool = False
    ) -> Token:
        """Make a token: the first who shows it within ``ttl_s`` is admitted, or any number. Its
        text (``str``) is a secret; the coordinator is told its hash alone."""
        secret = new_secret()
        answer = self._asked(
            m.AddToken(
                call=_call(), hash=hash_of(secret), role=role, ttl_s=ttl_s, reusable=reusable
            )
        )
        return token_for(self._ring, role, secret, self._places(answer.join_port))

    def approve(self, who: str) -> tuple[m.Admission, ...]:
        """Admit the device that waits with this id, or whose id alone begins so."""
        return self._asked(m.Approve(call=_call(), id=who)).members

    def revoke(self, who: str) -> tuple[m.Admission, ...]:
        """Shut out the key with this id, or the device of this name; its connections end."""
        return self._asked(m.Expel(call=_call(), id=who)).members

    def listed(self) -> m.AdmittedNow:
        """Who is admitted, and who waits to be."""
        return self._asked(m.ListAdmitted(call=_call()))

    def _asked(self, message: m.AnyMessage) -> m.AdmittedNow:
        answer = self._ask(message)
        assert isinstance(answer, m.AdmittedNow)
        return answer

    def _places(self, join_port: int) -> tuple[str, ...]:
        """Where others reach the coordinator: as we do, unless it is on this machine."""
        here = interface_addresses()
        if self._host in here or self._host.startswith("127."):
            return (*places_of("", join_port), *places_of(self._host, join_port))
        return places_of(self._host, join_port)


def _call() -> str:
    return secrets.token_hex(12)
