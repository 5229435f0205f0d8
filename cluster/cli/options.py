"""Options that several commands share, what settings files may say, and the client of both."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshinfer.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from cluster.client import Client
    from meshinfer.image import ImageSpec

LEVELS = ("debug", "info", "warning", "error")
_DIMENSIONS = re.compile(r"\d+(,\d+)*")
_BYTES = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([KMG]i?)B", re.IGNORECASE)
_UNITS = {"k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _log_level(ctx: typer.Context, value: str) -> str:
    if value not in LEVELS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(LEVELS)}")
    ctx.meta["log_level"] = value  # how much is said when the command fails
    return value


def _log_form(value: str) -> str:
    if value not in ("text", "json"):
        raise typer.BadParameter(f"{value!r} is neither text nor json")
    return value


ClusterName = Annotated[
    str, typer.Option("--cluster", envvar="MESHINFER_CLUSTER", help="Name of the cluster.")
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar="MESHINFER_COORDINATOR",
        metavar="HOST:PORT",
        help="Address of the coordinator; without, it is looked for over mDNS.",
    ),
]
KeyringFile = Annotated[
    Path | None,
    typer.Option(
        "--keyring",
        envvar="MESHINFER_KEYRING",
        help="Default: that of this machine's coordinator, or what meshinfer join wrote.",
    ),
]
Interfaces = Annotated[
    list[str] | None,
    typer.Option(
        "--interface",
        envvar="MESHINFER_INTERFACE",
        metavar="ADDRESS",
        help="Address of an interface for mDNS; may be given several times. Default: all.",
    ),
]
Listens = Annotated[
    list[str] | None,
    typer.Option(
        "--interface",
        envvar="MESHINFER_INTERFACE",
        metavar="ADDRESS",
        help="Address of an interface: it listens there alone, and mDNS is used there; may be "
        "given several times, of a coordinator with --host. Default: all.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the coordinator.")
]
LogLevel = Annotated[
    str,
    typer.Option(
        "--log-level",
        envvar="MESHINFER_LOG_LEVEL",
        callback=_log_level,
        help=f"One of {', '.join(LEVELS)}.",
    ),
]
LogForm = Annotated[
    str,
    typer.Option(
        "--log-form", envvar="MESHINFER_LOG_FORM", callback=_log_form, help="text or json."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="INPUT=1,3,224,224", help="Fixes a dynamic input; one for each."
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="NAME",
        help="Only this output, without what lies behind it; may be given several times.",
    ),
]
HalfTransfers = Annotated[
    bool,
    typer.Option(
        "--half-transfers",
        help="float32 goes from task to task as float16: half the bytes, for a loss that is told.",
    ),
]
Memory = Annotated[
    list[str] | None,
    typer.Option(
        "--memory",
        metavar="[DEVICE=]384MB",
        help="What each device may hold of this model, or this one; several times.",
    ),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="VALUE=DEVICE[,DEVICE]",
        help="A value, as an input, that never leaves these devices; several times.",
    ),
]


def settings(commands: Mapping[str, Any]) -> dict[str, Any]:
    """The settings files as defaults by command. Raises ``ConfigurationError`` for a misspelling.

    What stands outside the tables is for every command that has such an option. A table of a
    command with commands of its own, as ``[devices]``, is for them, too.
    """
    from cluster.config import file_settings

    found = file_settings()
    known = {name: {p.name for p in command.params} for name, command in commands.items()}
    result: dict[str, Any] = {name: {} for name in commands}
    for key, value in found.items():
        if isinstance(value, Mapping):
            if key not in commands:
                raise _misspelt(f"[{key}]", commands)
            for option, each in value.items():
                if _python(option) not in known[key]:
                    raise _misspelt(f"{option} in [{key}]", known[key])
                result[key][_python(option)] = each
            continue
        takers = [name for name, options in known.items() if _python(key) in options]
        if not takers:
            raise _misspelt(key, set().union(*known.values()))
        for name in takers:
            result[name].setdefault(_python(key), value)
    for name, command in commands.items():
        for inner, each in getattr(command, "commands", {}).items():
            has = {p.name for p in each.params}
            result[name][inner] = {k: v for k, v in result[name].items() if k in has}
    return result


def _python(option: str) -> str:
    return option.replace("-", "_")


def _misspelt(what: str, known: Iterable[str]) -> ConfigurationError:
    names = ", ".join(sorted(name.replace("_", "-") for name in known))
    return ConfigurationError(f"meshinfer.toml: {what} means nothing", hint=f"known are {names}")


def is_default(ctx: typer.Context, option: str) -> bool:
    """Whether nobody has said otherwise: no flag, variable or settings file."""
    source = ctx.get_parameter_source(option)
    return source is None or source.name == "DEFAULT"


def connect(
    coordinator: str | None,
    keyring: Path | None,
    cluster: str,
    interfaces: Sequence[str] | None,
    timeout_s: float,
    log_level: str,
) -> Client:
    """The client of a command."""
    from cluster import telemetry
    from cluster.client import Client

    telemetry.configure(log_level)
    return Client(
        coordinator,
        keyring=keyring,
        cluster=cluster,
        timeout_s=timeout_s,
        interfaces=interfaces or None,
    )


def parse_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]] | None:
    """``input=1,3,224,224`` of each. Raises ``InvalidInput``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")
        if not name or not _DIMENSIONS.fullmatch(sizes):
            raise InvalidInput(f"{text!r} is no shape", hint="write --shape input=1,3,224,224")
        shapes[name] = tuple(int(size) for size in sizes.split(","))
    return shapes or None


