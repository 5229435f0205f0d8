"""The coordinator is killed and started again: what it wrote down comes back, in virtual time.

The ledger of ``tests/cores.py`` is its disk; that the file keeps as much is ``test_journal.py``.
"""

from __future__ import annotations

import random

import pytest
from cores import DISK_S, Cluster, conv_net, image, random_delay
from shared import bands_for_all

from meshinfer import limits
from meshinfer.errors import BY_NAME
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.ledger import Accepted, Ended, Published

FULL = m.Failure(error="ClusterUnavailable", message="the disk is full", hint="make room")


def test_deployments_come_back_with_all_that_was_asked_for_them() -> None:
    cluster = Cluster()
    cluster.deployed("one", spread=True, objective="throughput")
    cluster.deployed("two", conv_net(seed=1))
    cluster.deployed("two", conv_net(seed=2), half_transfers=True)
    before = {
        (x.name, x.version): (x.deploy, x.objective, x.spread, x.half_transfers)
        for x in cluster.core.catalogue.all_models()
    }
    assert cluster.core.catalogue.find("one", 1).deploy.spread
    cluster.restart_coordinator()
    cluster.check(cluster.submit(model="one"))
    after = {
        (x.name, x.version): (x.deploy, x.objective, x.spread, x.half_transfers)
        for x in cluster.core.catalogue.all_models()
    }
    assert before == after
    cluster.check(cluster.submit(model="two", version=1), model=conv_net(seed=1))
    assert cluster.deployed("two", conv_net(seed=3)).version == 3
    cluster.check_idle()


def test_a_restart_with_the_same_devices_plans_nothing_anew() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    plan = cluster.deployed().plan
    asked = cluster.plans_asked
    for _ in range(3):
        cluster.restart_coordinator()
        reply = cluster.check(cluster.submit())
        assert (reply.plan, reply.attempts) == (plan, 1)
    assert cluster.plans_asked == asked
    cluster.check_idle()


def test_where_a_device_of_the_plan_does_not_come_back_another_plan_is_made() -> None:
    cluster = Cluster()
    cluster.deployed()
    asked = cluster.plans_asked
    cluster.kill("pi-2", silent=True)
    cluster.restart_coordinator()
    began = cluster.now
    assert "pi-2" not in cluster.check(cluster.submit()).plan
    assert cluster.plans_asked == asked + 1
    assert cluster.now - began < limits.RESUME_WAIT_S + 2.0
    cluster.check_idle()


def test_a_device_that_grants_less_memory_than_before_is_planned_for_anew() -> None:
    cluster = Cluster(())
    cluster.join("pi-1", m.Facts(flops_per_s=1e9, host="a", memory_bytes=1 << 30))
    cluster.deployed()
    asked = cluster.plans_asked
    cluster.kill("pi-1")
    cluster.restart_coordinator()
    cluster.join("pi-1", m.Facts(flops_per_s=1e9, host="a", memory_bytes=1 << 20))
    cluster.check(cluster.submit())
    assert cluster.plans_asked > asked


def test_a_model_of_any_size_comes_back_and_is_planned_when_a_shape_is_asked() -> None:
    cluster = Cluster()
    model = conv_net(None)
    cluster.deployed(model=model)
    for size in ((8, 9), (10, 11)):
        cluster.restart_coordinator()
        cluster.check(cluster.submit(image(1, size)), image(1, size), model)
    cluster.check_idle()


def test_the_answer_to_a_deployment_that_died_with_the_coordinator_is_given_by_the_next() -> None:
    """1. published and written; 2. killed before the client hears; 3. it asks again: version 1."""
    cluster = Cluster()
    call = cluster.deploy()
    cluster.settle(lambda: bool(cluster.ledger.models))
    cluster.restart_coordinator()
    answer = cluster.answer(call).answer
    assert isinstance(answer, m.Deployed) and (answer.version, answer.failure) == (1, None)
    assert answer.plan
    assert [x.version for x in cluster.core.catalogue.models["net"]] == [1]


# --- ids ----------------------------------------------------------------------------------------


