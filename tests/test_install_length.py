"""Spare devices are worth no plan that cannot be installed: two where their messages are not too
long, else one, else none.
"""

from __future__ import annotations

import pytest
from cores import _imported, banded, conv_net

from cluster.planner import _longest, _with_spares
from meshinfer import limits
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.identity import DeviceId
from meshinfer.planner import find_spares, pins_of
from meshinfer.programs import make_programs
from meshinfer.report import report_of
from meshinfer.scheduler import events as e

NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")
SIGNATURE = e.Signature(False, (("x", (1, 3, 12, 10)),))


@pytest.mark.parametrize("spares", [2, 1, 0])
def test_so_many_spares_as_their_messages_allow(
    spares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _imported(conv_net(), None, SIGNATURE)
    plan = banded(graph, NAMES, "head")
    profiles = [DeviceProfile(DeviceId(name), 1e9) for name in NAMES]
    two = find_spares(graph, plan, profiles, pins_of(graph, plan, profiles, {})).devices
    few = {ref: names[:spares] for ref, names in two.items() if spares}
    room = _longest(make_programs(graph, plan, few))
    monkeypatch.setattr(limits, "INSTALL_BYTES", room + 8 * len(NAMES))
    ask = (None, "latency", False, False)
    effect = e.MakePlan(1, "", None, SIGNATURE, (), "head", *ask)
    report = report_of(graph, plan, timeline(graph, plan, []))
    programs, _ = _with_spares(graph, plan, profiles, effect, report)
    tasks = [p for each in programs.by_device.values() for p in each if p.model is not None]
    assert {len(program.spares) for program in tasks} == {spares}
