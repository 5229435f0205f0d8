"""The coordinator process: the coordinator's loop, a planning thread, and the head device's loop.

The head is a worker core without an engine, so tensors never pass through the coordinator's core.
On the same host a worker of its own computes, unless ``--no-compute``.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

import meshinfer
from cluster import heap, notify, processes, profiler, telemetry
from cluster.blobs import BlobStore
from cluster.config import ADDRESS_FILE
from cluster.discovery import announce, browse
from cluster.journal import FILE, Journal, JournalThread
from cluster.keyring import Keyring, load_or_create_coordinator
from cluster.keys import KeyPair
from cluster.locate import DEFAULT_PORT
from cluster.loop import Loop, Post, start_thread
from cluster.planning import PlanningThread
from cluster.signing import Signing, Verifying, load_or_create_key
from cluster.sockets import Endpoint, Plane
from cluster.storing import StoreThread
from cluster.transport import Transport
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, ConfigurationError, MeshInferError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of, failure_of
from meshinfer.protocol.joining import Admission
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.protocol.token import short_id
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.events import Effect, Record, Stop, StopRequested
from meshinfer.scheduler.ledger import TokenMade
from meshinfer.scheduler.worker import COORDINATOR, WorkerCore

HEAD = "head"
"""Name of the coordinator's own device, the source and the sink of requests."""

PARTS = ("loop", HEAD)
"""What has to be alive for the service manager, as ``notify`` names it."""

EVERYWHERE, LOOPBACK = "0.0.0.0", "127.0.0.1"
_LOOK_S = 2.5
_POLL_S = 0.02
_REFRESH_S = 30.0
_WARN_S = 60.0
_JOIN_S = 5.0
_LAST_PORT = 65535
_DESCRIPTORS = 4 * limits.DEVICES + 512
"""A device has three connections, to control, bulk and the head; clients and strangers a few."""


class CoordinatorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a coordinator. ``host``: address to listen at; empty: all of this machine's.

    ``interfaces``: addresses for mDNS; None chooses, empty does without. ``plaintext``: the cluster
    does without encryption, as its keyring then says. ``join_port``: where strangers knock; 0: the
    one after ``port``, or any free one if that is 0. ``tokens``: good from the start. ``parent``:
    the process to end with.
    """

    cluster: str = "default"
    state_dir: str
    host: str = ""
    port: int = DEFAULT_PORT
    join_port: int = 0
    tokens: tuple[TokenMade, ...] = ()
    interfaces: tuple[str, ...] | None = None
    plaintext: bool = False
    log_level: str = "info"
    log_form: str = "text"
    parent: int = 0


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a running coordinator listens; ``address.json`` in its state folder."""

    host: str
    port: int
    join_port: int
    pid: int


def run_coordinator(
    options: CoordinatorOptions, on_listening: Callable[[Address], None] | None = None
) -> m.Failure | None:
    """Serve until stopped. Raises typed errors for a port in use and for a second coordinator.

    ``on_listening`` is called once, from when on devices can join.
    """
    state = Path(options.state_dir)
    processes.hold_folder(state)
    address = state / ADDRESS_FILE
    address.unlink(missing_ok=True)  # of one that was killed
    keyring, own = load_or_create_coordinator(state, options.cluster, plaintext=options.plaintext)
    signing = load_or_create_key(state)
    _refuse_second(options, keyring)
    journal = Journal(state / FILE)
    here = options.host or LOOPBACK
    shown = options.host or BESIDE_COORDINATOR
    incarnation = secrets.token_hex(4)
    always = (
        Admission(own.public, HEAD, "worker"),
        Admission(keyring.key.public, keyring.name, "admin"),
    )
    identity = f"{COORDINATOR}#{incarnation}"
    transport = Transport(identity, own, always, plaintext=keyring.plaintext)
    # Before anybody can connect: a device that comes back is not to be turned away.
    transport.admit(each.admission for each in journal.ledger.enrolled.values())
    try:
        port, join_port, bulk_port = _bind(transport, options)
    except MeshInferError:
        transport.close()
        journal.close()
        raise
    bulk = m.Peer(
        device=COORDINATOR, incarnation=incarnation, host=shown, port=bulk_port, key=own.public
    )
    store = BlobStore(state / "blobs", durable=True)
    door = Door(port, always, options.tokens, join_port, own.public)
    draw = secrets.SystemRandom().random  # no device can foresee which task is checked
    core = CoordinatorCore(options.cluster, meshinfer.__version__, bulk, door, journal.ledger, draw)
    planning: PlanningThread
    writing: JournalThread

    def perform(effect: Effect) -> None:
        if isinstance(effect, Record):
            writing.put(effect)
        else:
            planning.put(effect)

    signed, beat = Signing(core, signing, incarnation), partial(_alive, port)
    loop = Loop(signed, lambda: transport, perform, None, beat)
    writing = JournalThread(journal, loop.post)
    planning = PlanningThread(store, loop.post, options.log_level, options.log_form)
    head = Head(keyring, own, options.cluster, here, options.host, port, store, loop.post)
    _drain_at_signals(loop)
    listening = Address(host=here, port=port, join_port=join_port, pid=os.getpid())
    _tell(address, listening, options, own.public)
    head.start()
    try:
        with _announced(options, listening, own.public, loop), _warning(keyring, loop.post):
            if on_listening is not None:
                on_listening(listening)
            return loop.run()
    finally:
        address.unlink(missing_ok=True)
        head.close()
        planning.close()
        writing.close()


