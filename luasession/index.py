"""The index of principals: which sessions a user has, for "log out everywhere"."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from .calls import Caller
from .config import Config
from .errors import CorruptSession, SessionUnavailable
from .ids import SessionId, new_write_id
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .store import Store

# Entries that are looked at when another one is entered.
_STALE_AT_ONCE = 8


class Entry(NamedTuple):
    """A session in its principal's index."""

    handle: str
    #: Milliseconds since it was entered.
    age_ms: int


class PrincipalIndex:
    """For each principal a sorted set of handles, under a key of its own.

    An entry comes before its session says whose it is, and goes after the session no longer does.
    """

    def __init__(self, config: Config, store: Store) -> None:
        self._config = config
        self._store = store
        # A request lasts no longer once it waits for Redis, so that by twice that its log-in is through.
        self._youth_ms = math.ceil(config.redis_deadline * 2000)

    def enter(self, principal: str, handle: str, caller: Caller) -> None:
        """Enter a session into its principal's index, before the session says so.

        What expired without a log-out is looked for among the oldest entries, and taken out.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        entries = self._run(principal, caller, entered=handle, most=_STALE_AT_ONCE)
        oldest = [entry.handle for entry in entries if entry.age_ms > caller.lifetime_ms]
        with suppress(SessionUnavailable, CorruptSession):  # it stays, and the next log-in looks again
            self.leave(
                principal, [handle for handle in oldest if not self.owned(principal, handle, caller)], caller
            )

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

    def owned(self, principal: str, handle: str, caller: Caller) -> Snapshot | None:
        """Return a session if it is there and says that it is the principal's.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        snapshot = self._store.load(SessionId.without_secret(handle), caller).snapshot
        return snapshot if snapshot is not None and snapshot.principal == principal else None

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
        _sent, (_code, _id, now_us, *items) = self._store.calls.run(
            "index", f"principal:{digest}", new_write_id(), caller, lambda _age, _resend: packed
        )
        now_ms = int.from_bytes(now_us) // 1000
        pairs = zip(items[::2], items[1::2], strict=True)
        return [Entry(handle.decode(), max(now_ms - int(float(moment)), 0)) for handle, moment in pairs]
