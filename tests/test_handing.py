"""Who gets which blob: a device those of its tasks and of those it stands by for, and nobody else
any, neither from the coordinator nor from another member.
"""

from __future__ import annotations

import pytest
from cores import Cluster, image, kind
from shared import graph
from test_fallback import NAMES, pipeline, ready

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.simulator.node import Node

UNKNOWN = "0" * 64


def asked(cluster: Cluster, peer: str, digest: str) -> list[e.Effect]:
    want = m.Want(digest=digest, offset=0, length=10)
    effects = cluster.core.handle(e.Arrived(peer, want), cluster.now)
    return [x for x in effects if not isinstance(x, e.Send) or isinstance(x.message, m.Gone)]


def blobs(programs: tuple[m.Program, ...]) -> set[str]:
    return {d for p in programs if p.model for d in (p.model, *p.weights)}


def test_a_device_gets_what_it_was_told_to_load_and_nothing_else() -> None:
    names = (*NAMES, "pi-4", "pi-5", "pi-6")
    cluster = ready(names, plan=pipeline(graph()))
    (made,) = cluster.core.catalogue.deployments.values()
    every = {d for programs in made.programs.values() for d in blobs(programs)}
    before = {d.name: d.blobs for d in cluster.core.members.devices.values()}
    for name in names:
        its = blobs((*made.programs.get(name, ()), *made.spare_programs(name)))
        assert set() < its < every
        for digest in every | {UNKNOWN}:
            effects = asked(cluster, made.members[name], digest)
            if digest in its:
                served = e.ServeBlob(made.members[name], digest, 0, 10, made.model.name)
                assert served in effects
            else:
                assert not any(isinstance(x, e.ServeBlob) for x in effects)
                gone = e.Send(e.Plane.BULK, made.members[name], m.Gone(digest=digest))
                assert gone in effects
        handed = cluster.core.members.devices[name].blobs - before[name]
        assert handed == len(its) and before[name] >= len(its)
    for peer in (cluster.nodes["ann"].id, cluster.nodes["head"].id, "stranger#1", "pi-1#other"):
        for digest in every:
            assert not any(isinstance(x, e.ServeBlob) for x in asked(cluster, peer, digest))


def test_once_a_deployment_is_retired_its_blobs_are_not_handed_out() -> None:
    cluster = ready(plan=pipeline(graph()))
    (made,) = cluster.core.catalogue.deployments.values()
    (digest, *_) = sorted(blobs(made.programs["pi-1"]))
    assert any(isinstance(x, e.ServeBlob) for x in asked(cluster, made.members["pi-1"], digest))
    cluster.core._deploying.retire(made)
    assert not any(isinstance(x, e.ServeBlob) for x in asked(cluster, made.members["pi-1"], digest))


def test_members_serve_nobody_but_the_coordinator() -> None:
    """A device has only what it computes with, and a client what it deploys, the whole model."""
    cluster = ready(plan=pipeline(graph()))
    want = m.Want(digest=UNKNOWN, offset=0, length=10)
    coordinator = cluster.core._bulk.id
    for name, other, serves in (
        ("pi-1", "pi-2", False),
        ("pi-1", "", False),
        ("ann", "pi-2", False),
        ("ann", "", True),
    ):
        peer = cluster.nodes[other].id if other else coordinator
        effects = cluster.nodes[name].core.handle(e.Arrived(peer, want), cluster.now)
        assert any(isinstance(x, e.ServeBlob) for x in effects) is serves, (name, other)


def test_that_a_blob_is_not_handed_out_is_believed_once_it_is_said_again() -> None:
    """Seed 1865: word of what was asked for another deployment comes as the next one fetches."""
    cluster = Cluster(("pi-1",))
    device, told = cluster.nodes["pi-1"], set[str]()

    def stale(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        if isinstance(message, m.Want) and sender is device and message.digest not in told:
            told.add(message.digest)
            gone = m.Gone(digest=message.digest)
            cluster.inject(device, cluster.coordinator.id, gone)
        return False

    cluster.when(stale, lambda: None)
    cluster.deployed()
    assert told
    cluster.check(cluster.submit(image(1)), image(1))


def test_a_blob_that_is_lost_fails_the_deployment_and_says_so() -> None:
    cluster = Cluster(("pi-1",))
    cluster.when(kind(m.Install, to="pi-1"), cluster.coordinator.blobs.clear)
    failure = cluster.answer(cluster.deploy()).answer.failure
    assert failure is not None and "has lost it" in failure.message


@pytest.mark.parametrize(("times", "answered"), [(1, True), (limits.INSTALL_ATTEMPTS, False)])
def test_a_blob_that_does_not_come_is_fetched_anew_where_nobody_else_can(
    times: int, answered: bool
) -> None:
    """Its bulk link carries nothing for so long that it gives the blob up."""
    cluster = Cluster(("pi-1",))

    def withheld(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        failed = [n for n in cluster.coordinator.notes if "could not prepare" in n.text]
        return kind(m.Chunk, to="pi-1")(sender, receiver, message) and len(failed) < times

    for _ in range(200):
        cluster.drop(withheld)
    failure = cluster.answer(cluster.deploy(timeout_s=600.0)).answer.failure
    assert (failure is None) == answered
    if failure is None:
        cluster.check(cluster.submit(image(1)), image(1))
    else:
        assert failure.error == "ClusterUnavailable" and "does not send it" in failure.message


def test_a_deploy_that_takes_too_long_says_so_and_not_that_nobody_answers() -> None:
    cluster = Cluster(("pi-1",))
    for _ in range(10):
        cluster.drop(kind(m.Chunk, to="pi-1"))
    late = cluster.answer(cluster.deploy(timeout_s=5.0)).failure
    assert late is not None and late.error == "DeadlineExceeded" and "5 s" in late.message
