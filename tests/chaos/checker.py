"""Judges a run by its history alone: what was answered, how late, how wrong, and by which goal.

``python -m chaos.checker HISTORY...`` (from tests/) judges again what was kept.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any, Final

from chaos.history import Event, read
from meshinfer import limits
from meshinfer.plan import Plan

SETTLED_S: Final = 10.0
BEST_S: Final = 15
"""Of the best plan: 5 s have 20 requests, and the best of ten such spans is a tenth more."""
CRASHES: Final = ("C4", "C11", "C15")
LIES: Final = ("always", "tenth")
"""Phases in which answers may be wrong until the liar is found."""

CALM: Final = ("warm", "calm", "calm forced", "without", "peak")


@dataclass(frozen=True, slots=True)
class Request:
    """A request and its first outcome; None: it never had one."""

    n: int
    phase: str
    model: str
    at: float
    deadline_s: float
    outcome: Event | None
    outcomes: int

    @property
    def answered(self) -> bool:
        return self.outcome is not None and bool(self.outcome["ok"])

    @property
    def wrong(self) -> bool:
        return self.answered and not self.outcome["error"] <= self.outcome["tolerance"]

    @property
    def took_s(self) -> float:
        return math.inf if self.outcome is None else self.outcome["at"] - self.at


class View:
    """A history, asked."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = list(events)
        self.run = next(self.of("run"))
        outcomes: dict[int, list[Event]] = {}
        for each in self.of("outcome"):
            outcomes.setdefault(each["n"], []).append(each)
        self.requests = [
            Request(
                e["n"],
                e["phase"],
                e["model"],
                e["at"],
                e["deadline_s"],
                next(iter(outcomes.get(e["n"], [])), None),
                len(outcomes.get(e["n"], [])),
            )
            for e in self.of("submit")
        ]

    def of(self, kind: str, **fields: Any) -> Any:
        """Events of a kind, with these fields, in order."""
        wanted = {"kind": kind, **fields}
        return (e for e in self.events if all(e.get(k) == v for k, v in wanted.items()))

    def phase(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.phase == name]

    def hurt(self) -> list[Request]:
        """The requests beside faults."""
        return [r for r in self.requests if r.phase not in CALM]

    def faults(self, *what: str) -> list[Event]:
        return [e for e in self.of("fault") if not what or e["what"] in what]

    def calm_s(self, phase: str = "calm") -> float:
        """T: the fault-free p99 of the same run."""
        return p99([r.took_s for r in self.phase(phase) if r.answered])

    def times_calm(self, requests: Sequence[Request], phase: str = "calm") -> float:
        """Their p99 over T; lost and failed ones count as never."""
        return p99([r.took_s if r.answered else math.inf for r in requests]) / self.calm_s(phase)

    def devices(self, request: Request) -> int:
        """How many took part in an answer."""
        return len({*Plan.parse(request.outcome["plan"]).devices()}) if request.outcome else 0

    def extra_tasks(self, phase: str) -> float:
        """Tasks done beyond those that the answers name, as a share of these."""
        done = sum(e["done"] for e in self.of("tasks", phase=phase))
        needed = sum(r.outcome["places"] for r in self.phase(phase) if r.answered)
        return max(0.0, done / needed - 1.0) if needed else 0.0

    def lasted(self, phase: str) -> float:
        """Seconds from a phase's first request to its last answer."""
        requests = self.phase(phase)
        start = min((r.at for r in requests), default=0.0)
        return max((r.outcome["at"] - start for r in requests if r.answered), default=0.0)

    def rates(self, phase: str, after_s: float, until_s: float) -> float:
        """Answers a second of a phase, by when they came after its first request."""
        requests = self.phase(phase)
        if not requests:
            return math.nan
        start = min(r.at for r in requests)
        ends = [r.outcome["at"] - start for r in requests if r.answered]
        until_s = min(until_s, max(ends, default=0.0))
        return sum(after_s <= end <= until_s for end in ends) / max(1e-9, until_s - after_s)

    def next_s(self, after: float, what: str) -> float:
        """Seconds from a moment until a worker was ready, or an answer came."""
        for e in self.events:
            if e["at"] > after and (
                (what == "answer" and e["kind"] == "outcome" and e["ok"])
                or (
                    what == "worker"
                    and e["kind"] == "devices"
                    and any(s == "ready" for n, s in e["states"].items() if n != "head")
                )
            ):
                return e["at"] - after
        return math.inf

    def memory(self, phase: str) -> int:
        """Bytes that the daemons held together at most during a phase: each at its own peak."""
        times = [r.at for r in self.phase(phase)]
        peaks: dict[str, int] = {}
        for e in self.of("usage"):
            if min(times) <= e["at"] <= max(times):
                peaks[e["name"]] = max(peaks.get(e["name"], 0), e["rss"])
        return sum(peaks.values())

    def slope_mib_per_h(self, name: str) -> float:
        """Of a daemon's memory under faults, by least squares, its first fifth left out."""
        times = [r.at for r in self.phase("faults")]
        start = min(times) + 0.2 * (max(times) - min(times))
        points = [
            (e["at"] / 3600, e["rss"] / 2**20)
            for e in self.of("usage", name=name)
            if start <= e["at"] <= max(times)
        ]
        return linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else math.nan

    def held(self, what: str, which: str) -> dict[str, int]:
        """The least that each daemon held of something in a quiet time."""
        quiet = next(self.of("quiet", which=which))
        least: dict[str, int] = {}
        for e in self.of("usage"):
            if quiet["at"] - quiet["span_s"] <= e["at"] <= quiet["at"]:
                least[e["name"]] = min(least.get(e["name"], e[what]), e[what])
        return least

    def back_s(self, after: float, name: str) -> float:
        """Seconds from a moment until a device was (or still was) ready."""
        state = ""
        for e in self.of("devices"):
            if e["at"] <= after:
                state = e["states"].get(name, "gone")
            elif state != "ready" and e["states"].get(name) == "ready":
                return e["at"] - after
        return 0.0 if state == "ready" else math.inf