def parse_memory(texts: Sequence[str] | None) -> int | dict[str, int] | None:
    """``384MB`` for all devices, or ``pi-0=384MB`` of each. Raises ``InvalidInput``."""
    found: dict[str, int] = {}
    for text in texts or ():
        device, _, amount = text.rpartition("=")
        nbytes = _nbytes(amount)
        if nbytes is None or text.startswith("="):
            raise InvalidInput(
                f"{text!r} is no amount of memory",
                hint="write --memory 384MB for each device, or --memory DEVICE=1.5GiB for one; "
                "units are kB, MB, GB, KiB, MiB, GiB",
            )
        if device in found:
            raise InvalidInput(
                f"memory is given twice for {repr(device) if device else 'all devices'}",
                hint="give it once",
            )
        found[device] = nbytes
    if "" not in found:
        return found or None
    if len(found) > 1:
        raise InvalidInput(
            "memory is given for all devices and for some",
            hint="write --memory 384MB alone, or --memory DEVICE=384MB for each device",
        )
    return found[""]


def _nbytes(text: str) -> int | None:
    found = _BYTES.fullmatch(text)
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def parse_pins(texts: Sequence[str] | None) -> dict[str, tuple[str, ...]] | None:
    """``image=pi-0,pi-1`` of each. Raises ``InvalidInput``."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts or ():
        value, _, names = text.rpartition("=")
        devices = tuple(name.strip() for name in names.split(","))
        if not value or not all(devices):
            raise InvalidInput(
                f"{text!r} pins nothing",
                hint="write --pin image=head, or --pin VALUE=DEVICE,DEVICE",
            )
        if value in found:
            raise InvalidInput(
                f"{value!r} is pinned twice", hint=f"write --pin {value}=DEVICE,DEVICE once"
            )
        found[value] = devices
    return found or None


def parse_image(text: str | None) -> ImageSpec | None:
    """An image spec from JSON, or from the file that has it. Raises ``InvalidInput``."""
    if text is None:
        return None
    from meshinfer.image import ImageSpec

    if not text.lstrip().startswith("{"):
        text = read_text(Path(text))
    return ImageSpec.from_json(text)


def read_text(path: Path) -> str:
    """A text file of the user's. Raises ``InvalidInput``."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}", hint="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no text", hint="give a text file") from error


def write(path: Path, data: bytes) -> None:
    """Write a result, with the folder that it goes into. Raises ``ConfigurationError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}", hint="choose another folder"
        ) from error


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for people and for ``awk``: nothing is cut off, however narrow the terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def size(nbytes: float) -> str:
    """Bytes in words: 2.86 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def only_address(interfaces: Sequence[str] | None) -> str:
    """The one that a coordinator is to listen at; empty: all. Raises ``ConfigurationError``."""
    if interfaces and len(set(interfaces)) > 1:
        raise ConfigurationError(
            "--interface is given more than once, and a coordinator listens at one or at all",
            hint="say with --host where it is to listen; 0.0.0.0: at all addresses",
        )
    return interfaces[0] if interfaces else ""


def check_insecure(host: str, insecure: bool, anywhere: bool) -> None:
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
