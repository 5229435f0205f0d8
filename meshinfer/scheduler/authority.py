"""Which roles may say what, and how those are answered that may not. A peer's role is that of the
key which it connected with, by its name; nothing that it says of itself counts."""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.protocol.token import Role
from meshinfer.scheduler.events import Effect, Note, Plane, Send

_WORKERS: tuple[Role, ...] = ("worker",)
_USERS: tuple[Role, ...] = ("client", "admin")
_ADMINS: tuple[Role, ...] = ("admin",)

_NAMED_BY_KEY = 4
"""So many words of a client's name, between hyphens, come from its key (``token.client_name``)."""


_DOING: dict[type[m.AnyMessage], str] = {
    m.Submit: "having a model answer",
    m.Deploy: "deploying a model",
    m.AddToken: "making a token",
    m.Approve: "letting a device in",
    m.Expel: "revoking a key",
    m.ListAdmitted: "seeing who is admitted and who waits",
}
"""What is asked by messages that are answered, in words for whoever asks."""


def roles_for(message: m.AnyMessage) -> tuple[Role, ...] | None:
    """Who may say this to a coordinator; None: whoever is admitted. What a client says as a device
    does, as the head of its own requests, is judged by whether it is one."""
    match message:
        case m.TasksDone() | m.LinkMeasured() | m.Goodbye():
            return _WORKERS
        case m.Submit() | m.Cancel() | m.ListDevices() | m.ListModels():
            return _USERS
        case m.Deploy() | m.AddToken() | m.Approve() | m.Expel() | m.ListAdmitted():
            return _ADMINS
        case _:
            return None


def names_of(peer: str) -> tuple[str, str]:
    """By which name a peer may be admitted: a device's, or what a client's begins with."""
    name = peer.partition("#")[0]
    return name, "-".join(name.split("-")[:_NAMED_BY_KEY])


def is_of(peer: str, admission: m.Admission) -> bool:
    """Whether a peer has the name, or a name, of what was admitted."""
    name, beginning = names_of(peer)
    return admission.name == name or (admission.role != "worker" and admission.name == beginning)


def denied(peer: str, admission: m.Admission, message: m.AnyMessage) -> list[Effect] | None:
    """The answer to who may not say that; None to who may."""
    roles = roles_for(message)
    if roles is None or admission.role in roles:
        return None
    fields = {"peer": peer, "role": admission.role, "type": type(message).__name__}
    note = Note("warning", "a message that its role does not allow", fields)
    failure = m.Failure(
        error="AuthError",
        message=f"{_DOING.get(type(message), 'this')} needs the role {' or '.join(roles)}; "
        f"{admission.name} has the role {admission.role}",
        hint="run this on the coordinator's machine, as the user who runs it; or have `meshinfer "
        f"token --role {roles[-1]}` run there, and use that here: meshinfer join TOKEN",
    )
    match message:
        case m.Submit():
            answer: m.AnyMessage = m.Reply(request=message.request, failure=failure)
        case m.Deploy():
            answer = m.Deployed(call=message.call, failure=failure)
        case m.AddToken() | m.Approve() | m.Expel() | m.ListAdmitted():
            answer = m.AdmittedNow(call=message.call, failure=failure)
        case _:
            return [note]
    return [note, Send(Plane.CONTROL, peer, answer)]


def not_itself(
    peer: str, admission: m.Admission, hello: m.Hello, *, may_be_head: bool
) -> m.Failure | None:
    """Why a hello is not believed: it says other than the key it came with."""
    role = "worker" if admission.role == "worker" else "client"
    if peer != f"{hello.device}#{hello.incarnation}":
        why = "under another name than its connection's"
    elif hello.role != role:
        why = f"of a {hello.role}, by a key that was admitted as {admission.role}"
    elif hello.bulk is not None and hello.bulk.key != admission.key:
        why = "with another key than it was admitted by"
    elif hello.facts.head and not may_be_head:
        why = "of the coordinator's own device"
    else:
        return None
    return m.Failure(
        error="AuthError",
        message=f"{admission.name} says hello {why}",
        hint="join anew with a token of the right role: `meshinfer token` makes one",
    )
