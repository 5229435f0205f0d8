"""How well each device's processes did of late, by its name: deaths, their causes, quarantine.

A process is judged when the next of its device says hello, since only that one knows its end.
RELIABILITY: quarantined after 3 crashes in compute or deaths within 5 s of joining, in 60 s; not
for being killed after having answered. Who is killed so again and again rests a moment each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m

assert limits.LOST_SHOWN_S <= limits.QUARANTINE_FORGOTTEN_S


@dataclass(slots=True)
class _Record:
    """Of one device. ``info``: as it was when it was lost, if it is so now; ``incarnation``: its
    last process, with when it joined and was lost. ``answered``: it has done a task, ever.
    ``strikes``: when it was at fault; ``wait_s``: how long the next quarantine takes; ``kills``:
    when it was killed soon after joining."""

    info: m.DeviceInfo | None = None
    incarnation: str = ""
    joined_at: float = 0.0
    lost_at: float = 0.0
    answered: bool = False
    strikes: list[float] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    until: float = 0.0
    wait_s: float = limits.QUARANTINE_S
    cause: str = ""


class Health:
    """Mutable: owned by the coordinator's membership. ``_records``: those lost last at the end;
    ``_held``: the devices that are quarantined, or were as it was last asked."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._held: set[str] = set()
        self.liars: dict[str, tuple[float, str]] = {}

    # --- deaths

    def lost(self, hello: m.Hello, info: m.DeviceInfo, joined_at: float, now: float) -> None:
        """A device's process is gone, as far as is known; ``info.cause`` says how that was seen."""
        record = self._records.setdefault(hello.device, _Record())
        self._records.move_to_end(hello.device)
        record.info, record.incarnation = info, hello.incarnation
        record.joined_at, record.lost_at = joined_at, now
        record.answered, record.cause = record.answered or info.tasks_done > 0, info.cause
        while len(self._records) > limits.DEVICES:
            self._records.popitem(last=False)

    def left(self, device: str) -> None:
        """It was dismissed, or said that it leaves: that is no death, and all is forgotten."""
        self._records.pop(device, None)

    def joined(self, hello: m.Hello, now: float) -> str:
        """A process of a device says hello. The reason, if the device is quarantined for how the
        one before ended; else empty."""
        record = self._records.get(hello.device)
        ended = hello.ended
        if record is None or record.info is None:
            return ""
        record.info = None
        if record.incarnation == hello.incarnation:  # the same: its connection had broken
            record.cause = ""
            return ""
        if ended is not None:
            record.cause = ended.text
        killed = ended is None or ended.killed
        worked_from = min(max(record.joined_at, record.until), record.lost_at)
        early = record.lost_at - worked_from <= limits.EARLY_DEATH_S
        if killed and record.answered:
            why = self._rest(record, now) if early else ""
        else:
            crashed = not killed and ended is not None and bool(ended.request)
            why = self._strike(record, now) if crashed or early else ""
        if why:
            self._held.add(hello.device)
        return why

    def _strike(self, record: _Record, now: float) -> str:
        """It was at fault."""
        record.strikes = [*_of_late(record.strikes, now), now]
        if now - record.until > limits.QUARANTINE_FORGOTTEN_S:
            record.wait_s = limits.QUARANTINE_S
        if len(record.strikes) < limits.STRIKES:
            return ""
        record.until = now + record.wait_s
        record.wait_s = min(2 * record.wait_s, limits.QUARANTINE_MOST_S)
        times = len(record.strikes)
        return f"it ended {times} times within {limits.STRIKES_WITHIN_S:g} s, last: {record.cause}"

    def _rest(self, record: _Record, now: float) -> str:
        """It was killed, which is no fault; but what dies as it joins is of no use, either."""
        record.kills = [*_of_late(record.kills, now), now][-limits.RESTS :]
        if len(record.kills) < 2:
            return ""
        record.until = max(record.until, now + limits.REST_S * 2 ** (len(record.kills) - 2))
        return f"it was killed {len(record.kills)} times as it had just joined: {record.cause}"

    def cause(self, device: str) -> str:
        """How the process before the present one ended, or this one, if it is gone."""
        record = self._records.get(device)
        return "" if record is None else record.cause

    def gone(self, now: float) -> list[m.DeviceInfo]:
        """Devices that died of late and did not come back."""
        return [
            structs.replace(r.info, heard_s=r.info.heard_s + now - r.lost_at)
            for _, r in sorted(self._records.items())
            if r.info is not None and now - r.lost_at <= limits.LOST_SHOWN_S
        ]

    # --- quarantine

    def quarantined_until(self, device: str) -> float:
        record = self._records.get(device)
        return 0.0 if record is None else record.until

    def in_question(self, now: float) -> set[str]:
        """Devices that are quarantined now, as a rule very few; what is long over is forgotten."""
        self._held = {name for name in self._held if now < self.quarantined_until(name)}
        self.liars = {name: held for name, held in self.liars.items() if now < held[0]}
        while self._records and self._is_old(next(iter(self._records.values())), now):
            self._records.popitem(last=False)
        return self.liars.keys() | self._held

    @staticmethod
    def _is_old(record: _Record, now: float) -> bool:
        return now - max(record.lost_at, record.until) > limits.QUARANTINE_FORGOTTEN_S

    def quarantines(self, devices: Container[str]) -> list[float]:
        """Until when each of these that is quarantined is so, or was as it was last asked."""
        return [self.quarantined_until(name) for name in self._held if name in devices]

    def lies(self, device: str, now: float) -> tuple[float, str] | None:
        """Until when a device works no more because its results are wrong, and why."""
        until, why = self.liars.get(device, (0.0, ""))
        return (until, why) if now < until else None


def _of_late(times: list[float], now: float) -> list[float]:
    return [at for at in times if now - at <= limits.STRIKES_WITHIN_S]
