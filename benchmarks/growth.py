"""Growth: what a request costs as the session gets larger, as it gets more keys, and among more sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peers import CACHED, COLD, DEFAULTS, FLOOR, LOADED, RIVAL, VALIDATING, Peer
from .population import Mix, Population
from .samples import PERCENTILES, Row, summary

#: Whose growth is drawn: of one session, and of many.
PEERS = (FLOOR, LOADED, RIVAL, COLD, VALIDATING, CACHED)
AMONG_MANY = (FLOOR, LOADED, RIVAL, COLD, DEFAULTS)
#: What is asked of a session that grows.
PATHS = {"read one key": "/read", "read, change": "/change"}


def _shapes() -> list[tuple[str, int, dict[str, Any]]]:
    sizes = [(size, {f"key{n}": "v" * (size // 10 - 2) for n in range(10)}) for size in _POWERS]
    keys = [(number, {f"key{n}": "v" * 38 for n in range(number)}) for number in (2, 10, 100, 1000, 10_000)]
    return [("bytes", *each) for each in sizes] + [("keys", *each) for each in keys]


_POWERS = (1000, 10_000, 100_000, 1_000_000)


def measure(socket: str, rounds: int, calls: int, say: Callable[[str], None]) -> list[Row]:
    """Time a read and a change for each size, in ten keys, and for each number of keys, of 40 bytes."""
    rows: list[Row] = []
    for axis, size, data in _shapes():
        say(f"growth: {size} {axis}")
        peers = {name: Peer(name, socket, data) for name in PEERS}
        series: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for workload, path in PATHS.items():
                for name, peer in peers.items():
                    peer.call(path)
                    series.setdefault((workload, name), []).extend(peer.call(path) for _ in range(calls))
        rows += [
            {"axis": axis, "size": size, "workload": workload, "peer": name, **summary(values)}
            for (workload, name), values in series.items()
        ]
    return rows


def among_many(
    population: Population,
    socket: str,
    counts: tuple[int, ...],
    effort: tuple[int, int],
    say: Callable[[str], None],
) -> list[Row]:
    """Time the mix over the first sessions of a population, for each count of them.

    Each count has new apps with empty caches; the browsers stay the same.
    """
    mix = Mix(population, socket, AMONG_MANY)
    rows: list[Row] = []
    for count in counts:
        say(f"growth: {count} sessions")
        rows += [{"axis": "sessions", "size": count, **row} for row in mix.run(*effort, count)]
    return rows


def above_floor(rows: list[Row]) -> list[Row]:
    """Return the rows of the mix among many sessions, each percentile as what it is above the floor's."""
    many = [row for row in rows if row["axis"] == "sessions"]
    floors = {row["size"]: row for row in many if row["peer"] == FLOOR}
    return [
        {**row, **{name: row[name] - floors[row["size"]][name] for name in PERCENTILES}}
        for row in many
        if row["peer"] != FLOOR
    ]
