"""Who is the source and the sink of a request: the coordinator's own device, or the client itself.

A client on a device's host takes the head's place in every plan: it cuts its inputs and merges its
answers itself, so that no tensor passes through another process on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler.catalogue import Deployment, Model
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.on_device import grant, has_room, only_task
from meshinfer.scheduler.request import Request

Names = tuple[str, ...]


@dataclass(slots=True)
class _Refusal:
    """``times``: in a row, this one too; ``over``: it may stand for the head again."""

    until: float
    times: int
    over: bool = False


class Heads:
    """Mutable: owned by the coordinator's core. ``_with``: of each client that stands for the head,
    the deployments that it has (True) or was told of. ``_granted``: those whose requests it may
    compute itself, None where it was looked at and may not. ``_where``: the host of each.
    ``_refused``: clients that may not, for a while, or might not of late."""

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._with: dict[str, dict[int, bool]] = {}
        self._granted: dict[str, dict[int, Deployment | None]] = {}
        self._where: dict[str, str] = {}
        self._refused: dict[str, _Refusal] = {}

    def admit(self, peer: str, hello: m.Hello) -> str:
        """The name that a client acts under, or none; what it was told before, it has forgotten."""
        self._forget_client(peer)
        head = self._members.head
        refusal = self._refused.get(peer)
        if hello.role != "client" or head is None or (refusal and not refusal.over):
            return ""
        if not self._beside_a_device(hello):
            return ""
        self._with[peer], self._granted[peer] = {}, {}
        self._where[peer] = head.where if hello.where == BESIDE_COORDINATOR else hello.where
        return head.name

    def _beside_a_device(self, hello: m.Hello) -> bool:
        places = {device.where for device in self._members.devices.values()}
        return hello.where in {BESIDE_COORDINATOR, *places}

    def gone(self, peer: str) -> None:
        self._forget_client(peer)
        self._refused.pop(peer, None)

    def _forget_client(self, peer: str) -> None:
        for known in (self._with, self._granted, self._where):
            known.pop(peer, None)

    def refuse(self, peer: str, now: float) -> list[Effect]:
        """It and a device do not reach each other: from its next hello on it goes by the head, for
        a while, which costs a copy of each tensor and the coordinator memory for it."""
        old = self._refused.get(peer)
        late = old is None or now > old.until + limits.QUARANTINE_FORGOTTEN_S
        times = 1 if old is None or late else old.times + 1
        doubled = min(times - 1, limits.REFUSED_DOUBLINGS)
        self._refused[peer] = _Refusal(now + limits.EXCLUDED_S * 2**doubled, times)
        note = Note("warning", "a client does not reach all devices", {"client": peer})
        return [note, Send(Plane.CONTROL, peer, m.Who())]

    def due(self, now: float) -> list[Effect]:
        """Let those stand for the head again who could not for long enough."""
        effects: list[Effect] = []
        for peer, refusal in self._refused.items():
            if not refusal.over and now >= refusal.until:
                refusal.over = True
                note = Note("info", "a client may reach all devices again", {"client": peer})
                effects += [note, Send(Plane.CONTROL, peer, m.Who())]
        return effects

    def stands(self, peer: str) -> bool:
        """Whether a peer is the head of its own requests."""
        return peer in self._with

    def among(self, *peers: str) -> str | None:
        """The first of these peers that is a client and the head of its own requests."""
        return next(filter(self.stands, peers), None)

    def ready(self, peer: str, made: Deployment) -> bool:
        """Whether a client's requests can begin under a deployment."""
        return peer not in self._with or self._with[peer].get(made.number, False)

    def install(self, peer: str, made: Deployment) -> list[Effect]:
        """Give a client the head's programs, once."""
        if made.number in self._with[peer]:
            return []
        self._with[peer][made.number] = False
        devices = self._members.devices  # those that send it the answer need a connection, too
        bulk = tuple(devices[n].bulk for n in sorted(made.members) if n in devices)
        message = _install(made, made.programs[made.head], bulk, limits.KEPT_BYTES)
        return [Send(Plane.CONTROL, peer, message)]

    def installed(self, peer: str, message: m.Installed) -> None:
        known = self._with.get(peer, {})
        if message.deployment in known:
            known[message.deployment] = message.failure is None

    def forget(self, made: Deployment) -> list[Effect]:
        """A deployment is retired."""
        for granted in self._granted.values():
            granted.pop(made.number, None)
        told = [
            peer for peer, known in self._with.items() if known.pop(made.number, None) is not None
        ]
        return [Send(Plane.CONTROL, peer, m.Forget(deployment=made.number)) for peer in told]

    # --- requests that a client computes itself

    def grant(self, request: Request, made: Deployment) -> list[Effect]:
        """Let a client compute such requests itself, where the plan's one task lies on its host.
        Looked at once for each client and deployment, since all requests come by here."""
        peer = request.client
        if peer not in self._granted or made.number in self._granted[peer]:
            return []
        self._granted[peer][made.number] = None
        only = only_task(made)
        if only is None or made.alone:  # for fear that it ends the process that computes it
            return []
        device = self._members.devices.get(only[0])
        if device is None or device.where != self._where[peer] or not has_room(made, device):
            return []
        if device.hello.facts.paced:  # only its own process is as slow as it says
            return []
        self._granted[peer][made.number] = made
        return [Send(Plane.CONTROL, peer, grant(made, device, only[1], request.header))]

    def superseded(self, current: Model) -> list[Effect]:
        """A version is its name's current one: what was granted for others ends."""
        name = current.name
        return self._take_back(lambda made: made.model.name == name and made.model is not current)

    def changed(self, made: Deployment) -> list[Effect]:
        """A deployment goes on without a device: what was granted of it ends."""
        return self._take_back(lambda other: other is made)

    def _take_back(self, which: Callable[[Deployment], bool]) -> list[Effect]:
        effects: list[Effect] = []
        for peer, granted in self._granted.items():
            for number, made in list(granted.items()):
                if made is not None and which(made):
                    del granted[number]
                    effects.append(Send(Plane.CONTROL, peer, m.Revoke(deployment=number)))
        return effects

    def programs_granted(self, peer: str) -> Iterator[tuple[str, m.Program]]:
        """All that a client may compute, and of which model."""
        for made in self._granted.get(peer, {}).values():
            only = None if made is None else only_task(made)
            if made is not None and only is not None:
                yield made.model.name, only[1]

    def granted(self, peer: str, deployment: int) -> Deployment | None:
        """What a client may compute, if it still may."""
        return self._granted.get(peer, {}).get(deployment)


