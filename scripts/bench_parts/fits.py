"""A model that is too large for one device, on several: memory limits, kills and answers counted.

The devices' groups have a hard limit and no swap: what needs more is killed by the kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_parts.child import Broken
from bench_parts.measure import Answers, say
from bench_parts.models import Model, make
from bench_parts.rig import Patience, Rig, lifted, spawn
from cluster.lab import DeviceSpec, Lab

SPARE_BYTES = 16_000_000
"""Of a device's limit, for what an idle worker does not hold yet: buffers of sockets, stacks."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a device's group held. ``idle``: anonymous memory before the model came, ``peak``: of
    all kinds since, ``kills``: processes that the kernel killed for memory."""

    device: str
    limit_bytes: int | None
    idle_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    file_bytes: int
    kills: int
    last_exit: str


def fits(
    name: str,
    devices: int,
    limit_bytes: int,
    cores: float,
    folder: Path,
    patience: Patience,
    requests: int = 4,
    apart: bool = True,
) -> dict[str, Any]:
    """Plain onnxruntime on one device of this limit, then MeshInfer on so many of them.

    ``apart``: coordinator and client are on a device of their own that does not compute and has no
    limit; else they are on the first of the devices, within its limit.
    """
    model = make(name, folder)
    plain = _plain(model, limit_bytes, cores, folder, patience)
    say(f"  plain onnxruntime on one: {plain['said']}")
    limits = [None] * apart + [limit_bytes] * devices
    rig = Rig([cores] * len(limits), 1e9, folder / "rig", patience, 2.0, memory_bytes=limits)
    try:
        return {"plain": plain, **_deployed(rig, model, limits, patience, folder, requests)}
    finally:
        rig.close()


def _plain(
    model: Model, limit_bytes: int, cores: float, folder: Path, patience: Patience
) -> dict[str, Any]:
    path = folder / "one.npz"
    np.savez(path, **dict(model.requests[0].feeds))
    options = {"model": str(model.path), "inputs": [str(path)], "threads": 1}
    with Lab([DeviceSpec("one", cores, limit_bytes)]) as lab, lifted(lab, 2.0):
        with spawn(lab, "plain.py", options, folder / "one.log") as peer:
            try:
                peer.hear(patience.start_s)
                peer.ask({"run": 1}, patience.answer_s)
                said = "it answered"
            except Broken as error:
                said = str(error).partition(":")[0]
        used = lab.usage(0)
    return {"said": said, "kills": used.oom_kills, "peak_bytes": used.peak_memory_bytes}


def _deployed(
    rig: Rig,
    model: Model,
    limits: Sequence[int | None],
    patience: Patience,
    folder: Path,
    requests: int,
) -> dict[str, Any]:
    idle = [rig.lab.usage(i).anonymous_bytes for i in range(len(limits))]
    budgets = {
        rig.names[i]: 0 if limit is None else max(0, limit - idle[i] - SPARE_BYTES)
        for i, limit in enumerate(limits)
    }
    say(f"  granted: {', '.join(f'{d} {n / 1e6:.0f} MB' for d, n in budgets.items())}")
    for i in range(len(limits)):
        rig.lab.reset_peak(i)
    inputs = []
    for i, request in enumerate(model.requests):
        inputs.append(folder / f"fits-{i}.npz")
        np.savez(inputs[-1], **dict(request.feeds))
    rig.load(model, inputs)
    answers, identical, wall_s, failed = Answers(model), True, [], ""
    made: dict[str, Any] = {}
    try:
        made = rig.deploy(model.name, model, objective="latency", memory=budgets)
        for line in made["lines"]:
            say(f"    {line}")
        for i in range(requests):
            which = [i % len(model.requests)]
            told = rig.ask(do="infer", name=model.name, which=which, deadline_s=60.0)
            identical &= answers.check(rig.folder, told)
            wall_s.append(told[0]["wall_s"])
    except Broken as error:
        failed = str(error)
        say(f"  FAILED: {failed}")
    held = _held(rig, limits, idle, failed)
    return {
        "failed": failed,
        "answers": len(wall_s),
        "identical": identical,
        "wall_s": wall_s,
        "deploy_s": made.get("deploy_s"),
        "plan": made.get("plan"),
        "held": [asdict(each) for each in held],
    }


def _held(rig: Rig, limits: Sequence[int | None], idle: Sequence[int], failed: str) -> list[Held]:
    exits = {} if failed else {d["device"]: d["facts"]["last_exit"] for d in rig.ask(do="devices")}
    found = []
    for i, limit in enumerate(limits):
        used = rig.lab.usage(i)
        name = rig.names[i]
        found.append(
            Held(
                name,
                limit,
                idle[i],
                used.peak_memory_bytes,
                used.anonymous_bytes,
                used.file_bytes,
                used.oom_kills,
                exits.get(name, ""),
            )
        )
    return found


def said(found: Mapping[str, Any]) -> str:
    """A table of what was found, and what follows from it."""
    plain = found["plain"]
    lines = [
        f"plain onnxruntime on one: {plain['said']}; killed for memory: {plain['kills']} time(s), "
        f"peak {plain['peak_bytes'] / 1e6:.0f} MB",
        f"{'device':<10}{'limit':>9}{'idle':>9}{'peak':>9}{'own':>9}{'files':>9}{'kills':>7}",
    ]
    for each in found["held"]:
        limit = each["limit_bytes"]
        sizes = [each[f"{kind}_bytes"] for kind in ("idle", "peak", "anonymous", "file")]
        lines.append(
            f"{each['device']:<10}{'none' if limit is None else f'{limit / 1e6:.0f} MB':>9}"
            + "".join(f"{nbytes / 1e6:>6.0f} MB" for nbytes in sizes)
            + f"{each['kills']:>7}"
        )
    if found["failed"]:
        return "\n".join([*lines, f"failed: {found['failed']}"])
    middle_ms = statistics.median(found["wall_s"]) * 1e3
    bits = "bit for bit" if found["identical"] else "within its tolerance"
    lines.append(f"{found['answers']} answers, the oracle's {bits}, {middle_ms:.0f} ms each")
    return "\n".join(lines)


def holds(found: Mapping[str, Any]) -> bool:
    """Whether one device was too small for plain onnxruntime, and several enough for us."""
    lost = any(each["kills"] or each["last_exit"] for each in found["held"])
    return bool(found["plain"]["kills"] and found["answers"] and not found["failed"] and not lost)
