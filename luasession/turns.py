"""Turns: which of one process's requests at a session commits next, once they meet conflicts.

Optimistic locking is at its worst where many requests of one process change the same key: each commit
makes conflicts of all the others' that are on their way. So whoever has met one waits until its neighbours
are through, and goes on alone. It is no lock on the session: nobody waits for it who has met no conflict,
other processes know nothing of it, and whoever has waited long enough goes on without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

# Sessions that share a turn wait for each other now and then, which does no harm.
_TURNS = 64
# Seconds that a request waits for its turn at most: its neighbours may hang.
_LONGEST_WAIT = 0.25


class Turns:
    """The turns of one process."""

    @cached_property
    def _locks(self) -> list[Any]:
        # Made when first needed, when gevent has put its own kind in the place of threading's. Two threads
        # that make them at the same moment each have a turn then, which does no harm. Reentrant, for a merge
        # function that itself edits a session.
        return [threading.RLock() for _ in range(_TURNS)]

    @contextmanager
    def one(self, handle: str) -> Iterator[bool]:
        """Wait for a turn at a session, or long enough, and keep it while the block runs.

        :return: whether there were neighbours to wait for.
        """
        lock = self._locks[hash(handle) % _TURNS]
        waits = not lock.acquire(blocking=False)
        taken = not waits or lock.acquire(timeout=_LONGEST_WAIT)
        try:
            yield waits
        finally:
            if taken:
                lock.release()
