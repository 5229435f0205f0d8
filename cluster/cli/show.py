"""``meshinfer demo``: the options of ``cluster.demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import AsJson, LogLevel


def demo(
    workers: Annotated[int, typer.Option(min=2, max=32, help="How many workers to start.")] = 4,
    picture: Annotated[
        Path | None,
        typer.Option(help="A photograph of yours; default: the cat that ships with it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the drawing.")] = Path(
        "out"
    ),
    as_json: AsJson = False,
    log_level: LogLevel = "error",
) -> None:
    """Double a photograph on four worker processes of this machine, and lose one on the way."""
    from cluster import telemetry
    from cluster.demo import run_demo

    telemetry.configure(log_level)
    code = run_demo(workers=workers, picture=picture, out=out, as_json=as_json, log_level=log_level)
    raise typer.Exit(code)
