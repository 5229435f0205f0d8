"""Measures this device on its own engine: a rate for each kind of operator, and fixed costs.

``data/probes.json`` has a small model for each (``scripts/make_probes``) with its work as
``meshinfer.cost`` counts it; what bytes and kernels take is measured first and subtracted from the
others. The best of a few windows counts, because a shared machine only ever makes it slower.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import socket
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import psutil
import structlog

import meshinfer
from cluster import granted
from cluster.fixed_costs import LONGEST_S, HandOver, Wire
from cluster.processor import processor
from meshinfer.errors import ConfigurationError
from meshinfer.protocol import messages as m

if TYPE_CHECKING:  # loaded where something is measured: a coordinator starts without it
    from meshinfer.onnxrt import ort

_WINDOWS, _WINDOW_S, _QUOTA_WINDOW_S = 4, 0.012, 0.02
_LEAST_SHARE = 0.1
"""What is subtracted from a probe leaves at least this part of it."""
_DRIFT = 0.2
_FIXED = ("BYTES", "KERNELS")
_SHORT_BYTES, _LONG_BYTES = 16, 400_000
_MESSAGE, _BYTE, _TASK = 1.2, 1.4, 8.0
"""What a message and each of its bytes take of a worker's processor, sending and receiving alone
being 1; and what a task takes beside its hand-over and its messages, in messages sent or received.
The rest is the core and the loop. ``scripts/bench_messages``: 0.075 ms a message, 1.42 ns a byte
and 0.55 ms a task in a LocalCluster, where these probes gave 0.065 ms, 1.0 ns and 0.02 ms."""


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
    ``meshinfer.cost.OpKind``, 0 where there was no time. ``overhead_s``: of a task beside kernels
    and messages. ``message_s``, ``byte_s``: of a message at either end, and of each byte of it.
    ``cpu_cores``: quota, 0 without one.
    """

    rates: tuple[float, ...]
    memory_bytes_per_s: float
    kernel_s: float
    overhead_s: float
    message_s: float = 0.0
    byte_s: float = 0.0
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
            message_s=self.message_s / speed,
            byte_s=self.byte_s / speed,
            cpu_cores=self.cpu_cores,
        )


def measure(threads: int, *, plaintext: bool = False) -> Measured:
    """Measure this device: about a second, and never much more than ``LONGEST_S``.

    ``plaintext``: its messages are not encrypted.
    """
    return _Measuring(threads, plaintext=plaintext).all()


def probes() -> tuple[Probe, ...]:
    """The probes, those of the fixed costs last."""
    text = files("cluster").joinpath("data/probes.json").read_bytes()
    return msgspec.json.decode(text, type=tuple[Probe, ...])


class _Measuring:
    """One measuring. Of one thread, processor time counts: what else runs meanwhile is not this
    device's speed. Under a quota it counts for any number of threads, stretched by what the quota
    grants: windows of wall time would have to be many periods long each, and what shares the quota
    meanwhile (a coordinator that starts) is not this device's speed either: it once made a device
    of the lab 45 % slower than its equals."""

    def __init__(self, threads: int, *, plaintext: bool = False) -> None:
        self.threads, self.plaintext = threads, plaintext
        self.quota = granted.cpu_quota()
        if self.quota is not None and self.quota.cores >= threads:
            self.quota = None
        self.by_cpu = threads == 1 or self.quota is not None
        self.ends = time.perf_counter() + LONGEST_S

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
        with HandOver(_prepared(found["KERNELS"], 1)) as task:
            handed_s = max(0.0, self.one_thread(task) - fixed["KERNELS"])
        short, long = self.messages()
        stretch, alone = self.stretch(), self.stretch(1)
        return Measured(
            rates=tuple(rate / stretch for rate in rates),
            memory_bytes_per_s=1.0 / (byte_s * stretch),
            kernel_s=kernel_s * stretch,
            overhead_s=(handed_s + _TASK * short) * alone if short else 0.0,
            message_s=_MESSAGE * short * alone,
            byte_s=_BYTE * max(0.0, long - short) / _LONG_BYTES * alone,
            cpu_cores=self.quota.cores if self.quota else 0.0,
        )

    def messages(self) -> tuple[float, float]:
        """Of one end of a short message and of a long one; 0 where loopback carries none, for a
        device may compute without."""
        try:
            with Wire(plaintext=self.plaintext) as wire:
                return (
                    self.one_thread(wire(_SHORT_BYTES)) / Wire.ENDS,
                    self.one_thread(wire(_LONG_BYTES)) / Wire.ENDS,
                )
        except ConfigurationError as error:
            structlog.get_logger().warning("messages are not measured", why=error.message)
            return 0.0, 0.0

    def dense(self) -> float:
        """FLOP/s of the first probe alone, with all that it takes; a quick check."""
        probe = probes()[0]
        return probe.flops / (self.probe(probe) * self.stretch())

    def stretch(self, threads: int = 0) -> float:
        """Wall time a unit of the time that was counted, of so many threads at once."""
        return max(1.0, (threads or self.threads) / self.quota.cores) if self.quota else 1.0

    def probe(self, probe: Probe) -> float:
        """Seconds of one run of a probe."""
        return self.seconds(_prepared(probe, self.threads))

    def one_thread(self, run: Callable[[], object]) -> float:
        """Processor seconds of one run of what is not a kernel, whichever threads it takes."""
        return self.seconds(run, whole=True)

    def seconds(self, run: Callable[[], object], *, whole: bool = False) -> float:
        """Of one run: the best of a few windows, each many runs long where they are short.
        ``whole``: the processor time of all threads together."""
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
            each = used if whole else used / self.threads if self.by_cpu else took
            best = min(best, each / runs)
            if time.perf_counter() > self.ends:
                break
        return best


