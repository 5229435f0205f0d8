"""The loss of a device is made good by another that has prepared its tasks: no plan is awaited, no
weights are sent, nothing is compiled, and only what somebody awaits is computed again.
"""

from __future__ import annotations

from collections import Counter

import pytest
from architectures import squeezenet1_1
from cores import COMPUTE_S, Cluster, Node, image, kind
from msgspec import structs
from oracle import assert_exact
from processes import eventually
from processes import image as picture
from shared import HEAD, bands, graph
from test_covering import lose

import meshinfer as mi
from meshinfer import limits
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.puller import Puller

NAMES = ("pi-1", "pi-2", "pi-3")
SOON_S = limits.REPLAN_SETTLE_S / 2
"""After a loss: before another plan is even looked for."""


class Watched(Cluster):
    """Counts what recovery must not do: blobs that travel, and sessions that are prepared."""

    def __init__(self, *args: object, **fields: object) -> None:
        self.prepares: Counter[str] = Counter()
        super().__init__(*args, **fields)  # type: ignore[arg-type]

    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared:
        self.prepares[node.name] += 1
        return super()._prepare(node, effect)


def pipeline(g: Graph, names: tuple[str, ...] = NAMES) -> Plan:
    """A stage a device, each whole: what one has handed on is owed no more."""
    cuts = [*g.cut_points[: len(names) - 1], len(g.ops)]
    starts = [0, *cuts[:-1]]
    stages = []
    for start, stop, name in zip(starts, cuts, names, strict=True):
        shards = tuple(Shard(v, g.whole(v)) for v in g.live_outputs(start, stop))
        stages.append(Stage(start, stop, (Task((DeviceId(name),), shards),)))
    return Plan(g.digest, HEAD, HEAD, tuple(stages))


def ready(names: tuple[str, ...] = NAMES, plan: Plan | None = None, **fields: object) -> Watched:
    """A deployment whose fallbacks are prepared."""
    cluster = Watched(names, **fields)
    cluster.deployed(plan=None if plan is None else str(plan))
    settled(cluster)
    return cluster


def settled(cluster: Cluster) -> None:
    cluster.pass_time(limits.SPARES_AFTER_S + 0.3)
    [made] = cluster.core.catalogue.deployments.values()
    assert made.spares.ready == set(made.spares.peers) != set()


def computing(cluster: Cluster) -> Counter[m.Place]:
    """Counts how often each task begins from now on."""
    begun: Counter[m.Place] = Counter()

    def note(node: Node, job: e.Compute) -> None:
        begun[job.place] += 1

    cluster.kernel_fault = note
    return begun


