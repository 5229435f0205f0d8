"""``meshinfer coordinator`` and ``meshinfer worker``: the daemons."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.at_rest import BlobKeyFile, EncryptBlobs, Forget, Yes, forget_all
from cluster.cli.install import DryRun, Install, install_with
from cluster.cli.joining import VARIABLE, Qr, TokenFile, TokenText, given_token, show_line
from cluster.cli.options import (
    ClusterName,
    Coordinator,
    Listens,
    LogForm,
    LogLevel,
    check_insecure,
    is_default,
    only_address,
)
from meshinfer.errors import AuthError, ClusterUnavailable, ConfigurationError

if TYPE_CHECKING:
    from cluster.coordinator import Address, CoordinatorOptions
    from cluster.keyring import Keyring
    from cluster.worker import WorkerOptions
    from meshinfer.protocol.token import Token

_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DRAIN_S, _STOP_S = 3.0, 5.0
_AGAIN_S = 1.0

StateDir = Annotated[Path | None, typer.Option(help="Folder for keys and the weights it keeps.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads of the engine; default: its cores.")
]
Name = Annotated[str | None, typer.Option(help="Name of the device; default: the host's name.")]


def coordinator(
    cluster: ClusterName = "default",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all. Default: --interface, or all.")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7433,
    join_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Where devices ask to join; 0: --port + 1."),
    ] = 0,
    state_dir: StateDir = None,
    interface: Listens = None,
    mdns: Annotated[
        bool, typer.Option("--mdns/--no-mdns", help="Announce it, so that devices find it.")
    ] = True,
    compute: Annotated[
        bool, typer.Option("--compute/--no-compute", help="Start a worker on this host, too.")
    ] = True,
    name: Name = None,
    threads: Threads = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="No encryption and no keys, for this cluster's whole life: to measure what they "
            "cost. Only with a loopback --host.",
        ),
    ] = False,
    insecure_anywhere: Annotated[
        bool,
        typer.Option(
            "--insecure-anywhere",
            help="Lets --insecure listen at any --host: anyone who reaches it can join.",
        ),
    ] = False,
    qr: Qr = False,
    log_level: LogLevel = "info",
    log_form: LogForm = "text",
) -> None:
    """Run the coordinator of a cluster, with a worker beside it. SIGTERM drains, twice stops.

    As it starts, it prints the line that adds a device: once, within 15 minutes."""
    from cluster import heap

    heap.share_one()  # before what takes long to import
    import msgspec

    from cluster import telemetry
    from cluster.config import coordinator_state
    from cluster.coordinator import CoordinatorOptions
    from cluster.keyring import check_cluster_name
    from cluster.tokens import given, new_secret

    telemetry.configure(log_level, log_form, name="coordinator")
    check_cluster_name(cluster)
    host = host or only_address(interface)
    check_insecure(host, insecure, insecure_anywhere)
    state = state_dir or coordinator_state(cluster)
    secret = new_secret()
    options = CoordinatorOptions(
        cluster=cluster,
        state_dir=str(state),
        host="" if host == "0.0.0.0" else host,
        port=port,
        join_port=join_port,
        tokens=(given(secret, "worker"),),
        interfaces=_interfaces(interface, mdns),
        plaintext=insecure,
        log_level=log_level,
        log_form=log_form,
    )
    beside: _Beside | None = None
    if compute:
        chosen = _device_name(name)
        of_worker = _worker_state(cluster, chosen) if state_dir is None else state / "worker"
        log, anywhere = (log_level, log_form), not options.host
        beside = _Beside(_worker_options(chosen, cluster, of_worker, threads, log, anywhere))
        options = msgspec.structs.replace(options, tokens=(*options.tokens, beside.token))
    _serve(options, beside, secret, qr=qr)


def _serve(options: CoordinatorOptions, beside: _Beside | None, secret: bytes, *, qr: bool) -> None:
    """``secret``: of the token in the line that it prints."""
    from cluster import notify
    from cluster.coordinator import PARTS, run_coordinator
    from cluster.keyring import KEYRING_FILE, read_keyring
    from cluster.tokens import places_of, token_for
    from meshinfer.protocol.codec import error_of

    def listening(address: Address) -> None:
        ring = read_keyring(Path(options.state_dir) / KEYRING_FILE)
        if beside is not None:
            beside.start(address, ring)
        places = places_of(options.host, address.join_port)
        show_line(token_for(ring, "worker", secret, places), options.log_form, qr=qr)

    notify.enable(PARTS)
    try:
        failure = run_coordinator(options, listening)
    finally:
        if beside is not None:
            beside.stop()
    if failure is not None:
        raise error_of(failure)


def worker(
    ctx: typer.Context,
    token: TokenText = None,
    token_file: TokenFile = None,
    cluster: ClusterName = "default",
    coordinator: Coordinator = None,
    coordinator_id: Annotated[
        str, typer.Option(help="Without a token: join only the one with this id, or its beginning.")
    ] = "",
    keyring: Annotated[
        Path | None,
        typer.Option(
            envvar="MESHINFER_KEYRING", help="An admin's keyring, to join by without a token."
        ),
    ] = None,
    name: Name = None,
    state_dir: StateDir = None,
    interface: Listens = None,
    threads: Threads = None,
    memory: Annotated[
        int, typer.Option(min=0, help="MB that MeshInfer may use; 0: all that is granted.")
    ] = 0,
    nice: Annotated[
        int | None, typer.Option(min=0, max=19, help="Give way to what else runs here; 19: always.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, max=1.0, hidden=True)] = 1.0,
    install: Install = False,
    dry_run: DryRun = False,
    encrypt_blobs: EncryptBlobs = False,
    blob_key_file: BlobKeyFile = None,
    forget: Forget = False,
    yes: Yes = False,
    log_level: LogLevel = "info",
    log_form: LogForm = "text",
) -> None:
    """Run a worker: it finds the coordinator, computes, and is started again should it die.

    At first it joins: with the token, or by this user's admin keyring, or by waiting until
    meshinfer devices approve lets it in. From then on it needs none of them."""
    import msgspec

    from cluster import telemetry
    from cluster.locate import parse_address
    from cluster.tokens import leave_token

    telemetry.configure(log_level, log_form, name="worker")
    if coordinator is not None:
        parse_address(coordinator)
    chosen, found = _device_name(name), given_token(token, token_file)
    if install or dry_run:
        install_with(ctx, found, dry_run=dry_run)
        return
    if found is None and is_default(ctx, "cluster"):
        cluster = _joined_before(chosen) or cluster
    admin = _admin_keyring(keyring, cluster) if found is None else None
    named = found.cluster if found is not None else admin.cluster if admin is not None else cluster
    state = state_dir or _worker_state(named, chosen)
    if forget:
        forget_all(state, yes=yes)
        return
    if found is None and admin is not None and not _has_joined(state, admin, chosen):
        found = _token_by(admin, keyring, coordinator, interface)
    if found is not None:
        leave_token(state, found)
    os.environ.pop(VARIABLE, None)  # it is in the file now, and nowhere else
    options = msgspec.structs.replace(
        _worker_options(chosen, named, state, threads, (log_level, log_form)),
        coordinator=coordinator,
        coordinator_id=coordinator_id,
        interfaces=_interfaces(interface, True),
        speed=speed,
        memory_bytes=memory * 1_000_000,
        encrypt_blobs=encrypt_blobs,
        blob_key_file="" if blob_key_file is None else str(blob_key_file.absolute()),
    )
    if nice is not None:
        os.nice(nice)
    # Nothing of what was imported here shall cost the Pi memory.
    os.execv(sys.executable, _supervisor(options))


def _has_joined(state: Path, ring: Keyring, name: str) -> bool:
    """Whether the worker with this folder has joined the coordinator of a keyring by this name."""
    from cluster.membership import kept_keyring

    kept = kept_keyring(state)
    return kept is not None and (kept.coordinator_public, kept.name) == (
        ring.coordinator_public,
        name,
    )


def _joined_before(name: str) -> str | None:
    """The only cluster that a worker of this name here has joined."""
    from cluster.config import state_dir
    from cluster.keyring import KEYRING_FILE, read_keyring

    found = []
    for path in state_dir("").glob(f"worker-*-{name}/{KEYRING_FILE}"):
        with suppress(AuthError, ConfigurationError):
            ring = read_keyring(path)
            if ring.name == name:
                found.append(ring.cluster)
    return found[0] if len(found) == 1 else None


def _admin_keyring(given: Path | None, cluster: str) -> Keyring | None:
    """An admin's keyring that this user may read, if there is one."""
    from cluster.config import default_keyring
    from cluster.keyring import read_keyring

    if given is None:
        try:
            ring = read_keyring(default_keyring(cluster))
        except (AuthError, ConfigurationError):  # another user's, or there is none
            return None
        return ring if ring.role == "admin" else None
    ring = read_keyring(given)
    if ring.role != "admin":
        raise AuthError(
            f"{given} is the keyring of a {ring.role}, who cannot let a worker in",
            hint="give the worker a token: meshinfer token, on the coordinator's machine",
        )
    return ring


