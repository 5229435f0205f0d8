"""Logs: structured, to stderr, one line an event; ``text`` for people, ``json`` for machines."""

from __future__ import annotations

import contextlib
import logging
import sys

import structlog

LEVELS = ("debug", "info", "warning", "error")

_ids: dict[str, str] = {}


def configure(level: str = "info", form: str = "text", *, name: str = "") -> None:
    """Set up structlog for this process. ``name`` (a device) is bound to every line."""
    chosen = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=0,
            # Local variables may be secrets, and printing them takes long.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.contextvars.clear_contextvars()
    _ids.clear()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _naming(name),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if form == "text" else "iso"),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(chosen),
        # Asked for at each line: who embeds us may replace stderr, and close the old one.
        logger_factory=lambda *_: structlog.PrintLogger(_Lines()),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )


def configure_guest() -> None:
    """Within somebody's program: its stdout is its own, and so is how structlog is set up, where
    it does that. Else warnings go to stderr."""
    if not structlog.is_configured():
        configure("warning")


class _Lines:
    """stderr; a line that it does not take, for a full disk or a reader that has gone, is lost, and
    the daemon goes on."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def identify(**ids: str) -> None:
    """From now on each line of this process, of whatever thread, has these fields too."""
    _ids.update(ids)


def warn_of_plaintext() -> None:
    """For each daemon at its start, and for the coordinator again and again."""
    structlog.get_logger().warning(
        "NOT ENCRYPTED: anyone who reaches these ports can join, read and alter everything",
        hint="only for measurements: without --insecure, and with a new keyring, all is encrypted",
    )


def _naming(name: str) -> structlog.typing.Processor:
    def add(
        logger: object, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if name:
            event.setdefault("who", name)
        for key, value in _ids.items():
            event.setdefault(key, value)
        return event

    return add