MOMENTS = {
    "before it has its input": kind(m.Deliver, to="pi-2"),
    "as it sends its first piece": kind(m.Deliver, by="pi-2"),
    "as it hands over its part of the answer": kind(m.Deliver, by="pi-2", to="head"),
    "as another sends a piece": kind(m.Deliver, by="pi-1"),
    "as another tells of its tasks": kind(m.TasksDone, by="pi-3"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_loss_amid_a_request_sends_no_weights_and_prepares_nothing(
    moment: str, beside: bool
) -> None:
    cluster = ready(beside=beside)
    cluster.check(cluster.submit())
    times: list[float] = []

    def strike() -> None:
        cluster.prepares.clear()
        cluster.sent.clear()
        times.append(cluster.now)
        lose(cluster, "pi-2")

    matches = MOMENTS[moment]
    if beside and "answer" in moment:
        matches = kind(m.Deliver, by="pi-2", to="ann")
    cluster.when(matches, strike)
    asked = cluster.submit(image(1))
    reply = cluster.check(asked, image(1))
    assert times and cluster.now - times[0] < SOON_S
    assert reply.attempts == 1
    assert not cluster.prepares and not cluster.sent["Chunk"] and not cluster.sent["Install"]
    cluster.pass_time(2.0)  # another plan has been made meanwhile
    last = cluster.check(cluster.submit(image(2)), image(2))
    assert last.attempts == 1 and not last.degraded and "pi-2" not in last.plan
    cluster.check_idle()


@pytest.mark.parametrize("moment", MOMENTS)
def test_two_losses_before_there_is_another_plan_are_borne_too(moment: str) -> None:
    """Of a model that is small beside the devices' memory, each task has two spare devices."""
    cluster = ready()
    cluster.plan_s = 30.0
    begun = computing(cluster)

    def strike() -> None:
        lose(cluster, "pi-2")
        cluster.when(kind(m.Lacks), lambda: lose(cluster, "pi-1"))

    cluster.when(MOMENTS[moment], strike)
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.attempts == 1 and set(reply.lost) == {"pi-1", "pi-2"}
    assert sum(begun.values()) <= 3 * len(begun)
    after = cluster.check(cluster.submit(image(2)), image(2))
    assert after.attempts == 1 and {t.device for t in after.tasks} == {"pi-3"}


def test_a_newer_plan_is_not_used_before_it_bears_a_loss_as_the_older_does() -> None:
    cluster = ready()
    cluster.kill("pi-2")
    cluster.settle(lambda: len(cluster.core.catalogue.deployments) == 2)
    *_, newer = cluster.core.catalogue.deployments.values()
    cluster.settle(lambda: newer.ready_at > 0.0)
    assert not newer.spares.prepared
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.degraded, "by the older one, whose tasks others have taken over"
    cluster.settle(lambda: newer.spares.prepared)
    assert not cluster.check(cluster.submit(image(2)), image(2)).degraded
    assert list(cluster.core.catalogue.deployments.values()) == [newer]


def test_a_newer_plan_whose_spares_have_no_room_beside_the_older_is_used_at_once() -> None:
    cluster = ready()
    [older] = cluster.core.catalogue.deployments.values()
    for name in ("pi-1", "pi-3"):
        device = cluster.core.members.devices[name]
        room = int(1.5 * sum(older.held(name)))  # for one plan and its spare tasks, not for two
        facts = structs.replace(device.hello.facts, memory_bytes=room)
        device.hello = structs.replace(device.hello, facts=facts)
    cluster.kill("pi-2")
    cluster.settle(lambda: len(cluster.core.catalogue.deployments) == 2)
    *_, newer = cluster.core.catalogue.deployments.values()
    cluster.settle(lambda: newer.ready_at > 0.0)
    assert not newer.spares.prepared
    assert not cluster.check(cluster.submit(image(1)), image(1)).degraded
    cluster.settle(lambda: newer.spares.prepared and bool(newer.spares.peers))


def test_requests_after_a_loss_run_on_the_fallback_until_there_is_another_plan() -> None:
    cluster = ready()
    cluster.plan_s = 3.0
    cluster.kill("pi-2")
    cluster.pass_time(0.1)
    for i in range(4):
        reply = cluster.check(cluster.submit(image(i)), image(i))
        assert reply.degraded and reply.attempts == 1 and not reply.lost
        assert "lost" in reply.reasons[0]
        assert "pi-2" not in reply.plan and Plan.parse(reply.plan).devices()
        assert {t.device for t in reply.tasks} == {"pi-1", "pi-3"}
        assert {(t.place, t.device) for t in reply.tasks} == {
            ((s, t), device)
            for s, stage in enumerate(Plan.parse(reply.plan).stages)
            for t, task in enumerate(stage.tasks)
            for device in task.devices
        }
    cluster.pass_time(4.0)
    assert not cluster.check(cluster.submit()).degraded
    cluster.check_idle()


def test_what_a_lost_device_had_handed_on_is_not_computed_again() -> None:
    """A device that is done with its part of a request owes nothing, whoever computes now."""
    cluster = ready(plan=pipeline(graph()))
    begun = computing(cluster)
    asked = cluster.submit(image(1))
    cluster.when(kind(m.Deliver, by="pi-2", to="pi-3"), lambda: lose(cluster, "pi-1"))
    reply = cluster.check(asked, image(1))
    assert not cluster.nodes["pi-1"].alive and reply.attempts == 1
    assert begun == {(0, 0): 1, (1, 0): 1, (2, 0): 1}
    assert reply.lost == ("pi-1",) and "task pi-1" in reply.plan, "it had done its part"
    cluster.check_idle()


def test_a_device_lost_amid_its_task_makes_one_task_be_computed_twice() -> None:
    cluster = ready(plan=pipeline(graph()))
    begun = computing(cluster)
    asked = cluster.submit(image(1))
    cluster.when(kind(m.Deliver, to="pi-2"), lambda: lose_later(cluster, "pi-2", COMPUTE_S / 2))
    reply = cluster.check(asked, image(1))
    assert begun == {(0, 0): 1, (1, 0): 2, (2, 0): 1}
    assert reply.degraded and reply.attempts == 1
    cluster.check_idle()


def lose_later(cluster: Cluster, name: str, seconds: float) -> None:
    """It dies a while after the next message to reach it."""
    node = cluster.nodes[name]
    done = cluster.kernel_fault

    def then(at: Node, job: e.Compute) -> str | None:
        if at is node and node.alive:
            lose(cluster, name)
        return done(at, job)

    cluster.kernel_fault = then


def test_pieces_that_a_lost_device_never_acknowledges_are_held_against_nobody() -> None:
    """Its client, source and sink itself, stays so, and its attempt goes on."""
    cluster = ready(beside=True)
    cluster.slowness = dict.fromkeys(NAMES, 100.0)
    cluster.when(kind(m.Deliver, by="ann", to="pi-2"), lambda: cluster.kill("pi-2"))
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.total_s > 2 * limits.RESEND_AFTER_LOSS_S and reply.attempts == 1
    assert not cluster.sent["Feed"] and not cluster.sent["Who"]
    cluster.check_idle()


def test_with_bands_only_the_lost_device_s_tasks_are_computed_again() -> None:
    cluster = ready()
    begun = computing(cluster)
    cluster.when(kind(m.Deliver, by="pi-2", to="pi-3"), lambda: lose(cluster, "pi-2"))
    cluster.check(cluster.submit(image(1)), image(1))
    [made] = cluster.core.catalogue.deployments.values()
    again = {place for place, count in begun.items() if count > 1}
    assert again <= set(made.spares.moved) and max(begun.values()) <= 2


def test_a_second_loss_while_all_are_asked_about_the_first_is_survived() -> None:
    names = ("pi-1", "pi-2", "pi-3", "pi-4")
    cluster = ready(names)
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: lose(cluster, "pi-2"))
    cluster.when(kind(m.Lacks), lambda: lose(cluster, "pi-3"))
    for i in range(3):
        cluster.check(cluster.submit(image(i)), image(i))
    assert [n for n in names if not cluster.nodes[n].alive] == ["pi-2", "pi-3"]
    cluster.check_idle()


def test_a_loss_before_the_fallbacks_are_prepared_takes_a_new_plan() -> None:
    cluster = Watched(NAMES)
    cluster.deployed()
    cluster.kill("pi-2")
    reply = cluster.check(cluster.submit())
    assert not reply.degraded and "pi-2" not in reply.plan
    cluster.check_idle()


def test_what_a_device_cannot_prepare_for_others_costs_it_nothing_else() -> None:
    cluster = Watched(NAMES)
    prepare = cluster._prepare

    def fails(node: Node, effect: e.Prepare) -> e.Prepared:
        if cluster.prepares[node.name]:
            failure = m.Failure(error="ConfigurationError", message="no memory for more")
            return e.Prepared(effect.deployment, failure)
        return prepare(node, effect)

    cluster._prepare = fails  # type: ignore[method-assign]
    cluster.deployed()
    cluster.pass_time(1.0)
    [made] = cluster.core.catalogue.deployments.values()
    assert not made.spares.ready and not made.spares.peers
    reply = cluster.check(cluster.submit())
    assert {t.device for t in reply.tasks} == set(NAMES)
    states = {d.name: d.state(cluster.now) for d in cluster.core.members.devices.values()}
    assert set(states.values()) == {"ready"}
    cluster._prepare = prepare  # type: ignore[method-assign]
    cluster.kill("pi-2")
    cluster.check(cluster.submit(image(2)), image(2))
    cluster.check_idle()


def test_what_was_not_kept_costs_an_attempt_and_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "KEPT_BYTES", 0)
    cluster = ready()
    cluster.prepares.clear()
    cluster.when(kind(m.Deliver, by="pi-2", to="head"), lambda: lose(cluster, "pi-2"))
    asked = cluster.submit(image(1))
    reply = cluster.check(asked, image(1))
    assert cluster.sent["NotKept"] >= 1 and reply.attempts == 2 and not cluster.prepares
    cluster.check_idle()