def p99(seconds: Sequence[float]) -> float:
    """Of a few the longest; NaN of none."""
    ranked = sorted(seconds)
    return ranked[math.ceil(0.99 * len(ranked)) - 1] if ranked else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured, in words with figures, and what of the goal was missed (nothing: met)."""

    measured: str
    missed: tuple[str, ...]

    @property
    def met(self) -> bool:
        return not self.missed


class Book:
    """Figures and what is missed, gathered by one judge."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.figures: list[str] = []
        self.missed: list[str] = []

    def say(self, text: str) -> None:
        self.figures.append(text)

    def want(self, met: bool, text: str) -> None:
        """A figure with a goal."""
        self.figures.append(text)
        if not met:
            self.missed.append(text)

    def nothing_lost(self, requests: Sequence[Request] | None = None) -> None:
        """Every request answered, none wrong."""
        requests = self.view.hurt() if requests is None else requests
        answered = sum(r.answered for r in requests)
        self.want(0 < len(requests) == answered, f"{answered} of {len(requests)} answered")
        failed = [r.outcome["name"] for r in requests if r.outcome is not None and not r.answered]
        for name in sorted(set(failed)):
            self.say(f"{failed.count(name)} {name}")

    def always(self) -> None:
        """What holds of every run: one typed outcome each, none wrong, whole again in time."""
        requests = self.view.requests
        lost = sum(r.outcome is None for r in requests)
        twice = sum(r.outcomes > 1 for r in requests)
        wrong = sum(r.wrong for r in requests if r.phase not in ("poison", *LIES))
        vague = [r for r in requests if r.outcome and not r.answered and not r.outcome["typed"]]
        late = [r for r in requests if r.outcome and r.took_s > r.deadline_s + 2.0]
        self.want(not lost, f"{lost} lost")
        self.want(not wrong, f"{wrong} wrong")
        for found, text in ((twice, "answered twice"), (len(vague), "with no typed error")):
            if found:
                self.want(False, f"{found} {text}")
        if late:
            self.want(False, f"{len(late)} had no outcome by their deadline")
        ids = [r.outcome["request"] for r in requests if r.answered]
        if len(set(ids)) != len(ids):
            self.want(False, f"{len(ids) - len(set(ids))} ids answered again")
        settled = list(self.view.of("settled"))
        if not settled:
            self.want(False, "never healed")
        for each in settled:
            why = f" ({each['why']})" if each["why"] else ""
            whole = not each["why"] and each["took_s"] <= self.settled_s
            self.want(whole, f"whole {each['took_s']:.1f} s after healing{why}")

    @property
    def settled_s(self) -> float:
        """A device that crashed time and again is kept out first, as it must be."""
        kept_out = self.view.run["case"] in CRASHES
        return SETTLED_S + limits.QUARANTINE_S * kept_out

    def slower(self, limit: float, requests: Sequence[Request] | None = None) -> None:
        """The p99 of these against T."""
        times = self.view.times_calm(self.view.hurt() if requests is None else requests)
        self.want(times <= limit, f"p99 {times:.1f} T (T = {self.view.calm_s() * 1000:.0f} ms)")


