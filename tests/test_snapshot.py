"""Snapshots: what the metadata says, which bytes are refused, and the three ways to the same image."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luasession import CorruptSession
from luasession.config import Config
from luasession.delta import Change, Check, Delta, Put
from luasession.ids import SessionId, new_session_id
from luasession.outcome import Applied, Standing
from luasession.snapshot import Snapshot, field_name, read_changes, read_hash, session_key
from luasession.store import Caller, Store
from luasession.visit import now_ns

from .images import NOW_MS, deadlines, digest_of, identity, image, state, write_id
from .servers import Server

# Names.

#: All that a str can hold, lone surrogates included, and many that begin with "@".
KEYS = st.text(st.characters() | st.characters(categories=["Cs"])) | st.text("@aé", max_size=4)


@given(key=KEYS)
def test_a_key_comes_back_from_its_field(key: str) -> None:
    """Escaping is undone exactly, and no field of a key is taken for metadata."""
    name = field_name(key)
    assert session_key(name) == key
    assert not (name.startswith(b"@") and not name.startswith(b"@@"))


@given(one=KEYS, other=KEYS)
def test_no_two_keys_share_a_field(one: str, other: str) -> None:
    """Different keys are different fields."""
    assert (field_name(one) == field_name(other)) == (one == other)


@pytest.mark.parametrize(
    ("key", "name"),
    [("a", b"a"), ("@", b"@@"), ("@i", b"@@i"), ("@@", b"@@@"), ("a@", b"a@"), ("", b""), ("é", b"\xc3\xa9")],
)
def test_only_a_leading_at_is_doubled(key: str, name: bytes) -> None:
    """A field is the key itself wherever it can be, for whoever reads HGETALL."""
    assert field_name(key) == name


@pytest.mark.parametrize("name", [b"@", b"@i", b"@v", b"@i@@", b"\xff", b"@@\xff", b"a\xc3"])
def test_what_is_no_key(name: bytes) -> None:
    """Metadata and names that are no text are nobody's keys."""
    assert session_key(name) is None


# What the metadata says.


def test_the_parts_of_the_metadata() -> None:
    """Each property reads its own bytes of ``@i`` and ``@v``."""
    snapshot = Snapshot(
        identity("mine", created_ms=NOW_MS - 1),
        state(
            7, by=b"write-id", touched_ms=NOW_MS - 2, ends_ms=NOW_MS - 3, size=4_000_000_000, permanent=True
        ),
        {},
    )
    assert snapshot.digest == digest_of("mine")
    assert snapshot.pair == b"\0\0\0\x07write-id"
    assert (snapshot.version, snapshot.size, snapshot.permanent) == (7, 4_000_000_000, True)
    moments = snapshot.created_ms, snapshot.touched_ms, snapshot.ends_ms
    assert moments == (NOW_MS - 1, NOW_MS - 2, NOW_MS - 3)
    assert Snapshot(identity(), state(permanent=False), {}).permanent is False


def test_no_log_line_shows_what_is_in_it() -> None:
    """The repr names the version, and neither fields nor digest."""
    assert repr(image(3, "secret", key=b"value")) == "<Snapshot of version 3>"


@pytest.mark.parametrize(("at", "there"), [(NOW_MS, True), (NOW_MS + 4, True), (NOW_MS + 5, False)])
def test_a_field_past_its_end_is_missing(at: int, there: bool) -> None:
    """From its millisecond on a field reads as missing, by name and in the list; the others stay."""
    snapshot = image(1, a=b"1", b=b"2")._replace(deadlines={b"a": NOW_MS + 5, b"never was": NOW_MS})
    assert snapshot.value(b"a", at) == (b"1" if there else None)
    assert list(snapshot.names(at)) == ([b"a", b"b"] if there else [b"b"])
    assert snapshot.value(b"b", at) == b"2"
    assert snapshot.value(b"never was", at) is None
    assert snapshot.value(b"nor this", at) is None


