"""``meshinfer devices``: what the devices of a cluster do, which keys it admits, and who waits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import (
    AsJson,
    ClusterName,
    Coordinator,
    Interfaces,
    KeyringFile,
    LogLevel,
    Timeout,
    columns,
    connect,
)
from meshinfer.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.client import Client
    from meshinfer.protocol.messages import Admission, DeviceInfo, Facts, Waiting

devices = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

_HEADER = (
    "DEVICE STATE CORES THREADS MEMORY ARCH ENGINE CONV-GFLOP/S DEPTHWISE MATRIX INT8 TASK-MS "
    "LINK-MBIT/S LATENCY-MS TASKS BOARD CAUSE"
).split()
_WAITING = ["ID", "NAME", "ROLE", "WAITS-S"]
_ADMITTED = ["ID", "NAME", "ROLE"]
_NOBODY_WAITS = """nobody waits to be approved
  hint: a device asks when meshinfer worker is started on it without a token, and is forgotten here
  soon after that ends; meshinfer token makes a token, which lets it in without approval"""
Who = Annotated[
    str,
    typer.Argument(metavar="ID|NAME", help="Its id, or the beginning of it.", show_default=False),
]


@devices.callback()
def listed(
    ctx: typer.Context,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on: a live table, or a line for each change.")
    ] = False,
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Those that ask to join, and wait for approval.")
    ] = False,
    admitted: Annotated[
        bool, typer.Option("--admitted", help="All keys that may connect, of clients as well.")
    ] = False,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    lost: Annotated[bool, typer.Option("--lost", help="Those too that died of late.")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """List the devices of a cluster; "head" is the coordinator's own, which only merges.

    CAUSE says why a device gets no work, or how its last process ended. Approve and revoke let
    devices and clients in and shut them out."""
    if ctx.invoked_subcommand is not None:
        _hand_on(ctx, ctx.invoked_subcommand)
        return
    if watch + waiting + admitted > 1:
        raise InvalidInput(
            "--watch, --waiting and --admitted are three lists", hint="give one of them"
        )
    with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
        if watch:
            from cluster.cli.watch import watch as go_on

            go_on(client, as_json=as_json)
        elif waiting:
            found = client.admitting.listed().waiting
            if found or as_json:
                _show(_WAITING, [_waits(each) for each in found], found, as_json)
            else:
                typer.echo(_NOBODY_WAITS, err=True)
        elif admitted:
            keys = client.admitting.listed().members
            _show(_ADMITTED, [_admitted(each) for each in keys], keys, as_json)
        else:
            known = client.devices(lost=lost)
            _show(_HEADER, [_row(each) for each in known], known, as_json)
            _tell_of_waiting(client)


@devices.command()
def approve(
    who: Who,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Admit a device that waits: it prints its id, and so does meshinfer devices --waiting."""
    with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
        _say("admitted", client.admitting.approve(who), as_json)


@devices.command()
def revoke(
    who: Who,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Admit a key no more, of a device or a client; what it has open ends at once."""
    with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
        _say("revoked", client.admitting.revoke(who), as_json)


def _hand_on(ctx: typer.Context, command: str) -> None:
    """What was given before the command's name holds for it, too."""
    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    settings = dict(ctx.default_map or {})
    settings[command] = {**settings.get(command, {}), **given}
    ctx.default_map = settings


def _say(what: str, members: Sequence[Admission], as_json: bool) -> None:
    if as_json:
        _show(_ADMITTED, [], members, as_json)
        return
    for each in members:
        typer.echo(f"{what} {' '.join(reversed(_admitted(each)))}")


def _show(header: list[str], rows: list[list[str]], found: Sequence[object], as_json: bool) -> None:
    if as_json:
        import msgspec

        typer.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        typer.echo(columns(header, rows))


def _tell_of_waiting(client: Client) -> None:
    """To an admin, on stderr."""
    if client.role != "admin":
        return
    waiting = client.admitting.listed().waiting
    if waiting:
        names = ", ".join(each.name for each in waiting)
        typer.echo(f"waiting for approval: {names}; see meshinfer devices --waiting", err=True)


def _waits(each: Waiting) -> list[str]:
    return [each.id, each.name, each.role, f"{each.waits_s:.0f}"]


def _admitted(each: Admission) -> list[str]:
    from meshinfer.protocol.token import device_id

    return [device_id(each.key), each.name, each.role]


def _row(info: DeviceInfo) -> list[str]:
    from meshinfer.protocol.board import described

    facts, link = info.facts, info.link
    return [
        info.device,
        info.state,
        f"{facts.cpu_quota:.2g} of {facts.cores}" if facts.cpu_quota else str(facts.cores),
        str(facts.threads or "-"),
        f"{facts.memory_bytes / 2**30:.1f} GiB",
        facts.architecture,
        facts.engine,
        *(_speeds(facts) if facts.computes else ["-"] * 5),
        f"{link.bytes_per_s * 8e-6:.0f}" if link and link.bytes_per_s else "-",
        f"{link.latency_s * 1e3:.2f}" if link and link.latency_s else "-",
        str(info.tasks_done),
        described(info.board),
        info.cause or "-",
    ]


def _speeds(facts: Facts) -> list[str]:
    """GFLOP/s of the kinds that most of the time goes to, and the fixed cost of a task in ms."""
    from meshinfer.cost import OpKind

    kinds = (OpKind.DENSE, OpKind.DEPTHWISE, OpKind.MATRIX, OpKind.INT8)
    rates = [facts.rates[kind] if kind < len(facts.rates) else 0.0 for kind in kinds]
    rates[0] = rates[0] or facts.flops_per_s
    shown = [f"{rate / 1e9:.3g}" if rate else "-" for rate in rates]
    return [*shown, f"{facts.overhead_s * 1e3:.2f}" if facts.overhead_s else "-"]
