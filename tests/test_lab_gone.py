"""A device that is gone without a word, between two PINGs of ZeroMQ, in the lab: its connection to
a control socket ends, though nothing is ever sent by it again.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from test_lab import FULL, python

from cluster.lab import Lab

COMMON = """
import sys, time
import psutil, zmq
from cluster.keys import generate_keypair
from cluster.sockets import Plane, configure
from meshinfer import limits
limits.KEEPALIVE_IDLE_S, limits.TCP_MAX_RETRANSMIT_MS, limits.SILENT_MOST_S = 2, 1000, 1.0
key, context = generate_keypair(), zmq.Context()
"""
SERVER = """
server = context.socket(zmq.ROUTER)
configure(server, Plane.CONTROL, server=key, plaintext=True)
print(server.bind_to_random_port("tcp://0.0.0.0"), flush=True)
for line in sys.stdin:
    heard = 0
    while server.poll(100):
        server.recv_multipart()
        heard += 1
        if heard == 50:
            break
    here = psutil.Process().net_connections("tcp")
    print(heard, sum(c.status == psutil.CONN_ESTABLISHED for c in here), flush=True)
"""
CLIENT = """
client = context.socket(zmq.DEALER)
configure(client, Plane.CONTROL, client=key, plaintext=True)
client.connect(sys.argv[1])
for _ in range(10_000):
    client.send(b"")
    time.sleep(0.005)
"""
CUT_S = 2.5
"""Until the kernel of the device has given up what was not acknowledged."""
ENDED_S = 10.0


@pytest.mark.root
def test_who_is_gone_between_two_pings_leaves_no_connection(lab_here: None) -> None:
    with Lab(FULL) as lab:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with lab.spawn(0, python(COMMON + SERVER), **pipes) as server:
            assert server.stdin is not None and server.stdout is not None
            address = f"tcp://{lab.address(0)}:{server.stdout.readline().strip()}"

            def ask() -> tuple[int, int]:
                assert server.stdin is not None and server.stdout is not None
                server.stdin.write("\n")
                server.stdin.flush()
                heard, connections = server.stdout.readline().split()
                return int(heard), int(connections)

            client = lab.spawn(1, python(COMMON + CLIENT, address))
            assert any(ask() == (50, 1) for _ in range(100)), "it speaks"
            lab.cut(1)
            client.kill()
            client.wait()
            time.sleep(CUT_S)
            lab.heal(1)
            until = time.monotonic() + ENDED_S
            while ask()[1]:
                assert time.monotonic() < until, "nobody is there, and it is connected"
                time.sleep(0.2)
            server.stdin.close()
