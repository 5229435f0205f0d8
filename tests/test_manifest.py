"""What a manifest covers, and that neither a device nor a client is told what was not signed for
it: the shells' two ends around real cores.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cores import _imported, banded, conv_net
from msgspec.structs import replace

from cluster.signing import (
    KEY_FILE,
    SIGNER_FILE,
    Signing,
    SigningKey,
    Verifying,
    keep_signer,
    known_signer,
    load_or_create_key,
)
from meshinfer.errors import AuthError, MeshInferError
from meshinfer.programs import make_programs
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import decode, encode, header_bytes
from meshinfer.protocol.manifest import manifest
from meshinfer.scheduler import events as e
from meshinfer.scheduler.telling import COORDINATOR
from meshinfer.scheduler.worker import WorkerCore

KEY = SigningKey.of(bytes(range(32)))
OTHER = SigningKey.of(bytes(32))
ME = "pi-1#ab"
BULK = m.Peer(device=COORDINATOR, incarnation="c1", host="127.0.0.1", port=4000, key="k" * 40)
WELCOME = m.Welcome(coordinator="c1", protocol=3, bulk=BULK)


def _install() -> m.Install:
    """Of a real plan: pieces, boxes, sends, weights."""
    signature = e.Signature(False, (("x", (1, 3, 12, 10)),))
    graph = _imported(conv_net(), None, signature)
    made = make_programs(graph, banded(graph, ("pi-1", "pi-2"), "head"))
    return m.Install(deployment=7, programs=made.by_device["pi-1"], peers=(BULK,), model="net")


INSTALL = _install()
TENSOR = m.Tensor(name="x", dtype="<f4", shape=(1,))
GRANT = m.Grant(
    deployment=7,
    device="pi-1",
    program=next(p for p in INSTALL.programs if p.model),
    model="net",
    version=1,
    inputs=(TENSOR,),
)


class _Core:
    """Says what it is told to, and remembers what it hears, but for what means nothing: that comes
    in the place of what is refused, since messages are counted."""

    def __init__(self, *effects: e.Effect) -> None:
        self.effects = list(effects)
        self.heard: list[e.Event] = []

    def handle(self, event: e.Event, now: float) -> list[e.Effect]:
        if not (isinstance(event, e.Arrived) and isinstance(event.message, m.Probe)):
            self.heard.append(event)
        return list(self.effects)

    def next_deadline(self) -> float | None:
        return None


def sent(message: m.AnyMessage, peer: str = ME, key: SigningKey = KEY, by: str = "c1") -> Any:
    """The message as it leaves a coordinator, having travelled."""
    core = Signing(_Core(e.Send(e.Plane.CONTROL, peer, message)), key, by)
    (effect,) = core.handle(e.Ticked(), 0.0)
    assert isinstance(effect, e.Send)
    return decode(encode(effect.message))[0]


def verifying(core: Any = None, **options: Any) -> tuple[Verifying, Any]:
    core = core or _Core()
    return Verifying(core, ME, **options), core


def arrive(device: Verifying, message: m.AnyMessage, peer: str = COORDINATOR) -> list[e.Effect]:
    return device.handle(e.Arrived(peer, message), 0.0)


@pytest.mark.parametrize("message", [INSTALL, GRANT])
def test_what_was_signed_for_a_peer_reaches_its_core(message: Any) -> None:
    device, core = verifying()
    arrive(device, sent(WELCOME))
    assert arrive(device, sent(message)) == []
    assert core.heard[-1].message == sent(message)
    assert header_bytes(sent(message)) == header_bytes(message)  # its length was foreseen


def _changes(message: Any) -> list[Any]:
    """The message with each of its fields another one, and each of its first program's."""
    changed: list[Any] = []
    for name in message.__struct_fields__:
        if name not in ("signature", "programs", "program"):
            value = getattr(message, name)
            changed.append(replace(message, **{name: _other(value)}))
    program = message.program if isinstance(message, m.Grant) else message.programs[-1]
    for name in program.__struct_fields__:
        made = replace(program, **{name: _other(getattr(program, name))})
        if isinstance(message, m.Grant):
            changed.append(replace(message, program=made))
        else:
            changed.append(replace(message, programs=(*message.programs[:-1], made)))
    return changed


def _other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return "f" * 64 if len(value) == 64 else value + "x"
        case None:
            return "f" * 64
        case tuple() if value and isinstance(value[0], int):
            return tuple(v + 1 for v in value)
        case tuple():
            return value[:-1] if value else ("x",)
    raise AssertionError(value)


