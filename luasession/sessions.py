"""The sessions of an app from outside of a request: who is logged in where, and log out everywhere."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from . import signals
from .clock import now_ns
from .errors import CorruptSession, SessionGone
from .ids import is_handle
from .readers import idle_lifetime

if TYPE_CHECKING:
    from flask import Flask

    from .calls import Caller
    from .interface import LuaSessionInterface
    from .session import LuaSession
    from .snapshot import Snapshot

# Entries that are taken out of an index at once.
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session of a principal, as a page "where you are logged in" shows it."""

    #: The name of the session, for :meth:`Sessions.revoke`; no credential.
    handle: str
    created_at: datetime
    #: When it was last used, to ``SESSION_TOUCH_INTERVAL``.
    last_seen: datetime
    #: When it ends if it is not used again.
    expires_at: datetime
    #: What the app put under ``session.label``.
    label: str | None


class Sessions:
    """The sessions of an app from outside of a request, as ``app.extensions["luasession"]``.

    On a cluster a principal's index is in another slot than the sessions. Each step below is atomic by
    itself and the steps together are not: a log-in enters its session into the index *before* the
    session says whose it is, and an entry that may belong to a log-in under way is never taken out. So
    :meth:`revoke_all` finds every session that is live when it is called, and what is left behind by
    a crash in between is a stale entry, which does no harm.
    """

    def __init__(self, app: Flask, interface: LuaSessionInterface) -> None:
        # Weakly, as the app holds this.
        self._app = weakref.ref(app)
        self._interface = interface
        self._store = interface.store

    def sessions_of(self, principal: str) -> list[SessionInfo]:
        """Return the live sessions of a principal, the oldest log-in first.

        Reads each session by itself, so the list is no snapshot of one moment. Looking is no use:
        it keeps no session alive.

        :raise TypeError: if the principal is not a str.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        caller = self._caller(principal)
        found, stale = [], []
        for entry in self._store.index.entries(principal, caller):
            try:
                snapshot = self._store.owned(principal, entry.handle, caller)
            except CorruptSession:
                continue
            if snapshot is not None:
                found.append(_info(entry.handle, snapshot))
            else:
                stale.append(entry.handle)
        self._store.index.leave(principal, stale, caller)
        return found

    def revoke(self, handle: str) -> bool:
        """End a session on the server, and tell whether there was one.

        No write of it is accepted once this has returned, and no process shows it for longer than
        ``SESSION_CACHE_TTL``.

        :raise ValueError: if that is not a handle; a whole session id is none either.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        _check_handle(handle)
        if not self._store.destroy(handle, b"", self._caller()):
            return False
        self._ended(handle)
        return True

    def revoke_all(self, principal: str, keep: str | None = None) -> int:
        """End all sessions of a principal, and return how many.

        Includes the session of a log-in that is on its way. A log-in that begins while this runs may
        come after it, and is then a new session.

        :param keep: a handle to leave out, say of the session that asks.
        :raise TypeError: if the principal is not a str.
        :raise ValueError: if ``keep`` is not a handle.
        :raise SessionUnavailable: if Redis does not answer within the deadline; some of the sessions
            may have ended by then.
        """
        if keep is not None:
            _check_handle(keep)
        caller = self._caller(principal)
        done = []
        count = 0
        for entry in self._store.index.entries(principal, caller):
            if entry.handle == keep:
                continue
            # What is young may belong to a log-in that has not said so yet: it ends whatever it says.
            young = self._store.index.is_young(entry)
            owner = None if young else principal
            if self._store.destroy(entry.handle, b"", caller, principal=owner, always=young):
                count += 1
                self._ended(entry.handle)
            done.append(entry.handle)
            if len(done) == _AT_ONCE:
                # Whoever is cut off on the way need not begin anew.
                self._store.index.leave(principal, done, caller)
                done = []
        self._store.index.leave(principal, done, caller)
        return count

    @contextmanager
    def edit(self, handle: str) -> Iterator[LuaSession]:
        """Read and change a session: ``with sessions.edit(handle) as session: session["plan"] = "pro"``.

        What the block changed is committed at its end, as a request's delta would be; if the block
        raises, nothing is. The id cannot be rotated here. Looking is no use: it keeps no session alive.

        :raise ValueError: if that is not a handle.
        :raise SessionGone: if there is no such session, or it ended meanwhile.
        :raise SessionConflict: if a policy says so.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        _check_handle(handle)
        app = self._app()
        if app is None:
            raise RuntimeError("the app of these sessions is gone")
        session = self._interface.errand(app, handle)
        if session.handle is None:
            raise SessionGone(f"there is no session {handle}")
        yield session
        session.commit()

    def stats(self) -> dict[str, int]:
        """Return what happened in this process: see :class:`luasession.stats.Stats`."""
        return self._store.stats.counts()

    def _caller(self, principal: str = "") -> Caller:
        if not isinstance(principal, str):
            raise TypeError(f"a principal must be a str, not {type(principal).__name__}")
        app = self._app()
        if app is None:
            raise RuntimeError("the app of these sessions is gone")
        lifetime_ms = idle_lifetime(app.config["PERMANENT_SESSION_LIFETIME"])
        return self._store.caller(now_ns(), lifetime_ms)._replace(uses=False)

    def _ended(self, handle: str) -> None:
        self._interface.notify(signals.session_destroyed, handle=handle)


def _check_handle(handle: str) -> None:
    if not isinstance(handle, str) or not is_handle(handle):
        raise ValueError("a handle is the 22 characters that session.handle gives; the whole id is none")


def _info(handle: str, snapshot: Snapshot) -> SessionInfo:
    created, seen, ends = (
        datetime.fromtimestamp(ms / 1000, UTC)
        for ms in (snapshot.created_ms, snapshot.touched_ms, snapshot.ends_ms)
    )
    return SessionInfo(handle, created, seen, ends, snapshot.label)
