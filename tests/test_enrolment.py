"""Who is admitted: the coordinator's core with its disk, and strangers, devices and admins as plain
values. That answers stay right meanwhile is the simulator's, and the last tests' here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from copy import deepcopy

import pytest
from cores import Cluster, image
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import client_name, device_id, hash_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.ledger import Ledger, TokenMade

FULL = m.Failure(error="ClusterUnavailable", message="the disk is full", hint="make room")
BULK = m.Peer(device="coordinator", incarnation="1", host="h", port=1, key="c" * 40)


def key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:40]


def admission(name: str, role: str = "worker") -> m.Admission:
    shown = name if role == "worker" else client_name(key(name))
    return m.Admission(key=key(name), name=shown, role=role)  # type: ignore[arg-type]


ROOT = f"{client_name(key('root'))}-1#0"
ALWAYS = (admission("head"), admission("root", "admin"))


class Desk:
    """A coordinator whose disk answers at once, or when it is told to, or that it is full."""

    def __init__(self, tokens: tuple[TokenMade, ...] = (), *, plaintext: bool = False) -> None:
        self.door = None if plaintext else Door(7000, ALWAYS, tokens)
        self.ledger, self.now, self.calls = Ledger(), 100.0, 0
        self.full = self.slow = False
        self.start()

    def start(self, *, away_s: float = 0.0) -> None:
        """Killed and started again, after a while; the file keeps what remains of tokens' time."""
        for hash_, token in self.ledger.tokens.items():
            left = max(0.0, token.ttl_s - away_s)
            self.ledger.tokens[hash_] = TokenMade(
                hash_, token.role, left, token.reusable, token.maker, "", token.spent
            )
        self.core = CoordinatorCore("home", "0", BULK, self.door, deepcopy(self.ledger))
        self.records: deque[e.Record] = deque()
        self.gate: frozenset[str] = frozenset()
        self.lists: dict[str, frozenset[str]] = {}
        self.do(e.Ticked())
        self.hello("root", "admin")

    def do(self, event: e.Event) -> list[e.Effect]:
        """What comes of it, and of the disk."""
        self.now += 0.001
        effects = self.core.handle(event, self.now)
        for effect in effects:
            match effect:
                case e.Record():
                    self.records.append(effect)
                case e.Admit(members):
                    self.gate = frozenset(each.key for each in members)
                case e.Send(_, peer, m.Admitted(members)):
                    self.lists[peer] = frozenset(each.key for each in members)
                case e.Send(e.Plane.JOIN, _, m.Joined()):
                    assert isinstance(event, e.Knocked | e.Recorded)
        return effects if self.slow else effects + self.write()

    def write(self) -> list[e.Effect]:
        effects: list[e.Effect] = []
        while self.records:
            record = self.records.popleft()
            if self.full:
                effects += self.do(e.RecordFailed(record.number, FULL))
            else:
                self.ledger.apply(record.entries)
                effects += self.do(e.Recorded(record.number))
        return effects

    def disk_again(self) -> None:
        self.full = False
        self.now += limits.JOURNAL_RETRY_S
        self.do(e.Ticked())

    # --- strangers

    def knock(self, name: str, secret: bytes = b"", role: str = "worker", by: str = "",
              **changes: object) -> m.AnyMessage | None:  # fmt: skip
        """What a stranger is told; ``by``: whose key it has, if not one of this name."""
        join = m.Join(cluster="home", name=name, role=role, protocol=m.PROTOCOL, secret=secret)  # type: ignore[arg-type]
        join = structs.replace(join, **changes)
        effects = self.do(e.Knocked("stranger", key(by or name), join))
        return self.told(effects)

    @staticmethod
    def told(effects: list[e.Effect]) -> m.AnyMessage | None:
        said = [x.message for x in effects if isinstance(x, e.Send) and x.plane is e.Plane.JOIN]
        assert len(said) <= 1
        return said[0] if said else None

    def refused(self, *args: object, **fields: object) -> m.Failure:
        answer = self.knock(*args, **fields)  # type: ignore[arg-type]
        assert isinstance(answer, m.Refused), answer
        assert answer.failure.hint
        return answer.failure

    def joined(self, *args: object, **fields: object) -> m.Joined:
        answer = self.knock(*args, **fields)  # type: ignore[arg-type]
        assert isinstance(answer, m.Joined), answer
        return answer

    # --- members

    def hello(self, name: str, as_: str = "worker", **changes: object) -> list[e.Effect]:
        peer = self.peer(name, as_)
        device, _, incarnation = peer.partition("#")
        bulk = m.Peer(device=device, incarnation=incarnation, host="h", port=1, key=key(name))
        worker = as_ == "worker"
        hello = m.Hello(role="worker" if worker else "client", device=device, cluster="home",
                        incarnation=incarnation, protocol=m.PROTOCOL, bulk=bulk if worker else None,
                        facts=m.Facts(host=name, head=name == "head"))  # fmt: skip
        return self.do(e.Arrived(peer, structs.replace(hello, **changes)))

    @staticmethod
    def peer(name: str, role: str = "worker") -> str:
        return f"{name}#1" if role == "worker" else f"{client_name(key(name))}-1#0"

    def ask(self, question: type, peer: str = ROOT, **fields: object) -> m.AdmittedNow:
        self.calls += 1
        call = f"call-{self.calls}"
        effects = self.do(e.Arrived(peer, question(call=call, **fields)))
        (answer,) = (x.message for x in effects if is_answer(x, call))
        assert isinstance(answer, m.AdmittedNow)
        return answer

    def token(self, secret: bytes, role: str = "worker", ttl_s: float = 900.0,
              **fields: object) -> m.AdmittedNow:  # fmt: skip
        return self.ask(m.AddToken, hash=hash_of(secret), role=role, ttl_s=ttl_s, **fields)

    def enrolled(self, name: str, role: str = "worker") -> None:
        """Admitted, and it has said hello."""
        secret = f"of {name}".encode()
        assert self.token(secret, role).failure is None
        self.joined(name, secret, role)
        assert any(isinstance(x.message, m.Welcome) for x in sends(self.hello(name, role)))


