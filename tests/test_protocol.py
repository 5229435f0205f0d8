"""The codec: what goes in comes out, and whatever else comes in is a ``ProtocolError``."""

from __future__ import annotations

import math
import random
import tracemalloc
import types
import typing
from dataclasses import MISSING, fields, is_dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshinfer import limits
from meshinfer.errors import BY_NAME, InvalidInput, MeshInferError, QueueFull
from meshinfer.geometry import Interval
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import (
    DTYPES,
    ProtocolError,
    array_of,
    decode,
    describe,
    encode,
    error_of,
    failure_of,
    header_bytes,
    payload_of,
)

MESSAGES = typing.get_args(m.AnyMessage)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
ONE = m.Ack(ids=(7,))


def made(kind: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Values of a field's type, within its bounds."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, meta = typing.get_args(kind)[:2]
        if meta.pattern:
            return st.binary(min_size=32, max_size=32).map(bytes.hex)
        if inner is int:
            top = meta.le if meta.le is not None else 1 << 40
            least = meta.ge if meta.ge is not None else meta.gt + 1
            return st.integers(least, min(top, 1 << 62))
        if inner is float:
            return st.floats(0, 1e9 if meta.le is None else min(meta.le, 1e9))
        if inner is str and meta.min_length == 40:
            return st.just("k" * 40)
        if inner is bytes:
            return st.binary(min_size=meta.min_length or 0, max_size=max(8, meta.min_length or 0))
        if inner is str:
            return st.text(st.characters(codec="utf-8"), min_size=meta.min_length or 0, max_size=8)
        return made(inner)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return st.lists(made(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(made(a) for a in arguments))
    if origin is dict:
        return st.dictionaries(made(arguments[0]), made(arguments[1]), max_size=2)
    if arguments:  # a union with None
        return st.one_of(*(made(a) for a in arguments))
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(-1, 100)
    if kind is float:
        return st.floats(0, 1e9)
    if kind is str:
        return st.text(st.characters(codec="utf-8"), max_size=8)
    if kind is Interval:
        return st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda p: Interval(*p))
    assert issubclass(kind, msgspec.Struct) or is_dataclass(kind), kind
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: made(hint) for name, hint in hints.items() if name[0] != "_"})


def raw(document: object, *more: bytes) -> list[bytes]:
    return [msgspec.msgpack.encode(document), *more]


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@given(st.data())
def test_every_message_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    message = data.draw(made(kind))
    back, payload = decode([bytes(f) for f in encode(message)])
    assert back == message and type(back) is kind
    assert len(payload) == 0
    assert header_bytes(message) == pytest.approx(len(encode(message)[0]), abs=1)


def test_all_messages_are_in_the_union() -> None:
    assert {k for k in vars(m).values() if isinstance(k, type) and issubclass(k, m.Message)} == {
        m.Message,
        *MESSAGES,
    }


@pytest.mark.parametrize("size", [0, 1, limits.FRAME_BYTES, limits.FRAME_BYTES + 1, 3_000_000])
def test_a_payload_comes_back_in_frames_that_are_not_too_long(size: int) -> None:
    body = random.Random(size).randbytes(size)
    frames = encode(ONE, body)
    assert all(len(frame) <= limits.FRAME_BYTES for frame in frames)
    assert bytes(decode([bytes(f) for f in frames])[1]) == body


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_an_array_comes_back_read_only(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(math.prod(shape)).reshape(shape) % 2).astype(dtype)
    message = m.Feed(id=1, request="r", tensor=describe("x", array))
    back, payload = decode([bytes(f) for f in encode(message, payload_of(array))])
    assert isinstance(back, m.Feed)
    found = array_of(back.tensor, payload)
    assert found.dtype == array.dtype and found.shape == shape
    assert np.array_equal(found, array)
    assert not shape or not found.flags.writeable


def test_a_strided_array_travels_in_its_own_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, 1:5].T
    assert np.array_equal(array_of(describe("x", array), payload_of(array)), array)


