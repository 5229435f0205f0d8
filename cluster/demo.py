"""``meshinfer demo``: one photograph doubled by worker processes, checked, and again with a loss.

What it claims it has measured: every answer is held against plain onnxruntime on the whole model,
in this process. The story goes to stderr, the result to stdout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.cli.options import columns, size, write
from cluster.client import Client, Result
from cluster.discovery import browse
from cluster.local import LOOPBACK, LocalCluster
from cluster.pictures import read_picture
from meshinfer.errors import MeshInferError
from meshinfer.image import ImageSpec

Array = np.ndarray[Any, Any]

MODEL = "upscale"
HEAD = "head"
REQUESTS = 6
_FIND_S, _ANSWER_S, _POLL_S = 8.0, 120.0, 0.05


@dataclass(slots=True)
class Report:
    """What ``--json`` prints. ``exact``: within ``tolerance`` of plain onnxruntime, relatively."""

    cluster: str = ""
    discovery: str = ""
    devices: list[dict[str, Any]] = field(default_factory=list)
    stages: int = 0
    tasks: int = 0
    worker_to_worker_bytes: int = 0
    total_s: float = 0.0
    alone_s: float = 0.0
    largest_difference: float = 0.0
    tolerance: float = 0.0
    bit_identical: bool = False
    killed: str = ""
    requests: int = 0
    answered: int = 0
    lost: int = 0
    wrong: int = 0
    attempts: list[int] = field(default_factory=list)
    set_back: int = 0
    chaos_s: float = 0.0
    picture: str = ""
    drawing: str = ""
    width: int = 0
    height: int = 0
    exact: bool = False
    took_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Oracle:
    """Plain onnxruntime's answer to the picture, and how far another may be from it."""

    answer: Array
    tolerance: float
    took_s: float

    def difference(self, answer: Array) -> float:
        """max |a − b| / max |b|; infinite when the shapes differ."""
        if answer.shape != self.answer.shape:
            return float("inf")
        return _difference(answer, self.answer)


def run_demo(
    *, workers: int, picture: Path | None, out: Path, as_json: bool, log_level: str = "error"
) -> int:
    """Run it; 0 when every answer was exact and none was lost, else 1."""
    started = time.monotonic()
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    model = files("cluster").joinpath("data/upscale.onnx").read_bytes()
    photo = picture or Path(str(files("cluster").joinpath("data/photo.jpg")))
    report, spec = Report(requests=REQUESTS), _spec(model)
    pixels = read_picture(photo, spec).pixels  # refuses what is no picture before anything starts
    with _cluster(workers, log_level, say, report) as (cluster, client):
        phase = _Phases(report)
        client.deploy(MODEL, model, image=spec, spread=True)
        phase.ends("deploy")
        say.print(f"deployed   the ×2 upscaler ({size(len(model))}), spread over all of them")
        result = _watched(client, photo, say)
        took = phase.ends("first request")
        say.print(
            f"answered   {photo.name} in {took:.2f} s, planning and weights included "
            f"({result.timing.total_s:.2f} s by the coordinator's clock)"
        )
        oracle = ask_oracle(model, pixels, spec)
        _fill(report, result, oracle, spec)
        _write_files(report, result, model, pixels, photo, out)
        verdict = "bit-identical" if report.bit_identical else "not bit-identical"
        say.print(
            f"checked    against plain onnxruntime on the whole model: largest difference "
            f"{report.largest_difference:.1e} (allowed {report.tolerance:.1e}), {verdict}"
        )
        phase.ends("check and files")
        _lose_one(cluster, client, photo, oracle, say, report)
        phase.ends("loss")
    phase.ends("stop")
    report.exact = report.largest_difference <= report.tolerance and report.wrong == 0
    report.took_s = time.monotonic() - started
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else _summary(report))
    return 0 if report.exact and report.lost == 0 else 1


class _Phases:
    """Where the time goes, by this process's clock."""

    def __init__(self, report: Report) -> None:
        self._report, self._since = report, time.monotonic()

    def ends(self, name: str) -> float:
        """Note how long the phase took; the next one begins."""
        now = time.monotonic()
        took, self._since = now - self._since, now
        self._report.phases_s[name] = took
        return took


# --- the cluster