def sends(effects: list[e.Effect]) -> list[e.Send]:
    return [effect for effect in effects if isinstance(effect, e.Send)]


def is_answer(effect: e.Effect, call: str) -> bool:
    return isinstance(effect, e.Send) and getattr(effect.message, "call", None) == call


# --- tokens -------------------------------------------------------------------------------------


def test_a_one_off_token_admits_one_key_and_tells_it_again() -> None:
    desk = Desk()
    desk.token(b"s")
    assert key("pi") not in desk.gate
    assert desk.joined("pi", b"s") == m.Joined(name="pi", role="worker", port=7000)
    assert key("pi") in desk.gate
    assert desk.joined("pi", b"s") == desk.joined("pi")  # the reply was lost; the token is over
    desk.refused("other", b"s")
    assert desk.gate == {key("head"), key("root"), key("pi")}


def test_a_reusable_token_admits_until_its_time_is_over() -> None:
    desk = Desk()
    desk.token(b"s", ttl_s=60.0, reusable=True)
    desk.joined("a", b"s")
    desk.now += 30.0
    desk.joined("b", b"s")
    desk.now += 31.0
    desk.refused("c", b"s")
    desk.joined("a")


def test_all_ways_in_which_a_token_is_not_valid_sound_alike() -> None:
    desk = Desk()
    desk.token(b"used")
    desk.joined("pi", b"used")
    desk.token(b"old", ttl_s=1.0)
    desk.token(b"client", "client")
    desk.token(b"void", reusable=True)
    desk.joined("bad", b"void")
    desk.ask(m.Expel, id="bad")
    desk.now += 2.0
    failures = [desk.refused("new", s) for s in (b"wrong", b"used", b"old", b"client", b"void")]
    assert failures[0].error == "AuthError" and len(set(map(str, failures))) == 1
    assert desk.gate == set(map(key, ("head", "root", "pi")))


def test_nobody_is_told_joined_before_it_is_on_disk() -> None:
    desk = Desk()
    desk.token(b"s")
    desk.slow = True
    assert desk.knock("pi", b"s") is None and desk.knock("pi", b"s") is None
    assert key("pi") not in desk.gate and not desk.ledger.enrolled
    assert isinstance(desk.knock("other", b"s"), m.Refused)  # it is spent, for all that is known
    effects = desk.write()
    assert isinstance(desk.told(effects), m.Joined) and key("pi") in desk.ledger.enrolled
    order = [type(x.message if isinstance(x, e.Send) else x) for x in effects]
    assert order.index(e.Admit) < order.index(m.Joined)  # else it might be refused at once


