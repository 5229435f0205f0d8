"""``meshinfer doctor``: what is wrong here, and what to do about it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import AsJson, ClusterName, Coordinator, Interfaces, KeyringFile, LogLevel

if TYPE_CHECKING:
    from meshinfer.doctor import Finding

_WIDTHS = 9, 11


def doctor(
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this device; default: the host's name.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="State folder of the daemon here; default: the usual ones.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the coordinator.")
    ] = 5.0,
    as_json: AsJson = False,
    log_level: LogLevel = "error",
) -> None:
    """Find out what is wrong on this machine and with its cluster, and what to do about it.

    Run it where the trouble is: on a worker's, the coordinator's or a client's machine. Changes
    nothing. The exit code is that of the first problem, 0 without any.
    """
    import psutil

    from cluster import telemetry
    from cluster.doctor import Options, examine
    from cluster.keyring import check_cluster_name
    from meshinfer.doctor import exit_code

    telemetry.configure(log_level)
    options = Options(
        cluster=check_cluster_name(cluster),
        name=name or socket.gethostname(),
        coordinator=coordinator,
        keyring=keyring,
        interfaces=tuple(interface) if interface else None,
        state=state_dir,
        threads=psutil.cpu_count(logical=False) or 1,
        timeout_s=timeout,
    )
    findings = examine(options, (lambda _: None) if as_json else _say)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    raise typer.Exit(exit_code(findings))


def _say(finding: Finding) -> None:
    """A line, and what to do about it below."""
    verdict, check = _WIDTHS
    typer.echo(f"{finding.verdict:<{verdict}}{finding.check:<{check}}{finding.text}")
    if finding.hint:
        typer.echo(f"{'':<{verdict + check}}-> {finding.hint}")