@pytest.mark.parametrize("message", [INSTALL, GRANT])
def test_nothing_of_a_manifest_can_be_changed(message: Any) -> None:
    signed, changed = sent(message), _changes(sent(message))
    assert len(changed) > 10
    for other in changed:
        assert other != signed and other.signature == signed.signature
        device, core = verifying()
        arrive(device, sent(WELCOME))
        heard = list(core.heard)
        effects = arrive(device, other)
        assert core.heard == heard
        assert isinstance(effects[0], e.Note) and effects[0].level == "error"


@pytest.mark.parametrize(
    "forged",
    [
        INSTALL,  # unsigned
        sent(INSTALL, key=OTHER),
        sent(INSTALL, peer="pi-2#ab"),  # another device's
        sent(INSTALL, peer="pi-1#aa"),  # this one's, before it began anew
        sent(INSTALL, by="c0"),  # of an earlier coordinator
    ],
)
def test_a_forged_manifest_is_answered_with_a_failure_and_nothing_is_loaded(forged: Any) -> None:
    core = WorkerCore(m.Hello(role="worker", device="pi-1", incarnation="ab", cluster="c",
                              protocol=m.PROTOCOL))  # fmt: skip
    device, _ = verifying(core)
    arrive(device, sent(WELCOME))
    effects = arrive(device, forged)
    told = [x.message for x in effects if isinstance(x, e.Send)]
    assert [type(x) for x in told] == [m.Installed] and told[0].deployment == 7
    assert told[0].failure.error == "AuthError" and told[0].failure.hint
    assert not any(isinstance(x, e.FindBlobs | e.Prepare | e.Connect) for x in effects)
    assert any(isinstance(x, e.FindBlobs) for x in arrive(device, sent(INSTALL)))


def test_before_any_welcome_nothing_is_signed() -> None:
    device, core = verifying()
    arrive(device, sent(INSTALL))
    assert core.heard == []


def test_the_signer_is_learnt_once() -> None:
    learnt: list[str] = []
    device, core = verifying(keep=learnt.append)
    arrive(device, sent(WELCOME))
    arrive(device, sent(replace(WELCOME, coordinator="c2")))  # it has started anew
    assert learnt == [KEY.public] and len(core.heard) == 2
    assert arrive(device, sent(INSTALL, by="c2")) == [] and len(core.heard) == 3


@pytest.mark.parametrize("welcome", [sent(WELCOME, key=OTHER), WELCOME])
def test_another_signer_than_before_ends_the_device(welcome: Any) -> None:
    device, core = verifying(signer=KEY.public)
    (effect,) = arrive(device, welcome)
    assert isinstance(effect, e.Stop) and effect.failure is not None
    assert effect.failure.error == "AuthError" and "--forget" in effect.failure.hint
    assert core.heard == []


def test_what_others_say_is_not_looked_at() -> None:
    """Cores take manifests from the coordinator only."""
    device, core = verifying()
    assert arrive(device, INSTALL, peer="pi-2#ab") == [] and len(core.heard) == 1


def test_a_manifest_is_the_same_bytes_after_it_has_travelled() -> None:
    for message in (INSTALL, GRANT):
        travelled: Any = decode(encode(message))[0]
        assert manifest(travelled, ME, "c1") == manifest(message, ME, "c1")


# --- on the disk


def test_the_key_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    key = load_or_create_key(tmp_path)
    assert load_or_create_key(tmp_path).public == key.public
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.private.private_bytes_raw().hex() not in repr(key)
    path.chmod(0o644)
    with pytest.raises(AuthError, match="other users"):
        load_or_create_key(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"public": KEY.public},
        {"public": KEY.public, "secret": "00" * 31},
        {"public": KEY.public, "secret": "zz" * 32},
        {"public": KEY.public, "secret": ["00"] * 64},
        {"public": KEY.public, "secret": "00" * 32},  # OTHER's
    ],
)
def test_a_damaged_key_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / KEY_FILE
    path.write_text(json.dumps(fields))
    path.chmod(0o600)
    with pytest.raises(MeshInferError) as caught:
        load_or_create_key(tmp_path)
    assert isinstance(caught.value, AuthError) and caught.value.hint
    assert "00" * 31 not in str(caught.value)


def test_a_worker_remembers_the_signer_of_its_coordinator_only(tmp_path: Path) -> None:
    assert known_signer(tmp_path, "a" * 40) == ""
    keep_signer(tmp_path, "a" * 40, KEY.public)
    assert known_signer(tmp_path, "a" * 40) == KEY.public
    assert known_signer(tmp_path, "b" * 40) == ""  # it has been moved to another cluster
    (tmp_path / SIGNER_FILE).write_text('{"coordinator": "%s", "signer": 1}' % ("a" * 40))
    with pytest.raises(AuthError, match="hexadecimal"):
        known_signer(tmp_path, "a" * 40)