def test_an_id_keeps_its_body_over_a_restart() -> None:
    """1. answered; 2. a restart; 3. another body: an error; 4. the same body: the same answer."""
    cluster = Cluster()
    cluster.deployed()
    cluster.check(cluster.submit(request="one"))
    cluster.restart_coordinator()
    bob = cluster.connect("bob")
    cluster.settle(lambda: cluster._joined(bob))
    other = cluster.submit(image(5), request="one", client="bob")
    failure = cluster.failure(other, "bob")
    assert failure.error == "InvalidInput" and failure.hint
    again = cluster.connect("eve")
    cluster.settle(lambda: cluster._joined(again))
    cluster.check(cluster.submit(request="one", client="eve"), client="eve")
    cluster.check_idle()


def test_a_failure_that_was_told_is_told_again_after_a_restart() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.kernel_fault = lambda node, job: "no such kernel"
    told = cluster.failure(cluster.submit(request="one"))
    cluster.kernel_fault = lambda node, job: None
    cluster.restart_coordinator()
    cluster.connect("bob")
    assert cluster.failure(cluster.submit(request="one", client="bob"), "bob") == told


def test_no_reply_leaves_before_its_acceptance_is_on_disk() -> None:
    cluster = Cluster()
    cluster.deployed()
    original = cluster._send

    def checked(sender, send):  # type: ignore[no-untyped-def]
        if isinstance(send.message, m.Reply) and not isinstance(sender.core, type(None)):
            assert send.message.request in cluster.ledger.requests, "told before it was written"
        original(sender, send)

    cluster._send = checked  # type: ignore[method-assign]
    asked = [cluster.submit(image(i), request=f"r{i}") for i in range(8)]
    hasty = cluster.submit(image(9), request="hasty", deadline_s=0.0)
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    assert cluster.failure(hasty).error == "DeadlineExceeded"
    assert isinstance(cluster.ledger.requests["hasty"], Ended)
    cluster.pass_time(limits.JOURNAL_DELAY_S + 0.6)
    ends = [cluster.ledger.requests[request] for request in asked]
    assert all(isinstance(end, Ended) and end.outcome and end.failure is None for end in ends)


@pytest.mark.parametrize("beside", [False, True])
def test_the_same_answer_has_the_same_digest_on_disk(beside: bool) -> None:
    cluster = Cluster(beside=beside)
    cluster.deployed()
    cluster.check(cluster.submit(request="one"))
    cluster.check(cluster.submit(request="two"))
    cluster.check(cluster.submit(image(3), request="three"), image(3))
    cluster.pass_time(limits.JOURNAL_DELAY_S + 0.6)
    one, two, three = (cluster.ledger.requests[name] for name in ("one", "two", "three"))
    assert isinstance(one, Ended) and isinstance(two, Ended) and isinstance(three, Ended)
    assert one.outcome == two.outcome != three.outcome


def test_ids_beyond_the_bound_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOURNALED_IDS", 3)
    cluster = Cluster()
    cluster.deployed()
    for i in range(5):
        cluster.check(cluster.submit(request=f"r{i}"))
    cluster.pass_time(limits.JOURNAL_DELAY_S + 0.6)
    assert list(cluster.ledger.requests) == ["r2", "r3", "r4"]


# --- a disk that does not write -------------------------------------------------------------------


def test_what_cannot_be_written_is_not_accepted_and_is_again_when_it_can() -> None:
    """1. the disk is full: a typed error, and at once for the next; 2. there is room again."""
    cluster = Cluster()
    cluster.deployed()
    cluster.disk = lambda record: FULL
    assert cluster.failure(cluster.submit(request="one")) == FULL
    assert cluster.failure(cluster.submit(request="two")) == FULL
    assert [n for n in cluster.coordinator.notes if n.level == "error"]
    assert "one" not in cluster.ledger.requests
    cluster.disk = lambda record: None
    cluster.pass_time(limits.JOURNAL_RETRY_S + 0.1)
    cluster.connect("bob")  # with another body: the id never was another's
    cluster.check(cluster.submit(image(1), request="one", client="bob"), image(1), client="bob")
    cluster.check_idle()


def test_accepted_requests_are_answered_though_the_disk_fills_up() -> None:
    cluster = Cluster()
    cluster.deployed()
    asked = [cluster.submit(image(i), request=f"r{i}") for i in range(4)]
    cluster.settle(lambda: len(cluster.ledger.requests) == 4)
    cluster.pass_time(2 * DISK_S)
    cluster.disk = lambda record: FULL
    refused = cluster.submit(image(5), request="late")
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    assert cluster.failure(refused) == FULL
    cluster.disk = lambda record: None
    cluster.pass_time(limits.JOURNAL_RETRY_S + 0.6)
    assert all(isinstance(cluster.ledger.requests[r], Ended) for r in asked)


