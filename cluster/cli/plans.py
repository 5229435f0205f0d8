"""``meshinfer plan``: what the planner would do with a model, or what a cluster does now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import (
    AsJson,
    ClusterName,
    Coordinator,
    HalfTransfers,
    Interfaces,
    KeyringFile,
    LogLevel,
    Memory,
    Outputs,
    Pins,
    Shapes,
    Timeout,
    connect,
    parse_memory,
    parse_pins,
    parse_shapes,
    size,
    write,
)
from meshinfer.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from cluster.client import Client
    from meshinfer.cost import DeviceProfile
    from meshinfer.graph import Graph
    from meshinfer.planner import Planned

HEAD = "head"
_PI4_GFLOPS = 20.0


def plan(
    model: Annotated[
        str,
        typer.Argument(help="An ONNX file, or the name of a deployed model.", show_default=False),
    ],
    devices: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Plan for so many equal devices.")
    ] = None,
    speeds: Annotated[
        str | None, typer.Option(metavar="1,1,0.5", help="Plan for devices of these speeds.")
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Their names; default: worker-0, ...")
    ] = None,
    gflops: Annotated[
        float, typer.Option(min=0.001, help="What speed 1 is; 20: a Raspberry Pi 4.")
    ] = _PI4_GFLOPS,
    mbit: Annotated[float, typer.Option(min=0.001, help="Mbit/s of their links.")] = 100.0,
    head_computes: Annotated[
        bool, typer.Option("--head-computes", help="The coordinator is on the first one's host.")
    ] = False,
    objective: Annotated[str, typer.Option(help="latency, throughput or memory.")] = "latency",
    spread: Annotated[
        bool, typer.Option("--spread", help="Use every device, even where fewer are faster.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="No partial sums, one numeric class of devices.")
    ] = False,
    half_transfers: HalfTransfers = False,
    memory: Memory = None,
    pin: Pins = None,
    shape: Shapes = None,
    picture: Annotated[
        Path | None, typer.Option(help="Plan for this picture, by the model's ImageSpec.")
    ] = None,
    output: Outputs = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Print the plan for a model file, on devices that you describe or on those of a cluster.

    The plan goes to stdout, as deploy --plan takes it; to stderr, what is expected of it: time,
    what was folded, which nodes are barriers and why, the share of the FLOPs that is distributed,
    weights and peak memory of each device. With a coordinator's address and the name of a deployed
    model: the plans that serve it now. Inputs are pinned to ``head``, the coordinator's host; of
    devices that you describe, the first one is on it then, or with --head-computes.
    """
    budget, pinned = parse_memory(memory), parse_pins(pin) or {}
    described = devices is not None or speeds is not None
    if described or coordinator is None:
        _check_file(model)
        profiles = _described(devices, speeds, names, gflops, mbit)
        if pinned or head_computes:
            profiles = _beside_the_first(profiles)
    else:
        with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
            if not Path(model).exists():
                _print_deployed(client, model, as_json, svg)
                return
            profiles = _measured(client, mbit)
    from meshinfer.identity import DeviceId
    from meshinfer.legality import as_asked
    from meshinfer.planner import make_plan
    from meshinfer.scheduler.profiles import within

    profiles = within(profiles, budget)
    graph, drawn = _graph(model, shape, picture, output)
    head = DeviceId(HEAD)  # a cluster's source and sink
    graph = as_asked(graph, strict=strict, half_transfers=half_transfers)
    held = {value: tuple(map(DeviceId, names)) for value, names in pinned.items()}
    planned = make_plan(graph, profiles, head, head, objective=objective, spread=spread, pin=held)
    _print(graph, planned, as_json)
    if svg is not None:
        from meshinfer.draw import draw

        write(svg, draw(graph, planned.plan, picture=drawn).encode())


def _check_file(model: str) -> None:
    """A name is known to a coordinator only."""
    if not Path(model).exists():
        raise InvalidInput(
            f"there is no file {model}",
            hint="give the path of an ONNX file; the plans of a deployed model are its "
            "coordinator's: --coordinator HOST:PORT, without --devices and --speeds",
        )


def _described(
    count: int | None, speeds: str | None, names: str | None, gflops: float, mbit: float
) -> list[DeviceProfile]:
    from meshinfer.cost import DeviceProfile
    from meshinfer.identity import DeviceId

    try:
        factors = [float(s) for s in speeds.split(",")] if speeds else [1.0] * (count or 4)
    except ValueError:
        raise InvalidInput(f"{speeds!r} are no speeds", hint="write --speeds 1,1,0.5") from None
    called = names.split(",") if names else [f"worker-{i}" for i in range(len(factors))]
    if len(called) != len(factors) or (count is not None and count != len(factors)):
        raise InvalidInput(
            f"{len(factors)} speeds, {len(called)} names"
            + (f" and {count} devices" if count is not None else ""),
            hint="give as many of each",
        )
    if HEAD in called or not all(0 < factor < 1e6 for factor in factors) or "" in called:
        raise InvalidInput(
            f"devices {called} of speeds {factors}", hint="speeds are above 0; 'head' is taken"
        )
    return [
        DeviceProfile(DeviceId(name), factor * gflops * 1e9, bandwidth_bytes_per_s=mbit * 1e6 / 8)
        for name, factor in zip(called, factors, strict=True)
    ]