Judge = Callable[[Book], None]


def kills(book: Book) -> None:
    """C1."""
    book.say(f"{len(book.view.faults('kill', 'power'))} kills")
    book.nothing_lost()
    book.slower(4.0)


def freezes(book: Book) -> None:
    """C2."""
    book.say(f"{len(book.view.faults('pause'))} SIGSTOPs")
    book.nothing_lost()
    book.slower(5.0)
    extra = book.view.extra_tasks("faults")
    book.want(extra <= 0.15, f"{extra:.0%} extra tasks")


def partitions(book: Book) -> None:
    """C5."""
    book.nothing_lost()
    book.slower(5.0)
    heals = [(e["at"], e["name"]) for e in book.view.of("fault", what="reconnect")]
    back_s = [book.view.back_s(at, name) for at, name in heals]
    worst = max(back_s, default=math.inf)
    book.want(worst <= 3.0, f"back {worst:.1f} s after healing ({len(heals)} partitions)")


def halves(book: Book) -> None:
    """C6."""
    book.nothing_lost()
    times = book.view.times_calm(book.view.hurt())
    book.say(f"p99 {times:.1f} T (T = {book.view.calm_s() * 1000:.0f} ms)")
    parted = [r for r in book.view.hurt() if r.answered and r.outcome["attempts"] > 1]
    book.say(f"{len(parted)} took several attempts")


def throttled(book: Book) -> None:
    """C10."""
    view = book.view
    book.nothing_lost()
    best = view.rates("without", 0.0, 1e9)
    for phase, aim in (("slow", best), ("back", view.rates("calm", 0.0, 1e9))):
        starts = range(5, int(view.lasted(phase)) - BEST_S + 1, 5)
        aim = max([aim, *(view.rates(phase, s, s + BEST_S) for s in starts)])
        share = view.rates(phase, 10.0, 1e9) / aim
        book.want(share >= 0.9, f"{share:.2f} of the best plan 10 s after {phase}")
    whole = (r for r in view.hurt() if r.answered and not r.outcome["degraded"])
    plans = [r.outcome["plan"] for r in whole]  # the others are one of these, on spare devices
    changes = sum(a != b for a, b in pairwise(plans))
    book.want(changes <= 2, f"{changes} re-plans")


def nobody(book: Book) -> None:
    """C12."""
    view = book.view
    gone_at, back_at = (next(view.of("fault", what=w))["at"] for w in ("nobody", "somebody"))
    failed = [r for r in view.hurt() if r.outcome is not None and not r.answered]
    vague = [r for r in failed if r.outcome["retry_after_s"] is None]
    book.say(f"{len(failed)} failed")
    book.want(not vague, f"{len(vague)} of them without retry-after")
    for name in sorted({r.outcome["name"] for r in failed}):
        book.say(f"{sum(r.outcome['name'] == name for r in failed)} {name}")
    joined = [
        e["at"]
        for e in view.of("devices")
        if e["at"] > back_at and any(s == "ready" for n, s in e["states"].items() if n != "head")
    ]
    answered = [r.outcome["at"] for r in view.hurt() if r.answered and r.outcome["at"] > back_at]
    waits = [r for r in view.hurt() if r.answered and r.at > gone_at]
    book.say(f"{len(waits)} answered")
    took_s = answered[0] - joined[0] if answered and joined else math.inf
    book.want(took_s <= 3.0, f"the first answer {took_s:.1f} s after the first worker is back")


