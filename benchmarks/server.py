"""The server's side: its own time for each call, its memory for each session, and where sessions fall."""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import sqrt
from typing import Any

import redis
from flask import Flask
from redis.crc import key_slot

from luasession import merge
from luasession.ids import HANDLE_BYTES, SessionId

from .least import Bare
from .peers import CACHED, COLD, RIVAL, VALIDATING, Peer
from .samples import Row
from .workloads import HUGE, LARGE, SHAPES, SMALL

_SLOTS = 16384
_LISTPACK = {"default": "64", "1024": "1024"}

COMMIT = "commit of one key"
#: What that takes at least: its four commands in a script that does nothing else.
BARE = "a commit's commands alone"
#: Added to either, where one follows the other on sessions in turn, as on a server that has much to do.
IN_A_ROW = ", in a row"
_ROW = 100
_BARE = """
redis.call('TIME')
redis.call('HMGET', KEYS[1], '@i', '@v', '@r', '@j')
redis.call('HSTRLEN', KEYS[1], 'count')
return redis.call('HSET', KEYS[1], '@v', ARGV[1], '@r', ARGV[2], '@j', ARGV[3], 'count', ARGV[4])
"""


@contextmanager
def servers(everyone: bool, fallback: str) -> Iterator[dict[str, str]]:
    """Run what kinds of servers the test suite finds; give their unix sockets by kind.

    :param fallback: the socket of a server that runs anyway, for where there is no test suite.
    """
    try:
        from tests.servers import available_kinds, standalone
    except ImportError:
        yield {"embedded": fallback}
        return
    with ExitStack() as stack:
        kinds = available_kinds() if everyone else available_kinds()[:1]
        yield {kind: stack.enter_context(standalone(kind)).socket_path for kind in kinds}


