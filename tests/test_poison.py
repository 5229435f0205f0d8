"""Requests that end the processes that compute them; and what an answer tells of what happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cores import Cluster, image
from shared import whole

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe
from meshinfer.scheduler import events as e

FOUR = ("pi-1", "pi-2", "pi-3", "pi-4")
RESTART_S = 0.7
Fatal = Callable[[str, e.Compute], m.Ended | None]


class Deadly:
    """A cluster in which some tasks end their process, which a supervisor starts again."""

    def __init__(
        self, fatal: Fatal, names: tuple[str, ...] = FOUR, *, beside: bool = False
    ) -> None:
        self.cluster = Cluster(names, beside=beside)
        self.restart_s = RESTART_S
        self.deaths: list[tuple[str, e.Compute]] = []
        self._down: list[tuple[float, str, m.Ended]] = []

        def fault(node: object, job: e.Compute) -> None:
            name = node.name  # type: ignore[attr-defined]
            ended = fatal(name, job)
            if ended is not None and self.cluster.nodes[name].alive:
                self.deaths.append((name, job))
                self.cluster.kill(name)
                self._down.append((self.cluster.now + self.restart_s, name, ended))

        self.cluster.kernel_fault = fault  # type: ignore[assignment]

    def outcome(self, request: str) -> m.Reply:
        resolved = self.cluster.nodes["ann"].resolved
        for _ in range(6000):
            if request in resolved:
                reply = resolved[request][0].reply
                assert isinstance(reply, m.Reply)
                return reply
            self.step()
        raise AssertionError(self.cluster.tell(request))

    def step(self) -> None:
        self.cluster.pass_time(0.02)
        for entry in [d for d in self._down if d[0] <= self.cluster.now]:
            self._down.remove(entry)
            self.cluster.join(entry[1], ended=entry[2])

    def heal(self) -> None:
        while self._down:
            self.step()
        self.cluster.pass_time(1.0)


def crash(job: e.Compute) -> m.Ended:
    return m.Ended(cause="SIGSEGV", request=job.request, attempt=job.attempt, place=job.place)


def killed(job: e.Compute) -> m.Ended:
    return m.Ended(cause="SIGKILL", killed=True, request=job.request, attempt=job.attempt,
                   place=job.place)  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_a_request_that_ends_its_workers_fails_after_three_and_the_last_dies_alone(
    beside: bool,
) -> None:
    """Steps: it ends all that compute it, twice; then it runs alone on one, which is the proof."""
    deadly = Deadly(lambda n, job: crash(job) if job.request == "poison" else None, beside=beside)
    cluster = deadly.cluster
    cluster.deployed()
    poison = cluster.submit(image(7), request="poison")
    others = [cluster.submit(image(i), deadline_s=60.0) for i in range(5)]
    reply = deadly.outcome(poison)
    assert reply.failure is not None and reply.failure.error == "WorkerLost", reply
    assert "SIGSEGV" in reply.failure.message and reply.failure.hint
    last, job = deadly.deaths[-1]
    alone = [name for name, each in deadly.deaths if each.attempt == job.attempt]
    assert alone == [last] and 2 <= reply.attempts <= 4
    for i, other in enumerate(others):
        deadly.outcome(other)
        cluster.check(other, image(i))
    deadly.heal()
    cluster.check(cluster.submit(image(8)), image(8))
    cluster.check_idle()


def test_the_same_body_is_refused_at_once_for_ten_minutes_and_another_is_served() -> None:
    deadly = Deadly(lambda name, job: crash(job) if job.request.startswith("poison") else None)
    cluster = deadly.cluster
    cluster.deployed()
    body = {"body": "b" * 32}
    submit(cluster, "poison-1", **body)
    assert deadly.outcome("poison-1").failure is not None
    deadly.heal()
    before = len(deadly.deaths)
    submit(cluster, "poison-2", **body)
    failure = deadly.outcome("poison-2").failure
    assert failure is not None and failure.error == "WorkerLost" and len(deadly.deaths) == before
    assert failure.retry_after_s is not None and failure.retry_after_s > limits.POISON_S - 10
    submit(cluster, "good", body="c" * 32)
    assert deadly.outcome("good").failure is None
    cluster.pass_time(limits.POISON_S)
    submit(cluster, "poison-3", **body)
    deadly.outcome("poison-3")
    assert len(deadly.deaths) > before


def submit(cluster: Cluster, request: str, body: str) -> None:
    arrays = image()
    inputs = tuple(describe(n, a) for n, a in arrays.items())
    header = m.Submit(
        request=request, model="net", version=None, inputs=inputs, picture=False,
        deadline_s=60.0, body=body,
    )  # fmt: skip
    cluster._handle(cluster.nodes["ann"], e.Submitted(request, header, arrays))


def test_who_is_killed_from_outside_blames_no_request() -> None:
    deaths = iter(range(6))
    deadly = Deadly(lambda name, job: killed(job) if next(deaths, None) is not None else None)
    cluster = deadly.cluster
    cluster.deployed()
    request = cluster.submit(deadline_s=60.0)
    reply = deadly.outcome(request)
    cluster.check(request)
    assert reply.attempts > 1 and reply.degraded
    assert not any("one device" in reason for reason in reply.reasons)


def test_a_crash_while_another_request_is_computed_is_not_this_one_s_fault() -> None:
    """A device whose engine crashes on whatever it computes, among others that are well."""
    deadly = Deadly(lambda name, job: crash(job) if name == "pi-2" else None)
    cluster = deadly.cluster
    cluster.deployed()
    for i in range(12):
        request = cluster.submit(image(i), deadline_s=60.0)
        reply = deadly.outcome(request)
        cluster.check(request, image(i))
        assert reply.failure is None
        deadly.heal()
    assert len(deadly.deaths) <= limits.STRIKES + 1
    (info,) = (d for d in cluster.core.members.infos(cluster.now) if d.device == "pi-2")
    assert info.state == "quarantined"
    assert any("pi-2 is quarantined" in reason for reason in reply.reasons) and reply.degraded


def test_a_request_that_no_device_can_run_alone_fails_after_three_crashes_together() -> None:
    deadly = Deadly(lambda name, job: crash(job) if job.request == "poison" else None)
    cluster = deadly.cluster
    cluster.deployed()

    def too_large(effect: e.MakePlan) -> m.Failure | None:
        if not cluster.core.catalogue.deployments[effect.deployment].alone:
            return None
        return m.Failure(error="NotEnoughMemory", message="no device holds it")

    cluster.plan_fault = too_large
    reply = deadly.outcome(cluster.submit(request="poison"))
    assert reply.failure is not None and reply.failure.error == "WorkerLost"
    assert reply.attempts >= 2


def test_a_request_alone_that_is_answered_says_so() -> None:
    """It crashed two devices by bad luck; the third try, alone, is right."""
    left = iter(range(2))

    def twice(name: str, job: e.Compute) -> m.Ended | None:
        return crash(job) if job.request == "unlucky" and next(left, None) is not None else None

    deadly = Deadly(twice)
    deadly.restart_s, deadly.cluster.plan_s = 0.05, 0.3  # ends are known before it begins anew
    deadly.cluster.deployed()
    deadly.cluster.submit(request="unlucky", deadline_s=60.0)
    reply = deadly.outcome("unlucky")
    deadly.cluster.check("unlucky")
    assert len({task.device for task in reply.tasks}) == 1
    assert any("one device" in reason for reason in reply.reasons), reply.reasons


def test_nothing_else_begins_where_a_request_runs_that_may_end_its_process() -> None:
    """It ended one process; while it runs alone, tasks of others go to spare devices at once."""
    deadly = Deadly(lambda n, job: crash(job) if job.request == "poison" else None)
    cluster = deadly.cluster
    cluster.deployed()
    cluster.planner = lambda graph, names: whole(graph, names[:1], 1)
    cluster.deployed("evil")
    cluster.planner = None
    for i in range(4):
        cluster.check(cluster.submit(image(i)), image(i))
    cluster.pass_time(limits.SPARES_AFTER_S + 1.0)
    (others,) = (d for d in cluster.core.catalogue.deployments.values() if d.model.name == "net")
    cluster.submit(model="evil", request="poison", deadline_s=60.0)
    for _ in range(200):
        deadly.step()
        tries = [d for d in cluster.core.catalogue.deployments.values() if d.alone]
        if tries:
            break
    (made,) = tries
    cluster.settle(lambda: bool(made.programs))
    (at_risk,) = set(made.programs) - {"head"}
    cluster.settle(lambda: cluster.core.requests["poison"].deployment is made)
    using = cluster.core.catalogue.running(others.model, others.signature, cluster.now)
    assert using is not None and at_risk in using.programs
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert at_risk not in {task.device for task in reply.tasks}
    story = cluster.tell(reply.request).splitlines()
    sent = [line for line in story if "Deliver" in line and repr(reply.request) in line]
    assert sent and not [line for line in sent if at_risk in line], "nothing was sent there"
    assert deadly.outcome("poison").failure is not None
    deadly.heal()
    cluster.check_idle()


def test_an_answer_names_lost_devices_and_the_time_that_they_cost() -> None:
    cluster = Cluster(FOUR)
    cluster.deployed()
    calm = cluster.check(cluster.submit())
    assert (calm.degraded, calm.reasons, calm.lost, calm.added_s) == (False, (), (), 0.0)
    request = cluster.submit()
    cluster.settle(lambda: any(r.runs for r in cluster.core.requests.values()))
    cluster.kill("pi-2")
    reply = cluster.check(request)
    assert reply.degraded and reply.lost == ("pi-2",) and reply.attempts <= 2
    assert 0.0 < reply.added_s < reply.total_s and "pi-2 was lost" in reply.reasons[0]
    cluster.pass_time(2.0)  # until there is another plan it would run on the spare, and say so
    again = cluster.check(cluster.submit())
    assert not again.degraded


def test_a_poison_whose_plan_is_one_task_ends_three_however_late_their_causes_are_told() -> None:
    """Processes take long to start on a slow device: who may be the cause waits to hear."""
    deadly = Deadly(lambda name, job: crash(job) if job.request == "poison" else None)
    cluster, deadly.restart_s = deadly.cluster, 3.0
    cluster.planner = lambda graph, names: whole(graph, names[:1], 1)
    cluster.deployed()
    cluster.submit(image(7), request="poison")
    other = cluster.submit(image(1), deadline_s=60.0)
    failure = deadly.outcome("poison").failure
    assert failure is not None and failure.error == "WorkerLost" and len(deadly.deaths) == 3
    deadly.outcome(other)
    cluster.check(other, image(1))


def test_a_request_that_lost_three_devices_to_others_goes_on_as_soon_as_that_is_told() -> None:
    left = iter(range(3))
    deadly = Deadly(lambda name, job: killed(job) if next(left, None) is not None else None)
    deadly.restart_s = 2.0
    deadly.cluster.planner = lambda graph, names: whole(graph, names[:1], 1)
    deadly.cluster.deployed()
    request = deadly.cluster.submit(deadline_s=60.0)
    reply = deadly.outcome(request)
    deadly.cluster.check(request)
    assert len(reply.lost) == 3 and reply.total_s < limits.EVIDENCE_S


def on_one_device(*, used: bool = False) -> tuple[Cluster, list[tuple[str, e.Compute]]]:
    """A plan of one task, and what devices begin to compute from now on. ``used``: it has spares,
    and is known to take its usual time."""
    cluster = Cluster(FOUR)
    begun: list[tuple[str, e.Compute]] = []
    cluster.kernel_fault = lambda node, job: begun.append((node.name, job))  # type: ignore[func-returns-value]
    cluster.planner = lambda graph, names: whole(graph, names[:1], 1)
    cluster.deployed()
    if used:
        cluster.pass_time(2.0)
        for i in range(limits.PACE_SAMPLES):
            cluster.check(cluster.submit(image(i)), image(i))
        begun.clear()
    return cluster, begun


def test_who_computed_for_long_on_a_device_that_is_lost_waits_to_hear_why_at_once() -> None:
    """1. a kernel fills the memory, which takes a while; 2. its process dies; 3. others go on; 4.
    the next process says of what it died: only then the request is computed elsewhere."""
    cluster, begun = on_one_device()
    cluster.slowness = dict.fromkeys(FOUR, 240.0)
    poison = cluster.submit(image(7), deadline_s=60.0)
    cluster.pass_time(1.0)
    ((device, job),) = begun
    cluster.slowness.clear()
    other = cluster.submit(image(1), deadline_s=60.0)
    cluster.kill(device)
    cluster.check(other, image(1))
    cluster.pass_time(2.0)
    assert [each.request for _, each in begun] == [poison, other]
    cluster.join(device, ended=crash(job))
    reply = cluster.check(poison, image(7))
    assert begun[-1][1].request == poison and reply.degraded
    cluster.check_idle()


def test_what_a_device_computed_for_long_before_it_fell_silent_goes_to_no_other() -> None:
    """A kernel that takes all the memory makes its device as slow as if it were frozen. 1. what
    waits behind it goes to the spare; 2. it does not, or that one would be lost as well."""
    cluster, begun = on_one_device(used=True)
    cluster.slowness = dict.fromkeys(FOUR, 600.0)
    poison = cluster.submit(image(7), deadline_s=60.0)
    cluster.pass_time(0.8)
    ((device, _),) = begun
    cluster.slowness.clear()
    cluster.nodes[device].frozen_until = cluster.now + 1.0
    other = cluster.submit(image(1), deadline_s=60.0)
    cluster.check(other, image(1))
    assert [(each.request, name == device) for name, each in begun] == [
        (poison, True),
        (other, False),
    ]
    cluster.check(poison, image(7))
    assert len(begun) == 2


def test_what_waits_behind_a_task_that_takes_far_too_long_goes_to_the_spare() -> None:
    """The device answers all the while, and only says what it computes."""
    cluster, begun = on_one_device(used=True)
    cluster.slowness = dict.fromkeys(FOUR, 800.0)
    long_ = cluster.submit(image(7), deadline_s=60.0)
    cluster.pass_time(0.1)
    cluster.slowness.clear()
    start = cluster.now
    other = cluster.submit(image(1), deadline_s=60.0)
    cluster.check(other, image(1))
    assert cluster.now - start < 2 * limits.HEARTBEAT_S
    cluster.check(long_, image(7))
    assert [each.request for _, each in begun] == [long_, other]
    assert begun[0][0] != begun[1][0]