def coordinators(book: Book) -> None:
    """C13."""
    view = book.view
    book.nothing_lost()
    starts = [e["at"] for e in view.of("fault", what="coordinator")]
    ready_s = [view.next_s(at, "worker") for at in starts]
    worst = max(ready_s, default=math.inf)
    book.want(worst <= 2.0, f"ready {worst:.1f} s after at most ({len(starts)} kills)")
    answers_s = [view.next_s(at, "answer") for at in starts]
    book.say(f"the next answer {max(answers_s, default=math.inf):.1f} s after at most")


def overload(book: Book) -> None:
    """C16."""
    view = book.view
    peak = view.rates("peak", 0.0, 1e9)
    hurt = view.phase("faults")
    span_s = max(r.at for r in hurt) - min(r.at for r in hurt)
    good = view.rates("faults", 0.0, span_s)
    book.want(good >= 0.9 * peak, f"goodput {good:.1f}/s of a peak of {peak:.1f}/s")
    book.say(f"asked {len(hurt) / span_s:.0f}/s")
    failed = [r.outcome["name"] for r in hurt if r.outcome is not None and not r.answered]
    for name in sorted(set(failed)):
        book.say(f"{failed.count(name)} {name}")
    before, after = view.memory("peak"), view.memory("faults")
    book.want(after <= 1.2 * before, f"RSS {after / before:.2f} of before ({after >> 20} MiB)")


def crowd(book: Book) -> None:
    """C17."""
    view = book.view
    book.nothing_lost()
    book.slower(3.0)
    grown = view.memory("faults") - view.memory("calm")
    book.want(grown <= 50 << 20, f"RSS {grown / 2**20:+.1f} MiB")
    saw = view.faults("stranger saw")[0]
    book.want(saw["made"] > 0, f"{saw['made']} connections, {saw['most']} at once")
    book.say(f"on {view.faults('crowd')[0]['ports']} ports; {saw['closed']} were closed")


def records(book: Book) -> None:
    """C18."""
    view = book.view
    book.nothing_lost()
    saw = view.faults("stranger saw")[0]
    book.want(saw["sent"] >= view.faults("records")[0]["count"], f"{saw['sent']} records")
    book.say(f"{saw['came']} connections to the impostor")  # none, if the true one is heard first
    book.want(saw["sessions"] == 0, f"{saw['sessions']} unauthorised sessions")
    known = {"head", *view.run["devices"]}
    others = {name for e in view.of("devices") for name in e["states"]} - known
    book.want(not others, f"{len(others)} unknown devices")
    told = view.faults("anew")[1:]  # the first had to look for it
    back_s = [view.back_s(e["at"], e["name"]) for e in told]
    book.want(max(back_s) <= 10.0, f"told devices back {max(back_s):.1f} s after they started")


def states(book: Book) -> None:
    """C3."""
    book.nothing_lost()
    hits = Counter(e["state"] for e in book.view.faults("died"))
    book.say("deaths " + ", ".join(f"{hits[s]} {s}" for s in sorted(hits)))
    (run,) = book.view.of("run")
    least = 20 if run["full"] else 1
    often = sum(count >= least for count in hits.values())
    book.want(often == 5, f"{often} of 5 states hit {least} times or more")


def causes(book: Book) -> None:
    """C4."""
    view = book.view
    book.nothing_lost([r for r in view.hurt() if r.phase != "poison"])
    told = [cause for e in view.of("devices") for cause in e["exits"].values()]
    for e in view.faults("die"):
        named = any(e["cause"] in cause for cause in told)
        book.want(named, f"{e['cause']} {'named' if named else 'not named'}")
    for r in view.phase("poison"):
        book.say(f"{r.model}: {r.outcome['name'] if r.outcome else 'lost'}")
    refused = [r.outcome for r in view.phase("poison") if r.model == "picky" and r.outcome]
    named = any(
        "Gather" in e.get("message", "") or "index" in e.get("message", "") for e in refused
    )
    book.want(named, f"the kernel that refuses {'named' if named else 'not named'}")


