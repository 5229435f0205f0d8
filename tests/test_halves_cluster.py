"""float32 that travels as float16 on a running cluster: half the bytes, and the loss is told."""

from __future__ import annotations

import pytest
from architectures import unet
from cores import banded
from oracle import assert_exact, reference
from test_halves import noise, same_bits, worst

import meshinfer as mi
from meshinfer.errors import InvalidInput
from meshinfer.plan import Plan


def test_a_cluster_sends_half_the_bytes_and_tells_the_loss() -> None:
    model = unet()
    exact = mi.load(model)
    half = exact.with_half_transfers()
    with mi.LocalCluster(2) as cluster, cluster.client() as client:
        plan: Plan = banded(exact, cluster.names(), "head")
        plain = client.deploy("plain", model, plan=plan)
        made = client.deploy("half", model, plan=plan, half_transfers=True)
        with pytest.raises(InvalidInput, match="every bit"):
            client.deploy("both", model, strict=True, half_transfers=True)
        x = noise(exact)
        before, after = client.infer("plain", x), client.infer("half", x)
    assert plain.report is not None and plain.report.rounding is None
    assert made.report is not None and made.report.rounding is not None
    told = made.report.rounding.loss
    assert told is not None and "half transfers" in str(made.report)
    assert_exact(model, x, before.outputs)
    assert (before.rounded, after.rounded) == (False, True)
    assert same_bits(after.outputs, mi.run_plan(half, plan, x))
    assert 0 < worst(after.outputs, reference(model, x)) < 10 * told
    sent, fewer = (sum(r.timing.sent_bytes.values()) for r in (before, after))
    assert sent - fewer == made.report.rounding.float32_bytes // 2
