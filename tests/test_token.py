"""A token says whom to trust and proves who may join; a damaged one is refused untold."""

import base64
import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshinfer.errors import AuthError
from meshinfer.protocol.token import (
    ROLES,
    SECRET_BYTES,
    Token,
    client_name,
    device_id,
    format_token,
    hash_of,
    parse_token,
    short_id,
)

KEY = "0123456789abcdefghijABCDEFGHIJ.-:+=^!/*?"
TOKEN = Token("default", "worker", KEY, b"s" * SECRET_BYTES, ("192.168.1.5:5041",))


@given(
    st.text("abcXYZ09-_", min_size=1, max_size=32),
    st.sampled_from(ROLES),
    st.sampled_from(["", KEY]),
    st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
    st.lists(st.text("0123456789.:", max_size=21), max_size=4),
)
def test_a_token_reads_back_as_it_was_written(cluster, role, key, secret, places):
    token = Token(cluster, role, key, secret, tuple(places))
    assert parse_token(format_token(token)) == token
    assert parse_token(f"  {token}\n") == token


@given(st.data())
def test_a_token_with_one_character_wrong_or_missing_is_refused(data):
    text = str(TOKEN)
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from([c for c in "ABCabc012-_." if c != text[at]]))
    whole = data.draw(
        st.sampled_from([text[:at] + other + text[at + 1 :], text[:at], text[at + 1 :]])
    )
    try:
        token = parse_token(whole)
    except AuthError as error:
        shown = f"{error.message} {error.hint}"
    else:
        assert token == TOKEN, "only bits that base64 leaves unused may differ"
        return
    assert whole[10:30] not in shown or len(whole) < 30


@pytest.mark.parametrize(
    "text", ["", "mi1.", "mi2.abcd", "mi1.~~~~", "mi1.\u00e9\u00e9", "mi1." + "A" * 5000]
)
def test_what_is_no_token_is_an_auth_error_with_a_hint(text):
    with pytest.raises(AuthError) as caught:
        parse_token(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "body", [b"", b"\x93\x01\x02\x03", b"\xc1", b"\x95\xa1d\xa4rootx\xc4\x00\x90"]
)
def test_a_token_of_other_fields_is_refused(body):
    data = base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:4]).rstrip(b"=")
    with pytest.raises(AuthError):
        parse_token("mi1." + data.decode())


def test_the_secret_is_in_no_repr():
    assert "ssss" not in repr(TOKEN)


def test_an_id_is_thirteen_groups_and_the_short_one_is_its_beginning():
    assert [len(group) for group in device_id(KEY).split("-")] == [4] * 13
    assert device_id(KEY).startswith(short_id(KEY))
    assert client_name(KEY) == f"client-{short_id(KEY)}"
    assert hash_of(b"a") != hash_of(b"b")


def sealed(body: bytes) -> str:
    """A token of these bytes, with the check that they ask for: anybody can make it."""
    data = base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:4]).rstrip(b"=")
    return "mi1." + data.decode()


PARTS = st.one_of(
    st.text(max_size=50), st.binary(max_size=20), st.integers(), st.none(), st.floats()
)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(PARTS, min_size=5, max_size=5).map(msgspec.msgpack.encode),
        st.tuples(st.text(max_size=40), st.sampled_from(ROLES), st.text(min_size=40, max_size=40),
                  st.just(b"s" * 16), st.lists(st.text(max_size=30), max_size=3))
        .map(msgspec.msgpack.encode),
    )
)  # fmt: skip
def test_whatever_is_sealed_is_a_token_or_refused(body):
    try:
        token = parse_token(sealed(body))
    except AuthError:
        return
    assert parse_token(str(token)) == token
    device_id(token.coordinator)


@pytest.mark.parametrize("place", range(14))
def test_text_that_is_no_utf8_is_refused(place):
    body = bytearray(msgspec.msgpack.encode(("default", "worker", KEY, b"s" * 16, ())))
    body[place + 1] = 0x95
    with pytest.raises(AuthError):
        parse_token(sealed(bytes(body)))


@pytest.mark.parametrize("key", ["\u00e9" * 40, "k" * 39 + "\n", "k" * 39 + " ", '"' * 40])
def test_a_key_that_is_no_z85_is_refused(key):
    with pytest.raises(AuthError):
        parse_token(str(Token("default", "worker", key, b"s" * SECRET_BYTES)))
