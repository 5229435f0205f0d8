"""Which members say or do nothing now, by their names: silent though asked, stuck in a task, late
with one, or only just back.

They stay members. What becomes of their work is decided by others, who ask here.
"""

from __future__ import annotations

from meshinfer import limits
from meshinfer.scheduler.usual import Usual


class Presence:
    """Mutable: owned by the coordinator's membership. ``silent``: those that owe a sign of life for
    too long; ``starved``: those whose links may be other than is known."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.starved: set[str] = set()
        self._suspects: dict[str, tuple[float, float]] = {}
        self._asked: dict[str, float] = {}
        self._answers: Usual[str] = Usual(limits.SILENT_TIMES, 0.5)
        self._silent_since: dict[str, float] = {}
        self._stuck: dict[str, str] = {}
        self._resting: dict[str, float] = {}

    def gone(self, device: str) -> None:
        """It is a member no more."""
        self.well(device)
        self._unasked(device)

    # --- late with a task

    def suspect(self, device: str, now: float) -> None:
        """A task of it is late: no new work for a while; longer, if it was so before and nothing
        came."""
        until, wait = self._suspects.get(device, (0.0, limits.SUSPECT_S / 2))
        if now >= until:
            wait = min(2 * wait, limits.DEAD_AFTER_S)
            self._suspects[device] = (now + wait, wait)

    def well(self, device: str) -> None:
        """It has done a task."""
        self._suspects.pop(device, None)
        self._stuck.pop(device, None)

    def suspects(self, now: float) -> list[str]:
        """Who gets no new work now, where another can take it."""
        late = {name for name, (until, _) in self._suspects.items() if now < until}
        return sorted(late | self.away)

    # --- those that say nothing

    def ask(self, device: str, now: float) -> bool:
        """Whether to ask a device for a sign of life: not, if it owes one already."""
        if device in self._asked or device in self.silent:
            return False
        self._asked[device] = now
        return True

    @property
    def doubts(self) -> bool:
        """Whether any is asked, or silent."""
        return bool(self._asked or self.silent)

    def heard(self, device: str, now: float) -> bool:
        """Anything came from it: how long such answers take, of silent ones too. Whether it had
        been asked."""
        asked = self._asked.get(device)
        if asked is not None:
            self._answers.note(device, now - asked)
        if device in self.silent:  # its other connections may come back as much later
            silent_s = now - self._silent_since.pop(device, now)
            self.starved.add(device)
            self._resting[device] = now + min(silent_s / 2, limits.SILENT_REST_S)
        self._unasked(device)
        return asked is not None

    def resting(self, now: float) -> set[str]:
        """Those that are silent, or were just now: others do their work while they can."""
        self._resting = {name: until for name, until in self._resting.items() if now < until}
        return self.away | self._resting.keys()

    @property
    def away(self) -> set[str]:
        """Those that do no work now, though they are members."""
        return self.silent | self._stuck.keys()

    def sticks(self, device: str, task: str, devices: int) -> bool:
        """Whether a device is stuck in a task from now on: not, if most are away, of so many."""
        if 2 * len(self.away | {device}) > devices:
            return False
        self._stuck[device] = task
        return True

    def computes(self, device: str, task: str) -> None:
        """What it does, as it says: another task means that it is stuck no more."""
        if self._stuck.get(device, task) != task:
            del self._stuck[device]

    def falls_silent(self, device: str, now: float) -> None:
        self.silent.add(device)
        self._silent_since[device] = self._asked.get(device, now)

    def _unasked(self, device: str) -> None:
        self._asked.pop(device, None)
        self._silent_since.pop(device, None)
        self.silent.discard(device)

    def _due(self, device: str) -> float:
        """When a device that was asked is silent: after a few times as long as it usually takes."""
        usual = self._answers.late_after_s(device) or limits.SILENT_S
        return self._asked[device] + min(usual, limits.SILENT_S)

    def unanswered(self, now: float, devices: int) -> list[str]:
        """Those that are silent from now on. If most are, of so many, or the answers are looked at
        late, it is not them: then none, and they may be asked again."""
        due = [n for n in self._asked if n not in self.silent and now >= self._due(n)]
        slept = any(now >= self._due(name) + limits.SILENT_S for name in due)
        if slept or 2 * len(self.silent | set(due)) > devices:
            for name in due:
                del self._asked[name]
            return []
        for name in due:
            self.falls_silent(name, now)
        return due

    def answers_due(self) -> list[float]:
        return [self._due(name) for name in self._asked if name not in self.silent]
