"""The limit: one command by redis-py, below which no session that asks Redis can be."""

from __future__ import annotations

import redis

from .samples import Row, summary, timed

_ROUND = 25


def measure(socket: str, calls: int) -> list[Row]:
    """Time each command, interleaved."""
    client = redis.Redis(unix_socket_path=socket, protocol=2)
    value = b"v" * 40
    client.hset("limit", mapping={f"key{n}": value for n in range(8)})
    client.set("limit:blob", value * 8)
    commands = {
        "PING": client.ping,
        "GET": lambda: client.get("limit:blob"),
        "HSET": lambda: client.hset("limit", "key1", value),
        "HGETALL": lambda: client.hgetall("limit"),
    }
    series: dict[str, list[float]] = {name: [] for name in commands}
    while len(series["PING"]) < calls:
        for name, command in commands.items():
            command()
            series[name] += [timed(command) for _ in range(min(_ROUND, calls))]
    client.delete("limit", "limit:blob")
    client.close()
    return [{"command": name, **summary(values)} for name, values in series.items()]
