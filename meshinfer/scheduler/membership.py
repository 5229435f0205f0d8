"""Who is in the cluster: devices and clients, when they were last heard, who may get work.

Membership comes from hellos and heartbeats alone; mDNS is only a hint where to connect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Candidate

EXCLUDED_S = 15.0
"""How long a device that could not prepare its programs gets no work."""


@dataclass(slots=True)
class Device:
    """A joined worker. ``peer`` is its routing id, new with each incarnation."""

    hello: m.Hello
    peer: str
    heard: float
    draining: bool = False
    excluded_until: float = 0.0
    computing: str = ""
    tasks_done: int = 0

    @property
    def name(self) -> str:
        return self.hello.device

    @property
    def bulk(self) -> m.Peer:
        assert self.hello.bulk is not None
        return self.hello.bulk

    def state(self, now: float) -> str:
        if self.draining:
            return "draining"
        return "excluded" if now < self.excluded_until else "ready"


@dataclass(slots=True)
class Membership:
    """Mutable: owned by the coordinator's core."""

    cluster: str
    version: str
    devices: dict[str, Device] = field(default_factory=dict)
    clients: dict[str, float] = field(default_factory=dict)
    changed_at: float = 0.0

    def refusal(self, hello: m.Hello, now: float) -> m.Failure | None:
        """Why a hello is not admitted; None when it is."""
        first, last = m.PROTOCOL
        theirs_first, theirs_last = hello.protocol
        if theirs_last < first or last < theirs_first:
            return m.Failure(
                error="ProtocolMismatch",
                message=(
                    f"{hello.device} (version {hello.version}) speaks protocol {theirs_first} to "
                    f"{theirs_last}, the coordinator (version {self.version}) {first} to {last}"
                ),
                hint="install the same release of meshinfer on both",
            )
        if hello.cluster != self.cluster:
            return m.Failure(
                error="ConfigurationError",
                message=f"{hello.device} wants cluster {hello.cluster!r}, this is {self.cluster!r}",
                hint=f"start it with --cluster {self.cluster}",
            )
        known = self.devices.get(hello.device)
        if (
            hello.role == "worker"
            and known is not None
            and known.hello.incarnation != hello.incarnation
            and known.hello.facts.host != hello.facts.host
            and now - known.heard < limits.HEARTBEAT_S * 2
        ):
            return m.Failure(
                error="ConfigurationError",
                message=f"a device named {hello.device!r} is alive on {known.hello.facts.host}",
                hint="give this one another name with --name",
            )
        if hello.role not in ("worker", "client") or (hello.role == "worker") != bool(hello.bulk):
            return m.Failure(error="InvalidInput", message=f"a hello of role {hello.role!r}")
        return None

    def admit(self, hello: m.Hello, peer: str, now: float) -> None:
        if hello.role == "client":
            self.clients[peer] = now
            return
        self.devices[hello.device] = Device(hello, peer, now)
        self.changed_at = now

    def heard(self, peer: str, beat: m.Heartbeat, now: float) -> bool:
        """Note a heartbeat; False when the peer is unknown."""
        if peer in self.clients:
            self.clients[peer] = now
            return True
        device = self.by_peer(peer)
        if device is None:
            return False
        device.heard, device.computing = now, beat.computing
        return True

    def by_peer(self, peer: str) -> Device | None:
        return next((d for d in self.devices.values() if d.peer == peer), None)

    def remove(self, device: Device, now: float) -> None:
        del self.devices[device.name]
        self.changed_at = now

    def silent(self, now: float) -> list[Device]:
        """Devices that are dead: no heartbeat for too long."""
        return [d for d in self.devices.values() if now - d.heard > limits.DEAD_AFTER_S]

    def silent_clients(self, now: float) -> list[str]:
        return [p for p, heard in self.clients.items() if now - heard > limits.COORDINATOR_SILENT_S]

    @property
    def head(self) -> Device | None:
        """The coordinator's own device: source and sink."""
        return next((d for d in self.devices.values() if d.hello.facts.head), None)

    def candidates(self, now: float) -> tuple[Candidate, ...]:
        """Devices that may get work, by name."""
        return tuple(
            Candidate(d.name, d.hello.facts.flops_per_s, d.hello.facts.memory_bytes,
                      d.hello.facts.engine)
            for _, d in sorted(self.devices.items())
            if d.hello.facts.computes and d.state(now) == "ready"
        )  # fmt: skip

    def infos(self, now: float) -> tuple[m.DeviceInfo, ...]:
        return tuple(
            m.DeviceInfo(
                device=d.name,
                state=d.state(now),
                facts=d.hello.facts,
                heard_s=now - d.heard,
                computing=d.computing,
                tasks_done=d.tasks_done,
            )
            for _, d in sorted(self.devices.items())
        )

    def next_deadline(self) -> float | None:
        times = [d.heard + limits.DEAD_AFTER_S + 0.001 for d in self.devices.values()]
        times += [h + limits.COORDINATOR_SILENT_S + 0.001 for h in self.clients.values()]
        times += [d.excluded_until for d in self.devices.values() if d.excluded_until]
        return min(times, default=None)
