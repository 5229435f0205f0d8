"""Measures this device on its own engine: a rate for each kind of operator, and fixed costs.

``data/probes.json`` has a small model for each (``scripts/make_probes``) with its work as
``meshinfer.cost`` counts it; what bytes and kernels take is measured first and subtracted from the
others. The best of a few windows counts, because a shared machine only ever makes it slower.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import queue
import socket
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import psutil

import meshinfer
from cluster import granted
from meshinfer.protocol import codec
from meshinfer.protocol import messages as m

_WINDOWS, _WINDOW_S, _QUOTA_WINDOW_S = 4, 0.012, 0.02
_LONGEST_S = 8.0
"""A slow device stops measuring after this; kinds without a rate are derived from the others."""
_LEAST_SHARE = 0.1
"""What is subtracted from a probe leaves at least this part of it."""
_DRIFT = 0.2
_FIXED = ("BYTES", "KERNELS")
_PIECE = (1, 16, 14, 14)


class Probe(msgspec.Struct, frozen=True):
    """A small model: FLOPs of its kind, bytes and kernels of one run."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    flops: float
    nbytes: float
    kernels: float
    model: str


class Measured(msgspec.Struct, frozen=True):
    """What was measured, wall time at this number of threads. ``rates``: FLOP/s by the index of
    ``meshinfer.cost.OpKind``, 0 where there was no time. ``cpu_cores``: quota, 0 without one.
    """

    rates: tuple[float, ...]
    memory_bytes_per_s: float
    kernel_s: float
    overhead_s: float
    cpu_cores: float = 0.0

    @property
    def flops_per_s(self) -> float:
        """Of dense convolutions."""
        return self.rates[0]

    def slowed(self, speed: float) -> Measured:
        """The same device at a fraction of its speed."""
        return Measured(
            rates=tuple(rate * speed for rate in self.rates),
            memory_bytes_per_s=self.memory_bytes_per_s * speed,
            kernel_s=self.kernel_s / speed,
            overhead_s=self.overhead_s / speed,
            cpu_cores=self.cpu_cores,
        )


def measure(threads: int) -> Measured:
    """Measure this device: about a second, and never much more than ``_LONGEST_S``."""
    return _Measuring(threads).all()


def probes() -> tuple[Probe, ...]:
    """The probes, those of the fixed costs last."""
    text = files("cluster").joinpath("data/probes.json").read_bytes()
    return msgspec.json.decode(text, type=tuple[Probe, ...])