def test_a_deployment_that_cannot_be_written_fails_and_serves_nobody() -> None:
    cluster = Cluster()
    cluster.disk = lambda record: FULL
    answer = cluster.answer(cluster.deploy())
    assert answer.failure == FULL
    assert not cluster.core.catalogue.all_models() and not cluster.core.catalogue.deployments
    cluster.disk = lambda record: None
    cluster.pass_time(limits.JOURNAL_RETRY_S + 0.1)
    cluster.deployed()
    cluster.check(cluster.submit())


def test_a_model_whose_file_is_damaged_is_not_served_and_it_is_said_why() -> None:
    cluster = Cluster()
    cluster.deployed("good")
    damaged = cluster.deployed("bad", conv_net(seed=1))
    (model,) = cluster.core.catalogue.models["bad"]
    del cluster.coordinator.blobs[model.digest]
    cluster.restart_coordinator()
    early = cluster.submit(model="bad")
    assert cluster.failure(early).error == "ModelNotFound"
    failure = cluster.failure(cluster.submit(model="bad"))
    assert failure.error == "ModelNotFound" and "damaged" in failure.message
    cluster.check(cluster.submit(model="good"))
    assert cluster.deployed("bad", conv_net(seed=1)).version == damaged.version + 1
    cluster.check(cluster.submit(model="bad"), model=conv_net(seed=1))


def test_a_submodel_that_is_gone_is_made_again() -> None:
    cluster = Cluster()
    cluster.deployed()
    (model,) = cluster.core.catalogue.models["net"]
    for digest in [d for d in cluster.coordinator.blobs if d != model.digest]:
        del cluster.coordinator.blobs[digest]
    asked = cluster.plans_asked
    cluster.restart_coordinator()
    cluster.check(cluster.submit())
    assert cluster.plans_asked == asked + 1


# --- at random ----------------------------------------------------------------------------------


def run(seed: int) -> int:
    """Kills of the coordinator at random moments; how many requests were answered right."""
    rng = random.Random(seed)
    delay = random_delay(seed, rng.choice([0.001, 0.02, 0.2]))
    cluster = Cluster(("pi-1", "pi-2"), delay=delay, beside=seed % 2 == 0)
    cluster.planner = bands_for_all if seed % 3 == 1 else None
    full = rng.random() < 0.3

    def disk(record: e.Record) -> m.Failure | None:
        return FULL if full and rng.random() < 0.3 else None

    cluster.deployed()
    cluster.disk = disk
    asked: dict[str, int] = {}
    for _ in range(rng.randint(3, 8)):
        number = rng.randrange(4)
        asked[cluster.submit(image(number), deadline_s=60.0)] = number
        if rng.random() < 0.7:
            cluster.pass_time(rng.choice([0.0, 0.001, 0.003, 0.01, 0.05, 0.5]))
            cluster.restart_coordinator()
        cluster.pass_time(rng.choice([0.0, 0.002, 0.02, 0.3, 2.0]))
    right = 0
    for request, number in asked.items():
        reply = cluster.reply(request)  # there is exactly one
        if reply.failure is None:
            cluster.check(request, image(number))
            entry = cluster.ledger.requests[request]
            assert isinstance(entry, Accepted) or entry.failure is None
            right += 1
        else:
            assert reply.failure.error in BY_NAME
            assert reply.failure == FULL or reply.failure.error == "ClusterUnavailable", reply
    full = False
    cluster.pass_time(4.0)
    assert cluster.check(cluster.submit(image(9)), image(9)).version == 1
    cluster.check_idle()
    (versions,) = cluster.ledger.models.values()
    assert all(isinstance(entry, Published) for entry in versions) and len(versions) == 1
    return right


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_any_schedule_of_kills_gives_each_request_one_right_outcome(first: int) -> None:
    """To replay seed 7: ``cd tests && python -c 'import test_restart_core as t; t.run(7)'``."""
    right = 0
    for seed in range(first, first + 10):
        try:
            right += run(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert right > 10
