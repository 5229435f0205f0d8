"""Connects to a Ray cluster in a process of its own, so that whatever becomes of it does no harm.

Ray tries a refused token again for 20 s and an address without a cluster for longer, and some of
its faults end the process. Here the first word of either is the answer.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time

from meshinfer.errors import AuthError, ClusterUnavailable, MeshInferError

_POLL_S = 0.02
_SAID_CHARS = 300
_DONE = "meshinfer-probe: "
_REFUSED = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError")
_HINT = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token "
    "(on its head: ray get-auth-token)"
)


def probe(address: str, timeout_s: float) -> None:
    """Return if this process could join the Ray cluster at ``address``: "auto" or HOST:PORT. Raises
    ``AuthError``, ``ClusterUnavailable``."""
    command = [sys.executable, "-m", "cluster.ray_backend.probe", address, str(os.getpid())]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            ends = time.monotonic() + timeout_s
            while True:
                over = process.poll() is not None
                text = os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")
                error = _error(address, text, over)
                if over and error is None:
                    return
                if error is not None:
                    raise error
                if time.monotonic() > ends:
                    raise _unreachable(address, f"nothing answers within {timeout_s:.0f} s")
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()


def _error(address: str, text: str, over: bool) -> MeshInferError | None:
    """What the text says so far, and at last. ``over``: there will be no more."""
    if any(word in text for word in _REFUSED):
        return AuthError(
            f"the Ray cluster at {address} refuses this process's token, or it has none",
            hint=_HINT,
        )
    if not over or f"{_DONE}ok" in text:
        return None
    told = text.rpartition(_DONE)[2] if _DONE in text else text
    return _unreachable(address, told.strip()[-_SAID_CHARS:] or "it ended without a word")


def _unreachable(address: str, why: str) -> ClusterUnavailable:
    return ClusterUnavailable(
        f"no Ray cluster can be joined at {address}: {why}",
        hint="start one (ray start --head), run this on one of its nodes, and give the address of "
        "its head's GCS: ray://HOST:6379, or ray://auto",
    )


def main(address: str, parent: int) -> None:
    import ray

    from cluster import processes

    processes.watch_parent(parent, lambda: os._exit(0))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        outcome = "ok"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    print(f"{_DONE}{outcome}", flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