class _Measuring:
    """One measuring. Of one thread, processor time counts: what else runs meanwhile is not this
    device's speed. Under a quota it counts for any number of threads, stretched by the share of
    time that the process got over all of the measuring: windows of wall time would have to be many
    periods long each."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.quota = granted.cpu_quota()
        if self.quota is not None and self.quota.cores >= threads:
            self.quota = None
        self.by_cpu = threads == 1 or self.quota is not None
        self.wall_s = self.cpu_s = 0.0
        self.ends = time.perf_counter() + _LONGEST_S

    def all(self) -> Measured:
        found = {probe.name: probe for probe in probes()}
        fixed = {name: self.probe(found[name]) for name in _FIXED}
        byte_s = fixed["BYTES"] / found["BYTES"].nbytes
        kernel_s = fixed["KERNELS"] / found["KERNELS"].kernels
        rates = []
        for name, probe in found.items():
            if name in _FIXED:
                continue
            took = self.probe(probe) if time.perf_counter() < self.ends else 0.0
            known = probe.nbytes * byte_s + probe.kernels * kernel_s
            rates.append(probe.flops / max(took - known, took * _LEAST_SHARE) if took else 0.0)
        with _OneTask(found["KERNELS"]) as task:
            overhead_s = self.seconds(task) - fixed["KERNELS"]
        stretch = self.stretch()
        return Measured(
            rates=tuple(rate / stretch for rate in rates),
            memory_bytes_per_s=1.0 / (byte_s * stretch),
            kernel_s=kernel_s * stretch,
            overhead_s=max(0.0, overhead_s) * stretch,
            cpu_cores=self.quota.cores if self.quota else 0.0,
        )

    def dense(self) -> float:
        """FLOP/s of the first probe alone, with all that it takes; a quick check."""
        probe = probes()[0]
        return probe.flops / (self.probe(probe) * self.stretch())

    def stretch(self) -> float:
        """Wall time a unit of the time that was counted."""
        if self.quota is None or not self.cpu_s:
            return 1.0
        return max(1.0, self.wall_s * self.threads / self.cpu_s)

    def probe(self, probe: Probe) -> float:
        """Seconds of one run of a probe."""
        session = ort.InferenceSession(
            base64.b64decode(probe.model),
            _options(self.threads),
            providers=["CPUExecutionProvider"],
        )
        feeds = {session.get_inputs()[0].name: np.ones(probe.shape, np.dtype(probe.dtype))}
        return self.seconds(lambda: session.run(None, feeds))

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run: the best of a few windows, each many runs long where they are short."""
        run()
        window_s = _WINDOW_S if self.quota is None else _QUOTA_WINDOW_S
        best = float("inf")
        for _ in range(_WINDOWS):
            runs, wall, cpu = 0, time.perf_counter(), time.process_time()
            while True:
                run()
                runs += 1
                took = time.perf_counter() - wall
                if took >= window_s:
                    break
            used = time.process_time() - cpu
            self.wall_s, self.cpu_s = self.wall_s + took, self.cpu_s + used
            best = min(best, (used / self.threads if self.by_cpu else took) / runs)
            if time.perf_counter() > self.ends:
                break
        return best


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class _OneTask:
    """What a task costs beside its kernels: a piece comes in and is put in its place, the compute
    thread runs a trivial model, and a piece goes out."""

    def __init__(self, probe: Probe) -> None:
        self.model = base64.b64decode(probe.model)
        self.feed = np.ones(probe.shape, np.dtype(probe.dtype))
        self.piece, self.place = np.ones(_PIECE, np.float32), np.empty(_PIECE, np.float32)
        self.message = m.Deliver(
            id=1,
            request="request",
            attempt=1,
            deployment=1,
            consumer=(0, 0),
            slot=0,
            tensor=codec.describe("value", self.piece),
        )
        self.jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __enter__(self) -> Callable[[], None]:
        threading.Thread(target=self._compute, name="probe", daemon=True).start()
        return self._run

    def __exit__(self, *_: object) -> None:
        self.jobs.put(False)

    def _compute(self) -> None:
        providers = ["CPUExecutionProvider"]
        session = ort.InferenceSession(self.model, _options(1), providers=providers)
        name = session.get_inputs()[0].name
        while self.jobs.get():
            session.run(None, {name: self.feed})
            self.done.put(True)

    def _run(self) -> None:
        for _ in range(2):  # in and out
            frames = codec.encode(self.message, codec.payload_of(self.piece))
            message, payload = codec.decode(frames)
            assert isinstance(message, m.Deliver)
            self.place[:] = codec.array_of(message.tensor, payload)
        self.jobs.put(True)
        self.done.get()


def facts(
    *,
    threads: int,
    engine: str,
    measured: Measured | None,
    memory_bytes: int = 0,
) -> m.Facts:
    """What this device says of itself when it joins. ``measured``: None where it does not compute.

    ``memory_bytes``: what MeshInfer may use, 0 for all that is left of what the kernel grants.
    """
    limit = granted.memory_limit()
    quota = granted.cpu_quota()
    known = measured or Measured((0.0,), 0.0, 0.0, 0.0)
    return m.Facts(
        host=socket.gethostname(),
        cores=psutil.cpu_count(logical=True) or 1,
        cpu_quota=quota.cores if quota else 0.0,
        memory_bytes=min(memory_bytes or limit, granted.memory_left(limit)),
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        engine=engine,
        version=meshinfer.__version__,
        threads=threads,
        flops_per_s=known.flops_per_s,
        rates=known.rates,
        memory_bytes_per_s=known.memory_bytes_per_s,
        kernel_s=known.kernel_s,
        overhead_s=known.overhead_s,
        computes=measured is not None,
    )


class _Cached(msgspec.Struct, frozen=True):
    key: str
    measured: Measured
    dense_flops_per_s: float


def measured_once(folder: Path, engine: str, threads: int) -> Measured:
    """As ``measure``, kept in ``folder`` for this machine, engine and quota.

    A short check of one probe comes first: what is off by more than 20 % is measured again.
    """
    path, key = folder / "profile.json", _key(engine, threads)
    now = _Measuring(threads).dense()
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        cached = None
    same = cached is not None and cached.key == key
    if cached is not None and same and abs(now / cached.dense_flops_per_s - 1.0) <= _DRIFT:
        return cached.measured
    found = measure(threads)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(_Cached(key, found, max(now, 1.0))))
    part.replace(path)
    return found


def _key(engine: str, threads: int) -> str:
    """All that the numbers depend on."""
    quota = granted.cpu_quota()
    machine = _first_line(Path("/etc/machine-id"))
    models = files("cluster").joinpath("data/probes.json").read_bytes()
    return " ".join(
        (
            machine or socket.gethostname(),
            _processor(),
            engine,
            f"{threads} threads",
            f"{quota.cores:.3f} cores" if quota else "no quota",
            hashlib.sha256(models).hexdigest()[:12],
        )
    )


def _processor() -> str:
    """The processor's model, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
