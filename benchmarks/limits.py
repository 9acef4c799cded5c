"""The limit: one command by redis-py, below which no session that asks Redis can be."""

from __future__ import annotations

import redis

from .samples import Row, summary, timed


class Limits:
    """The commands, timed in turn."""

    def __init__(self, socket: str, calls: int) -> None:
        client = redis.Redis(unix_socket_path=socket, protocol=2)
        value = b"v" * 40
        client.hset("limit", mapping={f"key{n}": value for n in range(8)})
        client.set("limit:blob", value * 8)
        self._commands = {
            "PING": client.ping,
            "GET": lambda: client.get("limit:blob"),
            "HSET": lambda: client.hset("limit", "key1", value),
            "HGETALL": lambda: client.hgetall("limit"),
        }
        self._series: dict[str, list[float]] = {name: [] for name in self._commands}
        #: Of each command, in all.
        self.calls = calls

    def round(self, calls: int) -> None:
        """Send each command so often."""
        for name, command in self._commands.items():
            command()
            self._series[name] += [timed(command) for _ in range(calls)]

    def rows(self) -> list[Row]:
        """Return what was measured so far."""
        return [{"command": name, **summary(values)} for name, values in self._series.items()]
