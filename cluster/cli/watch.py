"""``meshinfer devices --watch``: a live table on a terminal, else a line for each change.

States and causes are shown as the coordinator says them; only that a device is no longer listed, or
that the coordinator is silent, is said in words of our own.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from meshinfer.errors import ClusterUnavailable

if TYPE_CHECKING:
    from cluster.client import Client
    from meshinfer.protocol.messages import DeviceInfo

_EACH_S = 0.5
_CHANGES = 12
_HEADER = "DEVICE STATE HEARD-S COMPUTING TASKS CAUSE".split()
_COLOURS = {"ready": "green", "draining": "blue", "dead": "red", "quarantined": "red"}
_OTHER_COLOUR = "yellow"
COORDINATOR, SILENT, ANSWERS, GONE = "coordinator", "silent", "answers", "gone"


@dataclass(frozen=True, slots=True)
class State:
    """What is told of a device, as far as a change of it is news."""

    state: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """``before`` is empty for a device that is seen for the first time."""

    device: str
    before: str
    state: str
    cause: str

    def __str__(self) -> str:
        was = f"{self.before} -> " if self.before else ""
        return f"{self.device}: {was}{self.state}{f' ({self.cause})' if self.cause else ''}"


def states(found: tuple[DeviceInfo, ...]) -> dict[str, State]:
    return {each.device: State(each.state, each.cause) for each in found}


def changes(before: Mapping[str, State], now: Mapping[str, State]) -> list[Change]:
    """What is new, by device. One that is gone is told once."""
    found = []
    for device in sorted({*before, *now}):
        was, has = before.get(device), now.get(device, State(GONE))
        if was is None:
            found.append(Change(device, "", has.state, has.cause))
        elif was != has:
            found.append(Change(device, was.state, has.state, has.cause))
    return found


class _Looking:
    """Asks again and again; remembers what was told of whom."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[str, State] = {}
        self.devices: tuple[DeviceInfo, ...] = ()

    def again(self) -> list[Change]:
        """Ask once; a coordinator that is silent leaves all as it was last known."""
        try:
            self.devices = self._client.devices(lost=True)
        except ClusterUnavailable:
            now = {**self._known, COORDINATOR: State(SILENT)}
        else:
            now = {**states(self.devices), COORDINATOR: State(ANSWERS)}
        found = changes(self._known, now)
        self._known = now
        return found

    def forever(self) -> Iterator[list[Change]]:
        while True:
            yield self.again()
            time.sleep(_EACH_S)


def watch(client: Client, *, as_json: bool) -> None:
    """Until it is interrupted, or nobody reads on."""
    looking = _Looking(client)
    if as_json:
        _lines(looking, _as_json)
    elif sys.stdout.isatty():
        _table(looking)
    else:
        _lines(looking, lambda change: f"{time.strftime('%H:%M:%S')} {change}")


def _lines(looking: _Looking, form: Callable[[Change], str]) -> None:
    for found in looking.forever():
        for change in found:
            typer.echo(form(change))


def _as_json(change: Change) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": when, **asdict(change)})


def _table(looking: _Looking) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    last: deque[str] = deque(maxlen=_CHANGES)
    with Live(auto_refresh=False) as live:
        for found in looking.forever():
            last.extend(f"{time.strftime('%H:%M:%S')} {change}" for change in found)
            live.update(Group(_rows(looking.devices), Text("\n".join(last))), refresh=True)


def _rows(found: tuple[DeviceInfo, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in _HEADER:
        table.add_column(title, overflow="fold")
    for each in found:
        cells = (
            Text(each.device),
            Text(each.state, style=_COLOURS.get(each.state, _OTHER_COLOUR)),
            Text(f"{each.heard_s:.1f}"),
            Text(each.computing or "-"),
            Text(str(each.tasks_done)),
            Text(each.cause or "-"),
        )
        table.add_row(*cells)
    return table
