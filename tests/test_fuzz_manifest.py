"""Whatever is done to a signed manifest, a device takes it as it was signed for it, or not at all:
it is no message, or it is refused in words and nothing of it reaches the core.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import msgspec
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_manifest import GRANT, INSTALL, KEY, ME, OTHER, WELCOME, sent

from cluster.signing import SigningKey, Verifying
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, decode, encode
from meshinfer.scheduler import events as e
from meshinfer.scheduler.telling import COORDINATOR
from meshinfer.scheduler.worker import WorkerCore

HELLO = m.Hello(
    role="worker", device="pi-1", incarnation="ab", cluster="c", protocol=m.PROTOCOL
)  # fmt: skip
MINE: tuple[Any, ...] = (
    sent(INSTALL),
    sent(replace(INSTALL, deployment=8, model="other")),
    sent(replace(INSTALL, programs=INSTALL.programs[:1])),
    sent(GRANT),
)
"""Signed for this process of this device by this one of the coordinator."""

THEIRS: tuple[Any, ...] = (
    sent(INSTALL, peer="pi-2#ab"),
    sent(INSTALL, peer="pi-1#aa"),
    sent(INSTALL, by="c0"),
    sent(INSTALL, key=OTHER),
    sent(GRANT, peer="client-a#0"),
)


def wire(message: m.AnyMessage) -> bytes:
    (header,) = encode(message)
    return bytes(header)


WIRES = tuple(wire(message) for message in MINE + THEIRS)
MORE = 4 * settings.default.max_examples if settings.default else 200
ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of Ed25519's group: a signature's second half plus this is another writing of the same number."""


class _Watched:
    """A worker's core, and what reached it."""

    def __init__(self) -> None:
        self.core, self.heard = WorkerCore(HELLO), []  # type: ignore[var-annotated]
        self.next_deadline = self.core.next_deadline

    def handle(self, event: e.Event, now: float) -> list[e.Effect]:
        if not (isinstance(event, e.Arrived) and isinstance(event.message, m.Probe)):
            self.heard.append(event)  # what is refused is only counted
        return self.core.handle(event, now)


def loads(message: m.AnyMessage, *, signer: m.AnyMessage | None = None) -> bool:
    """Whether a device that was just welcomed takes it; if not, that it says so as it should."""
    core = _Watched()
    device = Verifying(core, ME)
    device.handle(e.Arrived(COORDINATOR, signer or sent(WELCOME)), 0.0)
    core.heard.clear()
    effects = device.handle(e.Arrived(COORDINATOR, message), 0.0)
    if core.heard:
        return True
    assert isinstance(message, m.Install | m.Grant)
    note, *answers = effects
    assert isinstance(note, e.Note) and note.level == "error"
    if isinstance(message, m.Install):
        (send,) = answers
        assert isinstance(send, e.Send) and isinstance(send.message, m.Installed)
        assert send.message.deployment == message.deployment
        failure = send.message.failure
        assert failure is not None and failure.error == "AuthError" and failure.hint
    else:
        assert not answers  # a client goes on without it
    return False


def judge(header: bytes) -> None:
    """Of bytes that came in, in a connection's right shape or not."""
    try:
        message, _ = decode([header])
    except ProtocolError:
        return
    taken = loads(message)
    if isinstance(message, m.Install | m.Grant):
        assert taken == (message in MINE)


def test_what_was_signed_for_this_process_is_taken_and_what_was_not_is_refused() -> None:
    assert [loads(message) for message in MINE + THEIRS] == [True] * 4 + [False] * 5


# --- bytes ----------------------------------------------------------------------------------------

Change = Callable[[bytes, "st.DataObject"], bytes]


def flipped(data: bytes, draw: st.DataObject) -> bytes:
    made = bytearray(data)
    for bit in draw.draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=4)):
        made[bit // 8] ^= 1 << bit % 8
    return bytes(made)


def _range(data: bytes, draw: st.DataObject) -> tuple[int, int]:
    start = draw.draw(st.integers(0, len(data)))
    return start, draw.draw(st.integers(start, min(len(data), start + 300)))


def truncated(data: bytes, draw: st.DataObject) -> bytes:
    return data[: draw.draw(st.integers(0, len(data)))]


def torn(data: bytes, draw: st.DataObject) -> bytes:
    start, end = _range(data, draw)
    return data[:start] + data[end:]


def duplicated(data: bytes, draw: st.DataObject) -> bytes:
    start, end = _range(data, draw)
    return data[:end] + data[start:]


def spliced(data: bytes, draw: st.DataObject) -> bytes:
    """Begins as one and ends as another, at one place or at two."""
    other = draw.draw(st.sampled_from(WIRES))
    at = draw.draw(st.integers(0, min(len(data), len(other))))
    return data[:at] + other[draw.draw(st.sampled_from((at, len(other) - len(data) + at))) :]


def pasted(data: bytes, draw: st.DataObject) -> bytes:
    start, end = _range(data, draw)
    return data[:start] + draw.draw(st.binary(max_size=40)) + data[end:]


CHANGES: tuple[Change, ...] = (flipped, truncated, torn, duplicated, spliced, pasted)


@settings(max_examples=MORE)
@given(st.data())
def test_bytes_that_were_changed_on_the_way_are_no_manifest(data: st.DataObject) -> None:
    header = data.draw(st.sampled_from(WIRES))
    for change in data.draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3)):
        header = change(header, data) or b"\x93"
    judge(header)


