"""The public client: submit images or arrays, get results. One I/O thread; results are futures.

``Client`` blocks, ``AsyncClient`` awaits; both are thin over ``meshinfer.scheduler.client``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import meshinfer
from cluster.blobs import BlobStore
from cluster.config import default_keyring
from cluster.locate import find_coordinator
from cluster.loop import Loop
from cluster.pictures import Picture, read_picture
from cluster.security import read_keyring
from cluster.transport import Endpoint, Transport
from cluster.worker import serve
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, InvalidInput, MeshInferError
from meshinfer.image import ImageSpec
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array, describe, error_of
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.events import (
    Asked,
    Cancelled,
    Effect,
    Resolve,
    ServeBlob,
    Settle,
    StopRequested,
    Submitted,
)

CALL_S = 10.0
DEPLOY_S = 600.0
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ``total_s`` on the coordinator, of it ``queue_s`` before the first task started.

    ``tasks``: for each task its device, place (stage, task), seconds computing and bytes sent.
    """

    total_s: float
    queue_s: float
    tasks: tuple[m.TaskTime, ...]

    @property
    def compute_s(self) -> dict[str, float]:
        """Seconds of computing by device."""
        total: dict[str, float] = {}
        for task in self.tasks:
            total[task.device] = total.get(task.device, 0.0) + task.compute_s
        return total

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes that left each device for others."""
        total: dict[str, int] = {}
        for task in self.tasks:
            total[task.device] = total.get(task.device, 0) + task.sent_bytes
        return total


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one request. ``attempts`` above 1: devices were lost on the way."""

    request_id: str
    outputs: Mapping[str, Array]
    model: str
    model_version: int
    plan: str
    timing: Timing
    degraded: bool
    attempts: int
    image: ImageSpec | None = field(default=None, repr=False)

    def picture(self) -> Picture:
        """The output that is a picture (``ImageSpec.output``). Raises ``InvalidInput``."""
        if self.image is None or self.image.output is None:
            raise InvalidInput(
                f"{self.model} has no output that is a picture",
                hint="say which with ImageSpec(output=...)",
            )
        return Picture.from_tensor(self.outputs[self.image.output], self.image)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model version as it was deployed. ``plan`` is None until the first shape is known."""

    name: str
    version: int
    plan: str | None
    report: tuple[str, ...]
    image: ImageSpec | None


@dataclass(frozen=True, slots=True)
class _Open:
    """A request whose future is not done."""

    future: Future[Result]
    model: str
    image: ImageSpec | None
    wanted: tuple[str, ...] | None


class Client:
    """A connection to a coordinator.

    ``address``: HOST:PORT; else $MESHINFER_COORDINATOR; else mDNS for ``cluster``. ``keyring``: the
    file that the coordinator wrote; else $MESHINFER_KEYRING; else the coordinator's of this machine.
    Raises ``ClusterUnavailable`` when none answers within ``timeout_s``, ``AuthError``.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        keyring: str | os.PathLike[str] | None = None,
        cluster: str = "default",
        timeout_s: float = 10.0,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        ring = read_keyring(keyring or default_keyring(cluster))
        found = find_coordinator(
            address,
            ring.cluster,
            timeout_s=timeout_s,
            key=ring.coordinator_public,
            interfaces=interfaces,
        )
        if found is None:
            raise ClusterUnavailable(
                f"no coordinator of cluster {ring.cluster!r} was found over mDNS",
                hint="start meshinfer coordinator, or give its address",
            )
        self._lock = threading.Lock()
        self._results: dict[str, _Open] = {}
        self._calls: dict[str, Future[m.AnyMessage]] = {}
        self._images: dict[str, ImageSpec | None] = {}
        self._closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="meshinfer-client-")
        self._store = BlobStore(Path(self._folder.name))
        name = f"client-{secrets.token_hex(6)}"
        hello = m.Hello(
            role="client",
            device=name,
            incarnation="0",
            cluster=ring.cluster,
            protocol=m.PROTOCOL,
            version=meshinfer.__version__,
        )

        def make_transport() -> Transport:
            return Transport(f"{name}#0", ring.member)

        coordinator = Endpoint(found[0], found[1], ring.coordinator_public)
        self._loop = Loop(ClientCore(hello), make_transport, self._perform, coordinator)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        try:
            self._ask(m.ListModels(call=_id()), timeout_s)
        except BaseException:
            self.close()
            raise

    # --- models

    def deploy(
        self,
        name: str,
        model: object,
        *,
        plan: Plan | str | None = None,
        image: ImageSpec | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        spread: bool = False,
        timeout_s: float = DEPLOY_S,
    ) -> Deployment:
        """Deploy a model: a path, bytes or an ``onnx.ModelProto``. Returns when it can serve.

        ``shapes`` fixes dynamic inputs; without, a plan is made at the first request of each shape.
        ``spread``: use every device, even where fewer are faster. Raises ``InvalidInput`` for what
        onnxruntime refuses, ``ClusterUnavailable`` when no worker can compute.
        """
        from cluster.models import model_bytes  # onnx is heavy; only deploying needs it

        data = model_bytes(model)
        digest = hashlib.sha256(data).hexdigest()
        self._store.put(digest, data)
        message = m.Deploy(
            call=_id(),
            name=name,
            digest=digest,
            nbytes=len(data),
            plan=None if plan is None else str(plan),
            image=None if image is None else image.to_json(),
            shapes=None if shapes is None else {k: tuple(v) for k, v in shapes.items()},
            spread=spread,
        )
        answer = self._ask(message, timeout_s)
        assert isinstance(answer, m.Deployed)
        spec = None if answer.image is None else ImageSpec.from_json(answer.image)
        self._images[name] = spec
        return Deployment(name, answer.version, answer.plan, answer.report, spec)

    def models(self) -> tuple[m.ModelInfo, ...]:
        """Deployed models, all versions."""
        answer = self._ask(m.ListModels(call=_id()), CALL_S)
        assert isinstance(answer, m.Models)
        return answer.models

    def devices(self) -> tuple[m.DeviceInfo, ...]:
        """Devices of the cluster, the coordinator's own (``head``) included."""
        answer = self._ask(m.ListDevices(call=_id()), CALL_S)
        assert isinstance(answer, m.Devices)
        return answer.devices

    # --- requests

    def infer(
        self,
        model: str,
        data: object,
        *,
        outputs: Sequence[str] | None = None,
        version: int | None = None,
        deadline_s: float | None = None,
    ) -> Result:
        """Submit and wait. See ``submit``."""
        future = self.submit(model, data, outputs=outputs, version=version, deadline_s=deadline_s)
        return future.result()

    def submit(
        self,
        model: str,
        data: object,
        *,
        outputs: Sequence[str] | None = None,
        version: int | None = None,
        deadline_s: float | None = None,
    ) -> Future[Result]:
        """Submit a request; the future has its result, or a typed error.

        ``data``: {input: array}; one array, for a model of one input; or a picture (path, bytes,
        PIL image, uint8 array [H, W, C]) for a model with an ``ImageSpec``. ``outputs``: names to
        return (all). ``deadline_s``: after it the request fails with ``DeadlineExceeded``.
        """
        spec = self._image_of(model, data)
        arrays, picture = _arrays(data, spec)
        request = _id()
        try:
            inputs = tuple(describe(name, array) for name, array in arrays.items())
        except ValueError as error:
            raise InvalidInput(str(error), hint="use an array of numbers") from error
        header = m.Submit(
            request=request,
            model=model,
            version=version,
            inputs=inputs,
            picture=picture,
            deadline_s=limits.REQUEST_DEADLINE_S if deadline_s is None else deadline_s,
        )
        future: Future[Result] = Future()
        wanted = None if outputs is None else tuple(outputs)
        with self._lock:
            self._refuse_when_closed()
            self._results[request] = _Open(future, model, spec, wanted)
        self._loop.post(Submitted(request, header, arrays))
        future.add_done_callback(lambda f: self._cancelled(request) if f.cancelled() else None)
        return future

    def map(
        self,
        model: str,
        data: Iterable[object],
        *,
        max_in_flight: int = 8,
        outputs: Sequence[str] | None = None,
        version: int | None = None,
        deadline_s: float | None = None,
    ) -> Iterator[Result]:
        """Results in order, with at most ``max_in_flight`` requests open."""
        open_: deque[Future[Result]] = deque()
        for each in data:
            if len(open_) >= max_in_flight:
                yield open_.popleft().result()
            open_.append(
                self.submit(model, each, outputs=outputs, version=version, deadline_s=deadline_s)
            )
        while open_:
            yield open_.popleft().result()

    # --- the end

    def close(self) -> None:
        """Fail what is open with ``ClusterUnavailable`` and disconnect."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.post(StopRequested())
        self._thread.join(timeout=_JOIN_S)
        self._folder.cleanup()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _run(self) -> None:
        failure = self._loop.run()
        error = error_of(failure) if failure is not None else _closed_error()
        with self._lock:
            self._closed = True
            results, calls = list(self._results.values()), list(self._calls.values())
            self._results.clear()
            self._calls.clear()
        for future in [*(each.future for each in results), *calls]:
            if not future.done():
                future.set_exception(error)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Resolve(request, reply, arrays):
                assert isinstance(reply, m.Reply)
                self._resolve(request, reply, arrays)
            case Settle(call, answer, failure):
                with self._lock:
                    future = self._calls.pop(call, None)
                if future is None:
                    return
                if failure is not None:
                    future.set_exception(error_of(failure))
                else:
                    assert answer is not None
                    future.set_result(answer)
            case ServeBlob():
                self._loop.post(serve(self._store, effect))
            case _:
                raise AssertionError(f"a client cannot perform {effect}")

    def _resolve(self, request: str, reply: m.Reply, arrays: Mapping[str, Array]) -> None:
        with self._lock:
            found = self._results.pop(request, None)
        if found is None or not found.future.set_running_or_notify_cancel():
            return
        try:
            found.future.set_result(_result(request, reply, arrays, found))
        except MeshInferError as error:
            found.future.set_exception(error)

    def _cancelled(self, request: str) -> None:
        with self._lock:
            self._results.pop(request, None)
        self._loop.post(Cancelled(request))

    def _ask(self, message: Any, timeout_s: float) -> m.AnyMessage:
        future: Future[m.AnyMessage] = Future()
        with self._lock:
            self._refuse_when_closed()
            self._calls[message.call] = future
        self._loop.post(Asked(message.call, message, timeout_s))
        return future.result(timeout=timeout_s + _JOIN_S)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise _closed_error()

    def _image_of(self, model: str, data: object) -> ImageSpec | None:
        if isinstance(data, Mapping):
            return self._images.get(model)
        if model not in self._images:
            for info in self.models():
                if info.current:
                    text = info.image
                    self._images[info.name] = None if text is None else ImageSpec.from_json(text)
        return self._images.get(model)


def _result(request: str, reply: m.Reply, arrays: Mapping[str, Array], found: _Open) -> Result:
    """The result of a reply. Raises the typed error of a failure."""
    if reply.failure is not None:
        raise error_of(reply.failure)
    unknown = sorted(set(found.wanted or ()) - set(arrays))
    if unknown:
        raise InvalidInput(
            f"{found.model} has no output {unknown[0]!r}", hint=f"its outputs are {list(arrays)}"
        )
    return Result(
        request_id=request,
        outputs={name: arrays[name] for name in found.wanted or arrays},
        model=found.model,
        model_version=reply.version,
        plan=reply.plan,
        timing=Timing(reply.total_s, reply.queue_s, reply.tasks),
        degraded=reply.degraded,
        attempts=reply.attempts,
        image=found.image,
    )


def _arrays(data: object, spec: ImageSpec | None) -> tuple[dict[str, Array], bool]:
    """The input arrays of a request, and whether they are pixels for an image spec."""
    if isinstance(data, Mapping):
        return {str(name): np.asarray(array) for name, array in data.items()}, False
    if spec is None:
        raise InvalidInput(
            f"{type(data).__name__} was given to a model without an image spec",
            hint="give {input name: array}, or deploy the model with image=ImageSpec(...)",
        )
    return {spec.input: read_picture(data, spec).pixels}, True


def _id() -> str:
    return secrets.token_hex(12)


def _closed_error() -> ClusterUnavailable:
    return ClusterUnavailable("the client is closed", hint="make a new Client")


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited; the same one I/O thread behind them."""

    def __init__(self, address: str | None = None, **options: Any) -> None:
        self._address, self._options = address, options
        self._client: Client | None = None

    async def __aenter__(self) -> AsyncClient:
        self._client = await asyncio.to_thread(Client, self._address, **self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    @property
    def _open(self) -> Client:
        if self._client is None:
            raise _closed_error()
        return self._client

    async def deploy(self, name: str, model: object, **options: Any) -> Deployment:
        return await asyncio.to_thread(self._open.deploy, name, model, **options)

    async def infer(self, model: str, data: object, **options: Any) -> Result:
        """See ``Client.submit``; cancelling the task cancels the request."""
        future = await asyncio.to_thread(self._open.submit, model, data, **options)
        return await asyncio.wrap_future(future)

    async def devices(self) -> tuple[m.DeviceInfo, ...]:
        return await asyncio.to_thread(self._open.devices)

    async def models(self) -> tuple[m.ModelInfo, ...]:
        return await asyncio.to_thread(self._open.models)
