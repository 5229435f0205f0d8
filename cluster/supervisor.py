"""The small process over a worker: starts it, says why it died, starts it again. No engine here.

Standard library only, so that it costs a Pi little. Exit codes that a restart cannot mend (usage, a
refusal, a protocol or configuration error) end the supervisor with the same code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from cluster import notify
from cluster.doing import Doing, new_page
from cluster.processes import cause_of, oom_kills, was_killed, watch_parent

FINAL_CODES = frozenset((0, 2, 76, 77, 78))
_FIRST_WAIT_S, _LONGEST_WAIT_S, _HEALTHY_S = 0.2, 5.0, 30.0
_LOOK_S = 0.05
_NO_ENGINE_CODE, _ILLEGAL_TIMES = 78, 2
_NO_ENGINE = "its engine does not run on this processor; meshinfer doctor says more"


def supervise(options: dict[str, Any]) -> int:
    """Run ``cluster.worker`` until it ends for good; the exit code to leave with.

    SIGTERM and SIGINT go on to the worker, which drains; a second one stops it.
    """
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        nonlocal stopping
        stopping = True
        notify.stopping()
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    if options.get("parent"):
        watch_parent(options["parent"], lambda: os._exit(0))  # the worker sees it and follows
    notify.enable(of_another=bool(options.get("parent")))
    page = new_page()
    doing, wait = Doing(page), _FIRST_WAIT_S
    ended: dict[str, Any] | None = None
    illegal = 0
    while not stopping:
        text = json.dumps({**options, "ended": ended, "parent": os.getpid(), "doing": page})
        before, started = oom_kills(), time.monotonic()
        doing.end()
        child = subprocess.Popen([sys.executable, "-m", "cluster.worker", text], pass_fds=(page,))
        if stopping:  # the signal came before there was a child to send it on to
            child.terminate()
        code = child.wait()
        task = doing.read()
        if stopping or (code in FINAL_CODES and not task):  # a kernel may call exit(0), too
            return code if code >= 0 else 0
        last_exit = cause_of(code, before)
        illegal = illegal + 1 if code == -signal.SIGILL and not task else 0
        if illegal == _ILLEGAL_TIMES:
            _say(options, child.pid, {"cause": f"{last_exit}: {_NO_ENGINE}"}, None)
            return _NO_ENGINE_CODE
        ended = {**task, "cause": last_exit, "killed": was_killed(code, last_exit)}
        if time.monotonic() - started > _HEALTHY_S:
            wait = _FIRST_WAIT_S
        _say(options, child.pid, ended, wait)
        until = time.monotonic() + wait
        while not stopping and time.monotonic() < until:  # a signal does not end a sleep
            notify.alive(f"its worker process died: {last_exit}")
            time.sleep(_LOOK_S)
        wait = min(_LONGEST_WAIT_S, wait * 2)
    return 0


def _say(options: dict[str, Any], pid: int, ended: dict[str, Any], again_s: float | None) -> None:
    """Log a death, and what was computed then, in the form that the worker's own lines have."""
    task = f", computing for request {ended['request']}" if ended.get("request") else ""
    then = "not started again" if again_s is None else f"again in {again_s:g} s"
    text = f"worker {options['name']} died: {ended['cause']}{task}; {then}"
    if options.get("log_form") == "json":
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        fields = {"event": "worker died", "device": options["name"], "pid": pid, **ended}
        fields["why"] = fields.pop("cause")  # in logs a cause is the id of a fault
        text = json.dumps({**fields, "again_s": again_s, "level": "warning", "timestamp": when})
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(supervise(json.loads(sys.argv[1])))
