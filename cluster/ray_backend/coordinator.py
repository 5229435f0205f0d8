"""What the coordinator is on a cluster of our own, in the client's process: who is there, and where
requests wait for a plan and for their turn."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.blobs import BlobStore
from cluster.ray_backend.nodes import Asks, Nodes
from cluster.ray_backend.plans import LOOK_S, Plans
from cluster.ray_backend.serving import Serving
from cluster.results import closed_error
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, DeadlineExceeded, MeshInferError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of
from meshinfer.scheduler.admission import refuse_deploy, unavailable
from meshinfer.scheduler.catalogue import Model
from meshinfer.scheduler.events import Signature

_log = logging.getLogger("meshinfer.ray")
"""The host program's: its handlers decide what is shown."""
_STARTING_LOOK_S = 0.05
_FIRST_S = 120.0
"""The first actor on a node imports onnxruntime, maybe from a slow disk."""
_MORE_TIMES, _MORE_S = 3.0, 2.0
_END_S = 2.0


class RayCoordinator:
    """Mutable, under ``changed``. Any thread may call what has no underscore."""

    def __init__(self, ray: Any, asks: Asks, folder: Path, timeout_s: float) -> None:
        self.ray, self.changed = ray, threading.Condition(threading.RLock())
        self.nodes = Nodes(ray, asks, self.changed)
        self.store = BlobStore(folder)
        self.closed = False
        self._look_first(timeout_s)
        self.plans = Plans(ray, self.store, self.nodes, self.changed)
        self.catalogue = self.plans.catalogue
        self._thread = threading.Thread(target=self._look_on, name="ray-nodes", daemon=True)
        self._thread.start()

    # --- models

    def deploy(self, message: m.Deploy, timeout_s: float) -> m.Deployed:
        """Until it can serve. The blobs are in the store. Raises what is wrong with it."""
        ends = time.monotonic() + timeout_s
        with self.changed:
            self.refuse_when_closed()
            failure = refuse_deploy(self.catalogue, message)
            if failure is not None:
                raise error_of(failure)
            model = self.catalogue.open(message, "client", time.monotonic())
            self.changed.notify_all()
            while model.answer is None:
                try:
                    self.refuse_when_closed()
                    self._refuse_without_nodes(time.monotonic())
                    if time.monotonic() > ends:
                        raise ClusterUnavailable(
                            f"{message.name} could not be deployed within {timeout_s:.0f} s",
                            hint="give a longer timeout_s, or look at client.devices()",
                        )
                except MeshInferError:
                    self.catalogue.opening.pop(model.key, None)
                    raise
                self.changed.wait(LOOK_S)
            if model.answer.failure is not None:
                raise error_of(model.answer.failure)
            return model.answer

    # --- requests

    def serving(
        self, model: Model, signature: Signature, ends: float, is_dropped: Callable[[], bool]
    ) -> Serving:
        """What a request is to run under, once there is a turn; ``done`` ends that. Raises
        ``DeadlineExceeded`` and why there is no plan."""
        with self.changed:
            signature = model.asked_for(signature)
            self.changed.notify_all()
            while True:
                self.refuse_when_closed()
                now = time.monotonic()
                found = self.plans.find((model.key, signature))
                if found is not None and found.running < found.most_running:
                    found.running += 1
                    return found
                if found is None:
                    self.plans.refuse((model.key, signature))
                    self._refuse_without_nodes(now)
                if now >= ends or is_dropped():
                    raise DeadlineExceeded(
                        "no device was free, or planned for, before the deadline",
                        hint="give a longer deadline_s, or look at client.devices()",
                    )
                self.changed.wait(min(ends - now, LOOK_S))

    def done(self, serving: Serving) -> None:
        with self.changed:
            self.plans.over(serving)
            self.changed.notify_all()

    def lost(self, serving: Serving, whom: dict[str, str]) -> None:
        """Actors of a plan that are gone, and why. It may serve without them."""
        with self.changed:
            for name, why in whom.items():
                _log.info("the actor of %s is lost: %s", name, why)
                self.nodes.lost(name, serving.actors[name], why)
            self.changed.notify_all()

    def close(self) -> None:
        """Fail what waits, and end the actors."""
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.changed.notify_all()
        self.plans.close()
        self._thread.join(timeout=_END_S)
        with contextlib.suppress(Exception):  # whatever has become of the cluster
            self.nodes.end(_END_S)

    # --- inside: nodes

    def _look_first(self, timeout_s: float) -> None:
        """Until it is known of every node whether it computes; when one does, others get some times
        as long as it took. Raises ``ClusterUnavailable``."""
        begun = time.monotonic()
        ends = begun + min(timeout_s, _FIRST_S)
        one_took = 0.0
        while True:
            self.nodes.look()
            now = time.monotonic()
            ready, starting = self.nodes.ready(), self.nodes.starting()
            if ready and not one_took:
                one_took = now - begun
                ends = min(ends, now + max(_MORE_S, _MORE_TIMES * one_took))
            over = now > ends or not starting
            if ready and over:
                return
            if over:
                with contextlib.suppress(Exception):
                    self.nodes.end(0.0)
                raise ClusterUnavailable(
                    "no node of the Ray cluster computes: " + "; ".join(self.nodes.left_out()),
                    hint="see ray status for what is free; ask for less with cpus=, gpus= and "
                    "resources=, and install meshinfer on each node",
                )
            time.sleep(_STARTING_LOOK_S)

    def _look_on(self) -> None:
        while True:
            with self.changed:
                starting = bool(self.nodes.starting())
                self.changed.wait(_STARTING_LOOK_S if starting else LOOK_S)
                if self.closed:
                    return
            try:
                self.nodes.look()
            except Exception as error:
                if self.closed:
                    return
                _log.warning("Ray does not tell of its nodes: %s", str(error)[: limits.CAUSE_CHARS])
                time.sleep(LOOK_S)

    def _refuse_without_nodes(self, now: float) -> None:
        idle = not self.nodes.ready()
        if idle and now > self.nodes.idle_since + limits.NO_WORKER_GRACE_S:
            why = "; ".join(self.nodes.left_out()) or "none is alive"
            failure = unavailable(f"no node of the Ray cluster computes: {why}", "see ray status")
            raise error_of(failure)

    def refuse_when_closed(self) -> None:
        if self.closed:
            raise closed_error()