def test_an_array_that_lies_unaligned_in_a_frame_is_made_usable() -> None:
    body = memoryview(b"\0" + np.arange(4, dtype="<f8").tobytes())[1:]
    found = array_of(m.Tensor(name="x", dtype="<f8", shape=(4,)), body)
    assert found.flags.aligned and found.tolist() == [0, 1, 2, 3]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        [{"type": "Ack", "ids": [1], "more": 2}, 0, 0],
        [{"type": "Ack"}, 0, 0],
        [{"type": "Ack", "ids": [-1]}, 0, 0],
        [{"type": "Ack", "ids": ["1"]}, 0, 0],
        [{"type": "Ack", "ids": [1] * (limits.ACKS_AT_ONCE + 1)}, 0, 0],
        [{"type": "Nonsense", "id": 1}, 0, 0],
        [{"id": 1}, 0, 0],
        [{"type": "Ack", "ids": [1]}, 0, 0, 0],
        {"message": {"type": "Ack", "ids": [1]}},
        [{"type": "Gone", "digest": "A" * 64}, 0, 0],
        [{"type": "Gone", "digest": "a" * 64 + "\n"}, 0, 0],
        [{"type": "Release", "request": ""}, 0, 0],
        [{"type": "Release", "request": "r" * 513}, 0, 0],
        [{"type": "Want", "digest": "a" * 64, "offset": 0, "length": 1 << 40}, 0, 0],
        [{"type": "Heartbeat", "since_s": math.nan}, 0, 0],
        [{"type": "Heartbeat", "since_s": math.inf}, 0, 0],
        [{"type": "Heartbeat", "since_s": -1.0}, 0, 0],
        None,
        [],
        b"",
        7,
    ],
)
def test_a_header_that_is_no_message_is_refused(document: object) -> None:
    with pytest.raises(ProtocolError):
        decode(raw(document))


def test_a_hello_of_a_later_release_is_read_so_that_it_can_be_refused_with_a_text() -> None:
    hello = m.Hello(role="worker", device="d", incarnation="1", cluster="c", protocol=(7, 9))
    document = msgspec.msgpack.decode(encode(hello)[0])
    document[0]["colour"] = "red"
    document[0]["facts"]["wings"] = 2
    back, _ = decode(raw(document))
    assert isinstance(back, m.Hello) and back.protocol == (7, 9)


def test_a_deadline_is_a_finite_number() -> None:
    submit = m.Submit(
        request="r", model="m", version=None, inputs=(), picture=False, deadline_s=math.nan
    )
    with pytest.raises(ProtocolError):
        decode([bytes(f) for f in encode(submit)])


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"\x00" * (limits.CONTROL_FRAME_BYTES + 1)],
        [b"\x91" * 100_000],
        [encode(ONE)[0], b"more than was announced"],
        [b"x"] * (limits.FRAMES_PER_MESSAGE + 1),
    ],
    ids=["none", "empty", "invalid", "long", "deep", "more", "many"],
)
def test_frames_that_are_no_message_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


def test_a_frame_that_is_too_long_is_refused() -> None:
    frames = encode(ONE, bytes(limits.FRAME_BYTES * 2))
    with pytest.raises(ProtocolError, match="too long"):
        decode([bytes(frames[0]), b"".join(frames[1:])])


@pytest.mark.parametrize("place", range(0, 4000, 97))
def test_a_flipped_bit_in_a_payload_is_found(place: int) -> None:
    head, body = (bytearray(f) for f in encode(ONE, random.Random(1).randbytes(4000)))
    body[place] ^= 1 << place % 8
    with pytest.raises(ProtocolError, match="checksum"):
        decode([bytes(head), bytes(body)])


@given(st.data())
def test_damaged_frames_are_refused_or_still_a_message(data: st.DataObject) -> None:
    """Flipped, cut, lengthened, dropped and doubled: nothing but ``ProtocolError`` comes of it."""
    kind = data.draw(st.sampled_from(MESSAGES))
    body = data.draw(st.binary(max_size=50))
    frames = [bytearray(f) for f in encode(data.draw(made(kind)), body)]
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(frames) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "add", "drop", "double"])):
            case "flip" if frames[i]:
                frames[i][data.draw(st.integers(0, len(frames[i]) - 1))] ^= 1 << data.draw(
                    st.integers(0, 7)
                )
            case "cut":
                del frames[i][data.draw(st.integers(0, len(frames[i]))) :]
            case "add":
                frames[i] += data.draw(st.binary(max_size=9))
            case "drop" if len(frames) > 1:
                del frames[i]
            case "double":
                frames.insert(i, bytearray(frames[i]))
    try:
        message, payload = decode([bytes(f) for f in frames])
    except ProtocolError:
        return
    assert isinstance(message, MESSAGES)
    tensor = getattr(message, "tensor", None)
    if isinstance(tensor, m.Tensor):
        try:
            array_of(tensor, payload)
        except ProtocolError:
            pass


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode([noise])


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("<f4", (2, 3), 23),
        ("<f4", (2, 3), 28),
        ("<f4", (), 0),
        ("<f4", (0,), 4),
        ("<f4", (1 << 62, 4), 64),
        ("<f4", (0, 1 << 62, 1 << 62), 0),
        (">f4", (2,), 8),
        ("|O", (1,), 8),
        ("<U4", (1,), 16),
        ("|V8", (1,), 8),
        ("<c8", (1,), 8),
        ("nonsense", (1,), 8),
    ],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(
    dtype: str, shape: tuple[int, ...], size: int
) -> None:
    with pytest.raises(ProtocolError):
        array_of(m.Tensor(name="x", dtype=dtype, shape=shape), memoryview(bytes(size)))


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([None])])
def test_an_array_that_cannot_travel_is_a_value_error(array: np.ndarray) -> None:
    with pytest.raises(ValueError):
        describe("x", array)


