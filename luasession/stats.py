"""Counters of one process, for ``stats()``."""

from __future__ import annotations

from threading import Lock

_NAMES = (
    "loads",
    "cache_hits",
    "commits",
    "conflicts",
    "merges",
    "discards",
    "script_reloads",
    "bytes",
)


class Stats:
    """What happened in this process since it first asked Redis.

    ``loads`` and ``commits`` are calls answered by Redis, ``cache_hits`` reads
    answered without it, ``conflicts`` keys in conflict, ``merges`` commits sent
    again with merged values, ``discards`` deltas dropped, ``script_reloads``
    scripts that a server no longer knew, ``bytes`` names and values that
    travelled either way.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts = dict.fromkeys(_NAMES, 0)

    def add(self, name: str, nbytes: int = 0) -> None:
        """Count one, and the bytes that travelled with it."""
        with self._lock:
            self._counts[name] += 1
            self._counts["bytes"] += nbytes

    def counts(self) -> dict[str, int]:
        """Return all counters."""
        with self._lock:
            return dict(self._counts)
