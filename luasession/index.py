"""The index of principals: which sessions a user has, for "log out everywhere"."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from .calls import Caller, Calls
from .config import Config
from .ids import new_write_id

#: Entries that a log-in is told of, the oldest ones.
TOLD = 8


class Entry(NamedTuple):
    """A session in its principal's index."""

    handle: str
    #: Milliseconds since it was entered.
    age_ms: int


class PrincipalIndex:
    """For each principal a sorted set of handles, under a key of its own.

    An entry comes before its session says whose it is, and goes after the session no longer does.
    """

    def __init__(self, config: Config, calls: Calls) -> None:
        self._config = config
        self._calls = calls
        # A log-in enters its session anew where the entry is older than one call may take, then commits: by
        # twice that time it is through.
        self._youth_ms = math.ceil(config.call_seconds * 2000)

    def enter(self, principal: str, handle: str, caller: Caller) -> list[Entry]:
        """Enter a session, before it says whose it is, and return a few of the oldest entries.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        return self._run(principal, caller, entered=handle, most=TOLD)

    def leave(self, principal: str, handles: Sequence[str], caller: Caller) -> None:
        """Take entries out of a principal's index, save young ones.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        if handles:
            self._run(principal, caller, taken_out=handles, most=0)

    def entries(self, principal: str, caller: Caller) -> list[Entry]:
        """Return a principal's index, the oldest entry first.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        return self._run(principal, caller)

    def is_young(self, entry: Entry) -> bool:
        """Whether the log-in behind an entry may still be on its way."""
        return entry.age_ms < self._youth_ms

    def _run(
        self,
        principal: str,
        caller: Caller,
        *,
        entered: str = "",
        taken_out: Sequence[str] = (),
        most: int = -1,
    ) -> list[Entry]:
        digest = hashlib.sha256(principal.encode("utf-8", "surrogatepass")).hexdigest()
        absolute_ms = self._config.absolute_ms or 0
        packed = (
            entered.encode(),
            b"%d" % self._youth_ms,
            b"%d" % (absolute_ms + self._youth_ms if absolute_ms else 0),
            b"%d" % most,
            "".join(taken_out).encode(),
        )
        _sent, (_code, _id, now_us, *items) = self._calls.run(
            "index", f"principal:{digest}", new_write_id(), caller, lambda _age, _resend: packed
        )
        pairs = zip(items[::2], items[1::2], strict=True)
        return [
            Entry(handle.decode(), max(now_us - int(float(moment)), 0) // 1000) for handle, moment in pairs
        ]
