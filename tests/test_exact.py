"""Any plan of any network gives plain onnxruntime's answer: random networks, random plans, one oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BARRIERS, HEADS, TILED, Net, Network, networks
from plans import check_exact, check_text, check_transfers, plans

import meshinfer as mi

MORE = settings(max_examples=4 * settings().max_examples)


@MORE
@given(st.data())
def test_any_plan_of_any_network_is_exact(data: st.DataObject) -> None:
    network = data.draw(networks())
    graph = mi.load(network.model)
    plan = data.draw(plans(graph))
    mi.validate(graph, plan)
    check_text(plan)
    check_transfers(graph, plan)
    check_exact(network.model, graph, plan, network.inputs)
