"""Runs in every Python process of a lab whose PYTHONPATH has this folder: lets a worker die at a
state of its protocol that nobody outside can hit, when a file of its name says which.

The file, in $CHAOS_STATES: {"state": ..., "after": how many more times it may pass}. It is removed
at the moment of death. NAME.lies holds the share of tasks whose results are wrong. Everything else
in the process is as it is on a device.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

_FOLDER = os.environ.get("CHAOS_STATES", "")


def _watch() -> None:
    from cluster import blobs, loop
    from meshinfer.protocol import messages as m
    from meshinfer.scheduler import events

    name = json.loads(sys.orig_argv[-1])["name"]
    file = Path(_FOLDER) / name

    def reached(state: str, count: int = 1) -> None:
        """Die, if it is to be at this state, and now."""
        try:
            told = json.loads(file.read_text())
        except (OSError, ValueError):
            return
        if told["state"] != state:
            return
        if told["after"] >= count:
            file.write_text(json.dumps({"state": state, "after": told["after"] - count}))
            return
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    handle, send, write = loop.Loop._handle, loop.Loop._send, blobs.BlobStore.write

    def handled(self, event):  # type: ignore[no-untyped-def]
        if isinstance(event, events.Arrived) and isinstance(event.message, m.Deliver):
            reached("before ack")
        if isinstance(event, events.Computed):
            reached("after compute")
        handle(self, event)

    def sent(self, effect):  # type: ignore[no-untyped-def]
        deliver = isinstance(effect.message, m.Deliver)
        if deliver and effect.peer.startswith("w"):
            reached("mid-halo")
        send(self, effect)
        if deliver:
            reached("mid-send")

    def written(self, digest, offset, total, data):  # type: ignore[no-untyped-def]
        reached("mid-load", len(data))
        return write(self, digest, offset, total, data)

    loop.Loop._handle, loop.Loop._send = handled, sent
    blobs.BlobStore.write = written
    # A program that ends by itself, with a code: no signal tells of it.
    signal.signal(signal.SIGUSR2, lambda *_: os._exit(3))


def _lie() -> None:
    from meshinfer.engine.ort import OrtPrepared

    file = Path(_FOLDER) / f"{json.loads(sys.orig_argv[-1])['name']}.lies"
    honest = OrtPrepared.run

    def run(self, inputs):  # type: ignore[no-untyped-def]
        outputs = honest(self, inputs)
        if not file.exists() or random.random() >= float(file.read_text()):
            return outputs
        return [a + abs(a).max() + 1 if a.dtype.kind == "f" else a for a in outputs]

    OrtPrepared.run = run


if _FOLDER and "cluster.worker" in sys.orig_argv:
    _watch()
    _lie()