def test_newer_metadata_keeps_the_fields() -> None:
    """A confirmation changes identity and state, and nothing else; without a change it is the same object."""
    snapshot = image(1, a=b"1")._replace(principal="ada", deadlines={b"a": NOW_MS})
    assert snapshot.at(snapshot.identity, snapshot.state) is snapshot
    touched = state(1, touched_ms=NOW_MS + 9)
    newer = snapshot.at(identity("new"), touched)
    assert newer == snapshot._replace(identity=identity("new"), state=touched)
    assert newer.fields is snapshot.fields


# Reading a whole hash.


def whole(**metadata: bytes) -> dict[bytes, bytes]:
    """Return a hash of one field, its journal and ring included, with more metadata or other."""
    stored = {b"@i": identity(), b"@v": state(), b"@r": b"ring", b"@j": b"journal", b"a": b"1", b"@@b": b"2"}
    return stored | {b"@" + name.encode(): value for name, value in metadata.items()}


RARE = {
    "f": b"formers",
    "c": b"cleared",
    "e": b"5000",
    "p": "ключ".encode(),
    "l": b"\xed\xa0\x80",
    "x": deadlines({b"a": NOW_MS, b"@@b": 1}),
}


def test_a_plain_hash() -> None:
    """Metadata goes, fields stay as they are, the rest is at its defaults."""
    assert read_hash(whole()) == Snapshot(identity(), state(), {b"a": b"1", b"@@b": b"2"})


def test_a_hash_with_everything() -> None:
    """What is used rarely is read where the state says that there is any of it, and never left a field."""
    snapshot = read_hash(whole(v=state(rare=True), **RARE))
    assert snapshot.fields == {b"a": b"1", b"@@b": b"2"}
    assert (snapshot.lifetime_ms, snapshot.principal, snapshot.label) == (5000, "ключ", "\ud800")
    assert snapshot.deadlines == {b"a": NOW_MS, b"@@b": 1}


@pytest.mark.parametrize("name", RARE)
def test_each_of_what_is_rare_may_be_missing(name: str) -> None:
    """Any one of it can be there without the others."""
    snapshot = read_hash(whole(v=state(rare=True), **{name: RARE[name]}))
    assert snapshot.fields == {b"a": b"1", b"@@b": b"2"}
    found = {
        "e": snapshot.lifetime_ms is not None,
        "p": snapshot.principal is not None,
        "l": snapshot.label is not None,
        "x": bool(snapshot.deadlines),
    }
    assert [key for key, there in found.items() if there] == [name] * (name in found)