def test_a_device_that_comes_back_at_once_is_used_again() -> None:
    cluster = ready()
    cluster.kill("pi-2")
    cluster.join("pi-2")
    cluster.pass_time(2.0)
    reply = cluster.check(cluster.submit())
    assert {t.device for t in reply.tasks} == set(NAMES) and not reply.degraded
    cluster.check_idle()


def test_an_idle_device_stands_by_for_the_only_one_that_computes() -> None:
    cluster = ready(("pi-1", "pi-2"), plan=pipeline(graph(), ("pi-1",)))
    begun = computing(cluster)
    cluster.check(cluster.submit())
    assert cluster.sent["Release"] == 2, "the idle one hears of no request"
    cluster.when(kind(m.Deliver, to="pi-1"), lambda: lose(cluster, "pi-1"))
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.attempts == 1 and {t.device for t in reply.tasks} == {"pi-2"}
    assert begun == {(0, 0): 2}
    cluster.check_idle()


def test_the_loss_of_one_that_only_stands_by_is_no_loss() -> None:
    cluster = ready(("pi-1", "pi-2"), plan=pipeline(graph(), ("pi-1",)))
    cluster.when(kind(m.Deliver, to="pi-1"), lambda: lose(cluster, "pi-2"))
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.attempts == 1 and not reply.degraded and not cluster.sent["Assign"]
    cluster.check_idle()


