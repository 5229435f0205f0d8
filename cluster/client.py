"""The public client: submit images or arrays, get results. One I/O thread; results are futures.

Thin over ``meshinfer.scheduler.client``; ``cluster.async_client`` is the same, awaited. A
future's callbacks run in the I/O thread: they must not block.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import meshinfer
from cluster import results, telemetry
from cluster.admitting import Admitting
from cluster.blobs import BlobStore
from cluster.locate import own_place
from cluster.loop import Loop
from cluster.membership import find_as_client
from cluster.offers import Offers
from cluster.on_device import OnDevice
from cluster.ray_backend.address import MayBeRay
from cluster.results import Deployment, Result, closed_error
from cluster.signing import Verifying
from cluster.sockets import Endpoint
from cluster.storing import serve
from cluster.transport import Transport
from meshinfer.errors import ClusterUnavailable, MeshInferError
from meshinfer.image import ImageSpec
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array, error_of
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.events import (
    Asked,
    Cancelled,
    Discard,
    Effect,
    FindBlobs,
    Granted,
    Lease,
    Resolve,
    ServeBlob,
    Settle,
    StopRequested,
    Submitted,
    WriteBlob,
)

__all__ = ["Client", "Deployment", "Result"]

CALL_S = 10.0
DEPLOY_S = 600.0
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class _Open:
    """A request whose future is not done."""

    future: Future[Result]
    model: str
    wanted: tuple[str, ...] | None


class Client(MayBeRay):
    """A connection to a coordinator.

    ``address``: HOST:PORT (``ray://...`` makes a ``RayClient``); else $MESHINFER_COORDINATOR; else
    mDNS for ``cluster``. ``keyring``: of an admin or a client; else $MESHINFER_KEYRING; else that
    of this machine's coordinator, or what ``meshinfer join`` has written. ``token``: joins with it,
    once, and keeps its keyring; else, where there is no keyring, $MESHINFER_TOKEN.
    Raises ``ClusterUnavailable`` when none answers within ``timeout_s``, ``AuthError``.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        keyring: str | os.PathLike[str] | None = None,
        cluster: str = "default",
        token: str | None = None,
        timeout_s: float = 10.0,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        telemetry.configure_guest()
        ring, found = find_as_client(
            None if keyring is None else Path(keyring),
            cluster,
            token,
            address=address,
            interfaces=interfaces,
            timeout_s=timeout_s,
        )
        self.role = ring.role
        self.admitting = Admitting(ring, found[0], partial(self._ask, timeout_s=CALL_S))
        self._lock = threading.Lock()
        self._results: dict[str, _Open] = {}
        self._calls: dict[str, Future[m.AnyMessage]] = {}
        self._closed = False
        self._ended_by: MeshInferError | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="meshinfer-client-")
        self._offers = Offers(BlobStore(Path(self._folder.name)))
        name = f"{ring.name}-{secrets.token_hex(6)}"
        hello = m.Hello(
            role="client",
            device=name,
            incarnation="0",
            cluster=ring.cluster,
            protocol=m.PROTOCOL,
            version=meshinfer.__version__,
            where=own_place(found[0]),
        )
        coordinator = Endpoint(found[0], found[1], ring.coordinator_public)
        transport = partial(Transport, f"{name}#0", ring.key, plaintext=ring.plaintext)
        self._core = ClientCore(hello)
        self._loop = Loop(Verifying(self._core, f"{name}#0"), transport, self._perform, coordinator)
        self._on_device = OnDevice(self._loop.post)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        try:
            self._ask(m.ListModels(call=secrets.token_hex(12)), timeout_s)
        except BaseException:
            self.close()
            raise

    # --- models

    def deploy(
        self,
        name: str,
        model: object,
        *,
        example: object = None,
        plan: Plan | str | None = None,
        image: ImageSpec | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        objective: str = "latency",
        spread: bool = False,
        strict: bool = False,
        half_transfers: bool = False,
        memory: int | Mapping[str, int] | None = None,
        pin: Mapping[str, Sequence[str]] | None = None,
        timeout_s: float = DEPLOY_S,
    ) -> Deployment:
        """Deploy a model: a path, bytes, an ``onnx.ModelProto``, or a torch module with its
        ``example``, exported here (see ``meshinfer.from_torch``). Returns when it can serve.

        ``shapes`` fixes dynamic inputs; without, a plan is made at the first request of each shape.
        Of a torch module, it says which axes may vary: ``shapes={"image": (1, 3, None, None)}``.
        ``objective``: latency, throughput or memory. ``spread``: use every device, even where fewer
        are faster. ``strict``: no partial sums, and devices of one numeric class only, so that the
        answer has the bits of one device's wherever kernels do not depend on sizes. ``memory``:
        bytes of weights and values that each device, or all of them alike, may hold of this model.
        ``pin``: values that never leave these devices, nor what merely rewrites them (scaled,
        transposed); inputs and outputs lie on ``head``, which stands for the workers on its host.
        ``half_transfers``: float32 values go from task to task as float16, half the bytes for a
        small loss that the report tells as measured (``report.rounding``); a piece that float16 has
        no range for goes as it is. Input and answer stay exact, as does what is no float32; not
        with ``strict``.
        Raises ``InvalidInput`` for what torch cannot export or onnxruntime refuses or a pin that no
        plan keeps, ``NotEnoughMemory`` with numbers when no plan fits, ``ClusterUnavailable`` when
        no worker can compute.
        """
        from cluster.models import deploy_message, model_and_shapes, offer_model  # onnx is heavy

        with self._lock:
            self._refuse_when_closed()
        given, fixed = model_and_shapes(model, example, shapes)
        with self._offers.held(partial(offer_model, given)) as offer:
            message = deploy_message(
                name,
                offer,
                fixed,
                plan=plan,
                image=image,
                memory=memory,
                pin=pin,
                objective=objective,
                spread=spread,
                strict=strict,
                half_transfers=half_transfers,
            )
            answer = self._ask(message, timeout_s)
        assert isinstance(answer, m.Deployed)
        spec = results.image_of(answer)
        return Deployment(name, answer.version, answer.plan, answer.report, spec)

    def models(self) -> tuple[m.ModelInfo, ...]:
        """Deployed models, all versions."""
        answer = self._ask(m.ListModels(call=secrets.token_hex(12)), CALL_S)
        assert isinstance(answer, m.Models)
        return answer.models

    def devices(self, *, lost: bool = False) -> tuple[m.DeviceInfo, ...]:
        """Devices, the coordinator's own (``head``) included; ``lost``: and those that died."""
        answer = self._ask(m.ListDevices(call=secrets.token_hex(12), lost=lost), CALL_S)
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
        wanted, left_s = results.wanted_outputs(outputs), results.deadline(deadline_s)
        here = self._on_device.infer(model, data, wanted, version, left_s)
        if here is not None:
            return here
        future = self.submit(model, data, outputs=outputs, version=version, deadline_s=deadline_s)
        try:
            return future.result()
        except BaseException:  # Ctrl-C as well: nobody waits for it any more
            future.cancel()
            raise

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
        PIL image, uint8 array [H, W, C]) for a model with an ``ImageSpec``. Arrays are numpy's or
        torch tensors, on any device. It is copied: change it as soon as this returns.
        ``outputs``: only these (all, if None); what lies behind them in the model is not computed,
        and inputs that only that needs may be left out. ``deadline_s``: after it the request fails
        with ``DeadlineExceeded``. While the cluster is full the future fails at once with
        ``QueueFull``, for as long as its ``retry_after_s`` told.
        """
        wanted = results.wanted_outputs(outputs)
        future: Future[Result] = Future()
        refusal = self._core.full.refusal(results.size_of(data), time.monotonic())
        if refusal is not None:
            future.set_exception(error_of(refusal))
            return future
        info = None if isinstance(data, Mapping) else self._info(model, version)
        arrays, picture = results.input_arrays(data, info)
        request = secrets.token_hex(12)
        header = m.Submit(
            request=request,
            model=model,
            version=version,
            inputs=results.describe_inputs(arrays),
            picture=picture,
            deadline_s=results.deadline(deadline_s),
            outputs=wanted,
            body=results.digest_of(arrays),
        )
        with self._lock:
            self._refuse_when_closed()
            self._results[request] = _Open(future, model, wanted)
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
        """Results in order, with at most ``max_in_flight`` requests open. A slow one does not hold
        up those behind it: up to ``limits.MAP_AHEAD`` times as many wait here for their turn."""
        submit = partial(self.submit, outputs=outputs, version=version, deadline_s=deadline_s)
        return results.in_order(submit, model, data, max_in_flight)

    # --- the end

    def close(self) -> None:
        """Fail what is open with ``ClusterUnavailable`` and disconnect."""
        with self._lock:
            self._closed = True
        self._loop.post(StopRequested())
        if threading.current_thread() is not self._thread:  # a future's callback may close us
            self._thread.join(timeout=_JOIN_S)
        self._on_device.close()
        self._folder.cleanup()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _run(self) -> None:
        failure = self._loop.run()
        error = closed_error() if failure is None else error_of(failure)
        with self._lock:
            self._closed, self._ended_by = True, error
            open_ = [each.future for each in self._results.values()]
            calls = list(self._calls.values())
            self._results.clear()
            self._calls.clear()
        for future in open_:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for call in calls:
            call.set_exception(error)

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
                self._loop.post(serve(self._offers, effect))
            case FindBlobs() | WriteBlob() | Granted() | Discard() | Lease():
                self._on_device.perform(effect)
            case _:
                raise AssertionError(f"a client cannot perform {effect}")

    def _resolve(self, request: str, reply: m.Reply, arrays: Mapping[str, Array]) -> None:
        with self._lock:
            found = self._results.pop(request, None)
        if found is None or not found.future.set_running_or_notify_cancel():
            return
        try:
            result = results.result_of(found.model, reply, arrays, found.wanted)
        except MeshInferError as error:
            found.future.set_exception(error)
        else:
            found.future.set_result(result)

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
        try:
            return future.result(timeout=timeout_s + _JOIN_S)
        except TimeoutError:
            raise ClusterUnavailable("the client hangs", hint="make a new Client") from None

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise self._ended_by or closed_error()

    def _info(self, model: str, version: int | None) -> m.ModelInfo:
        """What the coordinator knows of a version (of the current one, if None)."""
        return results.chosen(self.models(), model, version)
