"""Judges the network between a machine and its coordinator: interfaces, multicast, ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshinfer.doctor.finding import Finding, ok, problem, warning
from meshinfer.errors import AuthError, ClusterUnavailable, ConfigurationError


@dataclass(frozen=True, slots=True)
class Interface:
    """An IPv4 address of this machine. ``skipped``: by its name it leads to containers only."""

    name: str
    address: str
    up: bool
    loopback: bool = False
    skipped: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.address}{'' if self.up else ' (down)'}"


def judge_interfaces(
    here: Sequence[Interface], asked: Sequence[str] | None, target: str, through: str | None
) -> Finding:
    """``asked``: addresses given for mDNS. ``target``: the coordinator's host, or empty;
    ``through``: our address towards it, or None where there is no way."""
    check = "interface"
    outer = [i for i in here if not i.loopback]
    known = ", ".join(map(str, outer)) or "none but loopback"
    for address in asked or ():
        found = next((i for i in here if i.address == address), None)
        if found is None or not found.up:
            what = "no interface has" if found is None else f"the interface {found.name} is down:"
            return problem(
                check,
                ConfigurationError,
                f"{what} the address {address}; here are: {known}",
                "give --interface (or MESHINFER_INTERFACE) an address of this machine that is up, "
                "or leave it out",
            )
    if not any(i.up for i in outer) and target not in ("127.0.0.1", "localhost"):
        return problem(
            check,
            ConfigurationError,
            f"no network: no interface but loopback is up with an IPv4 address; here are: {known}",
            "plug the cable in or join the Wi-Fi, and look at: ip address",
        )
    used = [i for i in here if (i.address in asked if asked else i.up and not i.skipped)]
    names = ", ".join(map(str, [i for i in used if asked or not i.loopback])) or "loopback"
    if not target:
        return ok(check, f"mDNS uses {names}")
    if through is None:
        return problem(
            check,
            ClusterUnavailable,
            f"there is no way to the coordinator's host {target}; here are: {known}",
            "check the address and the network: both must be in one network, or routed",
        )
    way = next((i for i in here if i.address == through), None)
    if way is not None and not way.loopback and way not in used:
        why = f"named {way.name}, it is skipped" if way.skipped else "it was not asked for"
        return warning(
            check,
            f"the coordinator at {target} is reached through {way}, but mDNS uses {names}: {why}",
            f"give --interface {through}, or the coordinator's address with --coordinator",
        )
    return ok(check, f"{target} is reached through {way or through}; mDNS uses {names}")


@dataclass(frozen=True, slots=True)
class Heard:
    """An announcement of a coordinator; nothing of it is proven."""

    host: str
    port: int
    key: str
    protocol: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Multicast:
    """What mDNS told. ``opened``: whether it works here at all. ``elsewhere``: coordinators heard
    at other interfaces than those asked for. ``direct``: whether the coordinator's host answers an
    mDNS question that is sent to it alone; None where it was not asked."""

    cluster: str
    opened: bool
    heard: tuple[Heard, ...]
    elsewhere: tuple[Heard, ...] = ()
    direct: bool | None = None


def judge_multicast(seen: Multicast, own_key: str | None, known: str) -> Finding:
    """``own_key``: of our keyring's coordinator. ``known``: its address, if any."""
    check = "multicast"
    static = f"give its address: coordinator = {known or 'HOST:PORT'!r} in meshinfer.toml"
    ours = [h for h in seen.heard if own_key is None or h.key == own_key]
    if len(seen.heard) > 1:
        return _judge_several(seen)
    if ours:
        return ok(check, f"cluster {seen.cluster!r} is announced by {ours[0]}")
    if seen.heard:
        return problem(
            check,
            AuthError,
            f"the coordinator of {seen.cluster!r} at {seen.heard[0]} has another key than our "
            "keyring names",
            "join it with a token that meshinfer token makes there, or give --keyring",
        )
    if seen.elsewhere:
        return problem(
            check,
            ConfigurationError,
            f"{seen.cluster!r} is announced by {seen.elsewhere[0]}, but not at the interface asked "
            "for: it is the wrong one",
            "leave --interface (MESHINFER_INTERFACE) out, or give the address of the network that "
            "the coordinator is in",
        )
    if not seen.opened:
        text = "mDNS does not work here: no interface for it, or UDP port 5353 is taken"
        hint = f"{static}; or stop what has the port (ss -ulpn 'sport = 5353')"
    elif seen.direct:
        text = (
            f"multicast is filtered: the coordinator at {known} answers mDNS that is sent to it "
            "alone, but nothing that is sent to all arrives"
        )
        hint = f"{static}; or let the Wi-Fi or switch pass it (AP isolation, IGMP snooping)"
    elif known:
        text = f"nobody announces {seen.cluster!r}: the coordinator at {known} does not answer mDNS"
        hint = f"{static}; or start it without --no-mdns and open UDP port 5353 there"
    else:
        return problem(
            check,
            ClusterUnavailable,
            f"no coordinator of cluster {seen.cluster!r} is heard over mDNS, and no address is "
            "known",
            "start meshinfer coordinator; if one runs, meshinfer doctor --coordinator HOST:PORT "
            "finds out whether multicast is filtered",
        )
    return warning(check, text, hint)


def _judge_several(seen: Multicast) -> Finding:
    where = ", ".join(map(str, seen.heard))
    cloned = len({h.key for h in seen.heard}) < len(seen.heard)
    return problem(
        "multicast",
        ConfigurationError,
        f"{len(seen.heard)} coordinators announce {seen.cluster!r}: {where}"
        + ("; with one key: a state folder was copied" if cloned else ""),
        "stop all but one"
        + (", and delete the copied state folder" if cloned else ", or give them other --cluster"),
    )


@dataclass(frozen=True, slots=True)
class Reached:
    """How connecting went: ``open``, ``refused``, ``silent``, ``no route`` or ``unknown host``."""

    host: str
    port: int
    outcome: str
    what: str = "coordinator"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def judge_port(reached: Reached) -> Finding:
    check = "port"
    match reached.outcome:
        case "open":
            return ok(check, f"the {reached.what}'s port at {reached} is open")
        case "refused":
            text = f"the {reached.what}'s port is closed: nobody listens at {reached}"
            hint = "is it running there, at this port and at this address (--host, --port)?"
        case "silent":
            text = f"the {reached.what}'s port is blocked: {reached} does not answer at all"
            hint = (
                "is the host on and in this network? A firewall on it must let TCP in, as: "
                f"ufw allow {reached.port}/tcp"
            )
        case "unknown host":
            text = f"no host is named {reached.host}"
            hint = "give the coordinator's IPv4 address"
        case _:
            text = f"there is no way to {reached}: {reached.outcome}"
            hint = "check the address and the network"
    return problem(check, ClusterUnavailable, text, hint)


def judge_own_port(host: str, port: int, taken: bool) -> Finding:
    """Of a coordinator that does not run here."""
    if not taken:
        return ok("port", f"the coordinator of this machine does not run; its port {port} is free")
    return problem(
        "port",
        ConfigurationError,
        f"the coordinator of this machine does not run, and another program has port {port}",
        f"see which: ss -tlpn 'sport = {port}'; stop it, or start the coordinator with --port",
    )
