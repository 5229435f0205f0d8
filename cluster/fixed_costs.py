"""What the profiler times beside kernels: the hand-over to the compute thread, and messages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from cluster.keys import generate_keypair
from cluster.sockets import Endpoint, Plane, Received
from cluster.transport import Transport
from meshinfer.errors import ConfigurationError
from meshinfer.protocol import codec
from meshinfer.protocol import messages as m
from meshinfer.protocol.joining import Admission

LONGEST_S = 8.0
"""A slow device stops measuring after this; kinds without a rate are derived from the others."""


class HandOver:
    """What a compute thread does, there and back."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __enter__(self) -> Callable[[], None]:
        threading.Thread(target=self._compute, name="probe", daemon=True).start()
        return self._run

    def __exit__(self, *_: object) -> None:
        self.jobs.put(False)

    def _compute(self) -> None:
        while self.jobs.get():
            self.act()
            self.done.put(True)

    def _run(self) -> None:
        self.jobs.put(True)
        self.done.get()


class Wire:
    """A piece of a value goes from one transport of this process to another over loopback, is put
    in its place, and comes back: four ends of a message, with the I/O threads' encryption."""

    ENDS = 4

    def __init__(self, *, plaintext: bool) -> None:
        key, other = generate_keypair(), generate_keypair()
        admitted = Admission(other.public, "there", "worker")
        self.here = Transport("here#1", key, [admitted], plaintext=plaintext)
        self.there = Transport("there#1", other, plaintext=plaintext)
        try:
            port = self.here.bind(Plane.BULK, "127.0.0.1")
            endpoint = Endpoint("127.0.0.1", port, self.here.public_key)
            self.there.connect(Plane.BULK, "here#1", endpoint)
        except ConfigurationError:
            self.__exit__()
            raise

    def __enter__(self) -> Callable[[int], Callable[[], None]]:
        return self._of

    def __exit__(self, *_: object) -> None:
        self.here.close(linger_s=0.0)
        self.there.close(linger_s=0.0)

    def _of(self, nbytes: int) -> Callable[[], None]:
        """What sends a piece of so many bytes there and back."""
        piece, place = np.ones(nbytes // 4, np.float32), np.empty(nbytes // 4, np.float32)
        message = m.Deliver(
            id=1,
            request="request",
            attempt=1,
            deployment=1,
            consumer=(0, 0),
            slot=0,
            tensor=codec.describe("value", piece),
        )

        def run() -> None:
            ways = (self.there, "here#1", self.here), (self.here, "there#1", self.there)
            for sender, name, receiver in ways:
                sender.send(Plane.BULK, name, codec.encode(message, codec.payload_of(piece)))
                place[:] = _received(receiver)

        return run


def _received(transport: Transport) -> np.ndarray:
    """The piece that comes in. Raises ``ConfigurationError`` where loopback carries nothing."""
    ends = time.monotonic() + LONGEST_S
    while time.monotonic() < ends:
        for incoming in transport.receive(0.1):
            if isinstance(incoming, Received):
                message, payload = codec.decode(incoming.frames)
                assert isinstance(message, m.Deliver)
                return codec.array_of(message.tensor, payload)
    raise ConfigurationError(
        f"a message over loopback did not arrive within {LONGEST_S:.0f} s",
        hint="look at this device's firewall: 127.0.0.1 must be open to itself",
    )
