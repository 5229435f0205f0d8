"""``python -m cluster.lab.joined REQUEST``: wait, inside a lab, until workers have joined."""

from __future__ import annotations

import sys
import time
from typing import Final

import msgspec

from cluster.client import Client
from meshinfer.errors import MeshInferError

_POLL_S: Final = 0.05


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coordinator, its keyring, the names of the devices to wait for, and how long."""

    address: str
    keyring: str
    names: list[str]
    timeout_s: float


def wait(request: Request) -> str:
    """Empty once all are there, else what is missing."""
    deadline = time.monotonic() + request.timeout_s
    wanted = set(request.names)
    with Client(request.address, keyring=request.keyring, timeout_s=request.timeout_s) as client:
        while missing := wanted - {device.device for device in client.devices()}:
            if time.monotonic() > deadline:
                return f"devices {', '.join(sorted(missing))} did not join"
            time.sleep(_POLL_S)
    return ""


def main(arguments: list[str]) -> int:
    """0 when all have joined, else 1 and the reason on stderr."""
    try:
        missing = wait(msgspec.json.decode(arguments[0], type=Request))
    except MeshInferError as error:
        missing = str(error)
    sys.stderr.write(missing)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