def test_a_device_that_cannot_be_reached_forgets_what_goes_on_without_it() -> None:
    cluster = ready()
    [made] = cluster.core.catalogue.deployments.values()
    asked = cluster.submit(image(1))
    cluster.pass_time(0.004)
    [request] = cluster.core.requests.values()
    word = m.Unreachable(request=asked, attempt=request.attempt, peer=cluster.nodes["pi-2"].id)
    cluster.inject(cluster.coordinator, cluster.nodes["head"].id, word)
    cluster.check(asked, image(1))
    assert made.number not in cluster.nodes["pi-2"].core._installing.deployments  # type: ignore[union-attr]
    cluster.check_idle()


def test_tasks_that_any_device_may_take_have_no_spare_device() -> None:
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(bands(graph(), NAMES, count=4)))
    cluster.pass_time(1.0)
    [made] = cluster.core.catalogue.deployments.values()
    assert made.choices and not made.spares.peers
    cluster.check_idle()


# --- what nobody waits for ------------------------------------------------------------------------


def test_what_is_prepared_for_others_is_fetched_a_tenth_of_the_time_while_requests_run() -> None:
    puller, gentle, wanted = Puller(), "a" * 64, "b" * 64
    [ask] = puller.want(gentle, "head", 0.0, gentle=True)
    assert isinstance(ask, e.Send)

    def arrive(digest: str, offset: int, now: float, *, busy: bool) -> list[e.Effect]:
        chunk = m.Chunk(digest=digest, offset=offset, total=100)
        return puller.arrived("head", chunk, memoryview(bytes(10)), now, busy=busy)

    assert len(arrive(gentle, 0, 0.1, busy=True)) == 1, "it is written, and nothing is asked"
    assert puller.next_deadline() == pytest.approx(0.1 + limits.GENTLE_PAUSE_TIMES * 0.1)
    assert puller.due(0.5) == ([], [])
    assert len(puller.want(wanted, "head", 0.5)) == 1, "what somebody waits for does not wait"
    assert len(arrive(wanted, 0, 0.6, busy=True)) == 2
    [again], _ = puller.due(1.1)
    assert isinstance(again, e.Send) and again.message == m.Want(
        digest=gentle, offset=10, length=limits.BLOB_WANT_BYTES
    )
    assert len(arrive(gentle, 10, 1.2, busy=False)) == 2, "when nothing runs it goes on at once"


def test_what_somebody_waits_for_as_well_is_not_gentle_any_more() -> None:
    puller, digest = Puller(), "a" * 64
    puller.want(digest, "head", 0.0, gentle=True)
    puller.want(digest, "head", 0.0)
    chunk = m.Chunk(digest=digest, offset=0, total=100)
    assert len(puller.arrived("head", chunk, memoryview(bytes(10)), 1.0, busy=True)) == 2


# --- processes ------------------------------------------------------------------------------------


def test_a_worker_killed_amid_a_request_costs_no_second_attempt(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Kills until one met a task that its device still owed; no attempt is ever made anew."""
    model, x, log = squeezenet1_1(96), picture(96), ""

    def prepared() -> bool:
        nonlocal log
        log += capfd.readouterr().err
        return "fallbacks ready" in log

    moved = False
    with (
        mi.LocalCluster(4, speeds=[0.1] * 4, log_level="info") as cluster,
        cluster.client() as client,
    ):
        for kill in range(4):
            client.deploy(f"net-{kill}", model, spread=True)
            assert eventually(prepared, 30.0)
            client.infer(f"net-{kill}", x)
            future = client.submit(f"net-{kill}", x)
            killed = cluster.kill(1)
            result = future.result(60.0)
            assert_exact(model, x, result.outputs)
            assert result.attempts == 1
            if killed not in result.plan:
                moved = True
                break
            cluster.add(0.1)
            log = ""
    assert moved
