"""What the coordinator was told and has told, held against what it makes of it."""

from __future__ import annotations

from collections import defaultdict

from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.coordinator import CoordinatorCore

_SEEN = {"reset", "no route"}
"""Why a device is lost, where its connection said so; else it was silent, or said hello again."""


class Word:
    """``assigned``: of each attempt of a request, who takes what, as was told. ``mistaken``: the
    processes that were taken for lost on news of another."""

    def __init__(self) -> None:
        self.assigned: defaultdict[tuple[str, int], set[m.Assigned]] = defaultdict(set)
        self.mistaken: list[str] = []
        self._news = ""

    def heard(self, event: e.Event) -> None:
        self._news = event.peer if isinstance(event, e.PeerLost) else ""

    def said(self, effect: e.Effect) -> None:
        match effect:
            case e.Send(_, _, m.Start() | m.Assign() as word):
                self.assigned[word.request, word.attempt] |= set(word.assigned)
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
