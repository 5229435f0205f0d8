"""A network where a piece may come once more when the next attempt of its request has begun.

A sender repeats what is not acknowledged, so that two of a kind may be under way; what is late must
not be taken for what is new.
"""

from __future__ import annotations

from collections import defaultdict

from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.enrolment import Door
from meshinfer.simulator.network import Network, Noise
from meshinfer.simulator.node import Node, Timing
from meshinfer.simulator.streams import Streams


class Copies(Network):
    """``copied``: the chance of a piece to come again; ``copies``: how many did."""

    def __init__(
        self, streams: Streams, timing: Timing, noise: Noise, door: Door | None = None
    ) -> None:
        self.copied, self.copies = 0.0, 0
        self._early: defaultdict[tuple[str, str], list[tuple[Node, m.Deliver, memoryview]]]
        self._early = defaultdict(list)
        super().__init__(streams, timing, noise, door)

    def _deliver(self, sender: Node, receiver: Node, plane: e.Plane, message: m.AnyMessage,
                 payload: memoryview, extra: float) -> None:  # fmt: skip
        super()._deliver(sender, receiver, plane, message, payload, extra)
        if not self.copied or not isinstance(message, m.Deliver | m.Start):
            return
        key = receiver.id, message.request
        late = [early for early in self._early[key] if early[1].attempt < message.attempt]
        self._early[key] = [early for early in self._early[key] if early not in late]
        for maker, piece, data in late:
            if maker.here and self._connected(maker, receiver):
                self.copies += 1
                self.tell_story(lambda piece=piece: f"    ... AGAIN {piece}")  # type: ignore[misc]
                super()._deliver(maker, receiver, e.Plane.BULK, piece, data, 0.0)
        if isinstance(message, m.Deliver) and self.streams["copies"].random() < self.copied:
            self._early[key].append((sender, message, payload))

    def _connected(self, sender: Node, receiver: Node) -> bool:
        linked = receiver.id in sender.links or sender.id in receiver.links
        return linked and (sender.name, receiver.name) not in self._blocks
