"""``meshinfer token`` and ``join``, and how a token is given, told and shown as a QR code."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.options import (
    AsJson,
    ClusterName,
    Coordinator,
    Interfaces,
    KeyringFile,
    LogLevel,
    Timeout,
    connect,
)
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from meshinfer.protocol.token import Role, Token

VARIABLE = "MESHINFER_TOKEN"
STDIN = "-"
_SPAN = re.compile(r"(\d{1,9})([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

TokenText = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN|-",
        allow_from_autoenv=False,
        help=f"What lets it join, as the coordinator printed it; -: from stdin. Or ${VARIABLE}.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", allow_from_autoenv=False, help="The file that has the token."),
]
Qr = Annotated[bool, typer.Option("--qr", help="Show it as a QR code, too (on stderr).")]


def token(
    role: Annotated[
        str, typer.Option(help="What it admits: a worker, a client, or an admin.")
    ] = "worker",
    ttl: Annotated[
        str, typer.Option(metavar="TIME", help="How long it holds, as 90s, 15m, 12h or 30d.")
    ] = "15m",
    reusable: Annotated[
        bool, typer.Option("--reusable", help="It admits any number, not one.")
    ] = False,
    qr: Qr = False,
    coordinator: Coordinator = None,
    keyring: KeyringFile = None,
    cluster: ClusterName = "default",
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    log_level: LogLevel = "warning",
) -> None:
    """Make a token: whoever has it may join. Needs an admin's keyring, as the coordinator has.

    Prints the token; use it with meshinfer worker --token, or meshinfer join."""
    chosen, ttl_s = _role(role), parse_span(ttl)
    with connect(coordinator, keyring, cluster, interface, timeout, log_level) as client:
        made = client.admitting.token(chosen, ttl_s=ttl_s, reusable=reusable)
    if as_json:
        fields = {"token": str(made), "role": chosen, "ttl_s": ttl_s, "reusable": reusable}
        typer.echo(json.dumps({**fields, "command": command_of(made)}))
    else:
        typer.echo(str(made))
    if qr:
        typer.echo(qr_code(command_of(made)), err=True)


def join(
    token: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOKEN|-]",
            help=f"As meshinfer token printed it; -: from stdin. Or --token-file, or ${VARIABLE}.",
            show_default=False,
        ),
    ] = None,
    token_file: TokenFile = None,
    coordinator: Coordinator = None,
    keyring: Annotated[
        Path | None,
        typer.Option(
            envvar="MESHINFER_KEYRING", help="Where to write it; default: this user's own folder."
        ),
    ] = None,
    interface: Interfaces = None,
    timeout: Timeout = 10.0,
    log_level: LogLevel = "warning",
) -> None:
    """Let this user's commands and programs use a cluster elsewhere: writes a keyring."""
    from cluster import telemetry
    from cluster.membership import join_as_user

    telemetry.configure(log_level)
    given = given_token(token, token_file)
    if given is None:
        raise InvalidInput(
            "there is no token", hint="make one with meshinfer token --role client, and give it"
        )
    made, path = join_as_user(
        given, keyring, address=coordinator, interfaces=interface or None, timeout_s=timeout
    )
    typer.echo(f"joined {made.cluster} as {made.role}; its keyring is {path}", err=True)


def given_token(text: str | None, path: Path | None) -> Token | None:
    """The token given by the option, the file, stdin or the environment; None without any."""
    from meshinfer.protocol.token import parse_token

    if text is not None and path is not None:
        raise InvalidInput("two tokens are given", hint="give --token or --token-file")
    if text == STDIN:
        text = sys.stdin.readline(2 * limits.TOKEN_CHARS)
    elif path is not None:
        text = _read(path)
    elif text is None:
        text = os.environ.get(VARIABLE) or None
    return None if text is None else parse_token(text)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            return file.read(2 * limits.TOKEN_CHARS)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise AuthError(f"{path} has no token", hint="give the file that has it") from error


def parse_span(text: str) -> float:
    """Seconds of ``90s``, ``15m``, ``12h`` or ``30d``. Raises ``InvalidInput``."""
    found = _SPAN.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise InvalidInput(f"{text!r} is no time", hint="write --ttl 90s, 15m, 12h or 30d")
    return float(int(found[1]) * _SECONDS[found[2]])


def _role(text: str) -> Role:
    from meshinfer.protocol.token import ROLES

    for role in ROLES:
        if role == text:
            return role
    raise InvalidInput(f"{text!r} is no role", hint=f"write --role {', '.join(ROLES)}")


def command_of(made: Token) -> str:
    """The line to paste where it is to be used."""
    how = "worker --token" if made.role == "worker" else "join"
    return f"meshinfer {how} {made}"


def qr_code(text: str) -> str:
    """For a terminal, two modules a character."""
    import io

    import segno

    buffer = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(out=buffer, compact=True)
    return buffer.getvalue()


def show_line(made: Token, log_form: str, *, qr: bool) -> None:
    """How to add a device, on stderr: among the log's lines, but so that it is seen."""
    line, minutes = command_of(made), limits.TOKEN_S / 60
    if log_form == "json":
        import structlog

        structlog.get_logger().info(
            "to add a device, run this there", command=line, within_s=limits.TOKEN_S
        )
    else:
        typer.echo(
            f"\nTo add a device, run this there (once, within {minutes:.0f} minutes; "
            f"more: meshinfer token):\n\n    {line}\n",
            err=True,
        )
    if qr:
        typer.echo(qr_code(line), err=True)