def test_an_admission_that_cannot_be_written_is_none_and_costs_no_token() -> None:
    desk = Desk()
    desk.token(b"s")
    desk.full = True
    assert desk.refused("pi", b"s") == FULL
    assert key("pi") not in desk.gate
    assert desk.token(b"t").failure == FULL
    desk.disk_again()
    desk.refused("pi", b"t")
    desk.joined("pi", b"s")


def test_tokens_have_a_bound_and_a_dead_one_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOKENS", 3)
    desk = Desk()
    for secret in (b"1", b"2", b"3"):
        assert desk.token(secret, ttl_s=100.0 if secret == b"1" else 1.0).failure is None
    failure = desk.token(b"4").failure
    assert failure is not None and failure.error == "QueueFull" and failure.hint
    desk.now += 2.0
    assert desk.token(b"4").failure is None
    desk.refused("b", b"2")
    desk.joined("a", b"1")
    desk.joined("d", b"4")
    assert set(desk.ledger.tokens) == {hash_of(s) for s in (b"1", b"3", b"4")}
    assert desk.token(b"2").failure is None  # forgotten for good, in memory as well


def test_a_restart_keeps_keys_and_what_remains_of_tokens() -> None:
    desk = Desk()
    for secret in (b"1", b"2", b"3"):
        desk.token(secret, ttl_s=60.0)
    desk.joined("a", b"1")
    desk.start(away_s=30.0)
    assert desk.gate == set(map(key, ("head", "root", "a")))
    assert {each.key for each in desk.core.admitted} == desk.gate
    desk.joined("a")
    desk.refused("b", b"1")
    desk.joined("b", b"2")
    desk.start(away_s=31.0)
    desk.refused("c", b"3")


def test_tokens_from_the_start_are_spent_for_good() -> None:
    first = TokenMade(hash_of(b"s"), "worker", 900.0)
    desk = Desk((first,))
    desk.joined("a", b"s")
    desk.start()
    desk.refused("b", b"s")
    desk.joined("a", b"s")


def test_a_token_asked_for_again_is_the_same_one() -> None:
    """By the same call, as after a broken connection; and by another, as after a restart."""
    desk = Desk()
    message = m.AddToken(call="c", hash=hash_of(b"s"), role="worker", ttl_s=60.0)
    first, again = (sends(desk.do(e.Arrived(ROOT, message))) for _ in range(2))
    assert first == again and isinstance(first[0].message, m.AdmittedNow)
    assert desk.token(b"s").failure is None
    desk.joined("a", b"s")
    failure = desk.token(b"s").failure
    assert failure is not None and failure.error == "InvalidInput"
    desk.refused("b", b"s")


# --- approval -----------------------------------------------------------------------------------


def test_without_a_token_a_device_waits_until_it_is_approved() -> None:
    desk = Desk()
    answer = desk.knock("pi")
    assert answer == m.Wait(id=device_id(key("pi")), again_s=limits.JOIN_AGAIN_S)
    desk.now += 1.0
    assert desk.knock("pi") == answer and key("pi") not in desk.gate
    (waiting,) = desk.ask(m.ListAdmitted).waiting
    assert (waiting.id, waiting.name, waiting.role) == (device_id(key("pi")), "pi", "worker")
    assert 1.0 <= waiting.waits_s < 1.1
    approved = desk.ask(m.Approve, id=device_id(key("pi"))[:6].upper())
    assert approved.members == (admission("pi"),) and approved.failure is None
    assert desk.ask(m.Approve, id=device_id(key("pi"))).members == approved.members  # twice
    desk.joined("pi")
    listed = desk.ask(m.ListAdmitted)
    assert not listed.waiting and set(listed.members) == {*ALWAYS, admission("pi")}
    desk.start()
    assert key("pi") in desk.gate


