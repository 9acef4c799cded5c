"""Requests: every workload on every shape, the peers interleaved round by round."""

from __future__ import annotations

from collections.abc import Callable

from .peers import COOKIE, PEERS, Peer
from .samples import Row, summary
from .workloads import FRESH, HUGE, LARGE, SHAPES, STANDING


def measure(socket: str, shape: str, rounds: int, calls: int, say: Callable[[str], None]) -> list[Row]:
    """Time all workloads that make sense on a shape; on 100 KB and more these are the standing ones."""
    large = shape in (LARGE, HUGE)
    # A browser keeps no cookie of 100 KB.
    names = [name for name in PEERS if not (large and name == COOKIE)]
    peers = {name: Peer(name, socket, SHAPES[shape]) for name in names}
    series: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        say(f"requests on {shape}, round {number + 1} of {rounds}")
        for workload, path in STANDING.items():
            for name, peer in peers.items():
                peer.call(path)  # the first call after another peer's has its caches to fill
                series.setdefault((workload, name), []).extend(peer.call(path) for _ in range(calls))
        if large:
            continue
        for workload, path in FRESH.items():
            for name, peer in peers.items():
                peer.call("/untouched")
                values = [_fresh(peer, path) for _ in range(calls)]
                series.setdefault((workload, name), []).extend(values)
    return [
        {"shape": shape, "workload": workload, "peer": name, **summary(values)}
        for (workload, name), values in series.items()
    ]


def _fresh(peer: Peer, path: str) -> float:
    jar: dict[str, str] = {}
    if path != "/start":
        peer.call("/start", jar)
    return peer.call(path, jar)
