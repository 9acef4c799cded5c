"""The ledger: what is read, what changes, and what of it becomes a delta; without Redis or Flask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from luasession import merge
from luasession.codec import make_serializer
from luasession.delta import KEPT, Change, Check, Delta, Put
from luasession.ledger import Ledger
from luasession.outcome import Applied, Conflicting
from luasession.policy import Policies
from luasession.snapshot import Snapshot, field_name
from luasession.values import Values

from .images import NOW_MS, identity, image, state, write_id

CODEC = make_serializer("json")


def raw(value: Any) -> bytes:
    encoded = CODEC.dumps(value)
    return encoded if isinstance(encoded, bytes) else encoded.encode()


def holding(version: int = 1, /, **values: Any) -> Snapshot:
    """Return a snapshot of these values."""
    return image(version, **{key: raw(value) for key, value in values.items()})


class Source:
    """Gives one snapshot, and counts how often it is asked for it."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.snapshot = snapshot
        self.loads = 0
        self.now_ms = NOW_MS
        self.corrupted: list[tuple[str, str]] = []

    def load(self) -> Snapshot | None:
        self.loads += 1
        return self.snapshot

    def open(self, name: bytes, stored: bytes) -> bytes:
        return stored

    def corrupt(self, key: str, error: Exception) -> None:
        self.corrupted.append((key, type(error).__name__))


def ledger_of(
    snapshot: Snapshot | None, policy: Any = "overwrite", *, source: Source | None = None, **by_key: Any
) -> Ledger:
    return Ledger(source or Source(snapshot), Values(CODEC), Policies(policy, by_key))


def resolved(ledger: Ledger, ours: Delta, current: dict[bytes, bytes | None], **more: Any) -> Delta:
    conflicting = Conflicting(holding(7).pair, current, more.pop("everything", False))
    return ledger.conflicts.resolve(
        ours, more.pop("sent", ours), conflicting, ledger.conflicts.find(ours, current)
    )


def changes(ledger: Ledger) -> dict[str, Any]:
    """Return what the delta sets and deletes, decoded."""
    delta = ledger.delta()
    sets = {name.decode(): CODEC.loads(put.value) for name, put in delta.sets.items()}
    return sets | {name.decode(): merge.MISSING for name in delta.deletes}


# Reading.


def test_one_snapshot_for_all_reads() -> None:
    """It is loaded at the first read and never again, nor where it is not needed (G4)."""
    source = Source(holding(a=1, b=2))
    ledger = ledger_of(None, source=source)
    ledger.set("c", 3)
    assert (source.loads, ledger.loaded) == (0, None)
    assert (ledger.get("c"), source.loads) == (3, 0)
    assert (ledger.get("a"), ledger.get("b"), list(ledger.keys())) == (1, 2, ["a", "b", "c"])
    with pytest.raises(KeyError, match="d"):
        ledger.get("d")
    assert source.loads == 1
    assert ledger.loaded is source.snapshot


def test_no_session_is_asked_for_once() -> None:
    """That there is none is known after the first read, too."""
    source = Source(None)
    ledger = ledger_of(None, source=source)
    for _ in range(3):
        with pytest.raises(KeyError):
            ledger.get("a")
    assert list(ledger.keys()) == []
    assert source.loads == 1


def test_a_value_is_decoded_once() -> None:
    """The same object comes back each time, so that a change in place is seen by later reads."""
    ledger = ledger_of(holding(cart=[1]))
    ledger.get("cart").append(2)
    assert ledger.get("cart") == [1, 2]


def test_two_first_reads_hold_one_value() -> None:
    """Who reads a key for the first time while another thread does holds the same object: both changes count."""
    source = Source(holding(cart=[]))
    ledger = ledger_of(None, source=source)
    original, inside = source.open, False

    def open_slowly(name: bytes, stored: bytes) -> bytes:
        nonlocal inside
        if not inside:
            inside = True
            ledger.get("cart").append("theirs")
        return original(name, stored)

    source.open = open_slowly  # type: ignore[method-assign]
    ledger.get("cart").append("ours")
    assert inside
    assert changes(ledger) == {"cart": ["theirs", "ours"]}