# --- fields ---------------------------------------------------------------------------------------

Field = tuple[Any, Any]


def fields(tree: Any) -> list[Field]:
    """Each container in a message with each key in it, at any depth."""
    found: list[Field] = []
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found += [(tree, key), *fields(tree[key])]
    return found


FIELDS = [field for header in WIRES for field in fields(msgspec.msgpack.decode(header)[0])]
"""Of all messages; not to be changed."""

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2**63 - 1),
    st.text(max_size=8),
    st.sampled_from(["f" * 64, "head", "pi-2", {}, [], [[]]]),
    st.binary(min_size=64, max_size=64),
)


def change(tree: Any, data: st.DataObject) -> None:
    """One field: another value, one of another message, twice, none, or at another place. The
    outermost as often as all that lie deeper."""
    outermost = [(tree, key) for key in tree]
    inside = data.draw(st.sampled_from((outermost, fields(tree))))
    box, key = inside[data.draw(st.integers(0, len(inside) - 1))]
    how = data.draw(st.sampled_from(("odd", "of another", "none", "twice", "moved")))
    if how == "odd":
        box[key] = data.draw(ODD)
    elif how == "of another":
        alike = [(b, k) for b, k in FIELDS if k == key] or FIELDS
        other, name = alike[data.draw(st.integers(0, len(alike) - 1))]
        box[key] = deepcopy(other[name])
    elif how == "none":
        del box[key]
    elif isinstance(box, list):
        value = box[key] if how == "twice" else box.pop(key)
        box.insert(data.draw(st.integers(0, len(box))), deepcopy(value))


@settings(max_examples=MORE)
@given(st.data())
def test_a_message_with_any_field_put_otherwise_is_no_manifest(data: st.DataObject) -> None:
    envelope = msgspec.msgpack.decode(data.draw(st.sampled_from(WIRES)))
    for _ in range(data.draw(st.integers(1, 2))):
        change(envelope[0], data)
    judge(msgspec.msgpack.encode(envelope))


# --- who signed, for whom -------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from((ME, "pi-1#aa", "pi-2#ab", "pi-1#", "pi-1#abc", "c1", "")),
    st.text("pi-12#abc", max_size=12),  # nearly the same, and put together from both
)


@given(NAMES, NAMES, st.sampled_from((INSTALL, GRANT)))
@example(ME, "c1", INSTALL)
@example(ME[:-1], ME[-1] + "c1", INSTALL)
@example(ME[1:], "c1" + ME[0], INSTALL)
def test_for_another_device_or_process_it_is_no_manifest(
    peer: str, coordinator: str, message: Any
) -> None:
    signed = sent(message, peer=peer, by=coordinator)
    assert loads(signed) == ((peer, coordinator) == (ME, "c1"))


@given(st.binary(min_size=32, max_size=32), st.sampled_from((INSTALL, GRANT)))
@example(bytes(range(32)), INSTALL)
def test_by_another_signer_it_is_no_manifest(secret: bytes, message: Any) -> None:
    signed = sent(message, key=SigningKey.of(secret))
    assert loads(signed) == (SigningKey.of(secret).public == KEY.public)


@given(st.sampled_from(MINE), st.sampled_from(MINE + THEIRS), st.data())
def test_with_any_other_signature_it_is_no_manifest(
    message: Any, other: Any, data: st.DataObject
) -> None:
    own = message.signature
    first, second = own[:32], int.from_bytes(own[32:], "little")
    signature = data.draw(
        st.one_of(
            st.just(other.signature),
            st.binary(min_size=64, max_size=64),
            st.just(own[32:] + own[:32]),
            st.just(first + other.signature[32:]),
            st.integers(1, 15).map(lambda n: first + ((second + n * ORDER) % 2**256).to_bytes(
                32, "little")),
            st.integers(0, 511).map(lambda bit: _with_bit(own, bit)),
        )
    )  # fmt: skip
    assume(signature != own)
    assert not loads(replace(message, signature=signature))


def _with_bit(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data) ^ 1 << bit).to_bytes(len(data))


@given(st.one_of(st.none(), st.binary(min_size=32, max_size=32)), st.sampled_from(MINE))
def test_where_the_signer_is_no_key_or_another_nothing_is_taken_and_nothing_breaks(
    public: bytes | None, message: Any
) -> None:
    """Most 32 bytes are no point of the curve; a welcome may say any."""
    assume(public is None or public.hex() != KEY.public)
    signer = replace(WELCOME, signer=None if public is None else public.hex())
    assert not loads(message, signer=signer)
