"""What a plan makes of a model: what was folded, what cannot be tiled and why, who holds what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from msgspec import structs

from meshinfer import limits
from meshinfer.cost import Timeline
from meshinfer.cost.model import whole_flops
from meshinfer.graph import Graph, Op
from meshinfer.identity import DeviceId
from meshinfer.importers.onnx_model import GIVEN_OPS
from meshinfer.ops import BARRIER, rule_of, why_barrier
from meshinfer.plan import Plan
from meshinfer.planner import Spares
from meshinfer.protocol.report import Barrier, DeviceReport, Folded, Report, Rounding
from meshinfer.transfers import derive


def report_of(graph: Graph, plan: Plan, expected: Timeline, notes: Sequence[str] = ()) -> Report:
    """The report of a valid plan. ``expected``: its timeline; ``notes``: the planner's."""
    return Report(
        folded=_folded(graph),
        barriers=_barriers(graph),
        distributed=_distributed(graph, plan),
        devices=tuple(
            DeviceReport(device=use.id, weights_bytes=use.weight_bytes, peak_bytes=use.peak_bytes)
            for use in expected.devices
            if use.id in plan.devices()
        ),
        expected_s=expected.total_s if math.isfinite(expected.total_s) else 0.0,
        bound=_line(expected.bound),
        notes=tuple(_line(note) for note in notes[: limits.REPORT_ENTRIES]),
        rounding=_rounding(graph, plan) if graph.half_transfers else None,
    )


def with_spares(report: Report, spares: Spares) -> Report:
    """The same, and what devices hold to go on with tasks of others."""
    extra = dict(spares.extra_bytes)
    devices = tuple(
        structs.replace(each, spare_bytes=extra.pop(DeviceId(each.device), 0))
        for each in report.devices
    )
    idle = tuple(
        DeviceReport(device=name, weights_bytes=0, peak_bytes=0, spare_bytes=nbytes)
        for name, nbytes in sorted(extra.items())
    )
    notes = (*report.notes, *map(_line, spares.notes))[: limits.REPORT_ENTRIES]
    more: Report = structs.replace(report, devices=(*devices, *idle), notes=notes)
    return more


def _rounding(graph: Graph, plan: Plan) -> Rounding:
    """What is rounded; the loss is yet to be measured."""
    flow = derive(graph, plan)
    nbytes = sum(
        graph.nbytes(t.piece.value, t.piece.box)
        for t in flow.transfers
        if not t.local and flow.halved(graph, t)
    )
    return Rounding(float32_bytes=nbytes, how="the loss is measured at deployment")


def _folded(graph: Graph) -> Folded:
    after = Counter(op.type for op in graph.ops)
    before: Counter[str] = graph.memo.get(GIVEN_OPS, after)
    return Folded(
        before=before.total(),
        after=after.total(),
        gone=_largest(before - after),
        new=_largest(after - before),
    )


def _largest(counts: Counter[str]) -> dict[str, int]:
    return {_line(op): n for op, n in counts.most_common(limits.REPORT_ENTRIES)}


def _barriers(graph: Graph) -> tuple[Barrier, ...]:
    """By operator and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Op]] = {}
    for op in graph.ops:
        if rule_of(op) is BARRIER:
            groups.setdefault((op.type, why_barrier(op)), []).append(op)
    found = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return tuple(
        Barrier(
            op=_line(kind),
            why=_line(why),
            count=len(ops),
            nodes=tuple(_line(op.proto.name) for op in ops[: limits.REPORT_NODES]),
        )
        for (kind, why), ops in found[: limits.REPORT_ENTRIES]
    )


def _distributed(graph: Graph, plan: Plan) -> float:
    """A barrier is whole on one device, or on each of them, whatever stage it is in."""
    shared = {
        index
        for stage in plan.stages
        if len({task.devices[0] for task in stage.tasks}) > 1
        for index in range(stage.start, stage.stop)
        if rule_of(graph.ops[index]) is not BARRIER
    }
    total = done = 0
    for op in graph.ops:
        flops = whole_flops(graph, op)
        total += flops
        done += flops if op.index in shared else 0
    return done / total if total else 0.0


def _line(text: str) -> str:
    """What a report may hold of a text: names and reasons come from the model."""
    most = limits.REPORT_LINE_CHARS
    return text if len(text) <= most else text[: most - 3] + "..."