def test_a_key_that_is_set_while_it_is_handed_out() -> None:
    """Set to something else by another thread just then, it has what was set, and its end, once committed too."""
    ledger = ledger_of(holding(cart=[]))

    class Interrupted(dict[str, Any]):
        def __setitem__(self, key: str, given: Any) -> None:
            ledger.set("cart", 5, 60_000)
            super().__setitem__(key, given)

    ledger._given = Interrupted()
    ledger.get("cart")
    ledger._given = dict(ledger._given)
    delta = ledger.delta()
    assert {name: (put.value, put.ttl_ms) for name, put in delta.sets.items()} == {b"cart": (raw(5), 60_000)}
    settle(ledger, version=2)
    assert not ledger.delta()


@pytest.mark.parametrize("key", [1, None, b"a", ("a",)])
def test_what_is_no_str_is_missing(key: Any) -> None:
    """A key that no session can have is missing, and costs no load."""
    source = Source(holding(a=1))
    with pytest.raises(KeyError):
        ledger_of(None, source=source).get(key)
    assert source.loads == 0


def test_a_corrupt_key_reads_as_missing() -> None:
    """It is reported once, left out of the keys, and left as it is by what changes other keys."""
    source = Source(image(1, good=raw(1), bad=b"\xff{"))
    ledger = ledger_of(None, source=source)
    for _ in range(2):
        with pytest.raises(KeyError, match="bad"):
            ledger.get("bad")
    assert list(ledger.keys()) == ["good"]
    assert [key for key, _ in source.corrupted] == ["bad"]
    ledger.set("good", 2)
    assert changes(ledger) == {"good": 2}
    ledger.set("bad", 3)
    assert changes(ledger) == {"good": 2, "bad": 3}


def test_no_memory_is_no_corrupt_key() -> None:
    """Where there is no memory to decode a value it is not taken for missing, and so not for one to be replaced."""

    class Full:
        dumps = staticmethod(CODEC.dumps)

        def loads(self, _raw: bytes) -> Any:
            raise MemoryError

    source, values = Source(holding(a=[1])), Values(Full())
    with pytest.raises(MemoryError):
        Ledger(source, values, Policies("overwrite", {})).get("a")
    assert source.corrupted == []
    with pytest.raises(MemoryError):
        values.decode(b"[1]")


def test_metadata_and_foreign_names_are_no_keys() -> None:
    """What holds no session key is not listed; a key with an @ is, under its own name."""
    snapshot = image(1)._replace(fields={b"@@i": raw(1), b"\xff": raw(2), b"a": raw(3)})
    ledger = ledger_of(snapshot)
    assert list(ledger.keys()) == ["@i", "a"]
    assert ledger.get("@i") == 1


def test_a_key_past_its_end_is_missing() -> None:
    """The moment of the load decides for the whole request: a key does not vanish half-way."""
    source = Source(holding(a=1, b=2)._replace(deadlines={b"a": NOW_MS, b"b": NOW_MS + 1}))
    ledger = ledger_of(None, source=source)
    assert list(ledger.keys()) == ["b"]
    source.now_ms += 100
    assert ledger.get("b") == 2
    with pytest.raises(KeyError):
        ledger.get("a")


# Changing.


def test_setting_what_is_there_is_no_change() -> None:
    """As read in this request, it is none (G2); blindly, it counts."""
    ledger = ledger_of(holding(a=1))
    ledger.set("a", 1)
    assert changes(ledger) == {"a": 1}
    ledger.get("a")
    assert changes(ledger) == {"a": 1}, "it was blind when it was set, and is read from what was set"
    ledger = ledger_of(holding(a=1, b=1))
    ledger.get("a")
    ledger.set("a", 1)
    assert not ledger.delta()
    ledger.set("b", 1)
    assert changes(ledger) == {"b": 1}, "a snapshot that was loaded for another key makes it no less blind"
    ledger.set("a", True)
    assert changes(ledger)["a"] is True


