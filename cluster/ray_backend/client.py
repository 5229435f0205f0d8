"""``mi.Client("ray://...")``: the same methods over a Ray cluster, in the caller's threads.

Models live in this process and on actors that it owns: they end with it. Whatever a ``Client`` of a
cluster of our own promises that Ray cannot keep is refused.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from cluster import results
from cluster.offers import Offer, Put
from cluster.ray_backend import session
from cluster.ray_backend.coordinator import RayCoordinator
from cluster.ray_backend.nodes import HEAD, STARTING, Asks, Node
from cluster.ray_backend.requests import Asked, Requests, unavailable
from cluster.results import Deployment, Result
from meshinfer import limits
from meshinfer.errors import InvalidInput, MeshInferError, QueueFull
from meshinfer.image import ImageSpec
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of
from meshinfer.scheduler.admission import refuse, signature_of

DEPLOY_S = 600.0
CONNECT_S = 60.0


class RayClient:
    """A Ray cluster, run by this process, which must be on one of its nodes.

    ``address``: ``ray://auto``, or ``ray://HOST:PORT`` of the head's GCS. ``cpus``, ``gpus`` and
    ``resources``: what each actor asks of its node, as Ray counts it; one actor a node, with as
    many threads as whole ``cpus`` (kernels run on processors). Nodes without so much are left out,
    as ``devices`` says. Raises ``ConfigurationError`` where Ray is not installed,
    ``ClusterUnavailable`` and ``AuthError``.
    """

    def __init__(
        self,
        address: str = "ray://auto",
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        timeout_s: float = CONNECT_S,
        **others: Any,
    ) -> None:
        if others:
            raise InvalidInput(
                f"{sorted(others)} are not for a Ray cluster",
                hint="Ray has its own keys (RAY_AUTH_MODE=token); give cpus=, gpus=, resources=",
            )
        if not cpus > 0 or gpus < 0 or any(amount < 0 for amount in (resources or {}).values()):
            raise InvalidInput(
                f"cpus={cpus}, gpus={gpus}, resources={resources}", hint="give amounts above 0"
            )
        self._closed = threading.Event()
        self._open = 0
        self._lock = threading.Lock()
        self._ray, self._ours = session.join(address, timeout_s)
        self._folder = tempfile.TemporaryDirectory(prefix="meshinfer-ray-client-")
        try:
            asks = Asks(cpus, gpus, dict(resources or {}))
            folder = Path(self._folder.name)
            self._coordinator = RayCoordinator(self._ray, asks, folder, timeout_s)
        except BaseException:
            self._leave()
            raise
        self._requests = Requests(self._coordinator)

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
        """As ``Client.deploy``. ``pin`` raises ``InvalidInput``: Ray decides where its objects lie,
        and sends small ones by way of this process."""
        from cluster.models import deploy_message, model_and_shapes  # onnx is heavy

        if pin:
            raise InvalidInput(
                f"{sorted(pin)} cannot be pinned on a Ray cluster: Ray decides where objects lie",
                hint="use a cluster of MeshInfer's own where values must not leave a device",
            )
        given, fixed = model_and_shapes(model, example, shapes)
        offer = self._stored(given)
        message = deploy_message(
            name,
            offer,
            fixed,
            plan=plan,
            image=image,
            memory=memory,
            objective=objective,
            spread=spread,
            strict=strict,
            half_transfers=half_transfers,
        )
        answer = self._coordinator.deploy(message, timeout_s)
        spec = results.image_of(answer)
        return Deployment(name, answer.version, answer.plan, answer.report, spec)

    def models(self) -> tuple[m.ModelInfo, ...]:
        """Models that this client has deployed, all versions."""
        with self._coordinator.changed:
            self._coordinator.refuse_when_closed()
            return self._coordinator.plans.infos()

    def devices(self, *, lost: bool = False) -> tuple[m.DeviceInfo, ...]:
        """A device for each node of the cluster, and this process (``head``); ``lost``: and those
        that died."""
        with self._coordinator.changed:
            nodes = sorted(self._coordinator.nodes.all.values(), key=lambda n: n.name)
            head = m.DeviceInfo(
                device=HEAD, state="ready", facts=m.Facts(computes=False, head=True), heard_s=0.0
            )
            return (head, *(_info(n) for n in nodes if lost or n.state != "dead"))

    @property
    def admitting(self) -> Any:
        """Raises ``InvalidInput``: who may join is Ray's matter."""
        raise InvalidInput(
            "a Ray cluster admits its own nodes and clients",
            hint="give it a token: RAY_AUTH_MODE=token, on each node and for each client",
        )

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
        """As ``Client.infer``."""
        asked = self._asked(model, data, outputs, version, deadline_s, copy=False)
        return self._answer(asked)

    def submit(
        self,
        model: str,
        data: object,
        *,
        outputs: Sequence[str] | None = None,
        version: int | None = None,
        deadline_s: float | None = None,
    ) -> Future[Result]:
        """As ``Client.submit``; each open request has a thread of this process."""
        future: Future[Result] = Future()
        try:
            asked = self._asked(model, data, outputs, version, deadline_s, copy=True)
        except QueueFull as error:
            future.set_exception(error)
            return future

        def run() -> None:
            try:
                outcome, error = self._answer(asked), None
            except BaseException as raised:
                outcome, error = None, raised
            if not future.set_running_or_notify_cancel():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(outcome)  # type: ignore[arg-type]

        def drop(done: Future[Result]) -> None:
            asked.cancelled = done.cancelled()

        future.add_done_callback(drop)
        name = f"ray-request-{asked.header.request}"
        threading.Thread(target=run, name=name, daemon=True).start()
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
        """As ``Client.map``."""
        submit = partial(self.submit, outputs=outputs, version=version, deadline_s=deadline_s)
        return results.in_order(submit, model, data, max_in_flight)

    # --- the end

    def close(self) -> None:
        """Fail what is open with ``ClusterUnavailable``, and end the actors."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self._coordinator.close()
        self._leave()

    def __enter__(self) -> RayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _leave(self) -> None:
        if self._ours:
            session.leave(self._ray)
        self._folder.cleanup()

    def _stored(self, model: object) -> Offer:
        """The model and its weights in our store, where the process that plans finds them."""
        from cluster.models import offer_model

        store = self._coordinator.store
        put: Put = store.put
        offer = offer_model(model, put)
        for digest, segment in offer.files.items():
            if store.missing((digest,)):
                size = limits.BLOB_CHUNK_BYTES
                for start in range(0, max(segment.nbytes, 1), size):
                    data = memoryview(segment.read(start, size))
                    store.write(digest, start, segment.nbytes, data)
        return offer

    def _asked(
        self,
        name: str,
        data: object,
        outputs: Sequence[str] | None,
        version: int | None,
        deadline_s: float | None,
        *,
        copy: bool,
    ) -> Asked:
        """An accepted request. Raises why it is refused."""
        begun, wanted = time.monotonic(), results.wanted_outputs(outputs)
        left_s = results.deadline(deadline_s)
        named = isinstance(data, Mapping)
        info = None if named else results.chosen(self.models(), name, version)
        arrays, picture = results.input_arrays(data, info, copy=copy)
        header = m.Submit(
            request=secrets.token_hex(12),
            model=name,
            version=version,
            inputs=results.describe_inputs(arrays),
            picture=picture,
            deadline_s=left_s,
            outputs=wanted,
        )
        with self._coordinator.changed:
            self._coordinator.refuse_when_closed()
            failure = refuse(self._coordinator.catalogue, header)
            if failure is not None:
                raise error_of(failure)
            found = self._coordinator.catalogue.find(name, version)
            assert found is not None
            if self._open >= limits.QUEUE_REQUESTS:
                raise QueueFull(
                    f"{self._open} requests are open", hint="submit again when some are answered"
                )
            self._open += 1
        return Asked(
            header, arrays, found, signature_of(found, header), wanted, begun, begun + left_s
        )

    def _answer(self, asked: Asked) -> Result:
        try:
            return self._requests.answer(asked)
        except (MeshInferError, KeyboardInterrupt):
            raise
        except Exception as error:
            with contextlib.suppress(AttributeError):
                if isinstance(error, self._ray.exceptions.RayError):
                    raise unavailable(error) from error
            raise
        finally:
            with self._coordinator.changed:
                self._open -= 1


def _info(node: Node) -> m.DeviceInfo:
    cause = node.cause
    if node.state in STARTING:
        cause = "it waits for room on its node, or starts"
    return m.DeviceInfo(
        device=node.name,
        state="excluded" if cause and node.state != "dead" else node.state,
        facts=node.facts,
        heard_s=max(0.0, time.monotonic() - node.since) if node.state == "dead" else 0.0,
        tasks_done=node.tasks_done,
        link=node.link,
        where=node.host,
        cause=cause,
        returns_s=max(0.0, node.until - time.monotonic()) if math.isfinite(node.until) else 0.0,
    )
