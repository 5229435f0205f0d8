"""What shells give to their threads and their disks, in virtual time: blobs, plans, kernels."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable

from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, decode, encode
from meshinfer.scheduler import events as e
from meshinfer.scheduler.ledger import Ledger
from meshinfer.simulator.node import Node, Timing


class Shells(ABC):
    """The part of a world that performs what is not I/O of sockets. ``ledger``: what is on the
    coordinator's disk; it outlives the coordinator."""

    timing: Timing
    ledger: Ledger
    search: int | None

    @abstractmethod
    def post(self, node: Node, event: e.Event, after: float) -> None: ...

    @abstractmethod
    def tell_story(self, line: Callable[[], str]) -> None: ...

    @abstractmethod
    def _send(self, sender: Node, send: e.Send) -> None: ...

    def _encoded(self, sender: Node, send: e.Send) -> list[Buffer]:
        return encode(send.message, send.payload)

    def _decoded(self, receiver: Node, frames: list[Buffer]) -> tuple[m.AnyMessage, memoryview]:
        return decode(frames)

    def _work(self, node: Node, effect: e.Effect) -> None:
        """What a shell gives to its threads and to its disk."""
        disk_s = self.timing.disk_s
        match effect:
            case e.Record():
                self._record(node, effect)
            case e.FindBlobs(purpose, digests):
                missing = tuple(d for d in digests if d not in node.blobs)
                self.post(node, e.BlobsFound(purpose, missing), disk_s)
            case e.WriteBlob():
                self._write(node, effect)
            case e.ServeBlob():
                self._serve(node, effect)
            case e.Prepare():
                self.post(node, self._prepare(node, effect), disk_s)
            case e.Discard(deployment):
                node.prepared.pop(deployment, None)
                node.granted.pop(deployment, None)
            case e.Compute(request=""):  # on made-up inputs: only what it takes is asked
                took = self._seconds(node, effect)
                done = e.Computed("", 0, effect.place, (), took, again=True)
                self.post(node, done, took)
            case e.Compute():
                took = self._seconds(node, effect)
                self.post(node, self._compute(node, effect, took), took)
            case e.OpenModel():
                self._drop_search(node)
                self.post(node, self._open(node, effect), self.timing.plan_s)
            case e.MakePlan():
                self._drop_search(node)
                if effect.share < 1.0:
                    self.search = effect.deployment
                self.post(node, self._plan(node, effect), self._search_s() / effect.share)
            case e.Renew(peer):
                self._renew(node, peer)
            case _:
                raise AssertionError(f"no shell performs {effect}")

    def _renew(self, node: Node, peer: str) -> None:
        """A connection is made anew; where none is broken it loses nothing."""
        self.tell_story(lambda: f"{node} begins its connection with {peer} anew")

    def _record(self, node: Node, effect: e.Record) -> None:
        failure = self._disk(effect)
        if failure is not None:
            self.post(node, e.RecordFailed(effect.number, failure), self.timing.disk_s)
            return
        self.ledger.apply(effect.entries)  # whether or not it lives to hear of it
        self.post(node, e.Recorded(effect.number), self.timing.disk_s)

    def _disk(self, record: e.Record) -> m.Failure | None:
        """Why something cannot be written, if so."""
        return None

    def _search_s(self) -> float:
        return self.timing.plan_s

    def _drop_search(self, node: Node) -> None:
        """What is urgent ends a search that nobody waits for; one that is over already is known."""
        if self.search is not None:
            self.post(node, e.PlanReady(self.search, dropped=True), 0.0)
            self.search = None

    def _write(self, node: Node, effect: e.WriteBlob) -> None:
        part = node.parts.setdefault(effect.digest, bytearray())
        if not effect.offset:
            part.clear()
        assert len(part) == effect.offset, "chunks are written in order"
        part += effect.data
        if len(part) < effect.total:
            return
        data = bytes(node.parts.pop(effect.digest))
        failure = None
        if hashlib.sha256(data).hexdigest() != effect.digest:
            failure = m.Failure(error="MeshInferError", message="its bytes are not its SHA-256's")
        else:
            self._store(node, effect.digest, data)
        self.post(node, e.BlobWritten(effect.digest, failure), self.timing.disk_s)

    def _store(self, node: Node, digest: str, data: bytes) -> None:
        node.blobs[digest] = data

    def _serve(self, node: Node, effect: e.ServeBlob) -> None:
        data = node.blobs.get(effect.digest)
        if data is None:
            message: m.AnyMessage = m.Gone(digest=effect.digest)
            self._send(node, e.Send(e.Plane.BULK, effect.peer, message))
            return
        message = m.Chunk(digest=effect.digest, offset=effect.offset, total=len(data))
        body = data[effect.offset : effect.offset + effect.length]
        self._send(node, e.Send(e.Plane.BULK, effect.peer, message, body))

    @abstractmethod
    def _seconds(self, node: Node, job: e.Compute) -> float: ...

    @abstractmethod
    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared: ...

    @abstractmethod
    def _compute(self, node: Node, job: e.Compute, took: float) -> e.Computed: ...

    @abstractmethod
    def _open(self, node: Node, effect: e.OpenModel) -> e.ModelOpened: ...

    @abstractmethod
    def _plan(self, node: Node, effect: e.MakePlan) -> e.PlanReady: ...
