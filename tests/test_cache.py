"""The cache: bounded by bytes, least recently used first, to the right secret only, safe under threads."""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
from cachetools import Cache
from hypothesis import given
from hypothesis import strategies as st

import luasession.cache
from luasession.cache import Entry, SnapshotCache
from luasession.delta import Delta, Draft, Put
from luasession.ids import SessionId
from luasession.snapshot import Snapshot

from .images import NOW_MS, identity, image, state

SECRET = "secret"
A = SessionId("a" * 22, SECRET)
#: The metadata of a commit.
METADATA = (identity(), state(2))
#: What a snapshot without fields costs.
EMPTY = luasession.cache._size(Entry(image(), 0))


def sized(size: int, version: int = 1) -> Snapshot:
    """Return a snapshot of one field whose names and values have so many bytes."""
    return image(version, SECRET, f=b"x" * (size - 1))


def makes(snapshot: Snapshot | None) -> Draft:
    """Return what stands for a draft that makes this snapshot of any, None for one that is never asked."""
    return cast("Draft", SimpleNamespace(over=lambda *_: snapshot or pytest.fail("asked")))


def held(cache: SnapshotCache, handle: str) -> bool:
    return cache.get(SessionId(handle, SECRET)) is not None


def bytes_held(cache: SnapshotCache) -> int:
    # Not by values(), which is use, and would change what goes next.
    places = cache._places
    return sum(luasession.cache._size(Cache.__getitem__(places, handle).entry) for handle in places)


# Who gets what.


def test_what_was_put_is_what_one_gets() -> None:
    """The snapshot comes back as the very object, with the moment of the call that confirmed it."""
    cache, snapshot = SnapshotCache(10_000), image(1, a=b"1")
    cache.put(A.handle, snapshot, 42)
    entry = cache.get(A)
    assert entry is not None
    assert entry.snapshot is snapshot
    assert entry.sent == 42


@pytest.mark.parametrize(
    "session_id",
    [
        SessionId(A.handle, "other"),
        SessionId(A.handle, ""),
        SessionId.without_secret(A.handle),
        SessionId("b" * 22, SECRET),
    ],
    ids=["other secret", "empty secret", "no secret", "other handle"],
)
def test_only_the_right_id_gets_a_snapshot(session_id: SessionId) -> None:
    """The digest is checked as Redis does: a handle, which may be logged, opens nothing (G11)."""
    cache = SnapshotCache(10_000)
    cache.put(A.handle, image(), 1)
    assert cache.get(session_id) is None
    assert cache.get(A) is not None


def test_after_a_rotation_the_new_secret_counts() -> None:
    """Advanced by a commit that rotated, an entry is the new secret's and no longer the old one's (G8)."""
    cache = SnapshotCache(10_000)
    cache.put(A.handle, image(1), 1)
    cache.advance(A.handle, image(1).pair, Draft(Delta()), (identity("new"), state(2)), NOW_MS, 2)
    assert cache.get(A) is None
    assert cache.get(SessionId(A.handle, "new")) is not None


def test_a_look_in_vain_takes_nothing_out() -> None:
    """Whoever guesses at a handle can neither read nor drop what is there."""
    cache = SnapshotCache(10_000)
    cache.put(A.handle, image(3), 1)
    for _ in range(3):
        assert cache.get(SessionId(A.handle, "wrong")) is None
    assert held(cache, A.handle)


# Which of two replies stays.


@pytest.mark.parametrize(
    ("version", "sent", "kept"),
    [
        pytest.param(4, 10, "held", id="older, asked for at the same moment"),
        pytest.param(4, 9, "held", id="older, asked for earlier"),
        pytest.param(4, 11, "put", id="older, asked for later: a failover took versions back"),
        pytest.param(5, 9, "put", id="the same version, asked for earlier"),
        pytest.param(5, 11, "put", id="the same version, asked for later"),
        pytest.param(6, 9, "put", id="newer, asked for earlier"),
        pytest.param(6, 11, "put", id="newer, asked for later"),
    ],
)
def test_two_loads_overlap(version: int, sent: int, kept: str) -> None:
    """The higher version stays if it was asked for no earlier; what was asked for later wins."""
    cache = SnapshotCache(10_000)
    cache.put(A.handle, image(5, SECRET, by=b"held"), 10)
    cache.put(A.handle, image(version, SECRET, by=b"put"), sent)
    entry = cache.get(A)
    assert entry is not None
    assert entry.snapshot.fields[b"by"].decode() == kept


