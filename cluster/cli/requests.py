"""``meshinfer deploy`` and ``infer``: what people ask of a running cluster."""

from __future__ import annotations

import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
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
    parse_image,
    parse_memory,
    parse_pins,
    parse_shapes,
    read_text,
    write,
)
from meshinfer.errors import InvalidInput, MeshInferError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from cluster.client import Client, Result
    from meshinfer.protocol.messages import ModelInfo

_IN_FLIGHT = 8
_TOP = 5


def deploy(
    name: Annotated[str, typer.Argument(help="Name to give it.", show_default=False)],
    model: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    shape: Shapes = None,
    plan: Annotated[
        Path | None, typer.Option(help="Use this plan, as meshinfer plan prints it.")
    ] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Use every device, even where fewer are faster.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="No partial sums, one numeric class of devices.")
    ] = False,
    half_transfers: HalfTransfers = False,
    objective: Annotated[
        str, typer.Option(help="What the plan makes small: latency, throughput or memory.")
    ] = "latency",
    memory: Memory = None,
    pin: Pins = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="JSON|FILE", help="How a picture becomes the input: an ImageSpec."),
    ] = None,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Deploy a model on the cluster; deployed again under its name, it gets the next version."""
    shapes, spec = parse_shapes(shape), parse_image(image)
    budget, pinned = parse_memory(memory), parse_pins(pin)
    text = None if plan is None else read_text(plan)
    if not name or len(name) > 512:
        raise InvalidInput("a model needs a name of 1 to 512 characters", hint="give one")
    with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
        made = client.deploy(
            name,
            model,
            plan=text,
            image=spec,
            shapes=shapes,
            objective=objective,
            spread=spread,
            strict=strict,
            half_transfers=half_transfers,
            memory=budget,
            pin=pinned,
        )
    if as_json:
        import msgspec

        fields = {
            "name": made.name,
            "version": made.version,
            "plan": made.plan,
            "report": msgspec.to_builtins(made.report),
            "image": None if made.image is None else json.loads(made.image.to_json()),
        }
        typer.echo(json.dumps(fields, indent=2))
        return
    typer.echo(f"{made.name} version {made.version}")
    later = ("planned at the first request of each shape",)
    for line in later if made.report is None else made.report.lines:
        typer.echo(f"  {line}", err=True)


def infer(
    name: Annotated[str, typer.Argument(help="A deployed model.", show_default=False)],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Pictures, or arrays in .npy and .npz.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the answers: .png for pictures, .npz for arrays."),
    ] = None,
    output: Outputs = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="Of the model; default: newest.")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(min=0.0, metavar="SECONDS", help="Give up after this time.")
    ] = None,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run inputs through a deployed model.

    Answers that are pictures become .png files in the folder --out (default: here). Of others the
    largest numbers are printed, or all are written as .npz where --out is given. --json prints a
    line for each input. Exit code 1: some inputs failed, others did not.
    """
    errors: list[MeshInferError] = []
    targets = _Targets(name, out)
    with (
        connect(coordinator, keyring, cluster, interface, timeout, log_level) as client,
        _progress(len(inputs)) as advance,
    ):
        model = _model(client, name, version)
        asked = {"outputs": output or None, "version": version, "deadline_s": deadline}
        for path, future in _answers(client, name, model, inputs, asked):
            try:
                result = future.result()
                files = targets.save(path, result)
                typer.echo(_json(path, result, files) if as_json else _line(path, result, files))
            except MeshInferError as error:
                errors.append(error)
                typer.echo(f"error: {path}: {error}", err=True)
            advance()
    if errors:
        raise typer.Exit(errors[0].exit_code if len(errors) == len(inputs) else 1)


def _model(client: Client, name: str, version: int | None) -> ModelInfo | None:
    """The version that will serve; None: the coordinator will say what is wrong."""
    for info in client.models():
        if info.name == name and (info.current if version is None else info.version == version):
            return info
    return None


def _answers(
    client: Client,
    name: str,
    model: ModelInfo | None,
    inputs: Sequence[str],
    asked: Mapping[str, Any],
) -> Iterator[tuple[str, Future[Result]]]:
    """The inputs with their futures, in order; a few are open at a time."""
    opened: deque[tuple[str, Future[Result]]] = deque()
    for path in inputs:
        if len(opened) >= _IN_FLIGHT:
            yield opened.popleft()
        try:
            data = _read(path, model)
            future = client.submit(name, data, **asked)
        except MeshInferError as error:
            future = Future()
            future.set_exception(error)
        opened.append((path, future))
    yield from opened