def where_it_is(peer: str, hello: m.Hello, ends: tuple[str, str]) -> tuple[m.Hello, list[Effect]]:
    """What is believed of where a client says that it is, by the ``ends`` of its connection. One on
    a device's host gets that device's part of a model: so it is there only if it comes from there.
    """
    theirs, ours = ends
    said = ours if hello.where == BESIDE_COORDINATOR else hello.where.rpartition(" ")[2]
    if not hello.where or (theirs and theirs == said):
        return hello, []
    fields = {"peer": peer, "where": hello.where, "comes_from": theirs}
    note = Note("warning", "a client is not where it says", fields)
    return structs.replace(hello, where=""), [note]


def install(made: Deployment, name: str, members: Membership) -> m.Install:
    """What a device is told of a deployment."""
    programs = made.programs[name]
    return _install(made, programs, _peers(programs, members), _keep_bytes(made, name, members))


def install_spares(made: Deployment, name: str, members: Membership) -> m.Install:
    """What a device is told of the tasks that it may take over."""
    programs = made.spare_programs(name)
    return _install(made, programs, _peers(programs, members), _keep_bytes(made, name, members))


def _peers(programs: tuple[m.Program, ...], members: Membership) -> tuple[m.Peer, ...]:
    sends = [send for program in programs for send in program.sends]
    receivers = {device for send in sends for device in (send.device, *send.others)}
    here = sorted(receivers & set(members.devices))  # not who left a plan that goes on without it
    return tuple(members.devices[device].bulk for device in here)


def _keep_bytes(made: Deployment, name: str, members: Membership) -> int:
    """What a device may keep for others that take over: what its programs leave of its memory."""
    room = made.room(name, members.devices[name].hello.facts.memory_bytes)
    if not room:
        return limits.KEPT_BYTES
    return min(limits.KEPT_BYTES, max(0, room - sum(made.held(name))))


def _install(
    made: Deployment, programs: tuple[m.Program, ...], peers: tuple[m.Peer, ...], keep_bytes: int
) -> m.Install:
    return m.Install(
        deployment=made.number,
        programs=programs,
        peers=peers,
        head=made.head,
        keep_bytes=keep_bytes,
        model=made.model.name,
        makers=_makers(made, programs),
    )


def _makers(made: Deployment, programs: tuple[m.Program, ...]) -> tuple[tuple[m.Place, Names], ...]:
    """Of each task that these programs read: whoever has it."""
    read = {x.producer for p in programs for value in p.inputs for x in value.pieces}
    return tuple((place, made.takers[place]) for place in sorted(read))
