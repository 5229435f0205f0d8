"""What a deployment comes to, as it travels and as people read it: a value, printed in lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.records import Count, Name, Record, Seconds

Line = Annotated[str, Meta(max_length=limits.REPORT_LINE_CHARS)]
Counts = Annotated[dict[Line, Count], Meta(max_length=limits.REPORT_ENTRIES)]


class Folded(Record, frozen=True):
    """What the import made of the model: its nodes ``before`` and ``after``.

    ``gone`` and ``new``: how many nodes fewer and more of an operator there are. A
    BatchNormalization that is gone was fused into its convolution, what computed constants became
    weights.
    """

    before: Count
    after: Count
    gone: Counts
    new: Counts


class Barrier(Record, frozen=True):
    """Nodes of one operator that run whole on one device, all for one reason.

    ``nodes`` has the names of the first of them, ``count`` is how many there are.
    """

    op: Line
    why: Line
    count: Count
    nodes: Annotated[tuple[Line, ...], Meta(max_length=limits.REPORT_NODES)] = ()


class DeviceReport(Record, frozen=True):
    """What a device is expected to hold, in bytes.

    ``weights_bytes``: its part of the weights. ``peak_bytes``: these and the values of its largest
    task, without what the engine itself takes. ``spare_bytes``: what it holds beside that, to go on
    with tasks of others that are lost.
    """

    device: Name
    weights_bytes: Count
    peak_bytes: Count
    spare_bytes: Count = 0


class Rounding(Record, frozen=True):
    """What goes as float16 under a plan, and what that costs.

    ``float32_bytes``: of the values that leave their device so, for one request; half of them are
    sent. ``loss``: the largest max|a - b| / max|b| of the outputs that are floating point, against
    the same plan without rounding, as measured; ``changed``: the largest share of elements of one
    other output that came out different. Both None where it was not measured. ``how``: on what it
    was, or why not.
    """

    float32_bytes: Count
    loss: Annotated[float, Meta(ge=0)] | None = None
    changed: Annotated[float, Meta(ge=0, le=1)] | None = None
    how: Line = ""

    def __str__(self) -> str:
        text = f"{self.float32_bytes / 1e6:.2f} MB of float32 go as float16, half of that"
        text += "" if self.loss is None else f"; loss {self.loss:.2g} of the largest output value"
        if self.changed:
            text += f"; {self.changed:.2%} of another output's elements changed"
        return f"{text} ({self.how})" if self.how else text


class Report(Record, frozen=True):
    """What was made of a model under one plan. ``str(report)`` is for people, ``lines`` too.

    ``distributed``: the share, 0 to 1, of the model's operations (multiplications and additions)
    that is in nodes which several devices compute together; recomputed overlap does not count.
    ``expected_s``: seconds of one request; ``bound``: what takes most of them. ``notes``: why the
    plan is as it is. ``rounding``: of transfers, if that was asked for.
    """

    folded: Folded
    barriers: Annotated[tuple[Barrier, ...], Meta(max_length=limits.REPORT_ENTRIES)]
    distributed: Annotated[float, Meta(ge=0, le=1)]
    devices: Annotated[tuple[DeviceReport, ...], Meta(max_length=limits.DEVICES + 1)]
    expected_s: Seconds = 0.0
    bound: Line = ""
    notes: Annotated[tuple[Line, ...], Meta(max_length=limits.REPORT_ENTRIES)] = ()
    rounding: Rounding | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """For people, a fact a line."""
        return (*self.notes, *self.facts)

    @property
    def facts(self) -> tuple[str, ...]:
        """``lines`` without the planner's notes."""
        folded = f"import: {self.folded.before} nodes became {self.folded.after}"
        for what, counts in (("gone", self.folded.gone), ("new", self.folded.new)):
            folded += f"; {what}: {_counted(counts)}" if counts else ""
        none = () if self.barriers else ("barriers, which run whole on one device: none",)
        return (
            *(() if self.rounding is None else (f"half transfers: {self.rounding}",)),
            folded,
            *none,
            *(
                f"barrier, whole on one device: {each.count} {each.op}: {each.why}"
                for each in self.barriers
            ),
            f"{self.distributed:.1%} of the FLOPs are in stages that several devices share",
            *(
                f"{each.device} holds {each.weights_bytes / 1e6:.1f} MB of weights, "
                f"expected peak {each.peak_bytes / 1e6:.1f} MB"
                + (f"; for others {each.spare_bytes / 1e6:.1f} MB" if each.spare_bytes else "")
                for each in self.devices
            ),
        )

    def __str__(self) -> str:
        return "\n".join(self.lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
