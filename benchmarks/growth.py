"""Growth: what a request costs as the session gets larger, and as it gets more keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .peers import CACHED, COLD, FLOOR, LOADED, RIVAL, VALIDATING, Peer
from .samples import Row, summary

#: Whose growth is drawn.
PEERS = (FLOOR, LOADED, RIVAL, COLD, VALIDATING, CACHED)
_PATHS = {"read one key": "/read", "read, change": "/change"}


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
            for workload, path in _PATHS.items():
                for name, peer in peers.items():
                    peer.call(path)
                    series.setdefault((workload, name), []).extend(peer.call(path) for _ in range(calls))
        rows += [
            {"axis": axis, "size": size, "workload": workload, "peer": name, **summary(values)}
            for (workload, name), values in series.items()
        ]
    return rows
