"""Connections by the numbers of descriptors: real sockets, and numbers that are used again."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from cluster.connections import Connection

HOST = "127.0.0.1"


class Pair:
    """Two ends of a connection, of which the near one is libzmq's, say."""

    def __init__(self) -> None:
        with socket.create_server((HOST, 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            self.near, _ = listener.accept()

    def is_open(self) -> bool:
        """Whether what is sent by it still arrives."""
        try:
            self.far.sendall(b"x")
            self.near.settimeout(1.0)
            return bool(self.near.recv(1))
        except OSError:
            return False

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_it_is_ended_for_both_and_once(pair: Pair) -> None:
    known = Connection.at(pair.near.fileno())
    assert known.hosts() == (HOST, HOST) and known.is_bound_to(pair.near.getsockname()[1])
    assert pair.is_open() and not known.spoiled
    known.end()
    assert known.spoiled and pair.far.recv(1) == b"" and not pair.is_open()


def test_a_number_that_is_anothers_by_now_is_not_touched(pair: Pair) -> None:
    known, number = Connection.at(pair.near.fileno()), pair.near.fileno()
    other = Pair()
    try:
        before, after = pair.near.detach(), other.near.detach()
        os.dup2(after, before)  # closed by libzmq, and given to somebody else
        other.near = socket.socket(fileno=before)
        os.close(after)
        assert other.near.fileno() == number
        known.end()
        known.end(if_silent=True)
        known.end(if_silent=True)
        assert not known.spoiled and other.is_open()
    finally:
        other.close()


def test_what_is_no_connection_is_left_alone() -> None:
    reading, writing = os.pipe()
    try:
        for known in (Connection.at(reading), Connection.at(1 << 20)):
            known.end()
            known.end(if_silent=True)
            assert not known.spoiled and known.hosts() == ("", "")
        assert os.write(writing, b"x") == 1 and os.read(reading, 1) == b"x"
    finally:
        os.close(reading)
        os.close(writing)


def test_one_by_which_much_comes_is_not_silent(pair: Pair) -> None:
    known = Connection.at(pair.near.fileno())

    def says(size: int) -> None:
        pair.far.sendall(bytes(size))
        deadline = time.monotonic() + 5.0
        while size and time.monotonic() < deadline:
            size -= len(pair.near.recv(size))

    known.end(if_silent=True)  # nothing is known of before
    says(100_000)
    known.end(if_silent=True)
    says(100_000)
    known.end(if_silent=True)
    assert not known.spoiled
    says(1_000)  # acknowledgements of other things
    known.end(if_silent=True)
    assert known.spoiled
