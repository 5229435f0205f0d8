"""Bugs that the simulator found, each once more as the smallest case that shows it; seeds of the
others are in ``simulator_seeds.txt``.
"""

from __future__ import annotations

import pytest
from cores import Cluster, conv_net, image, kind
from shared import graph
from test_covering import lose
from test_fallback import NAMES, Watched, pipeline, ready
from test_silence import USUAL, freeze

from meshinfer import limits
from meshinfer.protocol import messages as m


def test_who_has_left_does_not_stand_by_for_having_prepared_late() -> None:
    """Seed 1518: it joins again, and word of what it prepared before comes after its hello."""
    cluster = Watched(NAMES)
    cluster.deployed(plan=str(pipeline(graph(), ("pi-1",))))
    [made] = cluster.core.catalogue.deployments.values()
    cluster.settle(lambda: bool(made.spares.told))
    assert "pi-2" in made.spares.told
    cluster.cut("pi-2")
    cluster.settle(lambda: "pi-2" not in made.members)
    late = m.Installed(deployment=made.number)
    cluster.settle(lambda: cluster.joined(cluster.nodes["pi-2"]))
    cluster.inject(cluster.coordinator, cluster.nodes["pi-2"].id, late)
    cluster.pass_time(0.1)
    assert made.spares.ready == set(made.spares.peers) == {"pi-3"}
    cluster.kill("pi-1")
    cluster.check(cluster.submit(image(1)), image(1))
    cluster.check_idle()


def test_a_request_for_a_version_that_is_kept_no_more_is_planned_anew() -> None:
    """Seed 805: its device is lost after so many newer versions that its own is forgotten."""
    cluster = Cluster(("pi-1", "pi-2"))
    cluster.deployed()
    cluster.slowness = dict.fromkeys(("pi-1", "pi-2"), 1e4)
    asked = cluster.submit(image(1))
    for seed in range(limits.VERSIONS_PER_MODEL):
        cluster.deployed(model=conv_net(seed=seed + 1))
    for name in ("pi-1", "pi-2"):
        cluster.kill(name)
    cluster.slowness.clear()
    cluster.pass_time(0.1)
    cluster.join("pi-1")
    cluster.check(asked, image(1))
    cluster.check_idle()


def test_what_the_head_was_fed_before_a_client_stood_in_for_it_is_released() -> None:
    """Seed 351: the device on its host joins later than the client, and then it says hello again
    before its request has begun: an orphan for 10 minutes."""
    cluster = Cluster(("pi-1",))
    cluster.connect("bob", where="pi-2 h")
    cluster.deployed()
    cluster.kill("pi-1")
    cluster.pass_time(0.1)
    asked = cluster.submit(image(1), client="bob")
    head = cluster.nodes["head"].core
    cluster.settle(lambda: asked in head._computing._requests)  # type: ignore[union-attr]
    cluster.join("pi-2")
    cluster.settle(lambda: cluster.joined(cluster.nodes["pi-2"]))
    cluster.cut("bob")
    cluster.check(asked, image(1), client="bob")
    cluster.pass_time(1.0)
    assert asked not in head._computing._requests  # type: ignore[union-attr]
    cluster.check_idle()


def test_who_was_silent_as_all_were_asked_is_asked_when_it_is_heard_again() -> None:
    """Seed 793: of two devices one is lost, and the other, which alone awaits what was lost, is
    silent for a moment."""
    cluster = ready(("pi-1", "pi-2"), plan=pipeline(graph(), ("pi-1", "pi-2", "pi-1")))
    for i in range(USUAL):
        cluster.check(cluster.submit(image(i)), image(i))

    def strike() -> None:
        lose(cluster, "pi-2")
        freeze(cluster, "pi-1", 0.6)

    cluster.when(kind(m.Deliver, by="pi-1", to="pi-2"), strike)
    since = cluster.now
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert cluster.now - since < 1.5 and reply.lost == ("pi-2",)
    cluster.check_idle()


@pytest.mark.parametrize("lost", [m.Answer, m.Reply])
def test_an_answer_and_what_is_said_of_it_are_of_one_version(
    lost: type[m.Answer] | type[m.Reply],
) -> None:
    """Seed 1022: one half of an outcome is lost with the coordinator; asked again, another version
    answers, and the first half that comes of that must not be put to the one that was there."""
    cluster, times = Cluster(), {m.Answer: 2, m.Reply: 1}
    late = m.Reply if lost is m.Answer else m.Answer
    cluster.deployed()
    for _ in range(times[lost]):
        cluster.drop(kind(lost))
    asked = cluster.submit()
    cluster.settle(lambda: not cluster.core.requests and cluster.sent[lost.__name__] > 0)
    cluster.deployed(model=conv_net(seed=1))
    for _ in range(times[late]):
        cluster.delay(kind(late), 1.0)
    cluster.restart_coordinator()
    assert cluster.check(asked, model=conv_net(seed=1)).version == 2
    cluster.pass_time(limits.ACK_TIMEOUT_S)  # what was lost comes again
    cluster.check_idle()
