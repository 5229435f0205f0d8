"""Who is admitted, and by whom: what strangers, admins and the coordinator tell each other.

A stranger speaks to the join socket alone, and only by ``Join``. Who it is, is the key of its
connection; no message says so.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.records import Failure, Hex, Message, Name, Record, Seconds, Word
from meshinfer.protocol.token import Role

Key = Annotated[str, Meta(min_length=40, max_length=40)]
"""A CURVE public key, Z85."""

Id = Annotated[str, Meta(max_length=64)]
"""``token.device_id`` of a key, or its beginning."""


class Admission(Record, frozen=True):
    """A key that is admitted: of a device by its name, of a client or admin by the beginning of its
    names (``token.client_name``)."""

    key: Key
    name: Name
    role: Role


class Waiting(Record, frozen=True):
    """A device that asked to join without a token. ``id``: what to approve."""

    id: Id
    name: Name
    role: Role
    waits_s: Seconds = 0.0


class Join(Message, frozen=True, forbid_unknown_fields=False):
    """To the join socket: admit the key of this connection. ``secret``: the token's;
    empty to wait for approval. ``name``: a device's; not used for clients."""

    cluster: Name
    name: Name
    role: Role
    protocol: tuple[int, int]
    version: Word = ""
    secret: Annotated[bytes, Meta(max_length=64)] = b""


class Joined(Message, frozen=True):
    """Admitted: from now on this key may connect to the control socket at ``port``. ``key``: the
    coordinator's, which is news only where no encryption has proven it."""

    name: Name
    role: Role
    port: Annotated[int, Meta(ge=1, le=65535)]
    key: Annotated[str, Meta(max_length=40)] = ""


class Wait(Message, frozen=True):
    """Not admitted yet: an admin has to approve ``id``. Ask again ``again_s`` from now."""

    id: Id
    again_s: Seconds


class Admitted(Message, frozen=True):
    """To devices: the keys that may connect to them, all of them; others no longer."""

    members: Annotated[tuple[Admission, ...], Meta(max_length=limits.ADMITTED_KEYS)]


class AddToken(Message, frozen=True):
    """Admin: admit whoever shows the secret with this SHA-256, for ``ttl_s``: once, or
    ``reusable``."""

    call: Name
    hash: Hex
    role: Role
    ttl_s: Seconds
    reusable: bool = False


class Approve(Message, frozen=True):
    """Admin: admit who waits with this id, or the only one whose id begins so."""

    call: Name
    id: Id


class Expel(Message, frozen=True):
    """Admin: this key is admitted no more, and its connections end. ``id``: as in ``Approve``, or a
    device's name."""

    call: Name
    id: Id


class ListAdmitted(Message, frozen=True):
    """Admin: who is admitted, and who waits to be?"""

    call: Name


class AdmittedNow(Message, frozen=True):
    """Answer to ``AddToken``, ``Approve``, ``Expel`` (whom it was about) and ``ListAdmitted``
    (all). ``join_port``: where those knock who have a token."""

    call: Name
    members: Annotated[tuple[Admission, ...], Meta(max_length=limits.ADMITTED_KEYS)] = ()
    waiting: Annotated[tuple[Waiting, ...], Meta(max_length=limits.WAITING_KEYS)] = ()
    join_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    failure: Failure | None = None
