"""Where a chaos run takes place: a lab with its cluster, a user in it, and the hand that hurts."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnx
import psutil
from architectures import squeezenet1_1

from chaos.history import History, read
from cluster.gate import GateProcess
from cluster.lab import DeviceSpec, Lab, LabCluster
from cluster.worker import Ways
from meshinfer.plan import Plan

DEVICES: Final = 4
CORES: Final = (1.0, 0.5, 0.5, 0.5)
"""Of the first device too: the coordinator and the user's end of things are on it."""

SIZE: Final = 192
"""Pixels a side: a request then takes several times as long as a message."""

SETTLE_S: Final = 30.0
"""How long a run waits to be whole again; the goal is less, and is the checker's."""

BEHIND: Final = 4000
"""Where a worker listens that is behind a gate: below the ports that the kernel gives away."""

COMMAND_S: Final = 1500.0
_SPOILER = Path(__file__).resolve().parent / "spoiler.py"
_INSIDE = Path(__file__).resolve().parent / "inside"
_USER = Path(__file__).resolve().parent / "user.py"


MEMORY_BYTES: Final = (1500 << 20, 700 << 20, 700 << 20, 700 << 20)


def names(count: int = DEVICES) -> list[str]:
    return [f"w{i}" for i in range(count)]


class Arena:
    """A lab of ``devices`` with a running cluster and a user on device 0. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        devices: Sequence[DeviceSpec] | None = None,
        plaintext: bool = False,
        gates: bool = False,
        discovery: bool = False,
        environment: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self.folder = folder
        self.states = folder / "states"
        self.states.mkdir(exist_ok=True)
        self.environment = {**_inside(self.states), **environment()}
        self.specs = list(devices or map(DeviceSpec, names(), CORES, MEMORY_BYTES))
        self.log = folder / "daemons.log"
        self.lab = Lab(self.specs)
        self.gates: list[GateProcess] = []
        try:
            if gates:
                for i in range(len(self.specs)):
                    spawn = partial(self.lab.spawn, i, limits=False)
                    self.gates.append(GateProcess(spawn, str(_SPOILER), self.lab.address(i)))
            self.cluster: LabCluster = self.lab.start_cluster(
                log_level="info",
                plaintext=plaintext,
                discovery=discovery,
                log=self.log,
                environment=self.environment,
                ways=self._ways if gates else None,
            )
        except BaseException:
            self.lab.close()
            raise

    def _ways(self, i: int) -> Ways:
        name = self.specs[i].name
        return Ways(behind=BEHIND, **self.gates[i].ask("add", name=name, behind=BEHIND))

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates:
            gate.close()
        self.lab.close()


def _inside(states: Path) -> dict[str, str]:
    """What lets workers die where they are told to."""
    paths = [str(_INSIDE), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CHAOS_STATES": str(states)}


class Run:
    """One case in an arena: its history, its random stream, its user."""

    def __init__(self, arena: Arena, case: str, seed: int, path: Path, *, full: bool) -> None:
        path.unlink(missing_ok=True)
        self.arena, self.case, self.seed, self.full = arena, case, seed, full
        self.lab, self.cluster = arena.lab, arena.cluster
        self.rng = random.Random(seed)
        self.history = History(path)
        self.history.write("run", case=case, seed=seed, full=full, devices=self.names)
        self.user = User(arena, path)
        self._logged = len(arena.log.read_text(errors="replace").splitlines())

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.arena.specs]

    def count(self, short: int, full: int) -> int:
        """How many requests, seconds, faults: of the selection for CI, or of all of it."""
        return full if self.full else short

    # --- what happens

    def deploy(
        self, name: str = "net", model: Any = None, size: int = SIZE, seed: int = 0, **how: Any
    ) -> None:
        """A model [1, 3, size, size], cut for all devices unless ``how`` says otherwise."""
        path = self.arena.folder / f"{name}.onnx"
        onnx.save(squeezenet1_1(size, seed) if model is None else model, path)
        options = {"spread": True, **how}
        self.user.call("deploy", name=name, path=str(path), shape=[1, 3, size, size], **options)

    def calm(self, count: int, name: str = "net", phase: str = "calm", **how: Any) -> None:
        """The same load without any fault: where T comes from. The first answers warm up."""
        self.user.call("load", name=name, phase="warm", count=8, in_flight=2)
        self.user.call("load", name=name, phase=phase, count=count, **how)

    @contextmanager
    def load(self, phase: str, count: int, name: str = "net", **how: Any) -> Iterator[Load]:
        """Requests beside the faults in the block; at its end each has an outcome."""
        self.user.tell("load", name=name, phase=phase, count=count, **how)
        load = Load(self.user)
        yield load
        load.wait()

    def fault(self, what: str, device: int | None = None, **more: Any) -> None:
        self.history.write("fault", what=what, device=device, **more)

    def hurt(self, what: str, device: int, act: Callable[[], object], **more: Any) -> None:
        """Write the fault down, and do it; a device that is just gone is no error."""
        self.fault(what, device, **more)
        with suppress(psutil.NoSuchProcess, ProcessLookupError, KeyError):
            act()

    def power_cycle(self, i: int) -> None:
        """A device loses its power, and starts at once."""
        self.cluster.restart(i, wait=False)

    def signal(self, i: int, number: int) -> None:
        """To a device's worker process."""
        os.kill(self.cluster.worker_pids()[i], number)

    def die_at(self, i: int, state: str, after: int) -> None:
        """Let a worker die when it has passed a state of its protocol so often, or so many bytes;
        see ``inside/sitecustomize.py``."""
        told = self.arena.states / self.names[i]
        told.with_suffix(".new").write_text(json.dumps({"state": state, "after": after}))
        told.with_suffix(".new").replace(told)

    def until_dead(self, i: int, state: str, within_s: float) -> bool:
        """Whether it has died where ``die_at`` said, which is written down."""
        told, until = self.arena.states / self.names[i], time.monotonic() + within_s
        while told.exists() and time.monotonic() < until:
            time.sleep(0.02)
        hit = not told.exists()
        told.unlink(missing_ok=True)
        self.fault("died" if hit else "lived", i, state=state)
        return hit

    def log(self) -> None:
        """Put the daemons' warnings into the history, as long as they are new."""
        lines = self.arena.log.read_text(errors="replace").splitlines()[self._logged :]
        self._logged += len(lines)
        told = [line for line in lines if "[info" not in line]
        self.history.write("log", lines=told)

    def year(self) -> str:
        """What the daemons' wall clock says."""
        date = self.lab.spawn(
            0,
            ["date", "+%F %H"],
            env={**os.environ, **self.arena.environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        return date.communicate(timeout=10.0)[0].strip()

    def states(self) -> dict[str, str]:
        """The devices' states as the user last saw them."""
        seen = [e for e in read(self.history.path) if e["kind"] == "devices"]
        return seen[-1]["states"] if seen else {}

    def rate(self, phase: str) -> float:
        """Answers a second of a phase that is over."""
        events = read(self.history.path)
        mine = {e["n"] for e in events if e["kind"] == "submit" and e["phase"] == phase}
        ends = [e["at"] for e in events if e["kind"] == "outcome" and e["n"] in mine and e["ok"]]
        starts = [e["at"] for e in events if e["kind"] == "submit" and e["phase"] == phase]
        return len(ends) / (max(ends) - min(starts))

    def takes_part(self) -> set[str]:
        """The devices of the plan that the last answer was had by."""
        answers = [e for e in read(self.history.path) if e["kind"] == "outcome" and e["ok"]]
        plan = Plan.parse(answers[-1]["plan"])
        return {*plan.devices()}

    def ready(self) -> list[int]:
        states = self.states()
        return [i for i, name in enumerate(self.names) if states.get(name) == "ready"]

    def busy(self) -> list[int]:
        """Those that are ready and have tasks."""
        tasks = self.takes_part()
        return [i for i in self.ready() if self.names[i] in tasks]

    def until_busy(self, within_s: float) -> list[int]:
        """The same, once there is any; after two deaths in a row it may be a while."""
        until = time.monotonic() + within_s
        while not (found := self.busy()) and time.monotonic() < until:
            self.pause(0.25)
        return found

    def pause(self, least_s: float, most_s: float | None = None) -> None:
        time.sleep(least_s if most_s is None else self.rng.uniform(least_s, most_s))

    def heal(self, model: str = "net") -> None:
        """End every fault, start what is dead, and let the user say how long it took."""
        for i, spec in enumerate(self.arena.specs):
            self.lab.heal(i)
            self.lab.set_cpu(i, spec.cpu)
            self.lab.set_link(i, spec.link_bits_per_s)
            self.cluster.heal(i)
        self.history.write("healed")
        self.user.call("settle", names=self.names, model=model, within_s=SETTLE_S)

    @contextmanager
    def sampled(self, every_s: float = 0.5) -> Iterator[None]:
        """Write down meanwhile what each daemon holds: memory, threads, and descriptors but those
        of weights."""
        over = threading.Event()

        def body() -> None:
            while not over.wait(every_s):
                for name, pid in self._daemons().items():
                    with suppress(psutil.Error):
                        self.history.write("usage", name=name, pid=pid, **_holds(pid))

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(10.0)

    def list_descriptors(self) -> None:
        """Write down what each daemon has open, so that one more or less can be named."""
        for name, pid in self._daemons().items():
            with suppress(OSError):  # it ends just now
                self.history.write("descriptors", name=name, open=_opened(pid))

    def _daemons(self) -> dict[str, int]:
        pids = self.cluster.worker_pids().items()
        return {"coordinator": self.cluster.coordinator_pid} | {self.names[i]: p for i, p in pids}

    def close(self) -> None:
        self.user.close()
        self.history.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _holds(pid: int) -> dict[str, int]:
    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_info()
        return {
            "rss": memory.rss,
            "shared": memory.shared,
            "threads": process.num_threads(),
            "descriptors": sum(_WEIGHTS not in each for each in _links(pid)),
        }


_WEIGHTS = "/prepare-"
"""In names of files that hold the weights of prepared tasks: as many as the plan has parts."""
_SOCKETS = {"tcp": 9, "udp": 9, "unix": 6, "netlink": 9}
"""Which column of each of these lists of the kernel (proc(5)) has a socket's inode."""


def _opened(pid: int) -> list[str]:
    """What a process has open: files and kinds by name, sockets of its namespace by their ends and
    state. A socket without is in no list: its connection is over, and it was not closed."""
    ends = {}
    for kind, column in _SOCKETS.items():
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            ends[f"socket:[{words[column]}]"] = f"{kind} {' '.join(words[1:4])}"
    return sorted(ends.get(link, link.partition(":[")[0]) for link in _links(pid))


def _links(pid: int) -> list[str]:
    """What the descriptors of a process lead to."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(path))
    return found


class Load:
    """Requests under way."""

    def __init__(self, user: User) -> None:
        self._user, self._over = user, False

    @property
    def over(self) -> bool:
        self._over = self._over or self._user.said("load")
        return self._over

    def stop(self) -> None:
        """There has been enough of it."""
        self._user.call("stop")

    def wait(self) -> None:
        if not self._over:
            self._user.wait("load")
        self._over = True


class User:
    """The other end of ``user.py``."""

    def __init__(self, arena: Arena, history: Path) -> None:
        self._said: queue.Queue[dict[str, str]] = queue.Queue()
        self._kept: list[dict[str, str]] = []
        self._process = arena.lab.spawn(
            0,
            [sys.executable, str(_USER), str(history)],
            limits=False,  # it compares answers, which is no device's work
            env=arena.cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ear = threading.Thread(target=self._listen, daemon=True)
        self._ear.start()
        self.wait("start")

    def tell(self, what: str, **how: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
        self._process.stdin.flush()

    def call(self, what: str, **how: Any) -> None:
        self.tell(what, **how)
        self.wait(what)

    def said(self, what: str) -> bool:
        """Whether it is done with it; never waits."""
        with suppress(queue.Empty):
            while True:
                self._kept.append(self._said.get_nowait())
        return self._take(what)

    def wait(self, what: str) -> None:
        """Until it is done with it. Raises ``RuntimeError`` with what failed."""
        until = time.monotonic() + COMMAND_S
        while not self._take(what):
            try:
                self._kept.append(self._said.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                raise RuntimeError(f"the user is not done with {what}") from None

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._ear.join(10.0)
        self._process.stdout.close()

    def _take(self, what: str) -> bool:
        for each in self._kept:
            if each["done"] in (what, "end"):
                if each["done"] == "end" or each["failed"]:
                    raise RuntimeError(f"the user's {what}: {each['failed']}")
                self._kept.remove(each)
                return True
        return False

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put({"done": "end", "failed": "its process ended"})
