"""Deltas: what counts as a change, what starts a session, and what a delta makes of a snapshot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luasession.delta import KEEP, KEPT, Change, Check, Delta, Draft, Put, Rotation
from luasession.snapshot import Snapshot

from .images import NOW_MS, identity, image, state

NAMES = st.sampled_from([b"a", b"b", b"c", b"@@d"])
CHANGES = st.none() | st.builds(Change, st.sampled_from([None, "ada", "bob"]))
TTLS = st.sampled_from([0, 0, 1, 500, KEEP, KEPT + NOW_MS, KEPT + NOW_MS + 600])
PUTS = st.builds(Put, st.sampled_from([b"1", b"2"]), st.sampled_from(Check), TTLS)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """What a request can make: no field is both set and deleted."""
    sets = draw(st.dictionaries(NAMES, PUTS, max_size=3))
    deletes = draw(st.dictionaries(NAMES, st.sampled_from(Check), max_size=3))
    return Delta(
        sets=sets,
        deletes={name: check for name, check in deletes.items() if name not in sets},
        cleared=draw(st.booleans()),
        permanent=draw(st.sampled_from([None, True, False])),
        lifetime_ms=draw(st.sampled_from([None, 0, 5000])),
        principal=draw(CHANGES),
        label=draw(CHANGES),
    )


class Model:
    """A session as one would write it down with dicts: fields, the moments they end at, attributes."""

    def __init__(self) -> None:
        self.now = NOW_MS
        self.fields: dict[bytes, tuple[bytes, int | None]] = {}
        self.attributes: dict[str, Any] = {"lifetime_ms": None, "principal": None, "label": None}

    def apply(self, delta: Delta) -> None:
        if delta.cleared:
            self.fields.clear()
            self.attributes = dict.fromkeys(self.attributes)
        before = dict(self.fields)
        # Whoever commits takes out what is past its end.
        self.fields = {
            name: (value, end)
            for name, (value, end) in self.fields.items()
            if name not in delta.deletes and (end is None or end > self.now)
        }
        for name, put in delta.sets.items():
            end = self.now + put.ttl_ms if put.ttl_ms else None
            if put.ttl_ms >= KEPT:
                _, end = before.get(name, (b"", None if put.ttl_ms == KEEP else put.ttl_ms - KEPT))
            if end is None or end > self.now:
                self.fields[name] = put.value, end
        if delta.lifetime_ms is not None:
            self.attributes["lifetime_ms"] = delta.lifetime_ms or None
        for name in ("principal", "label"):
            change = getattr(delta, name)
            if change:
                self.attributes[name] = change.value

    def matches(self, snapshot: Snapshot) -> bool:
        ends = {name: end for name, (_, end) in self.fields.items() if end is not None}
        attributes = {name: getattr(snapshot, name) for name in self.attributes}
        values = {name: value for name, (value, _) in self.fields.items()}
        return (snapshot.fields, snapshot.deadlines, attributes) == (values, ends, self.attributes)


@given(steps=st.lists(st.tuples(deltas(), st.sampled_from([0, 1, 400])), max_size=8))
def test_over_against_a_model(steps: list[tuple[Delta, int]]) -> None:
    """Laid over one another, deltas make what a plain dict model makes, ends of fields included."""
    model, snapshot = Model(), None
    for number, (delta, passes) in enumerate(steps, 1):
        model.now += passes
        model.apply(delta)
        snapshot = delta.over(snapshot, identity(), state(number), model.now)
        assert snapshot.version == number
        assert model.matches(snapshot), (model.fields, snapshot)


@given(first=deltas(), then=deltas())
def test_a_snapshot_is_not_changed_by_what_is_laid_over_it(first: Delta, then: Delta) -> None:
    """The base stays as it was: a request that works on it sees one version to its end (G4)."""
    base = first.over(None, identity(), state(1), NOW_MS)
    fields, deadlines = dict(base.fields), dict(base.deadlines)
    then.over(base, identity(), state(2), NOW_MS + 10_000)
    assert (dict(base.fields), dict(base.deadlines)) == (fields, deadlines)


@given(deltas(), deltas(), deltas(), st.integers(0, 2000))
def test_a_draft_changes_nothing(first: Delta, then: Delta, delta: Delta, later: int) -> None:
    """Whether it was drawn up for the snapshot that the delta met, for another one or for none: all is as without."""
    empty = Snapshot(identity(), state(1), {})
    met = first.over(empty, identity(), state(2), NOW_MS)
    about = (identity("new"), state(3), NOW_MS + later)
    for assumed in (met, then.over(met, identity(), state(9), NOW_MS), None):
        draft = Draft(delta)
        draft.draw(assumed)
        assert draft.over(met, *about) == delta.over(met, *about)


def test_over_takes_the_metadata_as_it_is_given() -> None:
    """Digest, version, size and permanence are those of the reply, not reckoned here."""
    changed = Delta(sets={b"a": Put(b"1")}, permanent=False).over(
        image(1, "old", a=b"0"), identity("new"), state(2, size=77, permanent=True), NOW_MS
    )
    assert (changed.identity, changed.version) == (identity("new"), 2)
    assert (changed.size, changed.permanent) == (77, True)


def test_a_field_set_again_without_an_end_stays() -> None:
    """Setting a key without a ttl takes its end away; deleting it does, too."""
    ending = Delta(sets={b"a": Put(b"1", ttl_ms=5), b"b": Put(b"1", ttl_ms=5)}).over(
        None, identity(), state(), NOW_MS
    )
    assert ending.deadlines == {b"a": NOW_MS + 5, b"b": NOW_MS + 5}
    then = Delta(sets={b"a": Put(b"2")}, deletes={b"b": Check.NONE})
    assert then.over(ending, identity(), state(2), NOW_MS + 1).deadlines == {}


@pytest.mark.parametrize(("passed", "there"), [(4, True), (5, False), (6, False)])
def test_an_end_is_past_from_its_millisecond_on(passed: int, there: bool) -> None:
    """A commit takes out what ends in its own millisecond, and leaves what ends in the next."""
    ending = Delta(sets={b"a": Put(b"1", ttl_ms=5)}).over(None, identity(), state(), NOW_MS)
    after = Delta(sets={b"b": Put(b"1")}).over(ending, identity(), state(2), NOW_MS + passed)
    assert (b"a" in after.fields, b"a" in after.deadlines) == (there, there)


@pytest.mark.parametrize(
    ("there", "then"),
    [(None, NOW_MS + 50), (Put(b"1"), None), (Put(b"1", ttl_ms=70), NOW_MS + 70)],
    ids=["gone", "no end", "another end"],
)
def test_an_end_that_is_known(there: Put | None, then: int | None) -> None:
    """It counts where the field is gone by now, and not where the field has an end, or none, from others."""
    base = Delta(sets={} if there is None else {b"a": there}).over(None, identity(), state(), NOW_MS)
    kept = Delta(sets={b"a": Put(b"2", ttl_ms=KEPT + NOW_MS + 50)})
    assert kept.over(base, identity(), state(2), NOW_MS).deadlines == ({b"a": then} if then else {})
    assert kept.over(base, identity(), state(2), NOW_MS).fields == {b"a": b"2"}
    late = kept.over(base, identity(), state(2), NOW_MS + 50)
    assert (b"a" in late.fields) is (there is not None)


def test_without_what_another_changes() -> None:
    """Whatever two deltas were made from, and however checked, what both change in the same way is left out."""
    one = Delta(sets={b"a": Put(b"1", Check.STRICT)}, deletes={b"b": Check.NONE}, label=Change("x"))
    read_since = one._replace(base=b"p" * 12, own=(b"w" * 8,), reads=None)
    left = read_since.without(one._replace(sets={b"a": Put(b"1")}, deletes={b"b": Check.STRICT}))
    assert not left
    assert left == Delta(base=b"p" * 12, own=(b"w" * 8,), reads=None)
    for more in (
        {"sets": {b"a": Put(b"2", Check.STRICT)}},
        {"sets": {b"a": Put(b"1", Check.STRICT, 60)}},
        {"sets": {b"c": Put(b"1")}},
        {"deletes": {b"d": Check.REPORT}},
        {"label": Change("y")},
        {"label": Change(None)},
        {"principal": Change("ada")},
        {"permanent": False},
        {"lifetime_ms": 0},
        {"rotation": Rotation()},
        {"cleared": True},
    ):
        assert one._replace(**more).without(one) == Delta(**more)


def test_without_a_field() -> None:
    """What becomes of one field is left out, set or deleted, and nothing else."""
    one = Delta(sets={b"a": Put(b"1"), b"b": Put(b"2")}, deletes={b"c": Check.NONE, b"d": Check.NONE})
    assert one.without_field(b"a") == one._replace(sets={b"b": Put(b"2")})
    assert one.without_field(b"c") == one._replace(deletes={b"d": Check.NONE})
    assert one.without_field(b"e") == one


CHANGING = {
    "set": Delta(sets={b"a": Put(b"")}),
    "deleted": Delta(deletes={b"a": Check.NONE}),
    "cleared": Delta(cleared=True),
    "rotated": Delta(rotation=Rotation()),
    "rotated, nothing in flight": Delta(rotation=Rotation(in_flight=False)),
    "not permanent": Delta(permanent=False),
    "no lifetime any more": Delta(lifetime_ms=0),
    "no principal any more": Delta(principal=Change(None)),
    "no label any more": Delta(label=Change(None)),
    "an empty label": Delta(label=Change("")),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_a_change(name: str) -> None:
    """Each part of a delta makes it one, the "none any more" of an attribute included."""
    assert CHANGING[name]


def test_what_was_read_is_no_change() -> None:
    """A base, own commits and reads do not make a delta (G2)."""
    assert not Delta()
    assert not Delta(base=b"p" * 12, own=(b"w" * 8,), reads=None)
    assert not Delta(reads=frozenset([b"a"]))


def test_what_starts_a_session() -> None:
    """A field, or a principal; no other attribute by itself, no deletion, and no end of a principal."""
    assert CHANGING["set"].creates
    assert Delta(principal=Change("ada")).creates
    assert Delta(principal=Change("")).creates
    assert [name for name, delta in CHANGING.items() if delta.creates] == ["set"]