@pytest.mark.parametrize(
    ("id_", "words"),
    [("abc", "at least 4"), ("zzzz-zzzz", "nobody's"), ("", "at least 4"), ("-----", "at least 4")],
)
def test_an_id_that_means_nobody_is_said_to(id_: str, words: str) -> None:
    desk = Desk()
    desk.knock("pi")
    for question in (m.Approve, m.Expel):
        failure = desk.ask(question, id=id_).failure
        assert failure is not None and failure.error == "InvalidInput" and words in failure.message
    assert desk.gate == {key("head"), key("root")}


def alike() -> tuple[str, str]:
    """Two names whose ids begin alike."""
    seen: dict[str, str] = {}
    for number in range(20_000):
        name = f"pi-{number}"
        start = device_id(key(name))[:4]
        if start in seen:
            return seen[start], name
        seen[start] = name
    raise AssertionError("no two of so many")


def test_an_id_that_means_two_is_said_to_and_more_of_it_does() -> None:
    desk = Desk()
    one, two = alike()
    start, whole = device_id(key(one))[:4], device_id(key(one))
    desk.knock(one)
    desk.knock(two)
    failure = desk.ask(m.Approve, id=start).failure
    assert failure is not None and whole in failure.message and failure.error == "InvalidInput"
    assert desk.gate == {key("head"), key("root")}
    for name in (one, two):
        assert desk.ask(m.Approve, id=device_id(key(name))).failure is None
    assert desk.ask(m.Expel, id=start).failure is not None
    assert desk.ask(m.Expel, id=whole).members == (admission(one),)
    assert key(two) in desk.gate and key(one) not in desk.gate


def test_a_device_that_calls_itself_by_anothers_id_is_not_expelled_in_its_place() -> None:
    desk = Desk()
    desk.enrolled("bad")
    desk.token(b"s")
    decoy = device_id(key("bad"))
    desk.joined(decoy, b"s", by="decoy")
    assert desk.ask(m.Expel, id=decoy).members == (admission("bad"),)
    desk.enrolled("pi")
    desk.token(b"t")
    start = device_id(key("pi"))[:7]
    desk.joined(start, b"t", by="other")
    failure = desk.ask(m.Expel, id=start).failure  # the one's name, the other's id
    assert failure is not None and failure.error == "InvalidInput"


@pytest.mark.parametrize("role", ["client", "admin"])
def test_only_workers_may_wait(role: str) -> None:
    desk = Desk()
    failure = desk.refused("eve", role=role)
    assert failure.error == "AuthError" and f"--role {role}" in failure.hint
    assert not desk.ask(m.ListAdmitted).waiting


def test_the_waiting_room_has_a_bound_keeps_who_was_first_and_forgets_who_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "WAITING_KEYS", 2)
    desk = Desk()
    desk.token(b"s")
    desk.knock("a")
    desk.knock("b")
    failure = desk.refused("c")
    assert failure.error == "QueueFull" and failure.retry_after_s
    assert isinstance(desk.knock("a"), m.Wait)
    desk.joined("d", b"s")
    desk.now += limits.WAITS_S
    assert isinstance(desk.knock("b"), m.Wait)
    desk.now += 1.0
    assert desk.ask(m.Approve, id=device_id(key("a"))).failure is not None
    assert isinstance(desk.knock("c"), m.Wait)


def test_too_many_keys_are_not_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ADMITTED_KEYS", 3)
    desk = Desk()
    desk.token(b"s", reusable=True)
    desk.joined("a", b"s")
    assert desk.refused("b", b"s").error == "QueueFull"
    desk.knock("c")
    assert "c" not in desk.gate
    desk.ask(m.Expel, id="a")
    desk.token(b"t")
    desk.joined("b", b"t")


# --- names --------------------------------------------------------------------------------------


def test_a_name_belongs_to_one_key() -> None:
    desk = Desk()
    desk.enrolled("pi")
    desk.token(b"s")
    failure = desk.refused("pi", b"s", by="thief")
    assert failure.error == "AuthError" and "devices revoke pi" in failure.hint
    assert "--name" in failure.hint
    assert desk.refused("pi", by="thief") == failure
    assert desk.refused("head", b"s", by="thief").error == "AuthError"
    assert desk.refused("other", b"s", by="head").error == "ConfigurationError"
    desk.ask(m.Expel, id="pi")
    desk.joined("pi", b"s", by="thief")


