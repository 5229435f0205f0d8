"""What ``meshinfer worker`` can do about what lies on its disk: encrypt it, or remove it all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from meshinfer.errors import InvalidInput

EncryptBlobs = Annotated[
    bool,
    typer.Option(
        "--encrypt-blobs",
        help="Keep weights encrypted on this disk, by a key in memory: each start fetches them.",
    ),
]
BlobKeyFile = Annotated[
    Path | None,
    typer.Option(help="The same by the key in this file, on another medium: they last."),
]
Forget = Annotated[
    bool,
    typer.Option(
        "--forget", help="Remove this worker's weights, keys and membership from this disk."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="With --forget: do not ask.")]


def forget_all(state: Path, *, yes: bool) -> None:
    """Remove what a worker keeps in its state folder, once its user has said so."""
    from cluster.forgetting import forget

    if not state.exists():
        typer.echo(f"{state} is not there: nothing to forget")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(f"nobody can be asked whether {state} may go", hint="say --yes")
        typer.confirm(f"Remove the weights, keys and membership in {state}?", abort=True)
    for left in forget(state):
        typer.echo(f"{left} stays: no worker wrote it")
    typer.echo(
        "forgotten; have the cluster forget it too, by its name: meshinfer devices revoke NAME"
    )