# Commits.


def test_an_own_commit_advances_the_entry() -> None:
    """On top of the pair that it replaced, the new snapshot takes its place, with the moment of its call."""
    cache, base = SnapshotCache(10_000), image(1, a=b"1")
    cache.put(A.handle, base, 1)
    delta = Delta(sets={b"b": Put(b"2")})
    made = cache.advance(A.handle, base.pair, Draft(delta), METADATA, NOW_MS, 7)
    assert made is not None
    assert made.fields == {b"a": b"1", b"b": b"2"}
    entry = cache.get(A)
    assert entry is not None
    assert entry.snapshot is made
    assert entry.sent == 7


def test_foreign_changes_between_drop_the_entry() -> None:
    """An entry of another pair, be it of the same number, is dropped and never built on."""
    other = Snapshot(identity(), state(1, by=b"somebody"), {})
    for replaced in (other.pair, image(2).pair, bytes(12)):
        cache = SnapshotCache(10_000)
        cache.put(A.handle, image(1), 1)
        assert cache.advance(A.handle, replaced, makes(None), METADATA, NOW_MS, 2) is None
        assert not held(cache, A.handle)


def test_nothing_there_is_not_advanced() -> None:
    """Without an entry nothing is made, and nothing is put there."""
    cache = SnapshotCache(10_000)
    assert cache.advance(A.handle, image(1).pair, makes(None), METADATA, NOW_MS, 1) is None
    assert not held(cache, A.handle)


def test_drop_forgets_one() -> None:
    """Only the session in question goes; dropping what is not there is nothing."""
    cache = SnapshotCache(10_000)
    cache.put("a", image(), 1)
    cache.put("b", image(), 1)
    cache.drop("a")
    cache.drop("never")
    assert (held(cache, "a"), held(cache, "b")) == (False, True)


# Bytes.


def test_the_least_recently_used_goes_first() -> None:
    """Reading keeps an entry; of those not read the oldest goes when there is no room."""
    cache = SnapshotCache(3 * luasession.cache._size(Entry(sized(100), 0)))
    for handle in "abc":
        cache.put(handle, sized(100), 1)
    assert held(cache, "a")
    cache.put("d", sized(100), 1)
    assert [handle for handle in "abcd" if held(cache, handle)] == ["a", "c", "d"]


def test_a_peek_is_no_use() -> None:
    """What a commit looks at on its way keeps no entry: of those not read the oldest goes all the same."""
    cache = SnapshotCache(3 * luasession.cache._size(Entry(sized(100), 0)))
    for handle in "abc":
        cache.put(handle, sized(100), 1)
    assert cache.peek("a") == sized(100)
    assert cache.peek("never") is None
    cache.put("d", sized(100), 1)
    assert [handle for handle in "abcd" if held(cache, handle)] == ["b", "c", "d"]


def test_what_outgrows_the_cache_is_not_kept() -> None:
    """A snapshot larger than the whole cache is not held, nor the older one in its place, nor do others go."""
    cache = SnapshotCache(EMPTY * 2 + 1000)
    cache.put("small", image(), 1)
    cache.put(A.handle, sized(10), 1)
    cache.put(A.handle, sized(50_000, version=2), 2)
    assert not held(cache, A.handle)
    assert held(cache, "small")
    cache.put(A.handle, sized(10), 1)
    big = sized(50_000, version=2)
    assert cache.advance(A.handle, sized(10).pair, makes(big), METADATA, NOW_MS, 3) is big
    assert not held(cache, A.handle)


@pytest.mark.parametrize("max_bytes", [0, 1, EMPTY - 1])
def test_a_cache_without_room_holds_nothing(max_bytes: int) -> None:
    """A bound that not even an empty session fits in is kept to, without an error."""
    cache = SnapshotCache(max_bytes)
    cache.put(A.handle, image(), 1)
    assert not held(cache, A.handle)


def test_the_bound_covers_what_the_objects_cost() -> None:
    """A thousand fields of no content count as well: what is held costs no more than the bound says."""
    snapshot = Snapshot(identity(), state(1), {b"%d" % n: b"" for n in range(1000)})
    parts = [*snapshot.fields, *snapshot.fields.values()]
    real = sys.getsizeof(snapshot.fields) + sum(map(sys.getsizeof, parts))
    assert luasession.cache._size(Entry(snapshot, 0)) >= real