def lossy(book: Book) -> None:
    """C7. What is forced onto lossy links is told, and has to be right; its time has no goal."""
    view = book.view
    book.nothing_lost()
    planned = [view.devices(r) for r in view.phase("calm") if r.answered]
    book.want(min(planned, default=0) > 1, f"by {min(planned, default=0)} devices before it")
    hurt = [r for r in view.phase("faults") if r.answered]
    book.say(f"by {min(map(view.devices, hurt), default=0)} at least under it")
    book.slower(10.0, view.phase("faults"))
    forced = view.times_calm(view.phase("faults forced"), "calm forced")
    book.say(f"forced onto all: p99 {forced:.1f} T")


def thin(book: Book) -> None:
    """C8."""
    view = book.view
    book.nothing_lost()
    since = view.faults("thin")[0]["at"]
    gone = [e for e in view.of("devices") if e["at"] > since and len(e["states"]) < 5]
    lost = [t for e in view.of("log") for t in e["lines"] if "lost" in t]
    book.want(not gone and not lost, f"{max(len(gone), len(lost))} disconnects")
    took = sorted(r.took_s for r in view.hurt() if r.answered)
    book.say(f"{took[0]:.0f} to {took[-1]:.0f} s each" if took else "none came")


def joins(book: Book) -> None:
    """C11."""
    view = book.view
    kills = [e["at"] for e in view.faults("kill")]
    name = view.run["devices"][3]
    book.nothing_lost()
    book.want(len(kills) >= 3, f"{len(kills)} deaths")
    if len(kills) >= 3:
        later = [r for r in view.hurt() if r.answered and r.at > kills[2]]
        tasks = sum(r.outcome["work"].get(name, 0) for r in later)
        book.want(tasks <= 5, f"{tasks} tasks after its third death")
        again = sum(r.outcome["attempts"] > 1 for r in later)
        book.say(f"{again} requests begun anew after that")


def poisoned(book: Book) -> None:
    """C15."""
    view = book.view
    others = [r for r in view.hurt() if r.phase != "poison"]
    book.nothing_lost(others)
    book.slower(4.0, others)
    deaths = [t for e in view.of("log") for t in e["lines"] if "died" in t]
    evil = view.phase("poison")
    for r in evil:
        ended = r.outcome is not None and not r.answered and r.outcome["name"] != "DeadlineExceeded"
        name = r.outcome["name"] if r.outcome and not r.answered else "answered"
        book.want(ended, f"the poison ends as {name} after {r.took_s:.1f} s")
    most = 3 * len(evil) if len(evil) < 2 else 3  # its digest is known then
    book.want(0 < len(deaths) <= most, f"{len(deaths)} deaths")


def loads(book: Book) -> None:
    """C21."""
    view = book.view
    book.nothing_lost()
    hits = len(view.faults("died"))
    tried = hits + len(view.faults("lived"))
    book.want(hits == tried, f"killed at {hits} of {tried} tenths")
    rot = view.faults("rot")
    book.want(bool(rot) and rot[0]["blobs"] > 0, f"{rot[0]['blobs'] if rot else 0} rotten blobs")


def liars(book: Book) -> None:
    """C23."""
    view = book.view
    book.nothing_lost()
    found = {e["name"]: e["at"] for e in view.faults("found")}
    for e in view.faults("lies"):
        name, at = e["name"], found.get(e["name"], math.inf)
        mine = [r for r in view.phase(e["phase"]) if r.at >= e["at"]]
        before = [r for r in mine if r.at <= at]
        text = "found" if name in found else "not found"
        text = f"{name}, {e['phase']}: {text} after {len(before)} requests"
        book.want(name in found, f"{text}, {sum(r.wrong for r in before)} of them wrong")
        then = sum(r.wrong for r in mine if r.at > at)
        book.want(not then, f"{then} wrong then")
    seen = [e["states"] for e in view.of("devices")]
    accused = sorted({n for states in seen for n, s in states.items() if s == "quarantined"})
    book.want(accused == sorted(found), f"quarantined: {', '.join(accused)}")


