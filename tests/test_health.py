"""Devices that die: what counts against them, how long they get no work, and what is shown."""

from __future__ import annotations

import pytest
from cores import Cluster
from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.health import Health

CRASH = m.Ended(cause="SIGSEGV", request="somebody's", attempt=1, place=(0, 0))
KILLED = m.Ended(cause="SIGKILL", killed=True, request="somebody's", attempt=1, place=(0, 0))
IDLE_EXIT = m.Ended(cause="exit code 69")


def states(cluster: Cluster) -> dict[str, str]:
    return {info.device: info.state for info in cluster.core.members.infos(cluster.now, lost=True)}


def die(cluster: Cluster, name: str, ended: m.Ended | None, *, after_s: float) -> None:
    """Its process ends so long after it joined, and is started again."""
    cluster.pass_time(after_s)
    cluster.kill(name)
    cluster.pass_time(0.1)
    cluster.join(name, ended=ended)
    cluster.pass_time(0.1)


def four() -> Cluster:
    return Cluster(("pi-1", "pi-2", "pi-3", "pi-4"))


@pytest.mark.parametrize(
    ("ended", "after_s"), [(CRASH, 8.0), (IDLE_EXIT, 1.0), (KILLED, 1.0), (None, 1.0)]
)
def test_three_crashes_in_compute_or_early_deaths_quarantine_a_device(
    ended: m.Ended | None, after_s: float
) -> None:
    cluster = four()
    for _ in range(2):
        die(cluster, "pi-2", ended, after_s=after_s)
    assert states(cluster)["pi-2"] == "ready"
    die(cluster, "pi-2", ended, after_s=after_s)
    assert states(cluster)["pi-2"] == "quarantined"
    cluster.deployed()
    reply = cluster.check(cluster.submit())
    assert "pi-2" not in {t.device for t in reply.tasks}
    cluster.pass_time(limits.QUARANTINE_S)
    assert states(cluster)["pi-2"] == "ready"
    cluster.pass_time(1.0)
    assert "pi-2" in {t.device for t in cluster.check(cluster.submit()).tasks}


@pytest.mark.parametrize(("ended", "after_s"), [(KILLED, 8.0), (IDLE_EXIT, 8.0), (None, 8.0)])
def test_being_killed_late_or_ending_idle_is_no_fault(
    ended: m.Ended | None, after_s: float
) -> None:
    cluster = four()
    for _ in range(6):
        die(cluster, "pi-2", ended, after_s=after_s)
    assert states(cluster)["pi-2"] == "ready"


def test_who_has_answered_and_is_killed_early_again_and_again_rests_for_a_moment() -> None:
    cluster = four()
    cluster.deployed()
    assert "pi-2" in {t.device for t in cluster.check(cluster.submit()).tasks}
    tasks_after_the_third = 0
    for death in range(8):
        cluster.kill("pi-2")
        cluster.pass_time(0.1)
        cluster.join("pi-2", ended=KILLED)
        for _ in range(5):  # for a second of its life
            cluster.pass_time(0.2)
            reply = cluster.check(cluster.submit())
            tasks_after_the_third += death >= 3 and "pi-2" in {t.device for t in reply.tasks}
    assert tasks_after_the_third == 0
    assert states(cluster)["pi-2"] == "quarantined"
    cluster.pass_time(5.0)
    assert states(cluster)["pi-2"] == "ready"
    assert "pi-2" in {t.device for t in cluster.check(cluster.submit()).tasks}


def test_each_quarantine_is_twice_as_long_until_the_device_was_well_for_long() -> None:
    cluster = four()
    for _ in range(3):
        die(cluster, "pi-2", CRASH, after_s=1.0)
    for factor in (2, 4):
        die(cluster, "pi-2", CRASH, after_s=1.0)
        (info,) = (i for i in cluster.core.members.infos(cluster.now) if i.device == "pi-2")
        assert limits.QUARANTINE_S * factor - 1 < info.returns_s <= limits.QUARANTINE_S * factor
        assert "SIGSEGV" in info.cause
    cluster.pass_time(info.returns_s + limits.QUARANTINE_FORGOTTEN_S / 2)
    assert states(cluster)["pi-2"] == "ready"
    cluster.pass_time(limits.QUARANTINE_FORGOTTEN_S)
    for _ in range(3):
        die(cluster, "pi-2", CRASH, after_s=1.0)
    (info,) = (i for i in cluster.core.members.infos(cluster.now) if i.device == "pi-2")
    assert limits.QUARANTINE_S - 1 < info.returns_s <= limits.QUARANTINE_S


