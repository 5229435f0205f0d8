"""A wait finds every socket that has something to say, whoever has read what the kernel knew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from cluster.readiness import Readiness
from cluster.sockets import POLLIN, events_of, receive_whole
from cluster.waking import Waker

LONG_S = 3600.0
"""Nobody waits so long, unless something is missed: then the test's time is over first."""


class Sockets:
    """Makes sockets, and closes them all."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.made: list[zmq.Socket] = []

    def one(self, mark: int = 1000) -> zmq.Socket:
        made = self.context.socket(zmq.PAIR)
        made.linger, made.sndhwm, made.rcvhwm = 0, mark, mark
        self.made.append(made)
        return made

    def pair(self, mark: int = 1000) -> tuple[zmq.Socket, zmq.Socket]:
        """Two connected ones that hold so many messages in each direction."""
        one, other = self.one(mark), self.one(mark)
        one.bind("inproc://here")
        other.connect("inproc://here")
        return one, other


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    for each in made.made:
        each.close()
    made.context.term()


@pytest.fixture
def waker() -> Waker:
    return Waker()


@pytest.fixture
def ready(waker: Waker) -> Iterator[Readiness]:
    made = Readiness(waker)
    yield made
    made.close()


def test_only_what_has_something_to_say_is_found(sockets: Sockets, ready: Readiness) -> None:
    (one, other), idle = sockets.pair(), sockets.one()
    for each in (one, idle):
        ready.add(each)
    assert ready.wait(0.0) == set(), "nothing was said yet"
    other.send(b"x")
    assert ready.wait(LONG_S) == {one}
    assert not ready.woken


def test_what_was_read_to_its_end_is_found_only_when_there_is_more(
    sockets: Sockets, ready: Readiness
) -> None:
    one, other = sockets.pair()
    ready.add(one)
    for _ in range(3):
        other.send(b"x")
        assert ready.wait(LONG_S) == {one}
        assert receive_whole(one, expected=True) is not None
        assert receive_whole(one) is None
        assert ready.wait(0.0) == set()


def test_a_message_that_the_descriptor_does_not_tell_of_any_more_is_found_by_doubt(
    sockets: Sockets, ready: Readiness
) -> None:
    """As after a send: it processes what came in the meantime."""
    one, other = sockets.pair()
    ready.add(one)
    ready.wait(0.0)
    other.send(b"x")
    assert one.poll(20_000), "it is here"
    assert events_of(one) & POLLIN
    assert ready.wait(0.0) == set(), "this is what the doubt is for"
    ready.doubt(one)
    assert ready.wait(LONG_S) == {one}


def test_a_wait_ends_when_a_full_socket_has_room(sockets: Sockets, ready: Readiness) -> None:
    one, other = sockets.pair(mark=1)
    ready.add(one)
    sent = 0
    while one.poll(0, zmq.POLLOUT) and sent < 10:
        one.send(b"x", zmq.DONTWAIT)
        sent += 1
    assert 0 < sent < 10, "it is full"
    ready.await_room(one, full=True)
    assert ready.wait(0.0) == set()
    for _ in range(sent):
        other.recv()
    assert ready.wait(LONG_S) == set(), "it has nothing to say, and room"
    other.send(b"x")
    assert ready.wait(LONG_S) == {one}, "what it says is heard while it waits for room"
    ready.await_room(one, full=False)


def test_what_was_removed_and_what_is_closed_then_is_not_asked_any_more(
    sockets: Sockets, ready: Readiness
) -> None:
    one, other = sockets.pair()
    ready.add(one)
    other.send(b"x")
    ready.doubt(one)
    ready.await_room(one, full=True)
    ready.remove(one)
    one.close()
    assert ready.wait(0.0) == set()


def test_a_waker_ends_a_wait_once(ready: Readiness, waker: Waker) -> None:
    waker.wake()
    waker.wake()
    assert ready.wait(LONG_S) == set()
    assert ready.woken
    assert ready.wait(0.0) == set()
    assert not ready.woken