def test_a_change_in_place_is_one() -> None:
    """A mutable value that was handed out is compared with what it was, and back again it is none (G1)."""
    ledger = ledger_of(holding(cart=[1], deep={"a": [{}]}))
    assert not ledger.may_have_changed()
    ledger.get("cart").append(2)
    ledger.get("deep")["a"][0]["b"] = ()
    assert ledger.may_have_changed()
    assert ledger.changed()
    assert changes(ledger) == {"cart": [1, 2], "deep": {"a": [{"b": ()}]}}
    ledger.get("cart").pop()
    assert changes(ledger) == {"deep": {"a": [{"b": ()}]}}


def test_bytes_of_another_writer_are_no_change() -> None:
    """A value stored in another spelling of the same is neither changed by reading nor by setting it."""
    ledger = ledger_of(image(1, cart=b"[1,  2]", a=b'"\\u0061"'))
    assert ledger.get("cart") == [1, 2]
    assert ledger.get("a") == "a"
    ledger.set("a", "a")
    assert not ledger.delta()
    assert not ledger.is_pending("cart")


def test_deleting() -> None:
    """What is there is deleted once and then missing; what is missing is a KeyError, and no change."""
    ledger = ledger_of(holding(a=1))
    with pytest.raises(KeyError, match="b"):
        ledger.delete("b")
    ledger.delete("a")
    with pytest.raises(KeyError, match="a"):
        ledger.delete("a")
    assert changes(ledger) == {"a": merge.MISSING}
    assert list(ledger.keys()) == []


def test_set_and_deleted_again_where_it_was_not() -> None:
    """Known to be missing it needs no deletion; not looked at, it does."""
    ledger = ledger_of(holding(a=1))
    assert "b" not in list(ledger.keys())
    ledger.set("b", 1)
    ledger.delete("b")
    assert not ledger.delta()
    blind = ledger_of(holding(a=1, b=5))
    blind.set("b", 1)
    blind.delete("b")
    blind.get("a")
    assert blind.delta().deletes == {b"b": Check.NONE}, (
        "never looked at, it is nothing to be in conflict about"
    )


def test_clearing_reads_nothing() -> None:
    """All before it is gone, only what is set after it counts, and no load is needed."""
    source = Source(holding(a=1))
    ledger = ledger_of(None, source=source)
    ledger.set("b", 1)
    ledger.clear()
    ledger.set("c", 1)
    assert list(ledger.keys()) == ["c"]
    with pytest.raises(KeyError):
        ledger.get("a")
    delta = ledger.delta()
    assert (delta.cleared, list(delta.sets), dict(delta.deletes), source.loads) == (True, [b"c"], {}, 0)
    ledger.delete("c")
    assert ledger.delta() == Delta(cleared=True)


def test_what_merge_functions_return_is_no_value() -> None:
    """``merge.MISSING`` under a key is refused as anything else that cannot be stored, and not left out."""
    ledger = ledger_of(None)
    ledger.set("gone", merge.MISSING)
    with pytest.raises(TypeError, match="'gone'"):
        ledger.delta()


def test_what_cannot_be_stored_names_its_key() -> None:
    """A TypeError with key and type; it counts as changed, so that somebody hears of it."""
    ledger = ledger_of(holding(cart=[]))
    ledger.get("cart").append(object())
    with pytest.raises(TypeError, match=r"session\['cart'\] cannot be stored: .*object"):
        ledger.delta()
    assert ledger.changed()


@pytest.mark.parametrize("change", ["set", "in place", "set again"])
def test_a_key_deleted_while_a_delta_is_made(change: str) -> None:
    """What another thread deletes meanwhile is in this delta or in the next one, and in none both ways."""
    steps: list[Callable[[], None]] = []

    class Meddling:
        """Has another thread come between two values."""

        def dumps(self, value: Any) -> Any:
            while steps:
                steps.pop()()
            return CODEC.dumps(value)

        loads = staticmethod(CODEC.loads)

    ledger = Ledger(Source(holding(b=[1])), Values(Meddling()), Policies("overwrite", {}))
    if change == "set again":
        ledger.delete("b")
    ledger.set("a", 1)
    if change == "set":
        ledger.set("b", 2)
    if change == "in place":
        ledger.get("b").append(2)
    steps.append(lambda: ledger.set("b", 3) if change == "set again" else ledger.delete("b"))
    first, second = changes(ledger), changes(ledger)
    after = {"a": 1, "b": 3 if change == "set again" else merge.MISSING}
    assert second == after
    assert first.keys() <= after.keys()
    assert first["a"] == 1


