"""Many devices without faults: what is counted of the coordinator is what went over the network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest

from cluster.crowd import Measured, Plans, Row
from cluster.simulate import main
from meshinfer.scheduler import events as e
from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.crowd import Crowd, Meter
from meshinfer.simulator.node import Node
from meshinfer.simulator.resnet import resnet50

DEVICES, SIDE, CHANNELS = 16, 224, 64
OTHERS = 2
"""The head and the user."""


class Log:
    """What a crowd's network carried, counted apart from its meter."""

    def __init__(self, crowd: Crowd) -> None:
        self.carried: list[tuple[str, str, int]] = []
        self._carry: Callable[..., None] = crowd._carry
        crowd._carry = self.carry  # type: ignore[method-assign]

    def carry(
        self, sender: Node, receiver: Node, plane: e.Plane, frames: list[bytes], what: e.Arrived
    ) -> None:
        self.carried.append((sender.name, receiver.name, sum(map(len, frames))))
        self._carry(sender, receiver, plane, frames, what)

    def sums(self, which: Callable[[str, str], bool]) -> tuple[int, int]:
        """Messages and bytes."""
        found = [nbytes for sender, receiver, nbytes in self.carried if which(sender, receiver)]
        return len(found), sum(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Row, Meter, Crowd, Log]]:
    plans = Plans(tmp_path_factory.mktemp("blobs"))
    model = resnet50(SIDE, CHANNELS)
    plans.store.put(hashlib.sha256(model).hexdigest(), model)
    measured = Measured(DEVICES, plans, model, SIDE)
    before, between = measured.crowd.meter.copy(), measured.crowd.between
    log = Log(measured.crowd)
    row = measured.row(("latency", "throughput"))
    measured.crowd.between -= between
    yield row, measured.crowd.meter.since(before), measured.crowd, log
    plans.close()


def test_the_meter_counts_what_the_network_carried(
    run: tuple[Row, Meter, Crowd, Log],
) -> None:
    _, meter, crowd, log = run
    heard = sum(meter.heard.values()), sum(meter.heard_bytes.values())
    said = sum(meter.said.values()), sum(meter.said_bytes.values())
    assert heard == log.sums(lambda _, to: to == COORDINATOR)
    assert said == log.sums(lambda sender, _: sender == COORDINATOR)
    assert crowd.between == log.sums(lambda *ends: COORDINATOR not in ends)[0] > 0


def test_what_comes_at_rest_is_two_heartbeats_a_second_of_each(
    run: tuple[Row, Meter, Crowd, Log],
) -> None:
    row, *_ = run
    beats = 2 * (DEVICES + OTHERS)
    assert beats * 0.9 < row.rest.heard < beats * 1.1 + 1.0
    assert row.admission.said == pytest.approx(DEVICES + OTHERS - 1, abs=2)
    assert 0.0 < row.rest.cpu_s < 1.0


def test_a_plan_for_throughput_uses_all_and_a_request_tells_few_of_them(
    run: tuple[Row, Meter, Crowd, Log],
) -> None:
    row, *_ = run
    latency, throughput = row.served
    assert latency.used < throughput.used == DEVICES
    assert throughput.request.said < DEVICES / 2
    assert throughput.link_bytes > 4 * 3 * SIDE * SIDE  # the image, and little else
    assert throughput.weights_bytes > DEVICES * len(resnet50(SIDE, CHANNELS)) * 0.9


def test_the_command_measures_so_many_and_refuses_more_than_a_cluster_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--devices", "16", "--side", "64"]) == 0
    out = capsys.readouterr().out
    assert "| 16 |" in out and "| 16, latency |" in out and "| 16, throughput |" in out
    assert main(["--devices", "8", "1001"]) == 2
    told = capsys.readouterr()
    assert "1001 devices cannot be simulated: ask for 1 to 1000 devices" in told.err
