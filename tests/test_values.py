"""Values: bytes and back, whatever the app's serializer does."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest
from markupsafe import Markup

from luasession import merge
from luasession.codec import make_serializer
from luasession.values import Values, fingerprint

VALUES = Values(make_serializer("json"))


class Mode(IntEnum):
    """An int that is none of the exact type."""

    ON = 1


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


#: Values that are alike, and not the same: what takes the place of another one in a list is a change.
ALIKE: list[tuple[Any, ...]] = [
    (0, False, 0.0, -0.0, None, "", b"", [], (), {}, set(), frozenset()),
    (1, True, 1.0, "1", b"1", [1], (1,), {1}, frozenset({1}), {"1": 1}),
    (2**31, float(2**31), str(2**31)),
    (2**70, -(2**70), 2**70 + 1, float(2**70)),
    (float("inf"), float("-inf"), "inf"),
    ("a", "A", "a\0", "\udc61", b"a"),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}, {"a": 1, "b": 2.0}),
    ([[1], 2], [[1, 2]], [1, [2]], [(1,), 2]),
]


@pytest.mark.parametrize("alike", ALIKE, ids=lambda alike: repr(alike[0]))
def test_a_fingerprint_tells_values_apart(alike: tuple[Any, ...]) -> None:
    """Whatever is encoded otherwise has another fingerprint, and what is equal has the same."""
    for place, one in enumerate(alike):
        for other in alike[place + 1 :]:
            assert fingerprint([one]) != fingerprint([other]), (one, other)
            assert VALUES.encode("", [one]) != VALUES.encode("", [other]), (one, other)
        assert fingerprint([one]) == fingerprint([copy.deepcopy(one)])


def test_a_fingerprint_knows_no_names() -> None:
    """Who else holds a part, or whether a text is interned, makes no difference."""
    part = b"part".decode()
    before = fingerprint([part, [part]])
    others = [part, sys.intern(part)]
    assert fingerprint([others[1], [others[0]]]) == before == fingerprint([b"part".decode(), ["part"]])


@pytest.mark.parametrize(
    "value",
    [datetime(2026, 1, 1, tzinfo=UTC), Decimal(1), Markup("x"), Mode.ON, OrderedDict(a=1), object(), int],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_built_in_has_no_fingerprint(value: Any) -> None:
    """Other types, and subclasses, are compared by what they are encoded to, as is what contains itself."""
    assert fingerprint([value]) is None
    endless: list[Any] = []
    endless.append(endless)
    assert fingerprint(endless) is None