def _token_by(
    ring: Keyring, path: Path | None, coordinator: str | None, interfaces: list[str] | None
) -> Token:
    """A token for a worker here, as soon as the coordinator answers."""
    import structlog

    from cluster.client import Client

    while True:
        try:
            with Client(
                coordinator, keyring=path, cluster=ring.cluster, interfaces=interfaces
            ) as client:
                return client.admitting.token()
        except ClusterUnavailable as error:
            structlog.get_logger().info("no coordinator yet", why=error.message)
            time.sleep(_AGAIN_S)


class _Beside:
    """The worker on the coordinator's host: from when that listens to when it ends.

    ``token``: what the coordinator has to know of the one that lets it in."""

    def __init__(self, options: WorkerOptions) -> None:
        from cluster.tokens import given, new_secret

        self._options, self._secret = options, new_secret()
        self.token = given(self._secret, "worker")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: Address, ring: Keyring) -> None:
        """Start it; the coordinator listens at this address, and has this keyring."""
        import msgspec

        from cluster.tokens import leave_token, places_of, token_for

        state = Path(self._options.state_dir)
        if not _has_joined(state, ring, self._options.name):
            places = places_of(address.host, address.join_port)
            leave_token(state, token_for(ring, "worker", self._secret, places))
        options = msgspec.structs.replace(
            self._options, coordinator=f"{address.host}:{address.port}", parent=os.getpid()
        )
        self._process = subprocess.Popen(
            _supervisor(options),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the coordinator, which then stops us
        )

    def stop(self) -> None:
        """Let it drain, then stop it, then kill it."""
        process = self._process
        if process is None:
            return
        for patience in (_DRAIN_S, _STOP_S):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return
        process.kill()
        process.wait()