@pytest.mark.parametrize(
    "name",
    ["coordinator", "client-x", "a#1", "a~1", "a\x1b[2J", " a", "x" * 65, "a\n", "p\u0456-1"],
)
def test_a_name_that_could_be_taken_for_something_else_is_refused(name: str) -> None:
    desk = Desk()
    desk.token(b"s", reusable=True)
    for secret in (b"", b"s"):
        assert desk.refused(name, secret).error == "ConfigurationError"
    assert not desk.ask(m.ListAdmitted).waiting and len(desk.gate) == 2


def test_a_device_may_join_anew_under_another_name_and_its_old_one_ends() -> None:
    desk = Desk()
    desk.enrolled("pi")
    desk.token(b"s")
    assert isinstance(desk.knock("new", by="pi"), m.Wait)  # nobody said that it may
    desk.joined("new", b"s", by="pi")
    assert "pi" not in desk.core.members.devices
    names = {each.name for each in desk.core.admitted}
    assert "new" in names and "pi" not in names
    desk.enrolled("pi2")
    desk.token(b"t")
    desk.joined("pi", b"t", by="somebody")  # the name is free again


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"protocol": (98, 99)}, "ProtocolMismatch"), ({"cluster": "away"}, "ConfigurationError")],
)
def test_who_is_of_another_release_or_cluster_is_told_so(
    changes: dict[str, object], error: str
) -> None:
    desk = Desk()
    desk.token(b"s")
    assert desk.refused("pi", b"s", **changes).error == error
    desk.joined("pi", b"s")  # it cost no token


# --- expulsion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_id", [True, False])
def test_a_device_that_is_expelled_is_out_at_once_and_stays_out(by_id: bool) -> None:
    desk = Desk()
    desk.enrolled("pi")
    desk.enrolled("other")
    desk.slow = True
    id_ = device_id(key("pi"))[:9] if by_id else "pi"
    effects = desk.do(e.Arrived(ROOT, m.Expel(call="c", id=id_)))
    assert key("pi") not in desk.gate and "pi" not in desk.core.members.devices
    assert key("pi") not in desk.lists["other#1"] and key("other") in desk.lists["other#1"]
    told = [send.message for send in sends(effects) if send.peer == "pi#1"]
    assert [type(message) for message in told] == [m.Refused]
    assert not any(is_answer(effect, "c") for effect in effects)  # not before it is on disk
    assert any(is_answer(effect, "c") for effect in desk.write())
    desk.slow = False
    again = desk.do(e.Arrived(ROOT, m.Expel(call="c", id=id_)))  # its connection had broken
    (answer,) = (x.message for x in sends(again) if is_answer(x, "c"))
    assert answer == m.AdmittedNow(call="c", members=(admission("pi"),))
    assert desk.do(e.Arrived("pi#1", m.Heartbeat())) == []  # it was on its way
    assert not sends(desk.hello("pi"))
    desk.refused("pi", b"of pi")
    assert isinstance(desk.knock("pi"), m.Wait)
    desk.start()
    assert key("pi") not in desk.gate and key("other") in desk.gate


def test_an_expulsion_that_cannot_be_written_holds_and_is_written_later() -> None:
    desk = Desk()
    desk.enrolled("pi")
    desk.full = True
    failure = desk.ask(m.Expel, id="pi").failure
    assert failure is not None and "restart would let it in" in failure.message
    assert key("pi") not in desk.gate and key("pi") in desk.ledger.enrolled
    desk.disk_again()
    assert key("pi") not in desk.ledger.enrolled
    desk.start()
    assert key("pi") not in desk.gate


def test_with_a_key_goes_what_let_it_in_and_what_it_let_in_yet() -> None:
    desk = Desk()
    desk.enrolled("boss", "admin")
    boss = Desk.peer("boss", "admin")
    desk.ask(m.AddToken, peer=boss, hash=hash_of(b"s"), role="worker", ttl_s=60.0, reusable=True)
    desk.token(b"t", reusable=True)
    desk.joined("a", b"s")
    desk.ask(m.Expel, id=client_name(key("boss")))
    assert key("a") in desk.gate
    for _ in range(2):
        desk.refused("b", b"s")
        desk.start()
    desk.joined("c", b"t")
    desk.ask(m.Expel, id="c")
    desk.refused("d", b"t")