WRONG_FORM = "does not have the right form"
CORRUPT: dict[str, tuple[dict[bytes, bytes], str]] = {
    "no identity": ({name: value for name, value in whole().items() if name != b"@i"}, "is incomplete"),
    "no state": ({name: value for name, value in whole().items() if name != b"@v"}, "is incomplete"),
    "nothing": ({}, "is incomplete"),
    "an empty identity": (whole(i=b""), "is incomplete"),
    "an empty state": (whole(v=b""), "is incomplete"),
    "a short identity": (whole(i=identity()[:-1]), WRONG_FORM),
    "a long identity": (whole(i=identity() + b"\0"), WRONG_FORM),
    "a short state": (whole(v=state()[:-1]), WRONG_FORM),
    "a long state": (whole(v=state() + b"\0"), WRONG_FORM),
    "an older format": (whole(i=identity(form=0)), WRONG_FORM),
    "a newer format": (
        whole(i=identity(form=2)),
        "of format 2, written by a newer luasession; this one reads format 1",
    ),
    "a lifetime that is no number": (whole(v=state(rare=True), e=b"soon"), "does not decode"),
    "a principal that is no text": (whole(v=state(rare=True), p=b"\xff"), "does not decode"),
    "a label that is no text": (whole(v=state(rare=True), l=b"\xff"), "does not decode"),
    "cut off deadlines": (whole(v=state(rare=True), x=RARE["x"][:-1]), "does not decode"),
    "a deadline without a name": (whole(v=state(rare=True), x=b"\0\0"), "does not decode"),
    "a deadline with a huge name": (whole(v=state(rare=True), x=b"\xff" * 20), "does not decode"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_no_session_is_refused(name: str) -> None:
    """Metadata that is cut off, missing or of another format is a CorruptSession that says which."""
    raw, words = CORRUPT[name]
    with pytest.raises(CorruptSession, match=words):
        read_hash(dict(raw))


@given(raw=st.dictionaries(st.sampled_from([*whole(), b"@e", b"@p", b"@x"]), st.binary(max_size=60)))
def test_any_bytes_are_read_or_refused(raw: dict[bytes, bytes]) -> None:
    """Whatever is stored, nothing but a CorruptSession comes out of it."""
    try:
        snapshot = read_hash({b"@i": identity(), b"@v": state(rare=True), **raw})
    except CorruptSession:
        return
    assert snapshot.version >= 0


@pytest.mark.parametrize("cut", range(len(RARE["x"])))
def test_no_cut_of_the_deadlines_is_taken_for_fewer(cut: int) -> None:
    """Cut off anywhere but between two of them they are refused, never read as other moments."""
    raw = whole(v=state(rare=True), x=RARE["x"][:cut])
    first = len(deadlines({b"a": NOW_MS}))
    if cut in (0, first):
        assert read_hash(raw).deadlines == ({b"a": NOW_MS} if cut else {})
    else:
        with pytest.raises(CorruptSession):
            read_hash(raw)


# Reading changes.


def test_changes_are_laid_over_the_base() -> None:
    """New values replace, nulls delete, what is not named stays, and the base is left as it was."""
    base = image(1, a=b"1", b=b"2", c=b"3")
    reply = [
        identity("new"),
        state(2),
        None,
        None,
        None,
        None,
        b"a",
        b"9",
        b"b",
        None,
        b"d",
        b"4",
        b"x",
        None,
    ]
    changed = read_changes(base, reply)
    assert changed == Snapshot(identity("new"), state(2), {b"a": b"9", b"c": b"3", b"d": b"4"})
    assert base == image(1, a=b"1", b=b"2", c=b"3")


def test_changes_replace_what_is_rare() -> None:
    """Attributes and ends of fields are those of the reply, also where it has none any more."""
    base = image(1, a=b"1")._replace(lifetime_ms=1, principal="ada", label="x", deadlines={b"a": NOW_MS})
    plain = read_changes(base, [identity(), state(2), None, None, None, None])
    assert (plain.lifetime_ms, plain.principal, plain.label, dict(plain.deadlines)) == (None, None, None, {})
    ends = deadlines({b"a": NOW_MS + 1})
    other = read_changes(base, [identity(), state(2), b"2", b"bob", b"y", ends])
    assert (other.lifetime_ms, other.principal, other.label) == (2, "bob", "y")
    assert other.deadlines == {b"a": NOW_MS + 1}


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param([None, state(2), None, None, None, None], id="no identity"),
        pytest.param([identity(), None, None, None, None, None], id="no state"),
        pytest.param([identity(form=2), state(2), None, None, None, None], id="newer format"),
        pytest.param([identity(), state(2), b"x", None, None, None], id="lifetime"),
        pytest.param([identity(), state(2), None, None, None, None, None, b"1"], id="no name"),
    ],
)
def test_changes_that_are_none(reply: list[bytes | None]) -> None:
    """What a sound script cannot have sent is refused."""
    with pytest.raises(CorruptSession):
        read_changes(image(), reply)


# Three ways to one image: a delta laid over what it replaced, the changes since any version, the whole.