class _Clock:
    """What a server says of its own time."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def reset(self) -> None:
        self._client.config_resetstat()

    def spent(self, command: str) -> tuple[int, int]:
        """Return calls and microseconds of a command so far."""
        found: dict[str, Any] = self._client.info("commandstats").get(f"cmdstat_{command}", {})
        return found.get("calls", 0), found.get("usec", 0)

    def percentiles(self, command: str) -> Row:
        """Return P50 and P99 in microseconds, of servers that keep them (Redis 7, Valkey)."""
        try:
            found = self._client.info("latencystats").get(f"latency_percentiles_usec_{command}", {})
        except redis.ResponseError:
            found = {}
        if not found:
            return {}
        return {"p50": float(found["p50"]), "p99": float(found["p99"])}


def time_of(kind: str, socket: str, calls: int) -> list[Row]:
    """Count a server's own microseconds for a load, a commit and a merge round, on three shapes."""
    client = redis.Redis(unix_socket_path=socket, protocol=2)
    clock = _Clock(client)
    rows: list[Row] = []

    def add(what: str, shape: str, command: str, times: int, mean: float) -> None:
        row = {"server": kind, "what": what, "shape": shape, "command": command, "calls": times}
        rows.append({**row, "mean": round(mean, 2), **clock.percentiles(command)})

    for shape in (SMALL, LARGE, HUGE):
        few = max(5, calls // (10 if shape == HUGE else 1))
        # Flask-Session's parallel: one GET, one SET of all.
        for what, name, path, command in (
            ("load, cold", COLD, "/read", "hgetall"),
            ("load, unchanged", VALIDATING, "/read", "evalsha"),
            (COMMIT, CACHED, "/change", "evalsha"),
            ("blind commit", CACHED, "/write", "evalsha"),
            ("Flask-Session: load", RIVAL, "/read", "get"),
            ("Flask-Session: store", RIVAL, "/write", "setex"),
        ):
            peer = Peer(name, socket, SHAPES[shape])
            peer.call(path)
            clock.reset()
            for _ in range(few):
                peer.call(path)
            for actual in (command, "set"):  # versions of Flask-Session differ
                times, spent = clock.spent(actual)
                if times:
                    add(what, shape, actual, times, spent / times)
                    break
        if shape == SMALL:
            times, spent = _bare_commits(client, clock, peer, few)
            add(BARE, shape, "evalsha", times, spent / times)
            for what, times, spent in _in_a_row(client, clock, socket, SHAPES[shape], few):
                add(what + IN_A_ROW, shape, "evalsha", times, spent / times)
        times, spent = _merge_rounds(clock, socket, SHAPES[shape], max(5, few // 5))
        rows.append(
            {"server": kind, "what": "merge round", "shape": shape, "command": "evalsha", "calls": times}
            | {"mean": round(spent / times, 2)}
        )
    client.close()
    return rows


def _bare_commits(client: redis.Redis, clock: _Clock, peer: Peer, calls: int) -> tuple[int, int]:
    """Run the commands of a commit on a copy of a session; the app works in between, as it does otherwise."""
    ours = next(name for name in client.scan_iter("session:*") if client.hexists(name, "@r"))
    stored = client.hgetall(ours)
    client.hset("bare", mapping=stored)
    sha = client.script_load(_BARE)
    words = (stored[b"@v"], stored[b"@r"], stored[b"@j"], b"7")
    clock.reset()
    for _ in range(calls):
        client.evalsha(sha, 1, "bare", *words)
        peer.call("/untouched")
    return clock.spent("evalsha")


def _in_a_row(
    client: redis.Redis, clock: _Clock, socket: str, data: dict[str, Any], calls: int
) -> Iterator[tuple[str, int, int]]:
    """Have sessions changed in turn by one pipeline after another, and then their commands run as often."""
    app = Bare(Flask(__name__), socket)
    ids = [app.start({**data, "count": 0}) for _ in range(_ROW)]
    rounds = max(2, calls // _ROW)

    def run(what: str, words: Callable[[SessionId], tuple[bytes, ...]]) -> tuple[str, int, int]:
        clock.reset()
        for _ in range(rounds):
            row = client.pipeline(transaction=False)
            for each in ids:
                row.execute_command(*words(each))
            row.execute()
        return what, *clock.spent("evalsha")

    yield run(COMMIT, lambda each: app.commit_words(each, None, ("count", 1)).command)
    sha = client.script_load(_BARE).encode()
    keys = {each: app.commit_words(each, None, ("count", 1)).command[3] for each in ids}
    states = {each: client.hmget(key, "@v", "@r", "@j") for each, key in keys.items()}
    yield run(BARE, lambda each: (b"EVALSHA", sha, b"1", keys[each], *states[each], b"7"))


def _merge_rounds(clock: _Clock, socket: str, data: dict[str, Any], rounds: int) -> tuple[int, int]:
    """Let another browser come between; count what the request then spends: the conflict, and its answer."""
    peer, other = (Peer(CACHED, socket, data, SESSION_MERGE={"count": merge.add}) for _ in range(2))
    between: list[int] = []

    def come_between() -> None:
        before = clock.spent("evalsha")[1]
        other.call("/change", dict(peer.jar))
        between.append(clock.spent("evalsha")[1] - before)

    peer.flask.config["BETWEEN"] = come_between
    peer.call("/change")
    clock.reset()
    for _ in range(rounds):
        peer.call("/overlap")
    stats = peer.flask.extensions["luasession"].stats()
    if stats["merges"] < rounds:
        raise RuntimeError(f"{stats['merges']} merges in {rounds} overlaps")
    return rounds, clock.spent("evalsha")[1] - sum(between)


def memory(kind: str, socket: str) -> list[Row]:
    """Return the bytes of one session by shape, new and after 20 quick writes, with two settings."""
    client = redis.Redis(unix_socket_path=socket, protocol=2)
    rows: list[Row] = []
    for setting, bound in _LISTPACK.items():
        _bound_listpacks(client, bound)
        for shape, data in SHAPES.items():
            for name, prefix in ((RIVAL, "fs:"), (COLD, "session:")):
                client.flushdb()
                peer = Peer(name, socket, data, start="/plain")
                [key] = client.keys(f"{prefix}*")
                new = client.memory_usage(key, samples=0)
                for _ in range(20):
                    peer.call("/write")
                worn = client.memory_usage(key, samples=0)
                row = {"server": kind, "listpack": setting, "shape": shape, "peer": name}
                rows.append({**row, "new": new, "worn": worn})
    _bound_listpacks(client, _LISTPACK["default"])
    client.close()
    return rows


def _bound_listpacks(client: redis.Redis, size: str) -> None:
    # 6.2 knows it by its older name, the later ones by both.
    client.config_set("hash-max-ziplist-value", size)


def spread(handles: int, say: Callable[[str], None]) -> Row:
    """Draw handles, and return how evenly they fall on the slots of a cluster.

    ``z`` is chi-squared in standard deviations from what an even draw gives: within 3 all is well.
    """
    say(f"spreading {handles} handles over {_SLOTS} slots")
    counts = [0] * _SLOTS
    for _ in range(handles):
        text = urlsafe_b64encode(os.urandom(HANDLE_BYTES)).rstrip(b"=")
        counts[key_slot(b"session:" + text)] += 1
    even = handles / _SLOTS
    chi_squared = sum((count - even) ** 2 for count in counts) / even
    freedom = _SLOTS - 1
    return {
        "handles": handles,
        "slots": _SLOTS,
        "chi_squared": round(chi_squared, 1),
        "degrees_of_freedom": freedom,
        "z": round((chi_squared - freedom) / sqrt(2 * freedom), 2),
        "fullest_to_even": round(max(counts) / even, 3),
        "emptiest_to_even": round(min(counts) / even, 3),
    }
