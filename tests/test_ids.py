"""Session ids: drawn, taken apart, rotated, and never shown."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from base64 import urlsafe_b64decode

import pytest

from luasession import ids
from luasession.ids import (
    SessionId,
    new_session_id,
    new_write_id,
    parse_session_id,
    same_digest,
)

LENGTHS = [16, 17, 18, 32, 33, 128]
ALPHABET = re.compile(r"[A-Za-z0-9_-]+")


def raw(text: str) -> bytes:
    """Return the bytes of URL-safe base64 without its padding."""
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_form(length: int) -> None:
    """128 bits of handle, a dot, as many bytes of secret as were asked for; safe in a cookie."""
    made = new_session_id(length)
    handle, dot, secret = made.sid.partition(".")
    assert (handle, dot, secret) == (made.handle, ".", made.secret)
    assert len(raw(handle)) == 16
    assert len(raw(secret)) == length
    assert ALPHABET.fullmatch(handle)
    assert ALPHABET.fullmatch(secret)


def test_all_bits_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handle, secret and write id come from the system's generator, each drawn anew, none cut short."""
    drawn: list[bytes] = []
    urandom = os.urandom

    def draw(count: int) -> bytes:
        drawn.append(urandom(count))
        return drawn[-1]

    monkeypatch.setattr(ids.os, "urandom", draw)
    made = new_session_id(32)
    assert [raw(made.handle), raw(made.secret)] == drawn
    rotated = made.rotated(32)
    assert raw(rotated.secret) == drawn[2]
    assert new_write_id() == drawn[3]
    assert [len(bits) for bits in drawn] == [16, 32, 32, 8]


def test_no_two_are_alike() -> None:
    """A thousand ids share neither handle nor secret, and a thousand write ids are different."""
    made = [new_session_id(16) for _ in range(1000)]
    assert len({one.handle for one in made}) == len({one.secret for one in made}) == 1000
    assert len({new_write_id() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("length", LENGTHS)
def test_parsed_back(length: int) -> None:
    """What was issued is parsed back to the same handle, secret and digest."""
    made = new_session_id(length)
    parsed = parse_session_id(made.sid, length)
    assert parsed is not None
    assert (parsed.handle, parsed.secret, parsed.digest) == (made.handle, made.secret, made.digest)


@pytest.mark.parametrize("length", LENGTHS)
def test_any_other_length_is_refused(length: int) -> None:
    """A secret of another length than this app's, or a handle of another length, is none."""
    sid = new_session_id(length).sid
    for cookie in (
        sid[:-1],
        sid + "A",
        sid[1:],
        "A" + sid,
        sid + "=",
        sid.replace(".", ""),
        sid.upper() + ".",
    ):
        assert parse_session_id(cookie, length) is None, cookie


@pytest.mark.parametrize(
    "letter", ["=", "+", "/", " ", "\n", "\x00", ".", "%", '"', "é", "\u0660", "\uff21", "\ud800"]
)
def test_any_other_letter_is_refused(letter: str) -> None:
    """A letter outside of the alphabet, wherever it stands, a digit of another script too."""
    sid = new_session_id(32).sid
    for place in (0, 5, 21, 23, 40, len(sid) - 1):
        assert parse_session_id(sid[:place] + letter + sid[place + 1 :], 32) is None
    assert parse_session_id(sid + letter, 32) is None
    assert parse_session_id(letter + sid, 32) is None


def test_the_digest() -> None:
    """Redis gets SHA-256 of the secret as it stands in the cookie; digests are compared whole."""
    one = SessionId("h" * 22, "s" * 43)
    assert one.digest == hashlib.sha256(b"s" * 43).digest()
    assert same_digest(one.digest, SessionId("x" * 22, "s" * 43).digest)
    for other in (b"", one.digest[:-1], one.digest + b"\x00", bytes(32), one.digest[::-1]):
        assert not same_digest(one.digest, other)


def test_digests_are_compared_in_constant_time() -> None:
    """The comparison is hmac.compare_digest."""
    assert same_digest is hmac.compare_digest


def test_rotated() -> None:
    """The handle stays, the secret is new, and the old id is what it was."""
    made = new_session_id(32)
    sid = made.sid
    rotated = made.rotated(32)
    assert rotated.handle == made.handle
    assert rotated.secret != made.secret
    assert rotated.digest != made.digest
    assert made.sid == sid
    assert parse_session_id(rotated.sid, 32) is not None


def test_no_text_form_shows_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    """repr, str, format and a log line name the handle and keep the secret."""
    made = new_session_id(32)
    with caplog.at_level(logging.INFO):
        logging.getLogger("luasession").info("%s %r", made, made)
    for text in (repr(made), str(made), f"{made}", repr([made]), caplog.text):
        assert made.handle in text
        assert made.secret not in text