def _alive(port: int) -> None:
    notify.alive(f"listens at port {port}", ready=True)


def _drain_at_signals(loop: Loop) -> None:
    def drain(*_: object) -> None:
        notify.stopping()
        loop.post(StopRequested())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)


def _bind(transport: Transport, options: CoordinatorOptions) -> tuple[int, int, int]:
    """The ports of control, join and bulk, and descriptors for all that will connect."""
    processes.open_more(_DESCRIPTORS)
    host = options.host or EVERYWHERE
    control = transport.bind(Plane.CONTROL, host, options.port)
    after = options.port + 1 if 0 < options.port < _LAST_PORT else 0
    try:
        join = transport.bind(Plane.JOIN, host, options.join_port or after)
    except ConfigurationError as error:
        raise ConfigurationError(
            error.message, hint="there strangers are to knock: choose another with --join-port"
        ) from error
    return control, join, transport.bind(Plane.BULK, host)


@contextmanager
def _announced(options: CoordinatorOptions, where: Address, key: str, loop: Loop) -> Iterator[None]:
    """Be found over mDNS meanwhile, at the addresses that the machine has from time to time."""
    if options.interfaces == ():
        yield
        return
    announcement = announce(
        options.cluster,
        where.port,
        key=key,
        join_port=where.join_port,
        protocol=m.PROTOCOL,
        interfaces=options.interfaces,
    )
    try:
        with _each("announcing", _REFRESH_S, announcement.refresh, loop.post):
            yield
    finally:
        announcement.close()


@contextmanager
def _warning(keyring: Keyring, post: Post) -> Iterator[None]:
    """Say now and each minute that nothing is encrypted, if so."""
    if not keyring.plaintext:
        yield
        return
    telemetry.warn_of_plaintext()
    with _each("warning", _WARN_S, telemetry.warn_of_plaintext, post):
        yield


@contextmanager
def _each(name: str, pause_s: float, act: Callable[[], None], post: Post) -> Iterator[None]:
    """Do it in a thread, time and again, meanwhile."""
    over = threading.Event()

    def body() -> None:
        while not over.wait(pause_s):
            act()

    thread = start_thread(name, body, post)
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=_JOIN_S)


def _tell(path: Path, address: Address, options: CoordinatorOptions, key: str) -> None:
    """Write down where it listens, and log it."""
    fields = {"host": options.host or EVERYWHERE, "port": address.port, "id": short_id(key)}
    fields |= {"join_port": address.join_port, "cluster": options.cluster}
    structlog.get_logger().info("listening", **fields)
    part = path.with_suffix(".part")
    try:
        part.write_bytes(msgspec.json.encode(address))
        os.replace(part, path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}", hint="make room on the disk of its folder"
        ) from error


