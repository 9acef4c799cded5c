"""Contention: many requests on one session at the same moment; what is kept, and how long it takes.

The classical cure is a lock for each session, held for the whole request. Here that is Flask-Session
under redis-py's own ``Lock``, once looking often and, where each request sets a key of its own, once as it
comes: a waiter looks again every 100 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier
from time import perf_counter
from typing import Any

import redis

from luasession import merge

from .peers import CACHED, COOKIE, LOADED, RIVAL, Peer
from .samples import Row, median, summary
from .workloads import SHAPES, SMALL

LOCKED, TUNED = "Flask-Session under a Lock", "Flask-Session under a Lock, 5 ms"
#: By the names of the rows: which peer it is, and how often its lock looks, in seconds.
_CANDIDATES: dict[str, tuple[str, float | None]] = {
    COOKIE: (COOKIE, None),
    LOADED: (LOADED, None),
    RIVAL: (RIVAL, None),
    LOCKED: (RIVAL, 0.1),
    TUNED: (RIVAL, 0.005),
    CACHED: (CACHED, None),
}
#: What the requests change, and for how many milliseconds their views do something else meanwhile.
KINDS = ("own", "counter")
PAUSES = (0, 10)


class _Locked:
    """An app that serves one request of a session at a time."""

    def __init__(self, app: Callable[..., Iterable[bytes]], socket: str, sleep: float) -> None:
        self._app = app
        self._client = redis.Redis(unix_socket_path=socket, protocol=2)
        self._sleep = sleep

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        name = f"lock:{environ['HTTP_COOKIE']}"
        with self._client.lock(name, timeout=60, sleep=self._sleep):
            return list(self._app(environ, start_response))


def measure(socket: str, parallel: tuple[int, ...], rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Send all at once, ask what is kept, and so for each peer in turn, round by round."""
    peers = {}
    for title, (name, sleep) in _CANDIDATES.items():
        config = {"SESSION_MERGE": {"count": merge.add}} if name == CACHED else {}
        peers[title] = Peer(name, socket, SHAPES[SMALL], **config)
        if sleep is not None:
            peers[title].app = _Locked(peers[title].app, socket, sleep)
    rows: list[Row] = []
    names = count()
    for kind in KINDS:
        for pause in PAUSES:
            for many in parallel:
                say(f"contention: {many} parallel, {kind}, {pause} ms")
                titles = [title for title in peers if title != LOCKED or kind == KINDS[0]]
                found: dict[str, list[tuple[int, float, list[float]]]] = {title: [] for title in titles}
                with ThreadPoolExecutor(many) as pool:
                    for _ in range(rounds):
                        for title in titles:
                            found[title].append(_burst(peers[title], pool, many, kind, pause, names))
                rows += [
                    {"kind": kind, "pause_ms": pause, "parallel": many, "peer": title, **_row(bursts)}
                    for title, bursts in found.items()
                ]
    return rows


def _burst(
    peer: Peer, pool: ThreadPoolExecutor, many: int, kind: str, pause: int, names: count[int]
) -> tuple[int, float, list[float]]:
    peer.jar.clear()
    peer.call("/start")
    paths = [f"/{kind}/own{next(names)}/{pause}" for _ in range(many)]
    barrier = Barrier(many + 1)

    def click(path: str) -> float:
        barrier.wait()
        return peer.call(path)

    clicks = [pool.submit(click, path) for path in paths]
    barrier.wait()
    started = perf_counter()
    times = [each.result() for each in clicks]
    taken = perf_counter() - started
    peer.call("/kept")
    kept = int(peer.body.split()[KINDS.index(kind)])
    return kept, taken, times


def _row(bursts: list[tuple[int, float, list[float]]]) -> Row:
    kept, taken, times = zip(*bursts, strict=True)
    return {
        "kept_least": min(kept),
        "kept": median(kept),
        "seconds": round(median(taken), 6),
        **summary([value for burst in times for value in burst]),
    }