@pytest.mark.parametrize("given", ["", b""])
def test_a_serializer_that_gives_nothing(given: Any) -> None:
    """No bytes mean "missing" to the scripts, so a serializer may not give them."""

    class Empty:
        def dumps(self, value: Any, /) -> Any:
            return given

        def loads(self, data: bytes, /) -> Any:
            return None

    ledger = Ledger(Source(None), Values(Empty()), Policies("overwrite", {}))
    ledger.set("a", 1)
    with pytest.raises(TypeError, match=r"session\['a'\] cannot be stored: the serializer gave no bytes"):
        ledger.delta()


# The delta.


def put_of(delta: Delta, key: str) -> Put:
    return delta.sets[field_name(key)]


def test_the_base_is_the_snapshots_pair() -> None:
    """A delta that read has one; a blind one has none."""
    ledger = ledger_of(holding(3, a=1))
    ledger.set("b", 1)
    assert ledger.delta().base is None
    ledger.get("a")
    assert ledger.delta().base == holding(3).pair
    assert ledger.position == (holding(3).pair, ())


@pytest.mark.parametrize(
    ("policy", "strict", "check"),
    [
        ("overwrite", False, Check.REPORT),
        ("overwrite", True, Check.STRICT),
        ("raise", False, Check.STRICT),
        ("serializable", False, Check.STRICT),
        (merge.add, False, Check.STRICT),
        (merge.add, True, Check.STRICT),
    ],
)
def test_the_check_is_the_policys(policy: Any, strict: bool, check: Check) -> None:
    """Read and changed, a key is checked as its policy says; written without being read, never (G3)."""
    ledger = ledger_of(holding(a=1, b=1), policy)
    ledger.strict = strict
    ledger.set("blind", 1)
    ledger.set("a", ledger.get("a") + 1)
    ledger.delete("b")
    delta = ledger.delta()
    assert put_of(delta, "a").check is check
    assert delta.deletes == {b"b": check}
    assert put_of(delta, "blind").check is Check.NONE
    assert ledger.afresh().strict is strict


def test_what_was_missing_is_checked_too() -> None:
    """Whoever looked and found nothing has read: another's creation of the key is a conflict."""
    ledger = ledger_of(holding(), "raise")
    with pytest.raises(KeyError):
        ledger.get("a")
    ledger.set("a", 1)
    assert put_of(ledger.delta(), "a").check is Check.STRICT


def test_reads_count_where_all_do() -> None:
    """Serializable sends what was read and not changed, or all of it; nothing where nothing changed."""
    ledger = ledger_of(holding(a=1, b=1, c=1), "serializable")
    ledger.get("a")
    ledger.get("b")
    assert ledger.guarded(ledger.delta()).reads == frozenset()
    assert ledger.guarded(Delta(label=Change("x"))).reads == {b"a", b"b"}
    ledger.set("b", 2)
    assert ledger.guarded(ledger.delta()).reads == {b"a"}
    list(ledger.keys())
    assert ledger.guarded(ledger.delta()).reads is None
    for policy in ("overwrite", "raise"):
        other = ledger_of(holding(a=1), policy)
        other.set("b", other.get("a"))
        assert other.guarded(other.delta()).reads == frozenset()


def test_ends_of_keys() -> None:
    """Set with a ttl a key has it; changed in place it keeps its end; set anew without, it stays."""
    ends = {b"a": NOW_MS + 700, b"b": NOW_MS + 700}
    ledger = ledger_of(holding(a=[1], b=[1])._replace(deadlines=ends))
    ledger.get("a").append(2)
    ledger.get("b")
    ledger.set("b", [1])
    ledger.set("c", 1, ttl_ms=5)
    delta = ledger.delta()
    assert [put_of(delta, key).ttl_ms for key in "abc"] == [KEPT + NOW_MS + 700, 0, 5]


