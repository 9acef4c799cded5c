"""Values: bytes and back, whatever the app's serializer does."""

from __future__ import annotations

from typing import Any

import pytest

from luasession import merge
from luasession.codec import make_serializer
from luasession.values import Values

VALUES = Values(make_serializer("json"))


class Odd:
    """A serializer of one's own that answers what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def dumps(self, value: Any) -> Any:
        return self.answer

    def loads(self, data: bytes) -> Any:
        raise RuntimeError(f"{len(data)} bytes are none of mine")


def test_what_cannot_be_stored_is_named() -> None:
    """The error of the serializer comes with the session key, as a TypeError or a ValueError."""
    with pytest.raises(TypeError, match=r"session\['key'\] cannot be stored: .*object"):
        VALUES.encode("key", object())
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(ValueError, match=r"session\['key'\] cannot be stored: nested too deeply"):
        VALUES.encode("key", deep)


def test_a_serializer_may_give_text_but_not_nothing() -> None:
    """Text is stored as UTF-8; no bytes at all would not be told from no value."""
    assert Values(Odd("\u00e9")).encode("key", 1) == b"\xc3\xa9"
    with pytest.raises(TypeError, match="no bytes"):
        Values(Odd(b"")).encode("key", 1)


def test_what_does_not_decode_is_missing() -> None:
    """None, broken bytes, and whatever a serializer of one's own raises all mean no value."""
    assert VALUES.decode(None) is merge.MISSING
    assert VALUES.decode(b"\xff") is merge.MISSING
    assert Values(Odd(b"1")).decode(b"1") is merge.MISSING
    assert VALUES.decode(b"[1]") == [1]


def test_the_same_value_in_other_bytes_is_the_same() -> None:
    """Bytes are compared, and those that differ by what they mean; what does not decode is no value."""
    assert VALUES.same(b"[1,2]", b"[1,2]")
    assert VALUES.same(b"[1,2]", b"[1, 2]")
    assert not VALUES.same(b"[1,2]", b"[2,1]")
    assert not VALUES.same(b"[1,2]", b"[1,")