def _interfaces(given: list[str] | None, mdns: bool) -> tuple[str, ...] | None:
    if not mdns:
        return ()
    return tuple(given) if given else None


def _device_name(given: str | None) -> str:
    name = given or socket.gethostname()
    of_others = name in ("head", "coordinator") or name.startswith("client-")
    if not _DEVICE_NAME.fullmatch(name) or of_others:
        raise ConfigurationError(
            f"a device cannot be named {name!r}",
            hint="give --name: letters, digits, '.', '_' and '-'; 'head' and 'coordinator' are the "
            "coordinator's own, and what begins with 'client-' is a client's",
        )
    return name


def _worker_state(cluster: str, name: str) -> Path:
    from cluster.config import state_dir

    return state_dir(f"worker-{cluster}-{name}")


def _worker_options(
    name: str,
    cluster: str,
    state_dir: Path,
    threads: int | None,
    log: tuple[str, str],
    beside: bool = False,
) -> WorkerOptions:
    import psutil

    from cluster.worker import WorkerOptions

    return WorkerOptions(
        name=name,
        cluster=cluster,
        state_dir=str(state_dir.absolute()),
        threads=threads or psutil.cpu_count(logical=False) or 1,
        log_level=log[0],
        log_form=log[1],
        beside=beside,
    )


def _supervisor(options: WorkerOptions) -> list[str]:
    import msgspec

    text = json.dumps(msgspec.to_builtins(options))
    return [sys.executable, "-m", "cluster.supervisor", text]