def test_one_key_of_a_delta() -> None:
    """The part about one key leaves the others for later."""
    ledger = ledger_of(holding(a=1, b=1))
    ledger.set("a", 2)
    ledger.delete("b")
    assert [ledger.is_pending(key) for key in "abc"] == [True, True, False]
    assert list(ledger.delta_of("a").sets) == [b"a"]
    assert not ledger.delta_of("a").deletes
    assert list(ledger.delta_of("b").deletes) == [b"b"]
    assert not ledger.delta_of("c")
    ledger.forget("a")
    assert (ledger.get("a"), ledger.is_pending("a")) == (1, False)


def test_a_whole_session_of_ones_own() -> None:
    """All that the request sees, with its own changes on top, ends and attributes included."""
    snapshot = holding(a=1, b=2, c=3, d=4)._replace(
        deadlines={b"c": NOW_MS + 50, b"d": NOW_MS}, principal="ada", label="phone", lifetime_ms=9
    )
    ledger = ledger_of(snapshot)
    ledger.delete("a")
    ledger.set("b", ledger.get("b") + 1)
    whole = ledger.whole(ledger.delta()._replace(label=Change("mine")))
    assert {name: CODEC.loads(put.value) for name, put in whole.sets.items()} == {b"b": 3, b"c": 3}
    assert whole.sets[b"c"].ttl_ms == KEPT + NOW_MS + 50
    assert (whole.principal, whole.label, whole.lifetime_ms) == (Change("ada"), Change("mine"), 9)
    assert (whole.deletes, whole.permanent) == ({}, False)
    changed = ledger.whole(ledger.delta()._replace(principal=Change("bob"), lifetime_ms=0, permanent=True))
    assert (changed.principal, changed.label) == (Change("bob"), Change("phone"))
    assert (changed.lifetime_ms, changed.permanent) == (0, True)
    cleared = ledger.delta()._replace(cleared=True)
    assert ledger.whole(cleared) is cleared


# Afterwards.


def applied(delta: Delta, base: Snapshot | None, *, version: int, replaced: bytes | None = None) -> Applied:
    """Return what a server answers to a delta; with ``replaced``, others were between."""
    now = state(version)
    return Applied(
        stored=delta,
        version=version,
        write_id=write_id(version),
        replaced=replaced or (base.pair if base else bytes(12)),
        snapshot=None,
        former=False,
        identity=identity(),
        state=now,
        touched=True,
        offered=False,
        expiry_changed=False,
        now_ms=NOW_MS,
        report={},
    )


def settle(ledger: Ledger, *, version: int, replaced: bytes | None = None, created: bool = False) -> None:
    delta = ledger.delta()
    outcome = applied(delta, ledger.loaded, version=version, replaced=replaced)
    ledger.settle(delta, delta, outcome, ledger.assignments, created=created)


def test_what_was_committed_is_no_change_any_more() -> None:
    """After a commit the delta is empty, what was set reads as set, and the base is the commit's own pair."""
    ledger = ledger_of(holding(a=[1], b=1, c=1))
    ledger.get("a").append(2)
    ledger.set("b", 2)
    ledger.delete("c")
    settle(ledger, version=2)
    assert not ledger.delta()
    assert (ledger.get("a"), ledger.get("b"), list(ledger.keys())) == ([1, 2], 2, ["a", "b"])
    assert ledger.position == (holding(2).pair, ())
    ledger.get("a").append(3)
    assert changes(ledger) == {"a": [1, 2, 3]}


def test_others_between_stay_unseen() -> None:
    """After a commit on top of somebody else's, the base stays and the own write id is noted (G4)."""
    ledger = ledger_of(holding(a=1))
    ledger.set("b", ledger.get("a"))
    settle(ledger, version=5, replaced=holding(4).pair)
    assert ledger.position == (holding(1).pair, (write_id(5),))
    assert list(ledger.keys()) == ["a", "b"]
    assert not ledger.delta()
    ledger.set("b", 2)
    settle(ledger, version=9, replaced=holding(8).pair)
    assert ledger.position == (holding(1).pair, (write_id(5), write_id(9)))