def _prepared(probe: Probe, threads: int) -> Callable[[], object]:
    from meshinfer.onnxrt import ort

    session = ort.InferenceSession(
        base64.b64decode(probe.model), _options(threads), providers=["CPUExecutionProvider"]
    )
    feeds = {session.get_inputs()[0].name: np.ones(probe.shape, np.dtype(probe.dtype))}
    return lambda: session.run(None, feeds)


def _options(threads: int) -> ort.SessionOptions:
    from meshinfer.onnxrt import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def facts(
    *,
    threads: int,
    engine: str,
    measured: Measured | None,
    memory_bytes: int = 0,
) -> m.Facts:
    """What this device says of itself when it joins. ``measured``: None where it does not compute.

    ``memory_bytes``: what MeshInfer may use, 0 for all that the kernel grants; a worker itself
    takes some of it.
    """
    limit = granted.memory_limit()
    has = min(memory_bytes or limit, limit)
    quota = granted.cpu_quota()
    known = measured or Measured((0.0,), 0.0, 0.0, 0.0)
    return m.Facts(
        host=socket.gethostname(),
        cores=psutil.cpu_count(logical=True) or 1,
        cpu_quota=quota.cores if quota else 0.0,
        memory_bytes=granted.memory_for_shares(has) if measured else granted.memory_left(has),
        architecture=platform.machine(),
        processor=processor(),
        system=f"{platform.system()} {platform.release()}",
        engine=engine,
        version=meshinfer.__version__,
        threads=threads,
        flops_per_s=known.flops_per_s,
        rates=known.rates,
        memory_bytes_per_s=known.memory_bytes_per_s,
        kernel_s=known.kernel_s,
        overhead_s=known.overhead_s,
        message_s=known.message_s,
        byte_s=known.byte_s,
        computes=measured is not None,
    )


class _Cached(msgspec.Struct, frozen=True):
    key: str
    measured: Measured
    dense_flops_per_s: float


def measured_once(folder: Path, engine: str, threads: int, *, plaintext: bool = False) -> Measured:
    """As ``measure``, kept in ``folder`` for this machine, engine and quota.

    A short check of one probe comes first: what is off by more than 20 % is measured again.
    """
    path, key = folder / "profile.json", _key(engine, threads, plaintext)
    now = _Measuring(threads).dense()
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        cached = None
    same = cached is not None and cached.key == key
    if cached is not None and same and abs(now / cached.dense_flops_per_s - 1.0) <= _DRIFT:
        return cached.measured
    found = measure(threads, plaintext=plaintext)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(_Cached(key, found, max(now, 1.0))))
    part.replace(path)
    return found


def _key(engine: str, threads: int, plaintext: bool) -> str:
    """All that the numbers depend on."""
    quota = granted.cpu_quota()
    machine = _first_line(Path("/etc/machine-id"))
    models = files("cluster").joinpath("data/probes.json").read_bytes()
    return " ".join(
        (
            machine or socket.gethostname(),
            processor(),
            engine,
            f"{threads} threads",
            f"{quota.cores:.3f} cores" if quota else "no quota",
            hashlib.sha256(models).hexdigest()[:12],
            "messages in plaintext" if plaintext else "messages encrypted",
        )
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
