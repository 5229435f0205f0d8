"""The worker process: a thread for core and sockets, one that computes, one that stores and loads.

Started by ``cluster.supervisor``, which knows why it died. Never imports onnx or torch.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import sys
import time

if __name__ == "__main__":  # structlog imports it, for tracebacks that we do not print: 5 MB
    sys.modules["rich"] = None  # type: ignore[assignment]

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import structlog

import meshinfer
from cluster import notify, processes, profiler, telemetry
from cluster.blobs import BlobStore
from cluster.board import Watch
from cluster.doing import Doing
from cluster.forgetting import remove_blobs
from cluster.granted import Lasting, memory_limit
from cluster.heap import Room
from cluster.keyring import Keyring
from cluster.locate import NOT_FOUND_HINT, Where, find_coordinator, local_address
from cluster.loop import Loop, Post, start_thread
from cluster.measuring import measured_apart
from cluster.membership import worker_keyring
from cluster.processor import instruction_set
from cluster.signing import verifying_in
from cluster.sockets import Endpoint, Plane
from cluster.storing import StoreThread
from cluster.transport import Transport
from meshinfer.engine import EngineError
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import AuthError, MeshInferError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of, failure_of
from meshinfer.protocol.joining import Admission
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler.events import (
    BoardRead,
    Compute,
    Computed,
    Effect,
    StopRequested,
)
from meshinfer.scheduler.worker import WorkerCore

LOOK_S = 3.0
"""How long one look for the coordinator over mDNS takes; it is repeated until one is found."""


class Ways(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A worker's ways through ``cluster.gate``: it listens at ``behind``, is reached at ``front``,
    and reaches others by the SOCKS5 proxy ``outbound``; three ports of its own address."""

    behind: int
    front: int
    outbound: int


class WorkerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one worker, as ``meshinfer worker`` and LocalCluster hand them over. It joins
    with the token in its state folder, if there is one. ``coordinator_id``: whom it may trust
    without one.

    ``speed`` below 1 emulates a slower device: after each task the compute thread sleeps in
    proportion to the CPU time it took. ``speed_file``, once it is there, holds the speed from now
    on, whatever the device said as it joined. ``measured``: this device's speeds; None measures.
    ``memory_bytes``: what MeshInfer may use; 0 for what the kernel grants. ``interfaces``:
    addresses for mDNS, at one of which it listens; None chooses. ``ended`` and ``doing`` come from
    the supervisor: how the last worker process ended, and where to write what this one computes.
    ``parent``: process to end with. ``beside``: on the host of a coordinator that listens at all
    addresses; so does this worker. ``gate``: what a test can stop its connections with.
    ``encrypt_blobs``: on its disk, under a key that ends with the process, or that of
    ``blob_key_file``.
    """

    name: str
    cluster: str = "default"
    state_dir: str
    coordinator: str | None = None
    coordinator_id: str = ""
    interfaces: tuple[str, ...] | None = None
    threads: int = 1
    measured: profiler.Measured | None = None
    memory_bytes: int = 0
    speed: float = 1.0
    speed_file: str = ""
    log_level: str = "info"
    log_form: str = "text"
    ended: m.Ended | None = None
    doing: int = -1
    parent: int = 0
    beside: bool = False
    gate: Ways | None = None
    encrypt_blobs: bool = False
    blob_key_file: str = ""


class ComputeThread:
    """Runs one task after another; onnxruntime releases the GIL meanwhile."""

    def __init__(
        self,
        store: StoreThread,
        post: Post,
        speed: Callable[[], float],
        doing: Doing,
        lasting: Lasting,
    ) -> None:
        self._store, self._post, self._speed, self._doing = store, post, speed, doing
        self._lasting = lasting
        self._queue: queue.SimpleQueue[Compute | None] = queue.SimpleQueue()
        start_thread("compute", self._run, post)

    def put(self, job: Compute) -> None:
        self._queue.put(job)

    def close(self) -> None:
        self._queue.put(None)  # not awaited: a kernel cannot be interrupted

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._doing.begin(job.request, job.attempt, job.place)
            done = self._compute(job)
            self._doing.end()
            self._post(done)
            del job, done  # or the last inputs live until the next task

    def _compute(self, job: Compute) -> Computed:
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            session = self._store.prepared[job.deployment][job.place]
            outputs = tuple(session.run(job.inputs))
        except (EngineError, KeyError) as error:
            text = str(error) if isinstance(error, EngineError) else "its program is gone"
            fields = {"request": job.request, "attempt": job.attempt, "task": str(job.place)}
            if job.request:  # else it was only tried, on made-up inputs
                structlog.get_logger().error("a task failed", **fields, why=text)
            return Computed(job.request, job.attempt, job.place, (), 0.0, text, job.again)
        speed, cpu_s = self._speed(), time.thread_time() - cpu
        if speed < 1.0:
            time.sleep(cpu_s * (1.0 / speed - 1.0))
        return Computed(
            job.request,
            job.attempt,
            job.place,
            outputs,
            time.perf_counter() - started,
            again=job.again,
            lasting_s=self._lasting.seconds(cpu_s, started),
        )


def run_worker(options: WorkerOptions, room: Room) -> m.Failure | None:
    """Join the cluster and work until dismissed, stopped or refused."""
    _wait_for_stop_signals()
    state = Path(options.state_dir)
    processes.hold_folder(state)
    incarnation = secrets.token_hex(4)
    identity = f"{options.name}#{incarnation}"
    telemetry.identify(device=options.name, incarnation=incarnation)
    keyring, last = worker_keyring(
        state,
        options.name,
        options.cluster,
        coordinator=options.coordinator,
        coordinator_id=options.coordinator_id,
        interfaces=options.interfaces,
        proxy=_proxy(options, (options.interfaces or ("",))[0]),
    )
    if keyring.plaintext:
        telemetry.warn_of_plaintext()
    host, port = _locate(options, keyring, last)
    address = BESIDE_COORDINATOR if options.beside else _listens_at(options, host)
    gate = options.gate
    transport = Transport(
        identity,
        keyring.key,
        [Admission(keyring.coordinator_public, "head", "worker")],
        plaintext=keyring.plaintext,
        proxy=_proxy(options, address),
        unknown_is_temporary=True,  # until the coordinator has told who may connect
    )
    # All addresses, if beside the coordinator.
    bulk_port = transport.bind(Plane.BULK, address, 0 if gate is None else gate.behind)
    bulk_port = bulk_port if gate is None else gate.front
    coordinator = Endpoint(host, port, keyring.coordinator_public)
    store = _store(options, state)
    engine = OrtEngine(store.loading, options.threads, instruction_set())
    facts = _facts(options, engine, plaintext=keyring.plaintext)
    plain = WorkerCore(_hello(options, identity, address, bulk_port, keyring.key.public, facts))
    core = verifying_in(state, plain, identity, keyring.coordinator_public)

    def perform(effect: Effect) -> None:
        if isinstance(effect, Compute):
            compute.put(effect)
        else:
            storing.put(effect)

    watch = Watch(lambda board: loop.post(BoardRead(board), wake=False))
    each_step = _each_step(plain, coordinator, watch)
    loop = Loop(core, lambda: transport, perform, coordinator, each_step)
    storing = StoreThread(store, lambda: engine, loop.post, room)
    doing = Doing(options.doing)
    lasting = Lasting(options.threads)
    compute = ComputeThread(storing, loop.post, partial(_speed, options), doing, lasting)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.post(StopRequested()))
    try:
        return loop.run()
    finally:
        compute.close()
        storing.close()
        doing.end()  # whatever still computes, this end is not its doing


def _store(options: WorkerOptions, state: Path) -> BlobStore:
    if not options.encrypt_blobs and not options.blob_key_file:
        return BlobStore(state / "blobs", sole=True)
    from cluster.sealing import sealed_store  # few want it

    return sealed_store(state, options.blob_key_file)


def _facts(options: WorkerOptions, engine: OrtEngine, *, plaintext: bool) -> m.Facts:
    """What this device can do, as measured."""
    measured = options.measured or measured_apart(
        Path(options.state_dir),
        engine.name,
        options.threads,
        plaintext=plaintext,
        log_level=options.log_level,
        log_form=options.log_form,
    )
    return profiler.facts(
        threads=options.threads,
        engine=engine.name,
        measured=measured.slowed(options.speed),
        memory_bytes=options.memory_bytes,
    )


def _hello(
    options: WorkerOptions, identity: str, host: str, port: int, key: str, facts: m.Facts
) -> m.Hello:
    device, _, incarnation = identity.rpartition("#")
    return m.Hello(
        role="worker",
        device=device,
        incarnation=incarnation,
        cluster=options.cluster,
        protocol=m.PROTOCOL,
        version=meshinfer.__version__,
        bulk=m.Peer(device=device, incarnation=incarnation, host=host, port=port, key=key),
        facts=msgspec.structs.replace(
            facts,
            last_exit="" if options.ended is None else options.ended.cause,
            paced=options.speed < 1.0,
        ),
        ended=options.ended,
    )


def _each_step(core: WorkerCore, coordinator: Endpoint, watch: Watch) -> Callable[[], None]:
    """Lets the service manager know that the loop lives, and whether it has joined; and looks how
    warm the board is."""
    where = f"the coordinator at {coordinator.host}:{coordinator.port}"
    joined, waits = f"joined {where}", f"waits for {where}"  # once: each message is a step

    def step() -> None:
        watch.look(time.monotonic())
        notify.alive(joined if core.joined else waits, ready=core.joined)

    return step


def _speed(options: WorkerOptions) -> float:
    """How fast this device is to be now."""
    if options.speed_file:
        with suppress(FileNotFoundError):
            return float(Path(options.speed_file).read_text())
    return options.speed


def _proxy(options: WorkerOptions, address: str) -> str:
    return "" if options.gate is None else f"{address}:{options.gate.outbound}"


def _listens_at(options: WorkerOptions, coordinator: str) -> str:
    """The address by which others reach this device: towards the coordinator, where that is among
    those that it may listen at."""
    towards = local_address(coordinator)
    if not options.interfaces or towards in options.interfaces:
        return towards
    chosen = options.interfaces[0]
    structlog.get_logger().warning(
        "listens at another address than the coordinator is reached from",
        listens_at=chosen,
        reached_from=towards,
        hint=f"if others cannot reach it there, give --interface {towards}",
    )
    return chosen


def _locate(options: WorkerOptions, ring: Keyring, last: Where | None) -> tuple[str, int]:
    """The coordinator's address: as given, else where it was last, else over mDNS, asking until
    one answers."""
    log = structlog.get_logger()
    while True:
        notify.alive("looks for the coordinator over mDNS")
        found = find_coordinator(
            options.coordinator,
            ring.cluster,
            timeout_s=LOOK_S,
            key=None if ring.plaintext else ring.coordinator_public,
            interfaces=options.interfaces,
            last=last,
        )
        if found is not None:
            return found
        log.info("no coordinator yet", cluster=ring.cluster, hint=NOT_FOUND_HINT)


def _wait_for_stop_signals() -> None:
    """Until the loop runs there is nothing to drain: a stop signal ends the process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


def main(arguments: list[str]) -> int:
    """``python -m cluster.worker OPTIONS`` with the options as JSON."""
    options = msgspec.json.decode(arguments[0], type=WorkerOptions)
    room = Room(options.memory_bytes or memory_limit())  # before any thread begins
    telemetry.configure(options.log_level, options.log_form, name=options.name)
    log = structlog.get_logger()
    if options.parent:
        processes.watch_parent(options.parent, lambda: os._exit(0))
    notify.enable()  # unless its supervisor has hidden the service manager
    try:
        failure = run_worker(options, room)
    except MeshInferError as error:
        failure = failure_of(error)
    if failure is None:
        return 0
    if failure.error == AuthError.__name__:
        # Whom the cluster does not admit (any more) keeps nothing of its models.
        removed = remove_blobs(Path(options.state_dir))
        if removed > 0:  # a newcomer that is refused had none
            log.warning("submodels and weights removed", files=removed)
    log.error(failure.message, hint=failure.hint)
    return error_of(failure).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