def await_address(coordinator: subprocess.Popen[Any], state_dir: Path, timeout_s: float) -> Address:
    """Where a coordinator that was just started listens. Raises ``ClusterUnavailable`` if it ends,
    or does not listen in time."""
    path = state_dir / ADDRESS_FILE
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if coordinator.poll() is not None or time.monotonic() > deadline:
            raise ClusterUnavailable("the coordinator did not start", hint="look at the log above")
        time.sleep(_POLL_S)
    return msgspec.json.decode(path.read_bytes(), type=Address)


def _refuse_second(options: CoordinatorOptions, keyring: Keyring) -> None:
    """Two coordinators of one name on a network are an error; mDNS tells of the other."""
    if options.interfaces == ():
        return
    others = browse(options.cluster, timeout_s=_LOOK_S, interfaces=options.interfaces, until=1)
    for other in others:
        mine = other.key == keyring.coordinator_public
        raise ConfigurationError(
            f"cluster {options.cluster!r} has a coordinator at {other.host}:{other.port} already"
            + (" (with this very key)" if mine else ""),
            hint="stop that one, or choose another name with --cluster",
        )


class Head:
    """The coordinator's own device: holds inputs, merges answers, computes nothing."""

    def __init__(
        self,
        keyring: Keyring,
        own: KeyPair,
        cluster: str,
        host: str,
        shared_host: str,
        control_port: int,
        store: BlobStore,
        post: Post,
    ) -> None:
        self._own = own
        self._keyring, self._cluster, self._host, self._shared = keyring, cluster, host, shared_host
        self._control_port = control_port
        self._store, self._post = store, post
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        """A head that ends ends the coordinator, which is of no use without it."""
        self._thread = start_thread("head", self._run, self._post)

    def close(self) -> None:
        self._closed = True
        if self._loop is not None:
            _stop_at_once(self._loop)
        if self._thread is not None:
            self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        incarnation = secrets.token_hex(4)
        ring, identity = self._keyring, f"{HEAD}#{incarnation}"
        transport = Transport(
            identity,
            self._own,
            [Admission(self._own.public, HEAD, "worker")],
            plaintext=ring.plaintext,
            unknown_is_temporary=True,
        )
        port = transport.bind(Plane.BULK, self._shared or EVERYWHERE)
        control = Endpoint(self._host, self._control_port, self._keyring.coordinator_public)
        facts = profiler.facts(threads=0, engine="none", measured=None)
        hello = m.Hello(
            role="worker",
            device=HEAD,
            incarnation=incarnation,
            cluster=self._cluster,
            protocol=m.PROTOCOL,
            version=meshinfer.__version__,
            bulk=m.Peer(
                device=HEAD,
                incarnation=incarnation,
                host=self._shared or BESIDE_COORDINATOR,
                port=port,
                key=self._own.public,
            ),
            facts=msgspec.structs.replace(facts, head=True),
        )
        storing: StoreThread
        core = Verifying(WorkerCore(hello), identity)
        beat = partial(notify.alive, part=HEAD)
        loop = Loop(core, lambda: transport, lambda effect: storing.put(effect), control, beat)
        storing = StoreThread(self._store, None, loop.post)
        self._loop = loop
        if self._closed:  # before there was a loop to tell
            _stop_at_once(loop)
        failure = loop.run()
        storing.close()
        if failure is not None:
            self._post(Stop(failure))


def _stop_at_once(loop: Loop) -> None:
    loop.post(StopRequested())
    loop.post(StopRequested())  # the second: nothing to drain, the coordinator is gone


def main(arguments: list[str]) -> int:
    """``python -m cluster.coordinator OPTIONS`` with the options as JSON."""
    heap.share_one()
    options = msgspec.convert(json.loads(arguments[0]), CoordinatorOptions)
    telemetry.configure(options.log_level, options.log_form, name=COORDINATOR)
    if options.parent:
        processes.watch_parent(options.parent, lambda: os._exit(0))
    notify.enable(PARTS, of_another=bool(options.parent))
    try:
        failure = run_coordinator(options)
    except MeshInferError as error:
        failure = failure_of(error)
    if failure is None:
        return 0
    structlog.get_logger().error(failure.message, hint=failure.hint)
    return error_of(failure).exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
