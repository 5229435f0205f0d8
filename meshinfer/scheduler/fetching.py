"""Models on their way from the client that deploys them: which blobs are missing, and come.

A model whose blobs do not come, or are not what they were announced to be, fails its deployment.
"""

from __future__ import annotations

from collections.abc import Callable

from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import refuse_deploy
from meshinfer.scheduler.catalogue import Catalogue, Model
from meshinfer.scheduler.events import (
    BlobsFound,
    BlobWritten,
    Effect,
    FindBlobs,
    OpenModel,
    Plane,
    Send,
)
from meshinfer.scheduler.puller import Puller


class Fetching:
    """Mutable: owned by the coordinator's core. ``fail`` ends the deployment of a model."""

    def __init__(
        self, catalogue: Catalogue, fail: Callable[[Model, m.Failure], list[Effect]]
    ) -> None:
        self._catalogue = catalogue
        self._fail = fail
        self._puller = Puller()

    def deploy(self, peer: str, message: m.Deploy, now: float) -> list[Effect]:
        before = self._catalogue.asked(peer, message.call)
        if before is not None:  # asked again, since its connection broke
            return [] if before.answer is None else [_to(peer, before.answer)]
        failure = refuse_deploy(self._catalogue, message)
        if failure is not None:
            answer = m.Deployed(call=message.call, name=message.name, failure=failure)
            return [_to(peer, answer)]
        model = self._catalogue.open(message, peer, now)
        return [FindBlobs(str(model.key), tuple(model.blobs))]

    def found(self, event: BlobsFound, now: float) -> list[Effect]:
        model = self._catalogue.opening.get(int(event.purpose))
        if model is None or model.call is None:
            return []
        model.missing = set(event.missing)
        if not model.missing:
            return [OpenModel(model.key, model.digest, model.image)]
        effects: list[Effect] = []
        for digest in event.missing:
            effects += self._puller.want(digest, model.call.peer, now, model.blobs[digest])
        return effects

    def chunk(self, peer: str, chunk: m.Chunk, data: memoryview, now: float) -> list[Effect]:
        return self._puller.arrived(peer, chunk, data, now)

    def written(self, event: BlobWritten) -> list[Effect]:
        self._puller.done(event.digest)
        if event.failure is not None:
            if event.failure.error == "ClusterUnavailable":  # the disk, and not the model
                return self._blob_failed(event.digest, event.failure)
            return self._blob_lost(event.digest, event.failure.message)
        effects: list[Effect] = []
        for model in self._catalogue.opening.values():
            if event.digest in model.missing:
                model.missing.discard(event.digest)
                if not model.missing:
                    effects.append(OpenModel(model.key, model.digest, model.image))
        return effects

    def gone(self, peer: str, digest: str) -> list[Effect]:
        """The client has not the blob that it announced."""
        asked = any(
            digest in o.missing and o.asked.peer == peer for o in self._catalogue.opening.values()
        )
        return self._blob_lost(digest, "the client has lost the model") if asked else []

    def client_gone(self, peer: str) -> list[Effect]:
        effects: list[Effect] = []
        for digest in self._puller.forget_peer(peer):
            effects += self._blob_lost(digest, "the client is gone")
        return effects

    def connection_cut(self, peer: str, now: float) -> None:
        self._puller.hasten(peer, now)

    def _blob_lost(self, digest: str, why: str) -> list[Effect]:
        failure = m.Failure(
            error="InvalidInput", message=f"the model did not arrive: {why}", hint="deploy it again"
        )
        return self._blob_failed(digest, failure)

    def _blob_failed(self, digest: str, failure: m.Failure) -> list[Effect]:
        self._puller.done(digest)
        effects: list[Effect] = []
        for model in [o for o in self._catalogue.opening.values() if digest in o.missing]:
            effects += self._fail(model, failure)
        return effects

    def due(self, now: float) -> list[Effect]:
        effects, failed = self._puller.due(now)
        for digest in failed:
            effects += self._blob_lost(digest, "the client does not send it")
        return effects

    def next_deadline(self) -> float | None:
        return self._puller.next_deadline()


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
