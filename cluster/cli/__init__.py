"""The ``meshinfer`` command: which commands there are, and how each of its ends looks to a shell.

stdout is data, stderr is logs, progress and errors; exit codes are those of ``meshinfer.errors``.
What is heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import meshinfer
from cluster.cli.daemons import coordinator, worker
from cluster.cli.devices import devices
from cluster.cli.doctor import doctor
from cluster.cli.joining import join, token
from cluster.cli.lab import lab
from cluster.cli.options import settings
from cluster.cli.plans import plan
from cluster.cli.requests import deploy, infer
from cluster.cli.show import demo
from meshinfer.errors import MeshInferError

_INTERRUPTED = 130


class Commands(TyperGroup):
    """Fills in the settings files; turns errors into two lines on stderr and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; see typer."""
        if "default_map" not in extra:
            try:
                extra["default_map"] = settings(self.commands)
            except MeshInferError as error:
                sys.exit(report(error))
        return super().main(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except MeshInferError as error:
            code = report(error)
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except (OSError, AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as e:
            if isinstance(e, BrokenPipeError):
                raise  # typer knows what to do: the reader of our output is gone
            code = report_bug(e, traced=ctx.meta.get("log_level") == "debug")
        raise typer.Exit(code)


def report(error: MeshInferError) -> int:
    """Say it and what to do next; the exit code."""
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"  hint: {error.hint}", err=True)
    return error.exit_code


def report_bug(error: BaseException, *, traced: bool) -> int:
    """Say it; where it came from only on request."""
    if traced:
        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    typer.echo(f"error: {type(error).__name__}: {error}", err=True)
    typer.echo("  hint: this is a bug; --log-level debug shows where it came from", err=True)
    return MeshInferError.exit_code


app = typer.Typer(
    name="meshinfer",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "auto_envvar_prefix": "MESHINFER",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
for _command in (coordinator, worker, token, join, deploy, infer, plan, demo, doctor):
    app.command()(_command)
app.add_typer(devices, name="devices")
app.add_typer(lab, name="lab")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"meshinfer {meshinfer.__version__}")
        raise typer.Exit


@app.callback()
def _meshinfer(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """One vision model on the small computers you own, as if they were one machine.

    Settings: a flag, else MESHINFER_* in the environment, else ./meshinfer.toml, else
    meshinfer.toml in the user's configuration folder, else the default.
    """


def main() -> None:
    """The console script."""
    app()
