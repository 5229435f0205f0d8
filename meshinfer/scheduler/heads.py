"""Who is the source and the sink of a request: the coordinator's own device, or the client itself.

A client on a device's host takes the head's place in every plan: it cuts its inputs and merges its
answers itself, so that no tensor passes through another process on the way.
"""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.membership import Membership


class Heads:
    """Mutable: owned by the coordinator's core. ``_with``: of each client that stands for the head,
    the deployments that it has (True) or was told of. ``_refused``: clients that may not."""

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._with: dict[str, dict[int, bool]] = {}
        self._refused: set[str] = set()

    def admit(self, peer: str, hello: m.Hello) -> str:
        """The name that a client acts under, or none; what it was told before, it has forgotten."""
        self._with.pop(peer, None)
        head = self._members.head
        if hello.role != "client" or head is None or peer in self._refused:
            return ""
        if not self._beside_a_device(hello):
            return ""
        self._with[peer] = {}
        return head.name

    def _beside_a_device(self, hello: m.Hello) -> bool:
        places = {device.where for device in self._members.devices.values()}
        return hello.where in {BESIDE_COORDINATOR, *places}

    def gone(self, peer: str) -> None:
        self._with.pop(peer, None)
        self._refused.discard(peer)

    def refuse(self, peer: str) -> list[Effect]:
        """It and a device do not reach each other: from its next hello on it goes by the head."""
        self._refused.add(peer)
        note = Note("warning", "a client does not reach all devices", {"client": peer})
        return [note, Send(Plane.CONTROL, peer, m.Who())]

    def stands(self, peer: str) -> bool:
        """Whether a peer is the head of its own requests."""
        return peer in self._with

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
        message = _install(made, made.head, bulk)
        return [Send(Plane.CONTROL, peer, message)]

    def installed(self, peer: str, message: m.Installed) -> None:
        known = self._with.get(peer, {})
        if message.deployment in known:
            known[message.deployment] = message.failure is None

    def forget(self, made: Deployment) -> list[Effect]:
        """A deployment is retired."""
        told = [
            peer for peer, known in self._with.items() if known.pop(made.number, None) is not None
        ]
        return [Send(Plane.CONTROL, peer, m.Forget(deployment=made.number)) for peer in told]


def install(made: Deployment, name: str, members: Membership) -> m.Install:
    """What a device is told of a deployment."""
    sends = [send for program in made.programs[name] for send in program.sends]
    receivers = {device for send in sends for device in (send.device, *send.others)}
    here = sorted(receivers & set(members.devices))  # not who left a plan that goes on without it
    return _install(made, name, tuple(members.devices[device].bulk for device in here))


def _install(made: Deployment, name: str, peers: tuple[m.Peer, ...]) -> m.Install:
    programs = made.programs[name]
    return m.Install(deployment=made.number, programs=programs, peers=peers, head=made.head)
