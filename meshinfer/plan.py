"""The plan: who produces what. Everything else (inputs, halos, transfers, merges) is derived.

``str(plan)`` is readable and ``Plan.parse`` reads it back; ``meshinfer.legality`` holds a plan
against its graph. Cutting fused blocks is DeepThings' idea (Zhao et al. 2018), a stage a layer is
MoDNN's (Mao et al. 2017). Workers use these types, so nothing here imports onnx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.geometry import Box, Interval
from meshinfer.identity import DeviceId, Digest


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a named value; ``over`` is the part of the reduction summed here (None:
    complete)."""

    value: str
    box: Box
    over: Box | None = None

    def __str__(self) -> str:
        part = f" over {self.over}" if self.over is not None else ""
        return f"{_quoted(self.value)} {self.box}{part}"


@dataclass(frozen=True, slots=True)
class Task:
    """One part of a stage. One device: pinned. Several: any may take it, later ones are backups."""

    devices: tuple[DeviceId, ...]
    outputs: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Ops ``[start, stop)``; the tasks cover each of its live values exactly once."""

    start: int
    stop: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The ordered stages, with the device that holds the input and the one that must hold the
    answer."""

    graph: Digest
    source: DeviceId
    sink: DeviceId
    stages: tuple[Stage, ...]
    window: int = 1

    def devices(self) -> tuple[DeviceId, ...]:
        """Devices that compute, in order of their first task."""
        found = {d: None for s in self.stages for t in s.tasks for d in t.devices}
        return tuple(found)

    @property
    def mode(self) -> str:
        """A label derived from the shape of the plan; nothing branches on it."""
        devices = self.devices()
        if len(self.stages) == 1 and len(self.stages[0].tasks) == 1:
            return "on-device" if devices == (self.source,) else "full offload"
        if any(len(stage.tasks) > 1 for stage in self.stages):
            return "distributed tiling" if len(devices) > 1 else "tiled on one device"
        return "device + cloud split" if len(devices) == 2 else "cross-device pipeline"

    def __str__(self) -> str:
        lines = [
            f"plan graph={_quoted(self.graph)} source={_quoted(self.source)} "
            f"sink={_quoted(self.sink)} "
            f"window={self.window}"
        ]
        for stage in self.stages:
            lines.append(f"stage {stage.start}:{stage.stop}")
            for task in stage.tasks:
                lines.append("  task " + ",".join(_quoted(d) for d in task.devices))
                lines.extend(f"    {shard}" for shard in task.outputs)
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str) -> Plan:
        """The plan of this text. Raises ``InvalidInput`` that names the line."""
        return _Parser(text).plan()


_PLAIN = re.compile(r"[A-Za-z0-9_./#@+\-]+")
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\[[^\]]*\]|,|=|[A-Za-z0-9_./#@+\-:]+)')
_DIGITS = 18
_RANGE = rf"-?\d{{1,{_DIGITS}}}:-?\d{{1,{_DIGITS}}}"
_BOX = re.compile(rf"\[(?:{_RANGE}(?:,{_RANGE})*)?\]")


def _quoted(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


class _Parser:
    """Reads the text form line by line; ``self.number`` is the line at hand."""

    def __init__(self, text: str) -> None:
        if len(text) > limits.PLAN_TEXT_BYTES:
            raise InvalidInput(
                f"the plan text has {len(text)} characters, over {limits.PLAN_TEXT_BYTES}",
                hint="give the plan of one model",
            )
        self.lines: Iterator[tuple[int, str]] = (
            (i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()
        )
        self.number = 0

    def fail(self, why: str) -> InvalidInput:
        return InvalidInput(
            f"plan, line {self.number}: {why}",
            hint="the form is that of str(plan): "
            "plan, stage A:B, task DEVICE, VALUE [box] over [box]",
        )

    def tokens(self, line: str) -> list[str]:
        found, position = [], 0
        line = line.rstrip()
        while position < len(line):
            match = _TOKEN.match(line, position)
            if match is None:
                raise self.fail(f"unexpected {line[position : position + 200].strip()!r}")
            found.append(match.group(1))
            position = match.end()
        return found

    def name(self, token: str) -> str:
        if not token.startswith('"'):
            return token
        try:
            name = str(json.loads(token))
            name.encode()  # half a surrogate pair is no character, and cannot travel
        except ValueError:
            raise self.fail(f"{token[:200]} is no quoted name") from None
        return name

    def integer(self, token: str) -> int:
        if not token.isdecimal() or len(token) > _DIGITS:
            raise self.fail(f"{token[:_DIGITS]!r} is no number")
        return int(token)

    def box(self, token: str) -> Box:
        token = token.replace(" ", "")
        if not _BOX.fullmatch(token):
            raise self.fail(f"{token[:200]!r} is no box")
        pairs = [pair.split(":") for pair in token[1:-1].split(",") if pair]
        return Box(tuple(Interval(int(a), int(b)) for a, b in pairs))

    def head(self, tokens: list[str]) -> dict[str, str]:
        if len(tokens) % 3 or any(t != "=" for t in tokens[1::3]):
            raise self.fail("expected key=value pairs")
        return {tokens[i]: self.name(tokens[i + 2]) for i in range(0, len(tokens), 3)}

    def shard(self, tokens: list[str]) -> Shard:
        if len(tokens) == 2:
            return Shard(self.name(tokens[0]), self.box(tokens[1]))
        if len(tokens) == 4 and tokens[2] == "over":
            return Shard(self.name(tokens[0]), self.box(tokens[1]), self.box(tokens[3]))
        raise self.fail("expected VALUE [box], or VALUE [box] over [box]")

    def plan(self) -> Plan:
        head: dict[str, str] | None = None
        stages: list[tuple[int, int, list[tuple[tuple[DeviceId, ...], list[Shard]]]]] = []
        for number, line in self.lines:
            self.number = number
            indent = len(line) - len(line.lstrip())
            first, *rest = self.tokens(line)
            if indent == 0 and first == "plan" and head is None:
                head = self.head(rest)
            elif indent == 0 and first == "stage" and head is not None and len(rest) == 1:
                start, _, stop = rest[0].partition(":")
                stages.append((self.integer(start), self.integer(stop), []))
            elif indent == 2 and first == "task" and stages:
                if not rest or len(rest) % 2 == 0 or any(t != "," for t in rest[1::2]):
                    raise self.fail("expected task DEVICE[,DEVICE ...]")
                stages[-1][2].append((tuple(DeviceId(self.name(t)) for t in rest[::2]), []))
            elif indent == 4 and stages and stages[-1][2]:
                stages[-1][2][-1][1].append(self.shard([first, *rest]))
            else:
                raise self.fail(f"did not expect {line.strip()!r} here")
        if head is None or set(head) != {"graph", "source", "sink", "window"}:
            raise self.fail("expected plan graph=... source=... sink=... window=...")
        return Plan(
            graph=Digest(head["graph"]),
            source=DeviceId(head["source"]),
            sink=DeviceId(head["sink"]),
            stages=tuple(
                Stage(a, b, tuple(Task(devices, tuple(shards)) for devices, shards in tasks))
                for a, b, tasks in stages
            ),
            window=self.integer(head["window"]),
        )
