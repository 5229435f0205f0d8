"""Judges a cluster by what its coordinator lists: releases, identities, who is well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshinfer.doctor.finding import Finding, ok, problem, skipped, warning
from meshinfer.doctor.network import Heard, Reached
from meshinfer.errors import ClusterUnavailable, ConfigurationError, ProtocolMismatch


@dataclass(frozen=True, slots=True)
class Member:
    """A device as the coordinator lists it."""

    name: str
    state: str
    host: str
    address: str
    version: str
    port: int = 0
    cause: str = ""
    head: bool = False


def judge_versions(
    version: str, speaks: tuple[int, int], heard: Sequence[Heard], members: Sequence[Member]
) -> Finding:
    """What is announced tells of a mismatch even where the key is wrong."""
    check = "version"
    for each in heard:
        if each.protocol[1] < speaks[0] or speaks[1] < each.protocol[0]:
            low, high = each.protocol
            return problem(
                check,
                ProtocolMismatch,
                f"the coordinator at {each} speaks protocol {low} to {high}, this release "
                f"({version}) {speaks[0]} to {speaks[1]}",
                "install the same release of meshinfer on both",
            )
    if not members:
        return skipped(check, f"this is {version}, protocol {speaks[0]} to {speaks[1]}")
    others = [f"{d.name} has {d.version}" for d in members if d.version not in ("", version)]
    if others:
        return warning(
            check,
            f"this is {version}, but {', '.join(others)}",
            "they understand each other; still, install one release everywhere",
        )
    return ok(check, f"{version} everywhere, protocol {speaks[0]} to {speaks[1]}")


def judge_identity(
    name: str, own: Sequence[str], members: Sequence[Member], is_worker: bool
) -> Finding:
    """``own``: all addresses of this machine. ``is_worker``: it has a worker's state folder."""
    check = "identity"
    same = next((d for d in members if d.name == name), None)
    if same is None:
        return ok(check, f"no other device is named {name!r}")
    if same.address in own:
        return ok(check, f"{name!r} is this machine, {same.state}")
    text = f"a device named {name!r} is in the cluster from {same.host} at {same.address}"
    if not is_worker:
        return warning(
            check, f"{text}, and this machine is named so, too", "give a worker here another --name"
        )
    return problem(
        check,
        ConfigurationError,
        f"{text}, and this machine has that identity, too: it was cloned",
        "give this one a host name of its own (hostnamectl set-hostname) or --name, and delete the "
        "copied state folder; the coordinator lets in only one of the two",
    )


def judge_devices(members: Sequence[Member], reached: Sequence[Reached]) -> Finding:
    """``reached``: how connecting to each device's own port went, as other devices must."""
    check = "devices"
    workers = [d for d in members if not d.head]
    if not workers:
        return problem(
            check,
            ClusterUnavailable,
            "no worker is in the cluster: nobody can compute",
            "start meshinfer worker --token ... on a device; meshinfer token makes the token",
        )
    ailing = [d for d in workers if d.state != "ready"]
    if ailing:
        told = (f"{d.name} is {d.state}{f' ({d.cause})' if d.cause else ''}" for d in ailing)
        return warning(
            check,
            "; ".join(told),
            "meshinfer devices --watch shows what becomes of them; look at their logs",
        )
    closed = [r for r in reached if r.outcome != "open"]
    if closed:
        return warning(
            check,
            "; ".join(f"{r.what} has a closed port at {r} ({r.outcome})" for r in closed),
            "devices hand pieces to each other at ports that they choose: a firewall there must "
            "let TCP in from the other devices",
        )
    return ok(check, f"{len(workers)} ready: {', '.join(d.name for d in workers)}")