def jumps(book: Book) -> None:
    """C22."""
    view = book.view
    book.nothing_lost()
    days = {e["year"] for e in view.faults("jump")}
    book.want(len(days) == 5, f"{len(days)} different times")
    since = view.faults("jump")[0]["at"]
    gone = [e for e in view.of("devices") if e["at"] > since and len(e["states"]) < 5]
    book.want(not gone, f"{len(gone)} devices lost")
    again = sum(r.outcome["attempts"] > 1 for r in view.hurt() if r.answered)
    book.want(not again, f"{again} begun anew")
    times = view.times_calm(view.hurt())
    book.say(f"p99 {times:.1f} T (T = {view.calm_s() * 1000:.0f} ms)")


def spoiled(book: Book) -> None:
    """C9."""
    book.nothing_lost()
    count = sum(e["count"] for e in book.view.faults("spoiled"))
    book.want(count > 0, f"{count} pieces spoiled")
    lines = [t for e in book.view.of("log") for t in e["lines"] if "dropped" in t]
    sums = sum("checksum" in t for t in lines)
    # One piece too many or too few makes garbage of all behind it, until the connection ends: what
    # was noticed cannot be told piece by piece. That nothing was missed is seen by the answers.
    book.say(f"refused {sums} by checksum, {len(lines) - sums} that were no message")
    book.say(f"p99 {book.view.times_calm(book.view.hurt()):.1f} T")


def disks(book: Book) -> None:
    """C14."""
    view = book.view
    for phase in ("room", "torn", "writable"):
        book.say(phase)
        book.nothing_lost(view.phase(phase))
    for phase in ("full", "read-only"):
        answered = sum(r.answered for r in view.phase(phase))
        book.say(f"{phase}: {answered} of {len(view.phase(phase))} answered")
    crashed = [e["phase"] for e in view.of("alive") if not e["same"]]
    book.want(not crashed, f"crashed when {', '.join(crashed)}" if crashed else "no crash")
    torn = [name for e in view.faults("torn") for name in e["files"]]
    book.want(bool(torn), f"torn: {', '.join(torn) or 'there is no journal'}")
    loud = [t for e in view.of("log") for t in e["lines"] if _LOUD.search(t)]
    book.want(bool(loud), f"{len(loud)} lines of the log about the disk")


_LOUD = re.compile("journal|disk|no space|read-?only", re.IGNORECASE)


def soak(book: Book) -> None:
    """C24."""
    view = book.view
    book.say(f"{len(view.faults())} faults")
    book.nothing_lost()
    book.say(f"p99 {view.times_calm(view.hurt()):.1f} T (T = {view.calm_s() * 1000:.0f} ms)")
    slope = view.slope_mib_per_h("coordinator")
    book.want(slope < 1.0, f"the coordinator's RSS {slope:+.1f} MiB/h")
    for what in ("threads", "descriptors"):
        before, after = (view.held(what, which) for which in ("before", "after"))
        grown = {n: f"{before.get(n)} to {after[n]}" for n in after if after[n] > before.get(n, 0)}
        book.want(not grown, f"{what} {grown or 'constant'}")


JUDGES: dict[str, Judge] = {
    "C1": kills,
    "C2": freezes,
    "C3": states,
    "C4": causes,
    "C5": partitions,
    "C6": halves,
    "C7": lossy,
    "C8": thin,
    "C9": spoiled,
    "C10": throttled,
    "C11": joins,
    "C12": nobody,
    "C13": coordinators,
    "C14": disks,
    "C15": poisoned,
    "C16": overload,
    "C17": crowd,
    "C18": records,
    "C21": loads,
    "C22": jumps,
    "C23": liars,
    "C24": soak,
}


def judge(path: Path) -> Verdict:
    """The verdict on one history."""
    view = View(read(path))
    book = Book(view)
    broken = [e["why"] for e in view.of("broken")]
    try:
        JUDGES[view.run["case"]](book)
    except (LookupError, StopIteration, ValueError):  # what a judge looks for never happened
        if not broken:
            raise
    book.always()
    for why in broken:
        book.want(False, f"the run broke off: {why}")
    return Verdict("; ".join(book.figures), tuple(book.missed))


def main(paths: Sequence[str]) -> int:
    """0 if all met their goals."""
    failed = 0
    for path in paths:
        verdict = judge(Path(path))
        failed += not verdict.met
        word = "met" if verdict.met else "MISSED"
        sys.stdout.write(f"{path} {word} {verdict.measured}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
