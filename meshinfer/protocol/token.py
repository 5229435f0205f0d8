"""What joins a device: the text of a token, and how a public key is named. Pure, no I/O.

A token carries the coordinator's public key, so that the first packet is authenticated both ways,
and a secret of which the coordinator keeps the hash alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

from meshinfer import limits
from meshinfer.errors import AuthError

Role = Literal["worker", "client", "admin"]
"""What a key may do: compute; submit requests and look; all that, and say who else may."""

ROLES: tuple[Role, ...] = get_args(Role)
SECRET_BYTES = 16
_PREFIX = "mi1."
_CHECK_BYTES = 4
_GROUP = 4
_KEY = re.compile(r"([0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40})?")  # Z85 (ZeroMQ RFC 32)
_SHORT_GROUPS = 3
_HINT = "paste the whole line that the coordinator or `meshinfer token` printed"


@dataclass(frozen=True, slots=True)
class Token:
    """``coordinator``: its public key, Z85 of 40 characters; empty where the cluster does without
    encryption. ``places``: HOST:PORT of its join sockets, the likeliest first."""

    cluster: str
    role: Role
    coordinator: str
    secret: bytes = field(repr=False)
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        return format_token(self)


def format_token(token: Token) -> str:
    """``mi1.`` and base64url (RFC 4648, no padding) of its fields and four bytes of their SHA-256,
    by which a torn or mistyped one is known."""
    fields = (token.cluster, token.role, token.coordinator, token.secret, token.places)
    body = msgspec.msgpack.encode(fields)
    text = base64.urlsafe_b64encode(body + _check(body))
    return _PREFIX + text.rstrip(b"=").decode("ascii")


def parse_token(text: str) -> Token:
    """The token. Raises ``AuthError`` for one that is damaged or of another kind; the text, which
    may be a secret, is not repeated."""
    text = text.strip()
    if not text.startswith(_PREFIX):
        raise AuthError("that is no token of MeshInfer: one begins with mi1.", hint=_HINT)
    if len(text) > limits.TOKEN_CHARS:
        raise AuthError("the token is too long", hint=_HINT)
    try:
        packed = text[len(_PREFIX) :].encode("ascii")
        data = base64.b64decode(packed + b"=" * (-len(packed) % 4), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise AuthError("the token is damaged", hint=_HINT) from error
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if check != _check(body):
        raise AuthError("the token is damaged or not whole", hint=_HINT)
    try:
        cluster, role, coordinator, secret, places = msgspec.msgpack.decode(
            body, type=tuple[str, Role, str, bytes, tuple[str, ...]]
        )
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AuthError("the token is of another release", hint=_HINT) from error
    if len(secret) != SECRET_BYTES or not _KEY.fullmatch(coordinator):
        raise AuthError("the token is damaged", hint=_HINT)
    return Token(cluster, role, coordinator, secret, places)


def hash_of(secret: bytes) -> str:
    """What is kept of a token's secret: its SHA-256. It is random, so needs no salt."""
    return hashlib.sha256(secret).hexdigest()


def device_id(public: str) -> str:
    """The id of a key's holder: SHA-256 of the public key (its Z85 text), base32 in groups of 4."""
    text = base64.b32encode(hashlib.sha256(public.encode("ascii")).digest()).decode("ascii")
    text = text.rstrip("=").lower()
    return "-".join(text[i : i + _GROUP] for i in range(0, len(text), _GROUP))


def short_id(public: str) -> str:
    """The first groups of ``device_id``: to tell apart at a glance, not to trust."""
    return "-".join(device_id(public).split("-")[:_SHORT_GROUPS])


def client_name(public: str) -> str:
    """What the names of all clients with this key begin with; what follows is their own."""
    return f"client-{short_id(public)}"


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]
