"""``meshinfer lab``: make a lab, run programs in it, look at it, take it down."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import AsJson, columns, size
from meshinfer.errors import ConfigurationError, InvalidInput, MeshInferError

if TYPE_CHECKING:
    from cluster.lab import DeviceSpec, Lab

lab = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A shelf of small computers, emulated on this machine. Needs root on Linux.",
)

_NOTE = (
    "emulated: what is measured in a lab is a lower bound of real boards of these ratios; "
    "no latency is added to links"
)
Chosen = Annotated[
    str | None, typer.Option("--lab", metavar="NAME", help="Which lab; default: the only one.")
]


@lab.command()
def up(
    preset: Annotated[str, typer.Option(help="Which devices; see meshinfer lab presets.")] = "pi4",
    count: Annotated[
        int | None, typer.Option(help="How many devices; default: 4, or as the preset has.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the lab, of a-z and 0-9.")] = None,
    cpu: Annotated[float | None, typer.Option(help="Cores of each device, as 0.25.")] = None,
    memory: Annotated[int | None, typer.Option(help="MiB of each device.")] = None,
    link: Annotated[float | None, typer.Option(help="Mbit/s of each device's cable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a lab that stays until `meshinfer lab down`."""
    from cluster.lab import ABOUT, PRESETS, Lab
    from cluster.lab import preset as devices_of

    several = len(PRESETS.get(preset, ())) > 1
    devices = [
        _changed(device, cpu, memory, link)
        for device in devices_of(preset, count if count is not None or several else 4)
    ]
    with Lab(devices, name) as made:
        made.leave()
        typer.echo(f"{ABOUT[preset]}; {_NOTE}", err=True)
        _print([_facts(made)], as_json)


@lab.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", show_default=False)],
    name: Chosen = None,
    device: Annotated[int, typer.Option(help="Number of the device, from 0.")] = 0,
) -> None:
    """Run a program on a device of a lab: its network, its share of the CPU, its memory."""
    made = _only(name)
    argv = made.command(device, command)
    own = {  # all devices have this machine's host name
        f"MESHINFER_{daemon}_NAME": made.devices[device].name
        for daemon in ("WORKER", "COORDINATOR")
    }
    os.execvpe(argv[0], argv, own | os.environ)


@lab.command()
def presets() -> None:
    """List the presets and what each stands for."""
    from cluster.lab import ABOUT

    typer.echo(columns(["PRESET", "STANDS FOR"], [list(row) for row in ABOUT.items()]))
    typer.echo(_NOTE, err=True)


@lab.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the labs of this machine, their devices, and what those have used."""
    from cluster.lab import Lab

    names = Lab.names() if name is None else [name]
    if not names and not as_json:
        typer.echo("no lab; make one with meshinfer lab up", err=True)
    _print([_facts(Lab.attach(each)) for each in names], as_json)


@lab.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Default: the only one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All that nobody uses.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also one whose owner lives.")] = False,
) -> None:
    """Remove a lab, also what a killed run has left: processes, networks, groups, files."""
    from cluster.lab import Lab

    if every and name is not None:
        raise InvalidInput("both a name and --all", hint="give one of them")
    labs = [Lab.attach(each) for each in Lab.names()] if every else [_only(name)]
    for each in labs:
        if each.in_use and not force:
            if not every:
                raise ConfigurationError(
                    f"lab {each.name} is in use by process {each.owner}",
                    hint="end that one, which removes it, or use --force",
                )
            typer.echo(f"left {each.name}: process {each.owner} uses it", err=True)
            continue
        each.close()
        typer.echo(f"removed {each.name}", err=True)


def _changed(
    device: DeviceSpec, cpu: float | None, memory_mib: int | None, link_mbit: float | None
) -> DeviceSpec:
    return replace(
        device,
        cpu=device.cpu if cpu is None else cpu,
        memory_bytes=device.memory_bytes if memory_mib is None else memory_mib << 20,
        link_bits_per_s=device.link_bits_per_s if link_mbit is None else link_mbit * 1e6,
    )


def _only(name: str | None) -> Lab:
    from cluster.lab import Lab

    if name is not None:
        return Lab.attach(name)
    names = Lab.names()
    if len(names) != 1:
        raise InvalidInput(
            "there is no lab" if not names else f"there are {len(names)} labs",
            hint="meshinfer lab up" if not names else f"name one of {', '.join(names)}",
        )
    return Lab.attach(names[0])


def _facts(made: Lab) -> dict[str, Any]:
    """A lab as ``lab status --json`` shows it."""
    state = "ready" if made.owner is None else "in use" if made.in_use else "left behind"
    devices: list[dict[str, Any]] = []
    for i, device in enumerate(made.devices):
        used = None
        try:
            used = asdict(made.usage(i)) | {"processes": made.processes(i)}
        except (MeshInferError, OSError):  # its maker was killed before it was whole
            state = "left behind"
        devices.append({"device": i, **asdict(device), "address": made.address(i), "used": used})
    return {"lab": made.name, "state": state, "owner": made.owner, "devices": devices}


def _print(labs: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(labs))
        return
    rows = []
    for each in labs:
        for device in each["devices"] or [None]:
            rows.append([each["lab"], each["state"], *_cells(device)])
    if rows:
        head = "LAB STATE # DEVICE ADDRESS CORES MEMORY LINK RUNNING CPU PEAK SENT RECEIVED"
        typer.echo(columns(head.split(), rows))


def _cells(device: dict[str, Any] | None) -> list[str]:
    if device is None:
        return ["-"] * 11
    memory, used = device["memory_bytes"], device["used"]
    return [
        str(device["device"]),
        device["name"],
        device["address"],
        f"{device['cpu']:g}",
        "-" if memory is None else f"{memory >> 20} MiB",
        f"{device['link_bits_per_s'] / 1e6:g} Mbit/s",
        *(["-"] * 5 if used is None else _used(used)),
    ]


def _used(used: dict[str, Any]) -> list[str]:
    sizes = [size(used[key]) for key in ("peak_memory_bytes", "sent_bytes", "received_bytes")]
    return [str(len(used["processes"])), f"{used['cpu_s']:.1f} s", *sizes]