def test_label_and_principal_are_counted() -> None:
    """What the app has put under them counts as what it has stored under keys."""
    cache = SnapshotCache(100_000)
    for number in range(10):
        cache.put(f"{number:022}", image()._replace(label="x" * 30_000, principal="y" * 10_000), 0)
    assert sum(held(cache, f"{number:022}") for number in range(10)) == 2
    # Four bytes a character here.
    cache.put("wide".zfill(22), image()._replace(label="\U0001f9ca" * 24_000), 0)
    assert sum(held(cache, f"{number:022}") for number in range(10)) == 0


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("pgd"), st.sampled_from("abcdef"), st.integers(1, 2500)), max_size=40
    )
)
def test_against_a_model(steps: list[tuple[str, str, int]]) -> None:
    """Puts, gets and drops leave what an ordered dict bounded by bytes would hold, in the same order of use."""
    bound = EMPTY + 3000
    cache = SnapshotCache(bound)
    model: OrderedDict[str, int] = OrderedDict()
    for number, (step, handle, size) in enumerate(steps, 1):
        if step == "p":
            snapshot = sized(size, version=number)
            cost = luasession.cache._size(Entry(snapshot, number))
            cache.put(handle, snapshot, number)
            # Of the same size it only takes the other's place, which is no use.
            if model.get(handle) != cost:
                model.pop(handle, None)
            if cost <= bound and handle not in model:
                while sum(model.values()) + cost > bound:
                    model.popitem(last=False)
                model[handle] = cost
        elif step == "g":
            assert held(cache, handle) == (handle in model)
            if handle in model:
                model.move_to_end(handle)
        else:
            cache.drop(handle)
            model.pop(handle, None)
        assert set(cache._places) == set(model)
        assert bytes_held(cache) == cache._places.currsize <= bound


def test_an_entry_that_grows_is_counted_anew() -> None:
    """What takes up more is charged for it, and others go; of the same size one only takes the other's place."""
    step = luasession.cache._ROUNDED_TO
    cache = SnapshotCache(2 * luasession.cache._size(Entry(sized(100), 0)) + step)
    for handle in "ab":
        cache.put(handle, sized(100), 1)
    before = cache._places.currsize
    cache.put("a", sized(101, version=2), 2)
    assert cache._places.currsize == before == bytes_held(cache)
    cache.put("a", sized(100 + step, version=3), 3)
    assert cache._places.currsize == before + step == bytes_held(cache)
    cache.put("a", sized(100 + 2 * step, version=4), 4)
    assert [handle for handle in "ab" if held(cache, handle)] == ["a"]
    assert cache.peek("a") == sized(100 + 2 * step, version=4)


# Threads.


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads that take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_break_it(eager_switches: None) -> None:
    """Eight threads put, get, advance and drop at once: no error, and the books agree with what is there."""
    bound = 20 * EMPTY
    cache = SnapshotCache(bound)
    handles = [f"{n:022}" for n in range(40)]
    barrier = threading.Barrier(8)

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        barrier.wait(10)
        for n in range(1500):
            handle = chance.choice(handles)
            match chance.randrange(4):
                case 0:
                    cache.put(handle, sized(chance.randrange(1, 2000), n), n)
                case 1:
                    entry = cache.get(SessionId(handle, SECRET))
                    if entry is not None:
                        newer = sized(50, n)
                        cache.advance(handle, entry.snapshot.pair, makes(newer), METADATA, NOW_MS, n)
                case 2:
                    cache.get(SessionId(handle, SECRET))
                case _:
                    cache.drop(handle)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hammer, range(8)))
    assert bytes_held(cache) == cache._places.currsize <= bound
    for handle in handles:
        cache.drop(handle)
    assert (len(cache._places), cache._places.currsize) == (0, 0)


@pytest.mark.parametrize("_turn", range(20))
def test_no_two_advances_on_one_pair(eager_switches: None, _turn: int) -> None:
    """Of threads that advance the same entry at once one finds it, and the others drop what it left."""
    cache, base = SnapshotCache(100_000), image(1)
    cache.put(A.handle, base, 1)
    barrier = threading.Barrier(4)

    def advance(n: int) -> Snapshot | None:
        newer = Snapshot(identity(), state(2, by=b"%08d" % n), {})
        barrier.wait(10)
        return cache.advance(A.handle, base.pair, makes(newer), METADATA, NOW_MS, 2)

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(advance, range(4)))
    assert sum(snapshot is not None for snapshot in made) == 1