def test_what_is_the_coordinators_own_cannot_be_expelled() -> None:
    desk = Desk()
    for id_ in ("head", device_id(key("head")), client_name(key("root"))):
        failure = desk.ask(m.Expel, id=id_).failure
        assert failure is not None and failure.error == "ConfigurationError" and failure.hint
    assert desk.gate == {key("head"), key("root")}


def test_who_is_expelled_while_its_new_admission_is_written_is_out() -> None:
    desk = Desk()
    desk.enrolled("pi")
    desk.token(b"s")
    desk.slow = True
    desk.knock("new", b"s", by="pi")
    desk.do(e.Arrived(ROOT, m.Expel(call="c", id="pi")))
    assert not isinstance(desk.told(desk.write()), m.Joined)
    assert key("pi") not in desk.gate
    desk.slow = False
    desk.start()
    assert key("pi") not in desk.gate


# --- roles --------------------------------------------------------------------------------------

CALL = {"call": "c"}
DEPLOY = m.Deploy(call="c", name="net", digest="a" * 64, nbytes=1)
SUBMIT = m.Submit(request="r", model="net", version=None, inputs=(), picture=False, deadline_s=1.0)
ADMINS = (
    DEPLOY, m.AddToken(call="c", hash="a" * 64, role="admin", ttl_s=9.0), m.Expel(call="c", id="a"),
    m.Approve(call="c", id="abcd"), m.ListAdmitted(call="c"),
)  # fmt: skip
USERS = (SUBMIT, m.ListDevices(call="c"), m.ListModels(call="c"), m.Cancel(request="r"))
WORKERS = (m.TasksDone(request="r", attempt=1, tasks=()), m.Goodbye(),
           m.LinkMeasured(link=m.Link(peer="head")))  # fmt: skip
MAY = {"worker": WORKERS, "client": USERS, "admin": (*USERS, *ADMINS)}


@pytest.mark.parametrize("message", [*WORKERS, *USERS, *ADMINS], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("role", ["worker", "client", "admin"])
def test_each_role_says_what_it_may_and_no_more(role: str, message: m.AnyMessage) -> None:
    desk = Desk()
    desk.enrolled("eve", role)
    before = desk.gate, set(desk.ledger.tokens)
    effects = desk.do(e.Arrived(Desk.peer("eve", role), message))
    notes = [x.text for x in effects if isinstance(x, e.Note)]
    failures = [getattr(send.message, "failure", None) for send in sends(effects)]
    denied = [f for f in failures if f is not None and f.error == "AuthError"]
    if message in MAY[role]:
        assert not denied and "a message that its role does not allow" not in notes
        return
    assert "a message that its role does not allow" in notes
    assert (desk.gate, set(desk.ledger.tokens)) == before and not desk.core.catalogue.models
    assert not desk.core.requests
    device = desk.core.members.devices.get("eve")
    assert (device is not None) == (role == "worker")
    assert device is None or not device.draining
    if isinstance(message, m.Submit | m.Deploy | m.AddToken | m.Approve | m.Expel | m.ListAdmitted):
        (failure,) = denied
        assert f"role {role}" in failure.message and "meshinfer token --role" in failure.hint
        assert "ing " in failure.message.partition(" needs ")[0]  # what is done, in words
        assert type(message).__name__ not in failure.message and "join" in failure.hint


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("worker", {"device": "other"}),
        ("worker", {"incarnation": "2"}),
        ("worker", {"role": "client", "bulk": None}),
        ("worker", {"facts": m.Facts(head=True)}),
        ("worker", {"bulk": m.Peer(device="eve", incarnation="1", host="h", port=1, key="k" * 40)}),
        ("client", {"role": "worker"}),
        ("admin", {"role": "worker"}),
        ("client", {"device": client_name(key("root"))}),
    ],
)
def test_a_hello_says_nothing_but_what_its_key_is(role: str, changes: dict[str, object]) -> None:
    desk = Desk()
    desk.token(b"s", role)
    desk.joined("eve", b"s", role)
    members = desk.core.members
    before = set(members.devices), set(members.clients)
    (send,) = sends(desk.hello("eve", role, **changes))
    assert isinstance(send.message, m.Refused) and send.message.failure.error == "AuthError"
    assert (set(members.devices), set(members.clients)) == before


