"""Stats: counters that lose nothing to threads and are handed out as a copy."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from luasession.stats import Stats

NAMES = ["loads", "cache_hits", "commits", "conflicts", "merges", "discards", "script_reloads", "bytes"]


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads that take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_all_counters_are_there_from_the_start() -> None:
    """Each counter of the contract is there before anything happened, and is zero."""
    assert Stats().counts() == dict.fromkeys(NAMES, 0)


def test_the_docstring_names_each_counter() -> None:
    """What stats() is documented by speaks of every counter, and of nothing else in code type."""
    named = set(re.findall(r"``(\w+)``", Stats.__doc__ or ""))
    assert named == set(NAMES)


def test_one_and_its_bytes() -> None:
    """Each call counts one, and adds the bytes that travelled with it; without them none."""
    stats = Stats()
    stats.add("loads", 10)
    stats.add("loads", 5)
    stats.add("commits")
    assert stats.counts() == {**dict.fromkeys(NAMES, 0), "loads": 2, "commits": 1, "bytes": 15}


def test_an_unknown_counter_counts_nothing() -> None:
    """A misspelt name is a KeyError and leaves the bytes alone."""
    stats = Stats()
    with pytest.raises(KeyError, match="laods"):
        stats.add("laods", 7)
    assert stats.counts() == dict.fromkeys(NAMES, 0)


def test_what_is_handed_out_is_a_copy() -> None:
    """Changing the result changes no counter, and a later count does not change the result."""
    stats = Stats()
    counts = stats.counts()
    counts["loads"] = 99
    stats.add("commits")
    assert counts["commits"] == 0
    assert stats.counts()["loads"] == 0


class Slow(int):
    """A number whose addition lets other threads have their turn: what is not under a lock is torn."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return other + int(self)


def test_threads_lose_no_count(eager_switches: None) -> None:
    """Eight threads that count at once lose nothing, and whoever looks sees bytes that fit the count."""
    stats = Stats()
    barrier = threading.Barrier(9)
    torn: list[dict[str, int]] = []

    def count() -> None:
        barrier.wait(10)
        for _ in range(500):
            stats.add("loads", Slow(3))

    def look() -> None:
        barrier.wait(10)
        for _ in range(500):
            counts = stats.counts()
            if counts["bytes"] != 3 * counts["loads"]:
                torn.append(counts)

    with ThreadPoolExecutor(9) as threads:
        for done in [*(threads.submit(count) for _ in range(8)), threads.submit(look)]:
            done.result()
    assert torn == []
    assert stats.counts()["loads"] == 4000
    assert stats.counts()["bytes"] == 12_000
