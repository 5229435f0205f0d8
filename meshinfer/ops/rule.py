"""What a row of the operator table is: the box arithmetic of one operator and how to emit it.

A row answers, for boxes of the outputs: which boxes can really be computed (``align``), which boxes
of the inputs they read (``footprint``), and which nodes compute them (``emit``). Boxes that a plan
asks for are grown by ``align`` and cropped afterwards, so any plan is exact and a poor one merely
computes more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from meshinfer.geometry import Box
from meshinfer.graph import Op

Boxes = tuple[Box | None, ...]
"""One box for each output (None: not asked for) or for each input (None: not read)."""


class Emitter(Protocol):
    """What ``emit`` may use to write nodes; see ``meshinfer.lower``."""

    opset: int

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: object,
    ) -> None:
        """Append one node."""

    def copy(
        self,
        op: Op,
        inputs: Sequence[str],
        outputs: Sequence[str],
        drop: Sequence[str] = (),
        **attributes: object,
    ) -> None:
        """Append ``op`` itself with other names, without ``drop``, with attributes replaced."""

    def ints(self, values: Sequence[int]) -> str:
        """Name of a 1-D int64 constant."""

    def array(self, values: np.ndarray[Any, np.dtype[Any]]) -> str:
        """Name of a constant. It travels in the submodel: keep it to a vector an axis."""

    def scalar(self, value: float, op: Op) -> str:
        """Name of a 0-D constant of the type of the op's first input."""

    def fresh(self, hint: str) -> str:
        """A value name that is not in use."""


@dataclass(frozen=True, slots=True)
class Emission:
    """All that ``emit`` is told: aligned boxes and the names of the cropped inputs and outputs."""

    outs: Boxes
    ins: Boxes
    over: Box | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


AlignFn = Callable[[Op, Boxes], Boxes]
FootprintFn = Callable[[Op, Boxes, Box | None], Boxes]
EmitFn = Callable[[Op, Emission, Emitter], None]


def unchanged(op: Op, outs: Boxes) -> Boxes:
    return outs


def copy_node(op: Op, job: Emission, e: Emitter) -> None:
    e.copy(op, job.inputs, job.outputs)


def out_volume(op: Op, outs: Boxes) -> int:
    """One operation an element: right enough for all that is bound by memory."""
    return sum(box.volume for box in outs if box is not None)


def no_reduction(op: Op) -> Box | None:
    return None


def nothing(op: Op) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    ``objection``: why this node, with its attributes and static inputs, cannot follow the rule and
    is a barrier, in words for people ("its axes are computed"); empty when it can. ``split``: axes
    of the first output along which boxes shrink what is read; negative numbers count from the end.
    ``reduction``: the box of the axes that are summed away, when parts of the sum may be computed
    apart (``over``). ``flops``: operations for these outputs.
    """

    footprint: FootprintFn
    emit: EmitFn = copy_node
    align: AlignFn = unchanged
    objection: Callable[[Op], str] = nothing
    split: Callable[[Op], tuple[int, ...]] = lambda op: tuple(range(len(op.out_shape())))
    reduction: Callable[[Op], Box | None] = no_reduction
    flops: Callable[[Op, Boxes], int] = out_volume


def only_one_output(op: Op) -> str:
    """The objection of a rule that computes the first output and none of the optional ones."""
    return "" if len([o for o in op.outputs if o]) == 1 else "its further outputs are asked for"


def only(boxes: Boxes) -> Box:
    """The box of the first output, which must be asked for."""
    box = boxes[0]
    assert box is not None
    return box
