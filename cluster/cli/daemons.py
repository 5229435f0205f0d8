"""``meshinfer coordinator`` and ``meshinfer worker``: the daemons."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import (
    ClusterName,
    Coordinator,
    Interfaces,
    KeyringFile,
    LogForm,
    LogLevel,
)
from meshinfer.errors import ConfigurationError

if TYPE_CHECKING:
    from cluster.coordinator import Address
    from cluster.worker import WorkerOptions

_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DRAIN_S, _STOP_S = 3.0, 5.0

StateDir = Annotated[Path | None, typer.Option(help="Folder for keys and the weights it keeps.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads of the engine; default: its cores.")
]
Name = Annotated[str | None, typer.Option(help="Name of the device; default: the host's name.")]


def coordinator(
    cluster: ClusterName = "default",
    host: Annotated[str, typer.Option(help="Address to listen at; default: all.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7433,
    state_dir: StateDir = None,
    interface: Interfaces = None,
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
    log_level: LogLevel = "info",
    log_form: LogForm = "text",
) -> None:
    """Run the coordinator of a cluster, with a worker beside it. SIGTERM drains, twice stops."""
    from cluster import telemetry
    from cluster.config import coordinator_state
    from cluster.coordinator import CoordinatorOptions, run_coordinator
    from cluster.keyring import check_cluster_name
    from meshinfer.protocol.codec import error_of

    telemetry.configure(log_level, log_form, name="coordinator")
    check_cluster_name(cluster)
    _check_insecure(host, insecure, insecure_anywhere)
    state = state_dir or coordinator_state(cluster)
    options = CoordinatorOptions(
        cluster=cluster,
        state_dir=str(state),
        host="" if host == "0.0.0.0" else host,
        port=port,
        interfaces=_interfaces(interface, mdns),
        plaintext=insecure,
        log_level=log_level,
        log_form=log_form,
    )
    beside: _Beside | None = None
    if compute:
        chosen = _device_name(name)
        of_worker = _worker_state(cluster, chosen) if state_dir is None else state / "worker"
        beside = _Beside(
            _worker_options(
                name=chosen,
                cluster=cluster,
                state_dir=of_worker,
                keyring=state / "keyring.json",
                threads=threads,
                log=(log_level, log_form),
                beside=not options.host,
            )
        )
    try:
        failure = run_coordinator(options, beside.start if beside else None)
    finally:
        if beside is not None:
            beside.stop()
    if failure is not None:
        raise error_of(failure)


def worker(
    cluster: ClusterName = "default",
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    name: Name = None,
    state_dir: StateDir = None,
    interface: Interfaces = None,
    threads: Threads = None,
    memory: Annotated[
        int, typer.Option(min=0, help="MB that MeshInfer may use; 0: all that is left.")
    ] = 0,
    speed: Annotated[float, typer.Option(min=0.001, max=1.0, hidden=True)] = 1.0,
    log_level: LogLevel = "info",
    log_form: LogForm = "text",
) -> None:
    """Run a worker: it finds the coordinator, computes, and is started again should it die."""
    import msgspec

    from cluster.config import default_keyring
    from cluster.keyring import read_keyring
    from cluster.locate import parse_address

    ring = keyring or default_keyring(cluster)
    named = read_keyring(ring).cluster
    if coordinator is not None:
        parse_address(coordinator)
    chosen = _device_name(name)
    options = _worker_options(
        name=chosen,
        cluster=named,
        state_dir=state_dir or _worker_state(named, chosen),
        keyring=ring,
        threads=threads,
        log=(log_level, log_form),
    )
    options = msgspec.structs.replace(
        options,
        coordinator=coordinator,
        interfaces=_interfaces(interface, True),
        speed=speed,
        memory_bytes=memory * 1_000_000,
    )
    # Nothing of what was imported here shall cost the Pi memory.
    os.execv(sys.executable, _supervisor(options))


class _Beside:
    """The worker on the coordinator's host: from when that listens to when it ends."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: Address) -> None:
        """Start it; the coordinator listens at this address."""
        import msgspec

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


def _check_insecure(host: str, insecure: bool, anywhere: bool) -> None:
    """Without encryption on this machine only, unless it is asked for twice."""
    if anywhere and not insecure:
        raise ConfigurationError(
            "--insecure-anywhere says where --insecure may be, and that is not given",
            hint="leave it out: all connections are encrypted",
        )
    if insecure and not (anywhere or _is_loopback(host)):
        where = host or "all addresses"
        raise ConfigurationError(
            f"--insecure at {where} would let anyone in who reaches this machine",
            hint="give --host 127.0.0.1, or --insecure-anywhere too if that is what you want",
        )


def _is_loopback(host: str) -> bool:
    """Of addresses only: what a name stands for may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _interfaces(given: list[str] | None, mdns: bool) -> tuple[str, ...] | None:
    if not mdns:
        return ()
    return tuple(given) if given else None


def _device_name(given: str | None) -> str:
    name = given or socket.gethostname()
    if not _DEVICE_NAME.fullmatch(name) or name == "head":
        raise ConfigurationError(
            f"a device cannot be named {name!r}",
            hint="give --name: letters, digits, '.', '_' and '-'; 'head' is the coordinator's own",
        )
    return name


def _worker_state(cluster: str, name: str) -> Path:
    from cluster.config import state_dir

    return state_dir(f"worker-{cluster}-{name}")


def _worker_options(
    *,
    name: str,
    cluster: str,
    state_dir: Path,
    keyring: Path,
    threads: int | None,
    log: tuple[str, str],
    beside: bool = False,
) -> WorkerOptions:
    import psutil

    from cluster.worker import WorkerOptions

    return WorkerOptions(
        name=name,
        cluster=cluster,
        state_dir=str(state_dir),
        keyring=str(keyring.absolute()),
        threads=threads or psutil.cpu_count(logical=False) or 1,
        log_level=log[0],
        log_form=log[1],
        beside=beside,
    )


def _supervisor(options: WorkerOptions) -> list[str]:
    import msgspec

    text = json.dumps(msgspec.to_builtins(options))
    return [sys.executable, "-m", "cluster.supervisor", text]