def _read(path: str, model: ModelInfo | None) -> object:
    """What the client takes: the arrays of .npy and .npz files; a path for pictures."""
    if not path.lower().endswith((".npy", ".npz")):
        return path if model is not None else {}  # no model: let the coordinator say so
    from cluster.cli.arrays import read_arrays

    found = read_arrays(path)
    return found if isinstance(found, dict) else _named(path, found, model)


def _named(path: str, array: np.ndarray[Any, Any], model: ModelInfo | None) -> object:
    if model is None:
        return {}
    if model.image is not None and array.dtype.name == "uint8":
        return array
    if len(model.inputs) != 1:
        raise InvalidInput(
            f"{path} has one array, {model.name} has the inputs {list(model.inputs)}",
            hint="save them by name: numpy.savez(path, input=array, ...)",
        )
    return {model.inputs[0]: array}


class _Targets:
    """Where answers go; no two inputs share a file, and none is written over an input."""

    def __init__(self, model: str, out: Path | None) -> None:
        self._model = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
        self._out = out
        self._used: set[Path] = set()

    def save(self, source: str, result: Result) -> list[str]:
        """The files written for one answer."""
        if result.image is not None and result.image.output in result.outputs:
            buffer = io.BytesIO()
            result.picture().image.save(buffer, "PNG")
            return [self._write(source, ".png", buffer.getvalue())]
        if self._out is None:
            return []
        import numpy as np

        buffer = io.BytesIO()
        np.savez(buffer, **dict(result.outputs))  # type: ignore[arg-type]
        return [self._write(source, ".npz", buffer.getvalue())]

    def _write(self, source: str, ending: str, data: bytes) -> str:
        folder = self._out if self._out is not None else Path()
        stem = f"{Path(source).stem}-{self._model}"
        path, number = folder / f"{stem}{ending}", 1
        while path in self._used:
            number += 1
            path = folder / f"{stem}-{number}{ending}"
        self._used.add(path)
        write(path, data)
        return str(path)


def _line(path: str, result: Result, files: list[str]) -> str:
    spent = f"{result.timing.total_s:.3f} s on {len(result.timing.compute_s)} devices"
    if result.attempts > 1:
        spent += f", {result.attempts} attempts"
    if files:
        return f"{path} -> {', '.join(files)}  ({spent})"
    lines = [f"{path}  ({spent})"]
    for name, array in result.outputs.items():
        top = ", ".join(f"{index}: {value:.6g}" for index, value in _top(array))
        lines.append(f"  {name} {array.dtype} {list(array.shape)}  largest: {top}")
    return "\n".join(lines)


def _top(array: np.ndarray[Any, Any]) -> list[tuple[int, float]]:
    """Flat indices and values of the largest numbers, the largest first."""
    import numpy as np

    flat = array.reshape(-1)
    if flat.dtype.kind not in "fiub":
        return []
    order = np.argsort(flat.astype(np.float64), kind="stable")[::-1][:_TOP]
    return [(int(i), float(flat[i])) for i in order]


def _json(path: str, result: Result, files: list[str]) -> str:
    fields = {
        "input": path,
        "files": files,
        "outputs": {
            name: {"dtype": str(a.dtype), "shape": list(a.shape), "largest": _top(a)}
            for name, a in result.outputs.items()
        },
        "request_id": result.request_id,
        "model": result.model,
        "model_version": result.model_version,
        "plan": result.plan,
        "attempts": result.attempts,
        "degraded": result.degraded,
        "reasons": result.reasons,
        "devices_lost": result.devices_lost,
        "added_s": result.added_s,
        "total_s": result.timing.total_s,
        "queue_s": result.timing.queue_s,
        "compute_s": result.timing.compute_s,
        "sent_bytes": result.timing.sent_bytes,
    }
    return json.dumps(fields)


@contextmanager
def _progress(count: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal and there is something to wait for."""
    if count < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("inputs", total=count)
        yield lambda: progress.advance(task)