def test_a_header_that_lies_about_sizes_allocates_nothing() -> None:
    huge = m.Tensor(name="x", dtype="<f8", shape=(1 << 20, 1 << 20))
    message = m.Feed(id=1, request="r", tensor=huge)
    header = msgspec.msgpack.encode([msgspec.to_builtins(message), 1 << 50, 0])
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode([header, bytes(8)])
    with pytest.raises(ProtocolError):
        array_of(huge, memoryview(bytes(8)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("value", [2, 128, 255])
def test_a_truth_value_is_0_or_1(value: int) -> None:
    """Kernels may index a table by it."""
    tensor = m.Tensor(name="x", dtype="|b1", shape=(3,))
    assert array_of(tensor, memoryview(bytes((0, 1, 1)))).tolist() == [False, True, True]
    with pytest.raises(ProtocolError, match="truth"):
        array_of(tensor, memoryview(bytes((0, 1, value))))


def long_headers(kind: typing.Any, wrap: typing.Any, depth: int = 0) -> typing.Iterator[object]:
    """Documents of a message in which one list or map is as long as it may be, or as
    the header may."""
    inner, most = bare(kind), longest(kind)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    room = limits.CONTROL_FRAME_BYTES >> 6  # the share is the same, and the test is soon done
    if depth > 7:
        return
    if origin is tuple and arguments[1:] == (Ellipsis,):
        least = smallest(arguments[0])
        yield wrap([least] * min(room // len(msgspec.msgpack.encode(least)), most))
        yield from long_headers(arguments[0], lambda v: wrap([v]), depth + 1)
    elif origin is dict:
        each = 9 + len(msgspec.msgpack.encode(smallest(arguments[1])))
        count = min(room // each, most)
        yield wrap({f"{i:08}": smallest(arguments[1]) for i in range(count)})
    elif origin is tuple or is_union(inner):
        for i, argument in enumerate(arguments):
            around = [smallest(a) for a in arguments] if origin is tuple else []

            def placed(value: object, i: int = i, around: list[object] = around) -> object:
                return wrap([*around[:i], value, *around[i + 1 :]] if around else value)

            yield from long_headers(argument, placed, depth + 1)
    elif isinstance(inner, type) and (issubclass(inner, msgspec.Struct) or is_dataclass(inner)):
        base = smallest(inner)
        for name, hint in typing.get_type_hints(inner, include_extras=True).items():
            if name[0] != "_":
                yield from long_headers(hint, lambda v, n=name: wrap({**base, n: v}), depth + 1)


def bare(kind: typing.Any) -> typing.Any:
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def longest(kind: typing.Any) -> int:
    metas = kind.__metadata__ if typing.get_origin(kind) is typing.Annotated else ()
    return min((meta.max_length for meta in metas if meta.max_length is not None), default=1 << 30)


def is_union(kind: typing.Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def smallest(kind: typing.Any) -> typing.Any:
    """The shortest document of a type."""
    metas = kind.__metadata__ if typing.get_origin(kind) is typing.Annotated else ()
    inner = bare(kind)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is typing.Literal:
        return arguments[0]
    if origin is tuple:
        return [] if arguments[1:] == (Ellipsis,) else [smallest(a) for a in arguments]
    if is_union(inner):
        return None if type(None) in arguments else smallest(arguments[0])
    if inner in (bool, int, float, bytes, dict) or origin is dict:
        return {bool: False, int: 1, float: 0.0, bytes: b""}.get(inner, {})
    if inner is str:
        return "a" * max((64 if x.pattern else x.min_length or 0 for x in metas), default=0)
    if inner is Interval:
        return [0, 0]
    if issubclass(inner, msgspec.Struct):
        needed = [f.name for f in msgspec.structs.fields(inner) if f.required]
    else:
        needed = [f.name for f in fields(inner) if f.default is MISSING]
    hints = typing.get_type_hints(inner, include_extras=True)
    tag = {"type": inner.__name__} if issubclass(inner, m.Message) else {}
    return tag | {name: smallest(hints[name]) for name in needed}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_the_longest_header_becomes_a_bounded_amount_of_memory(kind: type) -> None:
    """Whatever is long in it. A tuple of two small numbers takes three bytes on the wire."""
    for document in long_headers(kind, lambda v: v):
        header = msgspec.msgpack.encode([document, 0, 0])
        if len(header) > limits.CONTROL_FRAME_BYTES:
            continue
        tracemalloc.start()
        message, _ = decode([header])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert type(message) is kind
        assert peak < 28 * max(len(header), 4096)


@pytest.mark.parametrize("count", [1 << 20, (1 << 32) - 1])
@pytest.mark.parametrize(
    ("name", "field", "head"),
    [
        ("TasksDone", "tasks", 0xDD), ("Start", "assigned", 0xDD), ("Deploy", "shapes", 0xDF),
        ("Hello", "role", 0xDB), ("Join", "secret", 0xC6), ("Hello", "unknown", 0xDD),
    ],
)  # fmt: skip
def test_a_list_or_text_that_claims_more_than_is_there_allocates_nothing(
    name: str, field: str, head: int, count: int
) -> None:
    parts = [msgspec.msgpack.encode(each) for each in ("type", name, field)]
    header = (
        b"\x93\x82" + b"".join(parts) + bytes((head,)) + count.to_bytes(4, "big") + b"\xc0" * 64
    )
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode([header])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def unbounded_texts(kind: typing.Any, where: str, seen: set[object]) -> typing.Iterator[str]:
    inner = bare(kind)
    metas = kind.__metadata__ if typing.get_origin(kind) is typing.Annotated else ()
    arguments = typing.get_args(inner)
    if inner in (str, bytes):
        if not any(meta.max_length or meta.pattern for meta in metas):
            yield where
    elif arguments and typing.get_origin(inner) is not typing.Literal:
        for each in arguments:
            yield from unbounded_texts(each, where, seen)
    elif isinstance(inner, type) and issubclass(inner, msgspec.Struct) and inner not in seen:
        seen.add(inner)
        for name, hint in typing.get_type_hints(inner, include_extras=True).items():
            yield from unbounded_texts(hint, f"{inner.__name__}.{name}", seen)


def test_every_text_of_a_message_has_a_bound() -> None:
    seen: set[object] = set()
    assert [w for kind in MESSAGES for w in unbounded_texts(kind, kind.__name__, seen)] == []
    assert m.Facts in seen
    bad = msgspec.defstruct("Bad", [("text", str)])
    assert list(unbounded_texts(bad, "", set())) == ["Bad.text"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_an_error_arrives_as_what_it_was(name: str) -> None:
    error = BY_NAME[name]("what", hint="do that")
    back = error_of(failure_of(error))
    assert type(back) is BY_NAME[name] and (back.message, back.hint) == ("what", "do that")


def test_when_to_try_again_arrives_too() -> None:
    back = error_of(failure_of(QueueFull("full", retry_after_s=2.5)))
    assert isinstance(back, QueueFull) and back.retry_after_s == 2.5


def test_an_unknown_or_foreign_error_is_a_plain_one() -> None:
    assert type(error_of(m.Failure(error="New", message="x"))) is MeshInferError
    assert "KeyError" in failure_of(KeyError("x")).message


@pytest.mark.parametrize(
    "text", ["x" * (3 << 20), "\\" * (1 << 20), "\U0001f600" * (1 << 20), "\ud800"]
)
def test_an_error_that_quotes_anything_still_travels(text: str) -> None:
    """Else nobody would hear of it, and wait."""
    for error in (InvalidInput(text, hint=text), ValueError(text)):
        reply = m.Reply(request="r", failure=failure_of(error))
        back, _ = decode([bytes(f) for f in encode(reply)])
        assert isinstance(back, m.Reply) and back.failure is not None
        assert text[:1000].encode("utf-8", "backslashreplace").decode() in back.failure.message
