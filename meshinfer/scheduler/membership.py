"""Who is in the cluster: devices and clients, when they were last heard, who may get work.

Membership comes from hellos and heartbeats alone; mDNS is only a hint where to connect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Candidate
from meshinfer.scheduler.faults import Faults
from meshinfer.scheduler.health import Health
from meshinfer.scheduler.presence import Presence


@dataclass(slots=True)
class Device:
    """A joined worker. ``peer`` is its routing id, new with each incarnation.

    ``links``: what its transfers to other devices came to, by their names.
    ``used``: it was told to install something. ``rival``: another process that wants its name, and
    since when. ``excluded_for``: why it gets no work until then. ``computing``: what its compute
    thread did as it was last heard, for ``computing_s`` then. ``wasted``: tasks that it has
    done in vain, as it says; ``stale``: those that it told of when their attempt was over.
    ``blobs``: how many it was handed.
    """

    hello: m.Hello
    peer: str
    heard: float
    draining: bool = False
    dismissed: bool = False
    used: bool = False
    rival: tuple[str, float] | None = None
    excluded_until: float = 0.0
    excluded_for: str = ""
    computing: str = ""
    computing_s: float = 0.0
    joined: float = 0.0
    tasks_done: int = 0
    wasted: int = 0
    stale: int = 0
    blobs: int = 0
    links: dict[str, m.Link] = field(default_factory=dict)
    board: m.Board | None = None

    @property
    def name(self) -> str:
        return self.hello.device

    @property
    def ids(self) -> dict[str, object]:
        """How the log names it."""
        return {"device": self.name, "incarnation": self.hello.incarnation}

    @property
    def bulk(self) -> m.Peer:
        assert self.hello.bulk is not None
        return self.hello.bulk

    @property
    def where(self) -> str:
        """The machine and the address there: the same for devices that reach each other without a
        link."""
        return f"{self.hello.facts.host} {self.bulk.host}"

    @property
    def untouched(self) -> bool:
        """Whether nothing but its welcome depends on it yet: no programs, no inputs of clients."""
        return not self.used and not self.hello.facts.head

    @property
    def request(self) -> str:
        """Whose task it computed as it was last heard; empty, if it did nothing."""
        return self.computing.rsplit(" ", 2)[0]  # "ID (STAGE, TASK)"

    def idle(self, now: float) -> bool:
        """Whether it has just said that it computes nothing."""
        return not self.computing and now - self.heard <= limits.DOUBT_AGAIN_S

    def computes_s(self, now: float) -> float:
        return self.computing_s + now - self.heard

    def unheard(self, now: float) -> str:
        return f"no heartbeat for {now - self.heard:.1f} s"

    def exclude(self, why: str, now: float) -> None:
        """It gets no work for a while."""
        self.excluded_until, self.excluded_for = now + limits.EXCLUDED_S, why

    def state(self, now: float) -> str:
        if self.draining:
            return "draining"
        return "excluded" if now < self.excluded_until else "ready"


@dataclass(slots=True)
class Membership:
    """Mutable: owned by the coordinator's core.

    ``absent``: clients whose connection broke, and since when; they come back or are given up.
    ``idle_since``: since when nobody can compute, or there is no head; None while somebody can.
    ``links_changed``: how often each link was found to be another than it was; ``links_bettered``:
    any to be better than was known. ``_peers``: the devices by their peers. ``apart``: pairs that
    do not reach each other.
    """

    cluster: str
    version: str
    devices: dict[str, Device] = field(default_factory=dict)
    clients: dict[str, float] = field(default_factory=dict)
    absent: dict[str, float] = field(default_factory=dict)
    changed_at: float = 0.0
    idle_since: float | None = 0.0
    links_changed: dict[tuple[str, str], int] = field(default_factory=dict)
    links_bettered: int = 0
    _peers: dict[str, Device] = field(default_factory=dict)
    apart: dict[tuple[str, str], bool] = field(default_factory=dict)
    health: Health = field(default_factory=Health)
    presence: Presence = field(default_factory=Presence)
    faults: Faults = field(default_factory=Faults)

    def refusal(self, hello: m.Hello, now: float) -> m.Failure | None:
        """Why a hello is not admitted; None when it is."""
        failure = foreign(hello, hello.device, self.cluster, self.version)
        if failure is not None:
            return failure
        bulk = hello.bulk
        if (
            hello.role not in ("worker", "client")
            or (hello.role == "worker") != (bulk is not None)
            or (bulk is not None and bulk.id != f"{hello.device}#{hello.incarnation}")
        ):
            return m.Failure(error="InvalidInput", message=f"a hello of role {hello.role!r}")
        known = self.devices.get(hello.device) if hello.role == "worker" else None
        if known is None or known.hello.incarnation == hello.incarnation:
            return None
        elsewhere = known.hello.facts.host != hello.facts.host
        if (elsewhere and now - known.heard < limits.HEARTBEAT_S * 2) or (
            known.rival is not None
            and known.rival[0] == hello.incarnation
            and known.heard > known.rival[1] + limits.HEARTBEAT_S
        ):
            return m.Failure(
                error="ConfigurationError",
                message=f"a device named {hello.device!r} is alive on {known.hello.facts.host}",
                hint="give this one another name with --name",
            )
        return None

    def contested(self, hello: m.Hello, now: float) -> Device | None:
        """The device of this name that was heard just now: restarted, or are there two of a name?

        Neither is known yet, so the newcomer waits: the old one beats again, or falls silent.
        """
        known = self.devices.get(hello.device) if hello.role == "worker" else None
        if known is None or known.hello.incarnation == hello.incarnation:
            return None
        if known.rival is None or known.rival[0] != hello.incarnation:
            known.rival = (hello.incarnation, now)
        return known if now - known.heard < limits.HEARTBEAT_S * 2 else None

    def admit(self, hello: m.Hello, peer: str, now: float) -> None:
        if hello.role == "client":
            self.absent.pop(peer, None)
            self.clients[peer] = now
            return
        before = self.devices.get(hello.device)
        if before is not None:
            self._peers.pop(before.peer, None)
        self.devices[hello.device] = self._peers[peer] = Device(hello, peer, now, joined=now)
        self.changed_at = now

    def knows(self, peer: str) -> bool:
        return peer in self.clients or self.by_peer(peer) is not None

    def heard(self, peer: str, beat: m.Heartbeat, now: float) -> bool:
        """Note a heartbeat; False when the peer is unknown."""
        if peer in self.clients:
            self.clients[peer] = now
            return True
        device = self.by_peer(peer)
        if device is None:
            return False
        device.heard, device.computing, device.computing_s = now, beat.computing, beat.since_s
        device.wasted, device.board = beat.wasted, beat.board
        self.presence.computes(device.name, beat.computing)
        return True

    def speaks(self, peer: str, now: float) -> bool:
        """Anything has come from a peer: whether a device that was asked gives a sign of life."""
        device = self.by_peer(peer) if self.presence.doubts else None
        return device is not None and self.presence.heard(device.name, now)

    def everybody(self) -> list[str]:
        """The peers that have joined."""
        return sorted([*(d.peer for d in self.devices.values()), *self.clients])

    def by_peer(self, peer: str) -> Device | None:
        return self._peers.get(peer)

    def remove(self, device: Device, why: str, now: float) -> None:
        self.presence.gone(device.name)
        if device.dismissed or device.draining:
            self.health.left(device.name)
        else:
            info = structs.replace(self._info(device, now), state="dead", cause=why)
            self.health.lost(device.hello, info, device.joined, now)
        del self.devices[device.name]
        self._peers.pop(device.peer, None)
        self.apart = {pair: True for pair in self.apart if device.name not in pair}
        for other in self.devices.values():
            other.links.pop(device.name, None)
        self.changed_at = now

    def overdue(self, now: float) -> list[Device]:
        """Devices without a heartbeat for so long that they are dead, if not borne with."""
        return [d for d in self.devices.values() if now - d.heard > limits.DEAD_AFTER_S]

    def forgive(self, asleep_s: float, now: float) -> None:
        """The coordinator itself stood still for so long: what was said meanwhile is yet to be
        read, and nobody is silent for that."""
        for device in self.devices.values():
            device.heard = min(now, device.heard + asleep_s)
        for heard in (self.clients, self.absent):
            heard.update({peer: min(now, at + asleep_s) for peer, at in heard.items()})

    def gone_clients(self, now: float) -> list[str]:
        """Clients that were silent or absent for too long; they are forgotten here."""
        heard = {**self.absent, **self.clients}
        return self.forget_clients(lambda p: now - heard[p] > limits.COORDINATOR_SILENT_S)

    def forget_clients(self, which: Callable[[str], bool]) -> list[str]:
        """Forget these, whether they are here or absent."""
        gone = [peer for peer in {**self.absent, **self.clients} if which(peer)]
        for peer in gone:
            self.clients.pop(peer, None)
            self.absent.pop(peer, None)
        return gone

    def leave_open(self, peer: str, now: float) -> None:
        """A client's connection broke: it must say hello again, since answers may be lost."""
        if self.clients.pop(peer, None) is not None:
            self.absent[peer] = now

    def note_workers(self, now: float) -> tuple[str, ...]:
        """Names of the devices that may get work, and since when there are none."""
        names = self.ready(now)
        if self.head is not None and names:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        return names

    def out_of_patience(self, since: float, now: float) -> bool:
        """Whether what waits for a worker since then is to be told that there is none."""
        return self.idle_since is not None and now >= self.patience_ends(since)

    def patience_ends(self, since: float) -> float:
        return max(since, self.idle_since or 0.0) + limits.NO_WORKER_GRACE_S

    @property
    def head(self) -> Device | None:
        """The coordinator's own device: source and sink."""
        return next((d for d in self.devices.values() if d.hello.facts.head), None)

    def ready(self, now: float) -> tuple[str, ...]:
        """Names of the devices that may get work, in order; the last two whatever they did,
        unless their results are wrong."""
        health = self.health
        here = [
            name
            for name, d in self.devices.items()
            if d.hello.facts.computes and not d.draining and now >= d.excluded_until
        ]
        in_question = health.in_question(now)
        if health.liars:
            here = [name for name in here if health.lies(name, now) is None]
        if not in_question:  # nobody is quarantined: of many devices this is asked often
            return tuple(sorted(here))
        ends = {name: health.quarantined_until(name) for name in here}
        names = [name for name in here if ends[name] <= now]
        held = sorted((ends[name], name) for name in here if ends[name] > now)
        names += [name for _, name in held[: max(0, limits.NEVER_QUARANTINED - len(names))]]
        return tuple(sorted(names))

    def candidates(self, now: float) -> tuple[Candidate, ...]:
        """Devices that may get work, by name."""
        return tuple(
            Candidate(
                d.name, d.hello.facts, self.link(d.name), tuple(d.links.values()), host=d.where
            )
            for d in map(self.devices.__getitem__, self.ready(now))
        )

    def link(self, device: str) -> m.Link | None:
        """The link between a device and the head, by the better of two measurings, since what
        disturbs one only makes it worse; None where nothing is known of it."""
        head = self.head
        ends = self.devices.get(device)
        if head is None or ends is None:
            return None
        ways = [w for w in (ends.links.get(head.name), head.links.get(device)) if w is not None]
        rates = [w.bytes_per_s for w in ways if w.bytes_per_s]
        waits = [w.latency_s for w in ways if w.latency_s]
        if not rates and not waits:
            return None
        return m.Link(
            peer=head.name, bytes_per_s=max(rates, default=0.0), latency_s=min(waits, default=0.0)
        )

    def infos(self, now: float, *, lost: bool = False) -> tuple[m.DeviceInfo, ...]:
        """What is known of the devices; ``lost``: of those too that died of late."""
        here = [self._info(d, now) for d in self.devices.values()]
        gone = self.health.gone(now) if lost else []
        return tuple(sorted((*here, *gone), key=lambda info: info.device))

    def standing(self, d: Device, now: float) -> tuple[str, float, str]:
        """A device's state, until when it is so if it ends by itself, and its cause."""
        state, until, cause = d.state(now), 0.0, self.health.cause(d.name)
        lies = self.health.lies(d.name, now)
        if lies is not None:
            return "quarantined", *lies
        if state == "excluded":
            until, cause = d.excluded_until, d.excluded_for
        elif state == "ready" and d.hello.facts.computes:
            until = self.health.quarantined_until(d.name)
            if until > now and d.name not in self.ready(now):
                state = "quarantined"
            elif d.name in self.presence.suspects(now):
                state = "suspect"
        return state, until, cause or d.hello.facts.last_exit

    def kept_out(self, now: float) -> list[tuple[str, str, str]]:
        """Devices that get no work for a while, in order: name, state and cause."""
        out = {name for name, d in self.devices.items() if now < d.excluded_until}
        out |= self.health.in_question(now) & self.devices.keys()
        found = [(name, *self.standing(self.devices[name], now)) for name in sorted(out)]
        kept = ("quarantined", "excluded")
        return [(name, state, cause) for name, state, _, cause in found if state in kept]

    def _info(self, d: Device, now: float) -> m.DeviceInfo:
        state, until, cause = self.standing(d, now)
        return m.DeviceInfo(
            device=d.name,
            state=state,
            facts=d.hello.facts,
            link=self.link(d.name),
            links=tuple(d.links.values()),
            heard_s=now - d.heard,
            computing=d.computing,
            computing_s=d.computes_s(now) if d.computing else 0.0,
            tasks_done=d.tasks_done,
            stale_tasks=d.wasted + d.stale,
            blobs=d.blobs,
            where=d.where,
            port=d.bulk.port,
            cause=cause,
            returns_s=max(0.0, until - now),
            board=d.board,
        )

    def next_deadline(self) -> float | None:
        here = self.devices.values()
        times = [d.excluded_until for d in here if d.excluded_until]
        times += self.health.quarantines(self.devices)
        if here:  # the first to be overdue; when it is given up comes later, whoever it is
            times.append(min([d.heard for d in here]) + limits.DEAD_AFTER_S + 0.001)
        heard = (*self.clients.values(), *self.absent.values())
        if heard:
            times.append(min(heard) + limits.COORDINATOR_SILENT_S + 0.001)
        return min(times, default=None)


def foreign(said: m.Hello | m.Join, name: str, cluster: str, version: str) -> m.Failure | None:
    """Why who says this cannot be of this cluster: it speaks another protocol, or wants another."""
    first, last = m.PROTOCOL
    theirs_first, theirs_last = said.protocol
    if theirs_last < first or last < theirs_first:
        return m.Failure(
            error="ProtocolMismatch",
            message=(
                f"{name} (version {said.version}) speaks protocol {theirs_first} to "
                f"{theirs_last}, the coordinator (version {version}) {first} to {last}"
            ),
            hint="install the same release of meshinfer on both",
        )
    if said.cluster != cluster:
        return m.Failure(
            error="ConfigurationError",
            message=f"{name} wants cluster {said.cluster!r}, this is {cluster!r}",
            hint=f"start it with --cluster {cluster}",
        )
    return None