NAMES = st.sampled_from([b"a", b"b", b"c", b"@@d", "é".encode()])
VALUES = st.binary(min_size=1, max_size=5) | st.binary(min_size=60, max_size=70)
PUTS = st.builds(Put, VALUES, ttl_ms=st.sampled_from([0, 0, 0, 1, 1, 60_000]))
CHANGES = st.none() | st.builds(Change, st.sampled_from([None, "ada", "\ud800"]))


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    sets = draw(st.dictionaries(NAMES, PUTS, max_size=3))
    deletes = draw(st.sets(NAMES, max_size=2)) - sets.keys()
    return Delta(
        sets=sets,
        deletes=dict.fromkeys(deletes, Check.NONE),
        cleared=draw(st.sampled_from([False, False, False, True])),
        permanent=draw(st.sampled_from([None, True, False])),
        lifetime_ms=draw(st.sampled_from([None, 0, 90_000])),
        principal=draw(CHANGES),
        label=draw(CHANGES),
    )


class Sessions:
    """Sessions of one app, and the caller that asks for them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.prefix = f"t{uuid4().hex[:8]}:"
        self.store = Store(Config(redis_url=server.url, key_prefix=self.prefix), "snapshots")

    @property
    def caller(self) -> Caller:
        return self.store.caller(now_ns(), 60_000)

    def stored(self, session_id: SessionId) -> Snapshot:
        with self.server.client() as client:
            raw: Any = client.hgetall(self.prefix + session_id.handle)
        return read_hash(raw)

    def commit(self, session_id: SessionId, delta: Delta, *, create: bool = False) -> Applied:
        applied = self.store.commit(session_id, delta, self.caller, create=create)
        assert isinstance(applied, Applied)
        return applied


@pytest.fixture(scope="module")
def sessions(server: Server) -> Sessions:
    return Sessions(server)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(steps=st.lists(deltas(), max_size=8))
def test_three_ways_to_one_image(sessions: Sessions, steps: list[Delta]) -> None:
    """After each commit over(), the changes since every earlier version, and HGETALL make the same snapshot."""
    session_id = new_session_id(32)
    applied = sessions.commit(session_id, Delta(sets={b"first": Put(b"1")}), create=True)
    images = [sessions.stored(session_id)]
    assert applied.snapshot == images[0]
    for delta in steps:
        applied = sessions.commit(session_id, delta)
        now = sessions.stored(session_id)
        assert delta.over(images[-1], applied.identity, applied.state, applied.now_ms) == now
        assert applied.snapshot == now
        assert now.size == sum(len(name) + len(value) for name, value in now.fields.items())
        assert now.deadlines.keys() <= now.fields.keys()
        for base in images:
            loaded = sessions.store.confirm(session_id, base, sessions.caller)
            assert loaded.standing is Standing.LIVE
            assert loaded.snapshot == now
        images.append(now)
    assert [image.version for image in images] == list(range(1, len(steps) + 2))


def test_the_images_of_these_tests_are_those_of_a_server(sessions: Sessions) -> None:
    """What stands for a server's metadata in tests without one is byte for byte what commit.lua writes."""
    session_id = new_session_id(32)
    put = Put(b"value", ttl_ms=5000)
    applied = sessions.commit(session_id, Delta(sets={b"name": put}, permanent=True), create=True)
    stored = sessions.stored(session_id)
    assert stored.identity == identity(session_id.secret, created_ms=applied.now_ms)
    committed_us = int.from_bytes(stored.state[12:19])
    assert committed_us // 1000 == applied.now_ms
    assert stored.state == state(
        1,
        by=applied.write_id,
        committed_us=committed_us,
        touched_ms=applied.now_ms,
        ends_ms=applied.now_ms + 60_000,
        size=9,
        permanent=True,
        rare=True,
        fields=1,
    )
    assert stored.pair == (1).to_bytes(4) + applied.write_id
    with sessions.server.client() as client:
        assert client.hget(sessions.prefix + session_id.handle, "@x") == deadlines(
            {b"name": applied.now_ms + 5000}
        )
    assert len(write_id(1)) == len(applied.write_id)