def test_after_a_clear_all_is_known() -> None:
    """Who cleared has seen everything up to his own commit, whatever others did before it."""
    source = Source(holding(1, a=1))
    ledger = ledger_of(None, source=source)
    ledger.get("a")
    ledger.clear()
    ledger.set("b", 2)
    settle(ledger, version=5, replaced=holding(4).pair)
    assert ledger.position == (holding(5).pair, ())
    assert list(ledger.keys()) == ["b"]
    assert not ledger.cleared


def test_a_blind_commit_loads_nothing() -> None:
    """What was written without reading leaves all else to be read when it is asked for."""
    source = Source(holding(2, a=1, b=2))
    ledger = ledger_of(None, source=source)
    ledger.set("b", 2)
    settle(ledger, version=2, replaced=holding(1).pair)
    assert (source.loads, ledger.loaded) == (0, None)
    assert ledger.get("a") == 1
    assert source.loads == 1


def test_a_created_session_is_known() -> None:
    """Who created it knows all of it, and asks nobody."""
    source = Source(None)
    ledger = ledger_of(None, source=source)
    ledger.set("a", 1)
    settle(ledger, version=1, created=True)
    assert list(ledger.keys()) == ["a"]
    assert (source.loads, ledger.position) == (0, (holding(1).pair, ()))


def test_what_was_merged_is_read_afresh() -> None:
    """A value that was merged with somebody else's reads as stored, not as this request had it."""
    ledger = ledger_of(holding(hits=1), merge.add)
    ledger.set("hits", ledger.get("hits") + 1)
    ours = ledger.delta()
    merged = resolved(ledger, ours, {b"hits": raw(5)})
    outcome = applied(merged, None, version=8, replaced=merged.base)
    ledger.settle(ours, merged, outcome, ledger.assignments, created=False)
    assert ledger.get("hits") == 6
    assert not ledger.delta()


# Against a dict.

KEYS = st.sampled_from(["a", "b", "@c"])
VALUES = st.sampled_from([0, 1, "x", [], [1], {"k": [1]}])


class AgainstADict(RuleBasedStateMachine):
    """A ledger and a plain dict that the same is done to; commits lay the delta over what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = holding(1, a=[1], b=0)
        self.version = 1
        self.ledger = ledger_of(self.stored)
        self.model: dict[str, Any] = {"a": [1], "b": 0}

    @rule(key=KEYS, value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.ledger.set(key, copy.deepcopy(value))
        self.model[key] = copy.deepcopy(value)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        expected = self.model.pop(key, None) is not None
        try:
            self.ledger.delete(key)
        except KeyError:
            assert not expected
        else:
            assert expected

    @rule(key=KEYS)
    def change_in_place(self, key: str) -> None:
        if isinstance(self.model.get(key), list):
            self.model[key].append(2)
            self.ledger.get(key).append(2)

    @rule()
    def clear(self) -> None:
        self.ledger.clear()
        self.model.clear()

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        try:
            found = self.ledger.get(key)
        except KeyError:
            found = None
        assert found == self.model.get(key)

    @rule()
    def list_all(self) -> None:
        assert sorted(self.ledger.keys()) == sorted(self.model)

    @rule()
    def commit(self) -> None:
        delta = self.ledger.delta()
        if not delta:
            return
        self.version += 1
        answer = applied(delta, self.stored, version=self.version)
        self.stored = delta.over(self.stored, answer.identity, answer.state, NOW_MS)
        self.ledger.settle(delta, delta, answer, self.ledger.assignments, created=False)
        self.ledger._source.snapshot = self.stored  # type: ignore[attr-defined]
        assert not self.ledger.delta()

    @invariant()
    def what_would_be_stored_is_the_model(self) -> None:
        after = self.ledger.delta().over(self.stored, identity(), state(99), NOW_MS)
        assert {name: CODEC.loads(value) for name, value in after.fields.items()} == {
            field_name(key): value for key, value in self.model.items()
        }


TestAgainstADict = AgainstADict.TestCase


@given(text=st.text(max_size=5))
def test_any_key_may_be_set(text: str) -> None:
    """Whatever text a key is, it is stored under its field and read under its name."""
    ledger = ledger_of(None)
    ledger.set(text, 1)
    settle(ledger, version=1, created=True)
    assert list(ledger.keys()) == [text]
    assert ledger.afresh().loaded is None
