"""What rounding transfers to float16 costs a deployment: measured, by running its plan twice.

Once with and once without, in this process, on inputs drawn from a fixed seed. A model that would
take long, or more memory than is free, goes unmeasured, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from msgspec import structs

from cluster import granted
from meshinfer import limits
from meshinfer.cost.model import whole_flops
from meshinfer.executor import run_plan
from meshinfer.graph import Graph
from meshinfer.ops import is_random
from meshinfer.plan import Plan
from meshinfer.protocol.codec import Array
from meshinfer.protocol.report import Report, Rounding

_SEED = 0
HOW = "measured once, on standard normal noise as float inputs, against the plan unrounded"


def with_loss(graph: Graph, plan: Plan, report: Report, scratch: Path) -> Report:
    """The report with the loss as measured, or with why it was not. Never fails.

    ``scratch``: a folder for the plan's weights meanwhile.
    """
    rounding = report.rounding
    if rounding is None:
        return report
    why = unmeasured(graph, rounding)
    if why:
        found = structs.replace(rounding, how=why)
    else:
        try:
            found = measured(graph, plan, rounding, scratch)
        except Exception as error:  # a model that noise does not suit is deployed all the same
            text = f"the loss could not be measured: {error}"
            found = structs.replace(rounding, how=text[: limits.REPORT_LINE_CHARS])
    return structs.replace(report, rounding=found)


def unmeasured(graph: Graph, rounding: Rounding) -> str:
    """Why the loss is not measured; "" if it may be."""
    if not rounding.float32_bytes:
        return "nothing is rounded"
    if any(is_random(op) for op in graph.ops):
        return "the loss is not measured: the model draws random numbers"
    flops = sum(whole_flops(graph, op) for op in graph.ops)
    if flops > limits.LOSS_FLOPS:
        return (
            f"the loss is not measured: a run takes {flops / 1e9:.0f} GFLOPs, "
            f"more than {limits.LOSS_FLOPS / 1e9:.0f}"
        )
    nbytes = sum(graph.nbytes(name) for name in graph.values)
    room = min(limits.LOSS_BYTES, _free_bytes())
    if nbytes > room:
        return (
            f"the loss is not measured: weights and values have {nbytes / 1e6:.0f} MB, "
            f"and {room / 1e6:.0f} MB may be used"
        )
    return ""


def measured(graph: Graph, plan: Plan, rounding: Rounding, scratch: Path) -> Rounding:
    """Run the plan with and without rounding. Raises what a run raises."""
    inputs = noise(graph)
    rounded = run_plan(graph, plan, inputs, scratch=scratch)
    exact = run_plan(replace(graph, half_transfers=False), plan, inputs, scratch=scratch)
    loss, changed = differences(rounded, exact)
    return structs.replace(rounding, loss=loss, changed=changed, how=HOW)


def noise(graph: Graph) -> dict[str, Array]:
    """Inputs by a fixed seed: standard normal floats, pixels from 0 to 255, else zeros and ones."""
    draw = np.random.default_rng(_SEED)
    made: dict[str, Array] = {}
    for name in graph.inputs:
        shape, dtype = graph.shape(name), graph.numpy_dtype(name)
        if shape is None:
            raise ValueError(f"input {name!r} has no static shape")
        if np.issubdtype(dtype, np.floating):
            made[name] = draw.standard_normal(shape).astype(dtype)
        else:
            most = 256 if dtype == np.uint8 else 2
            made[name] = draw.integers(0, most, shape).astype(dtype)
    return made


def differences(
    found: Mapping[str, Any], exact: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """The largest max|a - b| / max|b| of floating-point outputs, and the largest share of changed
    elements of another; None where there is no such output. Raises ``ValueError`` where an output
    has another shape, or is not finite."""
    losses: list[float] = []
    shares: list[float] = []
    for name, b in exact.items():
        a, b = np.asarray(found[name]), np.asarray(b)
        if a.shape != b.shape:
            raise ValueError(f"output {name!r} has shape {a.shape}, unrounded {b.shape}")
        if not b.size:
            continue
        if not np.issubdtype(b.dtype, np.floating):
            shares.append(float(np.mean(a != b)))
            continue
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"output {name!r} is not finite")
        largest = float(np.abs(b.astype(np.float64)).max())
        difference = float(np.abs(a.astype(np.float64) - b).max())
        losses.append(difference / largest if largest else float(difference > 0))
    return max(losses, default=None), max(shares, default=None)


def _free_bytes() -> int:
    """Half of what is left of this device's memory: others on it need theirs."""
    left = granted.memory_left(granted.memory_limit())
    return min(left, psutil.virtual_memory().available) // 2
