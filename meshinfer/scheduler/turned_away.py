"""The words to those that are not let in, and to admins that asked for what cannot be.

A stranger learns no more of a token than that it is not valid.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import Role
from meshinfer.scheduler.telling import COORDINATOR

_RESERVED = "client-"
"""With this begin the names of those that are no devices."""

_SHOWN = 4


def token_refused() -> m.Failure:
    """The same for one that is wrong, too old, spent, void, or of another role."""
    return m.Failure(
        error="AuthError",
        message="the token is not valid: it is wrong, has expired, or was used",
        hint="have a new one made by `meshinfer token` at the coordinator",
    )


def needs_token(role: Role) -> m.Failure:
    return m.Failure(
        error="AuthError",
        message=f"only workers may wait to be approved; a key of the role {role} needs a token",
        hint=f"have one made by `meshinfer token --role {role}` at the coordinator",
    )


def name_refusal(name: str) -> m.Failure | None:
    """Why no device can have this name: it is shown to people, and is a part of a peer's id."""
    if (
        len(name) <= limits.DEVICE_NAME_CHARS
        and name.isascii()  # no two that look alike
        and name.isprintable()
        and name == name.strip()
        and not set(name) & set("#~")
        and not name.startswith(_RESERVED)
        and name != COORDINATOR
    ):
        return None
    return m.Failure(
        error="ConfigurationError",
        message=f"no device may have the name {name[: limits.DEVICE_NAME_CHARS]!r}",
        hint=f"choose one of 1 to {limits.DEVICE_NAME_CHARS} printable ASCII characters with "
        f"--name; without # and ~, not {COORDINATOR} and not beginning with {_RESERVED}",
    )


def taken(name: str) -> m.Failure:
    return m.Failure(
        error="AuthError",
        message=f"the name {name!r} belongs to another key",
        hint=f"revoke the old one (`meshinfer devices revoke {name}`), or choose another name with "
        "--name",
    )


def not_ours(name: str) -> m.Failure:
    """``name`` is always admitted, as it is."""
    return m.Failure(
        error="ConfigurationError",
        message=f"{name} belongs to the coordinator itself, and stays",
        hint="to end it, stop the coordinator; for other keys, remove them from its state folder",
    )


def full(what: str, hint: str) -> m.Failure:
    return m.Failure(
        error="QueueFull",
        message=f"too many {what}",
        hint=hint,
        retry_after_s=limits.WAITS_S,
    )


def nobody(id_: str, *, short: bool = False) -> m.Failure:
    why = f"{id_!r} is nobody's id or name here"
    if short:
        why += f"; of an id, say at least {limits.ID_CHARS_LEAST} characters"
    return m.Failure(
        error="InvalidInput", message=why, hint="`meshinfer devices` lists who is in and who waits"
    )


def ambiguous(id_: str, ids: Iterable[str]) -> m.Failure:
    shown = sorted(ids)
    more = " and others" if len(shown) > _SHOWN else ""
    return m.Failure(
        error="InvalidInput",
        message=f"{id_!r} may be {', '.join(shown[:_SHOWN])}{more}",
        hint="give more of the id, as the device itself shows it",
    )


def made_before() -> m.Failure:
    return m.Failure(
        error="InvalidInput", message="this token was made before", hint="make a new one"
    )


def without_keys() -> m.Failure:
    return m.Failure(
        error="ConfigurationError",
        message="this cluster does without encryption, and so without keys and tokens",
        hint="start the coordinator without --insecure",
    )


def parted(name: str, why: str) -> m.Failure:
    """To somebody who was in."""
    return m.Failure(
        error="AuthError",
        message=f"{name} is not admitted any more: {why}",
        hint="join anew with a token that `meshinfer token` makes at the coordinator",
    )


def unwritten(failure: m.Failure) -> m.Failure:
    """An expulsion holds for now, and is not on disk."""
    return structs.replace(
        failure,
        message=f"it is out, but that is not on disk yet, and a restart would let it in again: "
        f"{failure.message}",
    )