def test_the_head_is_known_by_its_key() -> None:
    desk = Desk()
    desk.hello("head")
    assert desk.core.members.head is not None


def test_devices_are_told_whom_to_let_in_before_anything_else_but_their_welcome() -> None:
    """With that counts begin: whoever does not hear of it finds out."""
    desk = Desk()
    desk.token(b"s")
    desk.joined("pi", b"s")
    kinds = [type(send.message) for send in sends(desk.hello("pi"))]
    assert kinds == [m.Welcome, m.Admitted]
    again = [type(send.message) for send in sends(desk.hello("pi"))]
    assert again == [m.Welcome, m.Admitted], "both may have been lost"
    desk.enrolled("ann", "client")
    assert desk.lists == {"pi#1": desk.gate} and key("ann") in desk.gate


def test_a_plaintext_cluster_asks_nobody_for_keys() -> None:
    desk = Desk(plaintext=True)
    assert desk.refused("pi", b"s").error == "ConfigurationError"
    effects = desk.hello("pi", device="any", bulk=m.Peer(
        device="any", incarnation="1", host="h", port=1, key="k" * 40))  # fmt: skip
    assert [type(send.message) for send in sends(effects)] == [m.Welcome]
    failure = desk.token(b"s").failure
    assert failure is not None and failure.error == "ConfigurationError"
    assert desk.gate == frozenset()


# --- at random ----------------------------------------------------------------------------------

NAMES, SECRETS = ("a", "b"), (b"0", b"1")
KNOCK = st.tuples(st.just("knock"), st.sampled_from(NAMES), st.sampled_from((b"", *SECRETS)))
RARE = st.one_of(
    st.tuples(st.just("approve"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("disk"), st.booleans(), st.none()),
    st.tuples(st.just("wait"), st.sampled_from((1.0, 40.0)), st.none()),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("token"), st.sampled_from(SECRETS), st.booleans()),
        st.tuples(st.just("expel"), st.sampled_from(NAMES), st.none()),
        st.just(("restart", None, None)),
        KNOCK,
        KNOCK,
        RARE,
    ),
    min_size=8,
    max_size=40,
)
TTL_S = 60.0