def test_the_last_two_devices_are_never_quarantined() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    for _ in range(3):
        for name in ("pi-1", "pi-2", "pi-3"):
            die(cluster, name, CRASH, after_s=0.5)
    assert sorted(states(cluster).values()) == ["quarantined", "ready", "ready", "ready"]
    held = next(name for name, state in states(cluster).items() if state == "quarantined")
    other = next(n for n, s in states(cluster).items() if s == "ready" and n != "head")
    cluster.kill(other)
    cluster.pass_time(0.1)
    assert states(cluster) == {**states(cluster), held: "ready", other: "dead"}
    cluster.deployed()
    cluster.check(cluster.submit())


def test_a_connection_that_breaks_and_comes_back_is_no_death() -> None:
    cluster = four()
    for _ in range(4):
        cluster.cut("pi-2")
        cluster.pass_time(1.5)
    assert states(cluster)["pi-2"] == "ready"


def test_a_dead_device_is_shown_with_its_cause_when_asked_for_until_it_is_long_gone() -> None:
    cluster = four()
    cluster.kill("pi-2", silent=True)
    cluster.pass_time(3.0)
    answer = cluster.ask(m.ListDevices).answer
    assert isinstance(answer, m.Devices) and len(answer.devices) == 4
    (info,) = (i for i in cluster.core.members.infos(cluster.now, lost=True) if i.state == "dead")
    assert info.device == "pi-2" and "no heartbeat" in info.cause and info.heard_s > 2.0
    cluster.join("pi-2", ended=CRASH)
    cluster.pass_time(0.1)
    (info,) = (i for i in cluster.core.members.infos(cluster.now) if i.device == "pi-2")
    assert (info.state, info.cause) == ("ready", CRASH.text)
    cluster.kill("pi-2")
    cluster.pass_time(limits.LOST_SHOWN_S + 1)
    assert "pi-2" not in states(cluster)


def test_a_device_that_was_dismissed_has_not_died() -> None:
    cluster = four()
    cluster.stop("pi-2")
    cluster.pass_time(2.0)
    assert "pi-2" not in states(cluster)


def test_what_is_remembered_of_devices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICES", 3)
    health = Health()
    for i in range(10):
        name = f"pi-{i}"
        info = m.DeviceInfo(device=name, state="dead", facts=m.Facts(), heard_s=0.0)
        health.lost(m.Hello(role="worker", device=name, incarnation="1", cluster="home",
                            protocol=m.PROTOCOL), info, 0.0, 1.0)  # fmt: skip
    assert [info.device for info in health.gone(2.0)] == ["pi-7", "pi-8", "pi-9"]


def test_a_crash_names_its_request_and_task_in_the_log() -> None:
    cluster = four()
    die(cluster, "pi-2", CRASH, after_s=1.0)
    (note,) = (n for n in cluster.coordinator.notes if n.text == "its last process ended")
    said = {"device": "pi-2", "why": "SIGSEGV", "request": "somebody's", "task": "(0, 0)"}
    assert said.items() <= dict(note.fields).items() and note.fields["attempt"] == 1


def lose(health: Health, name: str, now: float) -> m.Hello:
    info = m.DeviceInfo(device=name, state="dead", facts=m.Facts(), heard_s=0.0)
    hello = m.Hello(role="worker", device=name, incarnation=f"{now}", cluster="home",
                    protocol=m.PROTOCOL, ended=CRASH)  # fmt: skip
    health.lost(hello, info, now, now)
    return structs.replace(hello, incarnation="next")


def test_after_an_outage_of_many_none_is_in_question_but_who_is_quarantined_now() -> None:
    """Else each look at who may work goes through all of them, for good."""
    health = Health()
    for i in range(100):
        assert health.joined(lose(health, f"pi-{i}", 1.0), 2.0) == ""
    for _ in range(limits.STRIKES - 1):
        why = health.joined(lose(health, "pi-7", 3.0), 4.0)
    assert why and health.in_question(5.0) == {"pi-7"}
    health.liars["pi-9"] = (10.0, "")
    assert health.in_question(6.0) == {"pi-7", "pi-9"}
    assert health.quarantines({"pi-7": 0}) == [health.quarantined_until("pi-7")]
    assert health.in_question(5.0 + limits.QUARANTINE_S) == set() and not health.liars
    health.in_question(5.0 + limits.QUARANTINE_S + limits.QUARANTINE_FORGOTTEN_S)
    assert health._records == {} and health.quarantines({"pi-7": 0}) == []
