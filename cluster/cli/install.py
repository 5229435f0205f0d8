"""``meshinfer worker --install``: writes the unit and its settings, and has systemd start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshinfer.errors import AuthError, ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from meshinfer.protocol.token import Token

UNIT = "meshinfer-worker.service"
_PROGRAM = "/opt/meshinfer/bin/meshinfer"  # in the unit as it ships
_NICE = "\nNice=5\n"
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 (of names)
_COMMANDS = (
    ("systemctl", "daemon-reload"),
    ("systemctl", "enable", UNIT),
    # It is up once it has joined, which may take until somebody starts the coordinator.
    ("systemctl", "restart", "--no-block", UNIT),
)


_VARIABLES = {
    "cluster": "MESHINFER_CLUSTER",
    "coordinator": "MESHINFER_COORDINATOR",
    "interface": "MESHINFER_INTERFACE",
    "coordinator_id": "MESHINFER_WORKER_COORDINATOR_ID",
    "name": "MESHINFER_WORKER_NAME",
    "threads": "MESHINFER_WORKER_THREADS",
    "memory": "MESHINFER_WORKER_MEMORY",
    "log_level": "MESHINFER_LOG_LEVEL",
    "encrypt_blobs": "MESHINFER_WORKER_ENCRYPT_BLOBS",
}
"""Options that the service is to have, and how its environment says them."""

_NOT_OF_IT = frozenset(("state_dir", "keyring", "blob_key_file", "speed", "forget"))
"""Options whose files a service's own user does not see, or that are for once."""

Install = Annotated[
    bool,
    typer.Option(
        "--install",
        allow_from_autoenv=False,
        help="Do not run it now: make it a service of systemd, with these options. Needs root.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", allow_from_autoenv=False, help="With --install: print what it would do."
    ),
]


@dataclass(frozen=True, slots=True)
class File:
    """One file to be written; ``secret``: root's alone, and never shown."""

    path: Path
    text: str
    secret: bool = False


def files_of(
    settings: Mapping[str, object], token: str | None, *, program: Path, nice: int | None
) -> list[File]:
    """What a worker's service consists of. ``settings``: its environment; ``program``: the command
    that it runs.

    Raises ``ConfigurationError`` where the service, which sees no home, could not run it.
    """
    if any(program.is_relative_to(folder) for folder in _HIDDEN):
        raise ConfigurationError(
            f"a service cannot run {program}: it sees no home folders and no /tmp",
            hint="install as root, into /opt/meshinfer: sudo sh deploy/install.sh",
        )
    unit = files("cluster").joinpath("data", UNIT).read_text()
    unit = unit.replace(_PROGRAM, str(program))
    if nice is not None:
        unit = unit.replace(_NICE, f"\nNice={nice}\n")
    given = "".join(f"{name}={_quoted(value)}\n" for name, value in settings.items())
    found = [
        File(Path("etc/systemd/system") / UNIT, unit),
        File(Path("etc/meshinfer/worker.env"), given),
    ]
    if token is not None:
        found.append(File(Path("etc/meshinfer/token"), f"{token}\n", secret=True))
    return found


def install_with(ctx: typer.Context, token: Token | None, *, dry_run: bool) -> None:
    """As ``install``, with the options that were given to ``meshinfer worker``."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }
    for name in sorted(given.keys() & _NOT_OF_IT):
        source = sources[name]
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidInput(
                f"a service cannot have --{name.replace('_', '-')}",
                hint="leave it out: the service has a user and a folder of its own, "
                "/var/lib/meshinfer-worker",
            )
    settings = {
        variable: " ".join(value) if isinstance(value, list | tuple) else value
        for name, variable in _VARIABLES.items()
        if (value := given.get(name)) is not None
    }
    text = None if token is None else str(token)
    install(settings, text, dry_run=dry_run, nice=given.get("nice"))


def install(
    settings: Mapping[str, object],
    token: str | None,
    *,
    dry_run: bool,
    nice: int | None = None,
    root: Path = Path("/"),
) -> None:
    """Write and start it; with ``dry_run`` print what would be done.

    Raises ``AuthError`` without a token, here or there already, and ``ConfigurationError`` without
    root, without systemd, and where ``files_of`` does.
    """
    program = Path(sys.executable).with_name("meshinfer")
    found = files_of(settings, token, program=program, nice=nice)
    if dry_run:
        _show(found, root)
        return
    if os.geteuid() != 0:
        raise ConfigurationError(
            "a service is root's to install", hint="run it with sudo, or see it with --dry-run"
        )
    if not Path("/run/systemd/system").is_dir():
        raise ConfigurationError(
            "this system does not run systemd", hint="run meshinfer worker by what it has instead"
        )
    if token is None and not (root / "etc/meshinfer/token").exists():
        raise AuthError(
            "the service has no token to join with",
            hint="make one on the coordinator's machine, meshinfer token, and give it with --token",
        )
    for each in found:
        write(root / each.path, each)
    for command in _COMMANDS:
        _run(command)
    typer.echo(f"{UNIT} is enabled and starts; see: systemctl status {UNIT}", err=True)


def write(path: Path, file: File) -> None:
    """Write it as a whole; a secret is never readable by others, not even for a moment."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        mode = 0o600 if file.secret else 0o644
        end = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(end, "w", encoding="utf-8") as out:
            out.write(file.text)
        os.replace(part, path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}", hint="is the file system writable?"
        ) from error


def _show(found: list[File], root: Path) -> None:
    for each in found:
        typer.echo(f"# --- {root / each.path}{' (mode 0600)' if each.secret else ''}")
        typer.echo("mi1...\n" if each.secret else each.text)
    for command in _COMMANDS:
        typer.echo(f"# --- run: {' '.join(command)}")


def _run(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigurationError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        raise ConfigurationError(
            f"{' '.join(command)} failed: {done.stderr.strip()}",
            hint=f"see: systemctl status {UNIT}",
        )


def _quoted(value: object) -> str:
    """As systemd.exec(5) reads an environment file."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    if any(not part.isprintable() for part in text):
        raise ConfigurationError(f"{value!r} cannot be a setting", hint="leave out what is no text")
    return f'"{text}"'