@settings(max_examples=400)
@given(steps=STEPS)
def test_nobody_is_in_but_by_a_valid_token_or_approval(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Against a model: who may be in by what was said, until when tokens are good, and which of
    them have been used."""
    desk = Desk()
    inside: set[str] = set()
    tokens: dict[bytes, tuple[float, bool]] = {}
    first: dict[bytes, set[str]] = {}
    came_by: dict[str, bytes] = {}
    void: set[bytes] = set()
    for what, one, other in steps:
        match what:
            case "token":
                failure = desk.token(one, ttl_s=TTL_S, reusable=other).failure
                if failure is None and one not in tokens:
                    tokens[one] = desk.now + TTL_S, other
            case "knock":
                until, reusable = tokens.get(other, (0.0, False))
                good = desk.now < until - 0.1 and other not in void
                good = good and (reusable or not first.get(other))
                late = until - 0.1 <= desk.now <= until + 0.1
                answer = desk.knock(one, other)
                if isinstance(answer, m.Joined):
                    assert one in inside or good or late
                    if one not in inside:
                        first.setdefault(other, set()).add(one)
                        came_by[one] = other
                    inside.add(one)
                else:
                    assert one not in inside
                    assert not good or desk.full
            case "approve":
                failure = desk.ask(m.Approve, id=device_id(key(one))).failure
                if failure is None:
                    came_by.setdefault(one, b"")
                    inside.add(one)
            case "expel":
                failure = desk.ask(m.Expel, id=one).failure
                if one in inside:
                    assert failure is None or desk.full
                    inside.discard(one)
                    void.add(came_by.pop(one))
                else:
                    assert failure is not None
            case "restart":
                if desk.full:
                    desk.disk_again()
                desk.start()
            case "disk":
                if one and not desk.full:
                    desk.full = True
                elif not one and desk.full:
                    desk.disk_again()
            case "wait":
                desk.now += one
                if desk.full:
                    continue
                for hash_, token in desk.ledger.tokens.items():
                    desk.ledger.tokens[hash_] = TokenMade(
                        hash_, token.role, max(0.0, token.ttl_s - one), token.reusable,
                        token.maker, "", token.spent,
                    )  # fmt: skip
        assert desk.gate == {key(name) for name in ("head", "root", *inside)}
        assert all(len(keys) == 1 for s, keys in first.items() if not tokens[s][1])


# --- requests -----------------------------------------------------------------------------------

KNOWN = tuple(
    m.Admission(key=Cluster.key_of(name), name=name, role=role)  # type: ignore[arg-type]
    for name, role in (("head", "worker"), ("pi-1", "worker"), ("ann", "admin"))
)


def with_newcomer() -> Cluster:
    """A cluster with keys, a model, and a device that has joined by a token since."""
    cluster = Cluster(("pi-1",), door=Door(1, KNOWN))
    token = m.AddToken(call="?", hash=hash_of(b"s"), role="worker", ttl_s=60.0)
    admin_asks(cluster, token)
    cluster.knock("pi-2", b"s")
    cluster.settle(lambda: cluster.key_of("pi-2") in (cluster.coordinator.gate or ()))
    node = cluster.join("pi-2")
    cluster.settle(lambda: cluster.joined(node))
    cluster.deployed()
    return cluster


def admin_asks(cluster: Cluster, question: m.AnyMessage) -> m.AdmittedNow:
    call = f"admin-{next(cluster._order)}"
    asked = e.Asked(call, structs.replace(question, call=call), 30.0)  # type: ignore[type-var]
    cluster._handle(cluster.nodes["ann"], asked)
    answer = cluster.answer(call).answer
    assert isinstance(answer, m.AdmittedNow) and answer.failure is None
    return answer


def test_a_device_that_joined_by_a_token_computes_and_a_request_outlives_its_revocation() -> None:
    cluster = with_newcomer()
    reply = cluster.check(cluster.submit())
    assert "pi-2" in {task.device for task in reply.tasks}
    request = cluster.submit(image(1))
    cluster.settle(lambda: cluster.nodes["pi-2"].core._computing.running is not None)  # type: ignore[union-attr]
    open_ = cluster.core.requests[request]
    assert admin_asks(cluster, m.Expel(call="?", id="pi-2")).members
    assert open_.losses == 0  # it is not the request that ended it
    reply = cluster.check(request, image(1))
    assert "pi-2" in reply.lost
    assert {task.device for task in reply.tasks} <= {"pi-1", "head"}
    cluster.settle(lambda: cluster.nodes["pi-2"].stopped is not None)
    failure = cluster.nodes["pi-2"].stopped.failure  # type: ignore[union-attr]
    assert failure is not None
    cluster.check(cluster.submit(image(2)), image(2))
    again = cluster.join("pi-2")
    cluster.settle(lambda: again.stopped is not None)
    assert again.stopped.failure.error == "AuthError"  # type: ignore[union-attr]


def test_with_a_client_that_is_expelled_its_requests_end() -> None:
    cluster = with_newcomer()
    eve = m.Admission(key=cluster.key_of("eve"), name=client_name(cluster.key_of("eve")),
                      role="client")  # fmt: skip
    admin_asks(cluster, m.AddToken(call="?", hash=hash_of(b"e"), role="client", ttl_s=60.0))
    cluster.knock("eve", b"e", "client")
    cluster.settle(lambda: eve.key in (cluster.coordinator.gate or ()))
    cluster.key_of = lambda name: Cluster.key_of("eve" if "client" in name else name)  # type: ignore[method-assign]
    name = f"{eve.name}-1"
    node = cluster.connect(name)
    cluster.settle(lambda: cluster.joined(node))
    cluster.check(cluster.submit(client=name), client=name)
    request = cluster.submit(image(1), client=name)
    cluster.settle(lambda: request in cluster.core.requests)
    admin_asks(cluster, m.Expel(call="?", id=eve.name))
    assert request not in cluster.core.requests
    assert cluster.failure(request, name).error in ("AuthError", "ClusterUnavailable")
    assert not cluster.joined(node)
    cluster.check(cluster.submit(image(2)), image(2))
