"""Packing: a delta's arguments are those of commit.lua's header, and unpack to the same delta."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luasession.delta import Change, Check, Delta, Put, Rotation
from luasession.packing import pack_change, pack_delta

#: From ARGV[4] on, as the header of commit.lua has them.
ARGUMENTS = (
    *("sets", "base", "own", "deletes", "reads"),
    *("new_digest", "permanent", "lifetime", "principal", "label"),
)

NAMES = st.binary(min_size=1, max_size=20)
CHANGES = st.none() | st.builds(Change, st.none() | st.text(max_size=10))
DELTAS = st.builds(
    Delta,
    base=st.none() | st.binary(min_size=12, max_size=12),
    own=st.lists(st.binary(min_size=8, max_size=8), max_size=3).map(tuple),
    sets=st.dictionaries(
        NAMES,
        st.builds(Put, st.binary(max_size=30), st.sampled_from(Check), st.integers(0, (1 << 48) - 1)),
        max_size=4,
    ),
    deletes=st.dictionaries(NAMES, st.sampled_from(Check), max_size=4),
    reads=st.none() | st.frozensets(NAMES, max_size=4),
    cleared=st.booleans(),
    rotation=st.none() | st.builds(Rotation, st.booleans()),
    permanent=st.none() | st.booleans(),
    lifetime_ms=st.none() | st.integers(0, 1 << 45),
    principal=CHANGES,
    label=CHANGES,
)


class Reader:
    """Takes packed bytes apart as Lua's struct library does."""

    def __init__(self, packed: bytes) -> None:
        self.left = packed

    def __bool__(self) -> bool:
        return bool(self.left)

    def bytes(self, count: int) -> bytes:
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count, "cut off"
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size))

    def named(self) -> bytes:
        return self.bytes(self.number(4))


def items(packed: bytes, take: Any) -> Iterator[Any]:
    reader = Reader(packed)
    while reader:
        yield take(reader)


def one_set(reader: Reader) -> tuple[bytes, Put]:
    check, ttl_ms = Check(reader.number(1)), reader.number(6)
    name, value = reader.named(), reader.named()
    return name, Put(value, check, ttl_ms)


def one_delete(reader: Reader) -> tuple[bytes, Check]:
    check = Check(reader.number(1))
    return reader.named(), check


def change_of(packed: bytes) -> Change | None:
    if not packed:
        return None
    return Change(None) if packed == b"-" else Change(packed.removeprefix(b"=").decode())


@given(delta=DELTAS, digest=st.just(b"") | st.binary(min_size=32, max_size=32))
def test_what_is_packed_unpacks_to_the_same(delta: Delta, digest: bytes) -> None:
    """By the forms of the script's header the arguments give back every part that they carry, in order."""
    packed = pack_delta(delta, digest)
    given_back = dict(zip(ARGUMENTS, [*packed, *[b""] * (len(ARGUMENTS) - len(packed))], strict=True))
    assert given_back["base"] == (delta.base or b"")
    assert list(items(given_back["own"], lambda reader: reader.bytes(4))) == [own[:4] for own in delta.own]
    assert list(items(given_back["sets"], one_set)) == list(delta.sets.items())
    assert list(items(given_back["deletes"], one_delete)) == list(delta.deletes.items())
    if delta.reads is None:
        assert given_back["reads"] == b"*"
    else:
        assert sorted(items(given_back["reads"], Reader.named)) == sorted(delta.reads)
    assert given_back["new_digest"] == digest
    assert given_back["permanent"] == {None: b"", False: b"0", True: b"1"}[delta.permanent]
    assert given_back["lifetime"] == (b"" if delta.lifetime_ms is None else str(delta.lifetime_ms).encode())
    assert (change_of(given_back["principal"]), change_of(given_back["label"])) == (
        delta.principal,
        delta.label,
    )


@given(delta=DELTAS)
def test_what_is_empty_at_the_end_is_left_out(delta: Delta) -> None:
    """The last argument is never empty: what changes rarely costs nothing where it does not change."""
    packed = pack_delta(delta, b"")
    assert not packed or packed[-1]


def test_the_common_delta_is_two_arguments() -> None:
    """The fields set and a base, in exactly the bytes of the header; a blind write has no base either."""
    delta = Delta(base=b"pair-of-base", sets={b"name": Put(b"value", Check.STRICT, 5)})
    head = struct.pack(">B", 2) + (5).to_bytes(6)
    expected = head + struct.pack(">I4s", 4, b"name") + struct.pack(">I5s", 5, b"value")
    assert pack_delta(delta, b"") == [expected, b"pair-of-base"]
    assert pack_delta(delta._replace(base=None), b"") == [expected]


def test_nothing_is_no_argument() -> None:
    """An empty delta packs to nothing at all."""
    assert pack_delta(Delta(), b"") == []


def test_one_read_of_a_star_is_not_all_reads() -> None:
    """A field that is called ``*`` cannot be taken for "all of them"."""
    assert pack_delta(Delta(reads=frozenset([b"*"])), b"")[-1] == b"\0\0\0\1*"
    assert pack_delta(Delta(reads=None), b"")[-1] == b"*"


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        (None, b"-"),
        ("", b"="),
        ("-", b"=-"),
        ("=", b"=="),
        ("ключ", "=ключ".encode()),
        ("\ud800", b"=\xed\xa0\x80"),
    ],
)
def test_a_text_or_its_removal(text: str | None, packed: bytes) -> None:
    """No text, the empty one included, looks like a removal or like no change; lone surrogates pass."""
    assert pack_change(Change(text)) == packed
