"""``python -m benchmarks``: one table, peers interleaved round by round, ratios and percentiles."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import redis

from luasession import embedded

from .peers import PEERS, SHAPES, Peer


@dataclass(frozen=True)
class Summary:
    """Percentiles of one series, in microseconds."""

    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> Summary:
        ordered = sorted(value * 1e6 for value in seconds)
        return cls(*(ordered[min(int(len(ordered) * q), len(ordered) - 1)] for q in (0.5, 0.9, 0.99, 1.0)))


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _limits(socket: str, value: str) -> dict[str, Callable[[], object]]:
    client = redis.Redis(unix_socket_path=socket, protocol=2)
    client.hset("limit", mapping={f"key{n}": value for n in range(8)})
    return {
        "PING": client.ping,
        "HGETALL of 8 x 40 B": lambda: client.hgetall("limit"),
        "HSET of one field": lambda: client.hset("limit", "key1", value),
    }


def _print(title: str, rows: dict[str, Summary], floor: float, against: float) -> None:
    print(f"\n{title}")
    print(f"  {'':28}{'P50':>9}{'P90':>9}{'P99':>9}{'max':>10}{'above floor':>13}{'to Flask-Session':>18}")
    for name, row in rows.items():
        above = row.p50 - floor
        ratio = f"{above / against:.2f}" if against > 0 and "luasession" in name else ""
        print(
            f"  {name:28}{row.p50:9.1f}{row.p90:9.1f}{row.p99:9.1f}{row.most:10.1f}{above:13.1f}{ratio:>18}"
        )


def _requests(
    socket: str, shape: str, paths: list[str], rounds: int, calls: int
) -> dict[str, dict[str, Summary]]:
    peers = {
        name: Peer(name, socket, shape)
        for name in PEERS
        # A browser keeps no cookie of 100 KB.
        if not (name == "signed cookie" and shape != "8 x 40 B")
    }
    series: dict[str, dict[str, list[float]]] = {path: {name: [] for name in peers} for path in paths}
    for _ in range(rounds):
        for path in paths:
            for name, peer in peers.items():
                peer.call(path)  # the first call after another peer's has its caches to fill
                series[path][name] += [peer.call(path) for _ in range(calls)]
    return {
        path: {name: Summary.of(values) for name, values in rows.items()} for path, rows in series.items()
    }


def _memory(socket: str) -> dict[str, int]:
    client = redis.Redis(unix_socket_path=socket, protocol=2)
    sizes = {}
    for name, prefix in (("Flask-Session", "fs:"), ("luasession, cached", "session:")):
        client.flushdb()
        peer = Peer(name, socket, "8 x 40 B")
        key = client.keys(f"{prefix}*")[0]
        sizes[f"{name.partition(',')[0]}, new"] = int(client.memory_usage(key, samples=0))
        for _ in range(20):
            peer.call("/write")
        sizes[f"{name.partition(',')[0]}, after 20 quick writes"] = int(client.memory_usage(key, samples=0))
    return sizes


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    options = parser.parse_args()
    rounds = 8 if options.quick else 40
    packages = ("luasession", "flask", "flask-session", "redis", "hiredis")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory(prefix="luasession-bench-") as folder:
        socket = embedded.start(Path(folder) / "server", name="benchmarks")
        server = redis.Redis(unix_socket_path=socket, protocol=2).info("server")
        print(
            f"Valkey {server.get('valkey_version', server['redis_version'])} on a unix socket; microseconds"
        )

        limits = _limits(socket, "v" * 40)
        rows = {name: Summary.of([_timed(call) for _ in range(rounds * 25)]) for name, call in limits.items()}
        _print("The limit: one command by redis-py", rows, 0.0, 0.0)

        small: dict[str, dict[str, Summary]] = {}
        for shape in SHAPES:
            paths = ["/untouched", "/read", "/write", "/change"]
            results = _requests(socket, shape, paths, rounds, 25 if shape == "8 x 40 B" else 5)
            for path, summaries in results.items():
                floor = summaries["no sessions"].p50
                against = summaries["Flask-Session, no refresh"].p50 - floor
                _print(f"{path} on {shape}", summaries, floor, against)
            if shape == "8 x 40 B":
                small = results
            else:
                for name in ("luasession, cached", "luasession, validating", "luasession, cold"):
                    ratio = results["/change"][name].p50 / small["/change"][name].p50
                    print(f"  /change on {shape} to the same on 8 x 40 B, {name}: {ratio:.2f}")

        print("\nMemory of one session of 8 x 40 B, bytes (MEMORY USAGE, default settings)")
        for name, size in _memory(socket).items():
            print(f"  {name:40}{size:8}")


if __name__ == "__main__":
    main()
