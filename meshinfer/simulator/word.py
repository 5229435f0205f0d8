"""What processes were told, and what the coordinator tells: held against what comes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.held import Held
from meshinfer.simulator.node import Node

_SEEN = {"reset", "no route"}
"""Why a device is lost, where its connection said so; else it was silent, or said hello again."""


@dataclass(frozen=True, slots=True)
class _Stale:
    """A piece of an attempt of a request that is at its next. ``before``: how many pieces that
    lacks and how many of its tasks have begun, until the piece comes."""

    piece: m.Deliver
    held: Held
    before: tuple[int, int]


class Word:
    """``assigned``: of each attempt of a request, who takes what, as was told. ``mistaken``: the
    processes that were taken for lost on news of another. ``on_answered``: a client is sent word of
    an answer."""

    def __init__(self) -> None:
        self.assigned: defaultdict[tuple[str, int], set[m.Assigned]] = defaultdict(set)
        self.mistaken: list[str] = []
        self.on_answered: Callable[[str], None] = lambda client: None
        self._news = ""
        self._stale: _Stale | None = None

    # --- what comes to a process

    def heard(self, node: Node, event: e.Event) -> None:
        """It is about to handle an event."""
        if isinstance(node.core, CoordinatorCore):
            self._news = event.peer if isinstance(event, e.PeerLost) else ""
        elif isinstance(event, e.Arrived) and isinstance(event.message, m.Deliver):
            self._stale = _stale(event.message, node.core._computing._requests)

    def taken(self) -> m.Deliver | None:
        """A piece of an attempt that is over, if the last event was one and was taken for one of
        the next."""
        stale, self._stale = self._stale, None
        return None if stale is None or stale.before == _counts(stale.held) else stale.piece

    # --- what the coordinator does

    def said(self, effect: e.Effect) -> None:
        match effect:
            case e.Send(_, _, m.Start() | m.Assign() as word):
                self.assigned[word.request, word.attempt] |= set(word.assigned)
            case e.Send(_, client, m.Reply(failure=None)):
                self.on_answered(client)
            case e.Note(_, "device lost", fields) if fields["why"] in _SEEN:
                peer = f"{fields['device']}#{fields['incarnation']}"
                if peer != self._news:
                    self.mistaken.append(peer)
            case _:
                pass

    def untold(self, core: CoordinatorCore) -> str:
        """A request some of whose tasks go to others, as nobody was told; empty where there is
        none."""
        for request in core.requests.values():
            if request.runs:
                tried = request.tried[request.attempt]
                if not self.assigned[request.id, request.attempt].issuperset(tried.on_wire()):
                    return request.id
        return ""


def _stale(piece: m.Deliver, requests: Mapping[str, Held]) -> _Stale | None:
    held = requests.get(piece.request)
    if held is None or piece.attempt >= held.attempt:
        return None
    return _Stale(piece, held, _counts(held))


def _counts(held: Held) -> tuple[int, int]:
    return sum(len(each.missing) for each in held.pieces.values()), len(held.begun)
