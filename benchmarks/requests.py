"""Requests: every workload on every shape, shapes and peers interleaved round by round."""

from __future__ import annotations

from collections.abc import Callable

from .limits import Limits
from .peers import COOKIE, LEAST, PEERS, Peer
from .samples import Row, summary
from .workloads import FRESH, HUGE, LARGE, SHAPES, STANDING


class _Requests:
    """All that is asked of sessions of one shape; on 100 KB and more these are the standing workloads."""

    def __init__(self, socket: str, shape: str) -> None:
        self._shape = shape
        self._large = shape in (LARGE, HUGE)
        # A browser keeps no cookie of 100 KB.
        names = [name for name in PEERS if not (self._large and name == COOKIE)]
        self._peers = {name: Peer(name, socket, SHAPES[shape]) for name in names}
        self._series: dict[tuple[str, str], list[float]] = {}

    def round(self, calls: int) -> None:
        """Call each workload of each peer so often."""
        for workload, path in STANDING.items():
            for name, peer in self._peers.items():
                if workload not in LEAST.get(name, STANDING):
                    continue
                peer.call(path)  # the first call after another peer's has its caches to fill
                self._add(workload, name, [peer.call(path) for _ in range(calls)])
        if self._large:
            return
        for workload, path in FRESH.items():
            for name, peer in self._peers.items():
                if name in LEAST:
                    continue
                peer.call("/untouched")
                self._add(workload, name, [_fresh(peer, path) for _ in range(calls)])

    def rows(self) -> list[Row]:
        """Return what was measured so far."""
        return [
            {"shape": self._shape, "workload": workload, "peer": name, **summary(values)}
            for (workload, name), values in self._series.items()
        ]

    def _add(self, workload: str, name: str, values: list[float]) -> None:
        self._series.setdefault((workload, name), []).extend(values)


def measure(
    socket: str, efforts: dict[str, tuple[int, int]], limits: Limits, say: Callable[[str], None]
) -> list[Row]:
    """Time all shapes in turn, the limits between them, so that one can be compared with another.

    :param efforts: rounds and calls by shape; fewer rounds are spread over the time of the most.
    """
    shapes = {shape: _Requests(socket, shape) for shape in efforts}
    most = max(rounds for rounds, _ in efforts.values())
    for number in range(most):
        say(f"requests, round {number + 1} of {most}")
        limits.round(max(1, limits.calls // most))
        for shape, (rounds, calls) in efforts.items():
            if number * rounds // most != (number + 1) * rounds // most:
                shapes[shape].round(calls)
    return [row for each in shapes.values() for row in each.rows()]


def _fresh(peer: Peer, path: str) -> float:
    jar: dict[str, str] = {}
    if path != "/start":
        peer.call("/start", jar)
    return peer.call(path, jar)