@contextmanager
def _cluster(
    workers: int, log_level: str, say: Console, report: Report
) -> Iterator[tuple[LocalCluster, Client]]:
    """Workers and a client that found the coordinator over mDNS, or were told where mDNS fails."""
    began = time.monotonic()
    cluster = LocalCluster(0, discovery=True, log_level=log_level)
    try:
        found = browse(cluster.cluster, timeout_s=_FIND_S, interfaces=(LOOPBACK,), until=1)
        if found:
            address = f"{found[0].host}:{found[0].port}"
            report.discovery = "mdns"
            say.print(f"found      {found[0].instance} at {address}, over mDNS")
        else:
            cluster.close()
            cluster = LocalCluster(0, log_level=log_level)
            address = cluster.address
            report.discovery = "static"
            say.print(f"no mDNS    on this machine; going on with the address {address}")
        for _ in range(workers - 1):
            cluster.add(wait=False)
        cluster.add()
        report.cluster = cluster.cluster
        how = "found it the same way" if found else "joined"
        say.print(f"joined     {workers} worker processes {how} ({_since(began)})")
        with Client(address, keyring=cluster.keyring, cluster=cluster.cluster) as client:
            yield cluster, client
    finally:
        cluster.close()


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


# --- one picture


@contextmanager
def _bar(say: Console, what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; elsewhere nothing, since what comes after says it in a line.

    Yields ``show(done, total=None)``.
    """
    if not say.is_terminal:
        yield lambda done, total=None: None
        return
    shown = (
        TextColumn(f"{what:<11}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*shown, console=say, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)


def _watched(client: Client, photo: Path, say: Console) -> Result:
    """Submit the photograph and show how many tasks are done, once it is known of how many."""
    future = client.submit(MODEL, photo)
    with _bar(say, "tasks", None) as show:
        while not future.done():
            wait([future], timeout=_POLL_S)
            if say.is_terminal:
                plans = [plan for info in client.models() for plan in info.plans]
                total = plans[0].count("\n  task ") if plans else None
                show(sum(device.tasks_done for device in client.devices()), total)
    return future.result(timeout=_ANSWER_S)


def _spec(model: bytes) -> ImageSpec:
    from meshinfer.importers import open_model

    spec = open_model(model).image
    assert spec is not None and spec.output is not None
    return spec


def ask_oracle(model: bytes, pixels: Array, spec: ImageSpec) -> Oracle:
    """The original model on one thread here, and onnxruntime's own difference between no and full
    optimisation, four times which is allowed (but at least 1e-5)."""
    from meshinfer.onnxrt import ort

    tensor: Array = pixels.astype(np.float32) * np.float32(spec.scale)
    if spec.colour == "BGR":
        tensor = tensor[..., ::-1]
    channels = spec.channels
    mean, std = (np.array(each[:channels], np.float32) for each in (spec.mean, spec.std))
    tensor = (tensor - mean) / std
    if spec.layout == "NCHW":
        tensor = tensor.transpose(0, 3, 1, 2)
    feeds = {spec.input: np.ascontiguousarray(tensor)}

    def ask(level: Any) -> tuple[Array, float]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = level
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        began = time.perf_counter()
        (answer,) = session.run([spec.output], feeds)
        return answer, time.perf_counter() - began

    answer, took_s = ask(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    plain, _ = ask(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return Oracle(answer, max(1e-5, 4 * _difference(plain, answer)), took_s)


def _difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def _fill(report: Report, result: Result, oracle: Oracle, spec: ImageSpec) -> None:
    answer = result.outputs[spec.output or ""]
    report.largest_difference = oracle.difference(answer)
    report.bit_identical = bool(np.array_equal(answer, oracle.answer))
    report.tolerance, report.alone_s = oracle.tolerance, oracle.took_s
    timing = result.timing
    report.total_s, report.tasks = timing.total_s, len(timing.tasks)
    report.stages = len({task.place[0] for task in timing.tasks})
    report.devices = [
        {
            "device": device,
            "tasks": sum(task.device == device for task in timing.tasks),
            "compute_s": seconds,
            "sent_bytes": timing.sent_bytes[device],
        }
        for device, seconds in sorted(timing.compute_s.items())
    ]


def _write_files(
    report: Report, result: Result, model: bytes, pixels: Array, photo: Path, out: Path
) -> None:
    """The picture and the drawing of the plan that made it, with what moves between the workers."""
    import io

    from PIL import Image

    from meshinfer.draw import draw
    from meshinfer.importers import load, open_model
    from meshinfer.plan import Plan
    from meshinfer.transfers import derive

    image = result.picture().image
    report.width, report.height = image.size
    doubled, drawing = out / f"{photo.stem}-x2.png", out / "plan.svg"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write(doubled, buffer.getvalue())
    source = open_model(model)
    assert source.image is not None
    graph = load(source, shapes={source.image.input: pixels.shape}, image=source.image)
    plan = Plan.parse(result.plan)
    between = derive(graph, plan).bytes_between(graph)
    report.worker_to_worker_bytes = sum(n for ends, n in between.items() if HEAD not in ends)
    shown = io.BytesIO()
    Image.fromarray(pixels[0]).save(shown, "JPEG", quality=85)
    write(drawing, draw(graph, plan, picture=shown.getvalue()).encode())
    report.picture, report.drawing = str(doubled), str(drawing)


# --- the loss


def _lose_one(
    cluster: LocalCluster,
    client: Client,
    photo: Path,
    oracle: Oracle,
    say: Console,
    report: Report,
) -> None:
    """Submit several, SIGKILL a worker when the first is answered, and hold all to the oracle."""
    began = time.monotonic()
    futures = [client.submit(MODEL, photo) for _ in range(REQUESTS)]
    with _bar(say, "requests", REQUESTS) as show:
        _until(futures, 1, show)
        report.killed = cluster.kill(len(cluster.names()) // 2)
        open_ = sum(not future.done() for future in futures)
        say.print(f"killed     {report.killed} with SIGKILL, {open_} of {REQUESTS} requests open")
        _until(futures, REQUESTS, show)
    report.chaos_s = time.monotonic() - began
    for future in futures:
        try:
            result = future.result(timeout=0)
        except (MeshInferError, TimeoutError) as error:
            report.lost += 1
            say.print(f"lost       a request: {error}", markup=False)
            continue
        report.answered += 1
        report.attempts.append(result.attempts)
        report.set_back += report.killed in result.devices_lost
        answer = next(iter(result.outputs.values()))
        report.wrong += oracle.difference(answer) > oracle.tolerance
    say.print(
        f"survived   {report.answered} of {REQUESTS} answered in {report.chaos_s:.1f} s, "
        f"{report.wrong} wrong, {report.lost} lost; {report.set_back} had lost it on their way"
    )


def _until(futures: Sequence[Future[Result]], count: int, show: Callable[..., None]) -> None:
    """Wait until so many are done, or too long."""
    deadline = time.monotonic() + _ANSWER_S
    while (done := sum(f.done() for f in futures)) < count and time.monotonic() < deadline:
        show(done, len(futures))
        time.sleep(_POLL_S)
    show(done, len(futures))


# --- the end


def _summary(report: Report) -> str:
    rows = [
        [
            str(each["device"]),
            str(each["tasks"]),
            f"{each['compute_s']:.2f} s",
            size(each["sent_bytes"]),
        ]
        for each in report.devices
    ]
    verdict = "bit for bit" if report.bit_identical else f"within {report.largest_difference:.1e}"
    good = report.exact and report.lost == 0
    return "\n".join(
        (
            "",
            columns(["device", "tasks", "compute", "sent"], rows),
            "",
            f"{report.tasks} tasks in {report.stages} stages, "
            f"{size(report.worker_to_worker_bytes)} of halos worker to worker, "
            f"{report.total_s:.2f} s "
            f"(plain onnxruntime, one thread: {report.alone_s:.2f} s)",
            f"equal to plain onnxruntime {verdict}",
            f"{report.killed} killed: {report.answered} of {report.requests} requests answered, "
            f"{report.wrong} wrong, {report.lost} lost; {report.set_back} had lost it midway",
            f"{'all exact, nothing lost' if good else 'NOT AS PROMISED'}, {report.took_s:.1f} s",
            "",
            f"{report.picture}  {report.width} × {report.height}",
            f"{report.drawing}  who computed what; open it in a browser",
            "",
            "next: meshinfer demo --picture yours.jpg",
            "      meshinfer coordinator      here; meshinfer worker on every other device",
        )
    )