def _beside_the_first(found: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The same, with the head on the first device's host: so inputs can be pinned to it."""
    from meshinfer.scheduler.profiles import with_head

    return with_head([replace(found[0], host=found[0].id), *found[1:]], HEAD, found[0].id)


def _measured(client: Client, mbit: float) -> list[DeviceProfile]:
    """The devices of a cluster as they measured themselves; ``mbit`` where a link was not."""
    from meshinfer.protocol.messages import Link
    from meshinfer.scheduler.profiles import profile_of, with_head

    assumed = Link(peer=HEAD, bytes_per_s=mbit * 1e6 / 8)
    known = client.devices()
    found = [
        profile_of(info.device, info.facts, info.link or assumed, info.where, info.links)
        for info in known
        if info.facts.computes and info.state == "ready"
    ]
    where = next((info.where for info in known if info.facts.head), "")
    return with_head(found, HEAD, where) if found else []


def _graph(
    model: str, shape: list[str] | None, picture: Path | None, outputs: list[str] | None
) -> tuple[Graph, bytes | None]:
    """The model at its shapes, and the picture's file if it can be drawn."""
    from cluster.importing import Importer
    from cluster.pictures import read_picture
    from meshinfer.importers import load, open_model

    shapes = parse_shapes(shape)
    load = partial(load, outputs=outputs or None)
    if picture is None:
        with closing(Importer()) as through:  # a model may crash what reads it, but not us
            return load(model, shapes=shapes, through=through), None

    source = open_model(model)
    if source.image is None:
        raise InvalidInput(
            f"{model} says nothing of how a picture becomes its input",
            hint="give --shape instead of --picture",
        )
    pixels = read_picture(picture, source.image).pixels
    shapes = {**(shapes or {}), source.image.input: pixels.shape}
    with closing(Importer()) as through:
        graph = load(source, shapes=shapes, image=source.image, through=through)
    data = picture.read_bytes()
    return graph, data if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) else None


def _print(graph: Graph, planned: Planned, as_json: bool) -> None:
    import msgspec

    from meshinfer.report import report_of
    from meshinfer.transfers import derive

    made, expected = planned.plan, planned.timeline
    report = report_of(graph, made, expected, planned.notes)
    between = derive(graph, made).bytes_between(graph)
    moved = sum(between.values())
    direct = sum(n for pair, n in between.items() if HEAD not in pair)
    if as_json:
        fields: dict[str, Any] = {
            "plan": str(made),
            "mode": made.mode,
            "expected_s": expected.total_s,
            "bound": expected.bound,
            "moved_bytes": moved,
            "worker_to_worker_bytes": direct,
            "devices": [
                {"device": u.id, "busy_s": u.busy_s, "sent_bytes": u.bytes_sent,
                 "received_bytes": u.bytes_received, "peak_bytes": u.peak_bytes}
                for u in expected.devices
            ],
            "notes": list(planned.notes),
            "report": msgspec.to_builtins(report),
        }  # fmt: skip
        typer.echo(json.dumps(fields, indent=2))
        return
    typer.echo(str(made), nl=False)
    for line in report.lines:
        typer.echo(line, err=True)
    typer.echo(f"{size(direct)} a request go from worker to worker", err=True)


def _print_deployed(client: Client, name: str, as_json: bool, svg: Path | None) -> None:
    found = [info for info in client.models() if info.name == name and info.current]
    if not found:
        raise ModelNotFound(
            f"{name!r} is neither a file nor a deployed model",
            hint="give the path of an ONNX file, or deploy it first",
        )
    if svg is not None:
        raise InvalidInput(
            "a drawing needs the model's graph, which stays in the cluster",
            hint="give the model file instead of its name",
        )
    info = found[0]
    if as_json:
        typer.echo(json.dumps({"name": name, "version": info.version, "plans": list(info.plans)}))
        return
    typer.echo("\n".join(info.plans), nl=False)
    plans = "1 plan" if len(info.plans) == 1 else f"{len(info.plans)} plans"
    later = "" if info.plans else ": the first request of a shape makes one"
    typer.echo(f"{name} version {info.version}: {plans}{later}", err=True)
