"""A visit: one request's dealings with one session.

Which id the browser presented, what Redis answered to it, and so what the
response has to carry. The session asks its visit for snapshots and hands it
deltas; the interface turns what the visit knows at the end into cookies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from typing import Any

from . import signals
from .calls import Caller
from .clock import now_ns
from .config import Config
from .delta import Change, Delta
from .errors import CorruptSession, SessionTooLarge, SessionUnavailable
from .ids import SessionId, new_session_id, parse_session_id
from .outcome import FORMER, GONE, LIVE, MISSING, STALE, Applied, Conflicting, Refused, Standing
from .readers import idle_lifetime
from .snapshot import Snapshot
from .store import Store

_log = logging.getLogger("luasession")

# A hint: digits, no more than the largest version has.
_HINT = re.compile(r"\s*([0-9]{1,10})\s*").fullmatch
# Nanoseconds after a commit's sending by which its answer leaves, or it may meet what others have been told
# since (G9). Well below the second by which the hint of the others outlasts the trust window.
_PROMPT = 500_000_000


class Visit:
    """One request's dealings with one session.

    :param cookies: the header that the browser sent, read when the session is first touched; most requests
        for static files never touch it. None: there is no browser.
    :param name: the name of the id cookie.
    :param settings: the app's config, for ``PERMANENT_SESSION_LIFETIME``, which may change late.
    :param opened: the monotonic nanosecond at which the request opened its session.
    :param notify: sends a signal.
    """

    # Defaults stand here, on the class: most requests change none of them.
    _caller: Caller | None = None
    _hint = 0
    _others_hint = False
    _id: SessionId | None = None
    _touched = False
    _closed = False
    # Whose the session is, as far as this request knows.
    _principal: str | None = None
    # Where this request has entered which session, and the monotonic nanosecond when it did.
    _entered: tuple[str, str, int] | None = None
    #: Whether there is a browser that a new id could be given to.
    has_browser = True
    #: How this request stands to the session; None until Redis has been asked.
    standing: Standing | None = None
    #: The id that a commit of this request made; the response has to carry it.
    issued: SessionId | None = None
    #: The id that the session is to have next, in place of one that is due: the response offers it.
    offered: SessionId | None = None
    #: The version to put into the hint cookie; None to leave the hint alone.
    made: int | None = None
    # The monotonic nanosecond at which the commit was sent that made it.
    _sent = 0
    #: Whether others were writing meanwhile, so that every process has to confirm.
    others_wrote = False
    #: Whether the TTL was refreshed, so that the browser's expiry is due as well.
    refreshed = False
    #: Whether permanence or lifetime changed, and with them the expiry in the browser.
    expiry_changed = False
    #: The metadata of the session as last seen.
    seen: Snapshot | None = None
    #: Whether this request ended the session: its cookies have to go.
    ended = False
    #: Whether this request has read or changed anything.
    used = False
    #: The last response that it was saved for, held weakly, and whether that carries the cookies.
    response: Callable[[], Any] | None = None
    is_carried = False
    #: What can be done for the response while a commit is on its way, until :meth:`close`.
    meanwhile: Callable[[], object] | None = None
    #: Whether it could not read what there is: nothing of it is stored, as nothing can be built on that.
    failed = False
    #: Whether a commit is on its way, or what came of it was not taken in. Where it was broken off, by a
    #: killed greenlet say, it may have been applied: sent once more it would be another commit (G6).
    unsettled = False

    def __init__(
        self,
        store: Store,
        config: Config,
        cookies: str | None,
        name: str,
        settings: Mapping[str, Any],
        opened: int,
        notify: Callable[..., None],
    ) -> None:
        self._store = store
        #: The app's configuration.
        self.config = config
        self._cookies = cookies
        self._settings = settings
        self._opened = opened
        #: Sends a signal.
        self.notify = notify
        #: The name of the id cookie.
        self.name = name

    @property
    def id(self) -> SessionId | None:
        """The id of the session, None while there is none."""
        if self._cookies is not None:
            self._open()
        return None if self.standing is MISSING else self._id

    @property
    def presented_handle(self) -> str | None:
        """The handle that the browser presented, or that this request made; proven or not."""
        self._open()
        return self._id.handle if self._id else None

    @property
    def caller(self) -> Caller:
        """The request, as the store wants to know it."""
        if self._caller is None:
            self._caller = self._store.caller(self._opened, self.lifetime_ms)
        return self._caller

    @property
    def lifetime_ms(self) -> int:
        """Idle lifetime, in milliseconds, of sessions that have none of their own."""
        return idle_lifetime(self._settings["PERMANENT_SESSION_LIFETIME"])

    @property
    def now_ms(self) -> int:
        """The server's clock in milliseconds."""
        return self._store.now_ms(self._id.handle if self._id else "")

    def open(self, name: bytes, stored: bytes) -> bytes:
        """Return the bytes of a stored value as the serializer made them.

        :raise ValueError: if the value is encrypted, and no key opens it.
        """
        vault = self._store.vault
        return stored if vault is None or self._id is None else vault.open(self._id.handle, name, stored)

    def _open(self) -> None:
        if self._cookies is None:
            return
        header = self._cookies
        # Ids and hints need no unquoting, so three names are looked for and the rest is left unparsed. The
        # first of a name counts, as everywhere in Flask.
        found = dict(reversed(_cookies(self.name).findall(header)))
        session_id = parse_session_id(found.get("", "").strip(), self.config.id_length)
        if self._cookies is None:
            return  # another thread of the request was faster
        self._id = session_id
        if session_id is None:
            self.standing = MISSING
        if hint := _HINT(found.get("_v", "")):
            self._hint = int(hint[1])
        self._others_hint = "_o" in found
        self._cookies = None

    def load(self) -> Snapshot | None:
        """Return the session as it is, None if it is not there for this request.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise CorruptSession: if what is stored is not a session of a known format.
        """
        self.used = True
        if self._cookies is not None:
            self._open()
        if self._id is None or self.standing in _ABSENT:
            return None
        if not self._others_hint and self.standing is None:
            snapshot = self._store.trusted(self._id, self._hint, self.lifetime_ms)
            if snapshot is not None:
                self.standing = LIVE
                self.seen = snapshot
                self._principal = snapshot.principal
                return snapshot
        return self.reload()

    def reload(self) -> Snapshot | None:
        """Return the session as Redis has it now.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise CorruptSession: if what is stored is not a session of a known format.
        """
        self.used = True
        if self._cookies is not None:
            self._open()
        if self._id is None or self.standing in _ABSENT:
            return None
        offer = self._offer()
        try:
            loaded = self._store.load(self._id, self.caller, offer)
        except BaseException:
            self.failed = True
            raise
        self.standing = loaded.standing
        if loaded.offered:
            self.offered = offer
        if loaded.snapshot is None:
            return None
        self.seen = loaded.snapshot
        self._principal = loaded.snapshot.principal
        if loaded.touched:
            self._note_touch()
        if loaded.snapshot.version < self._hint:
            # A failover took versions back: a hint that stays above would have everybody confirm forever. And
            # one that falls may fall below what others have been told by now.
            self._hint = self.made = loaded.snapshot.version
            self.others_wrote = True
        return loaded.snapshot

    def commit(self, delta: Delta) -> Applied | Conflicting | Refused:
        """Apply a delta, to a new session if there is none and the delta may start one.

        What was applied has to be settled before anything else can be stored: until then it is as a failure.

        :raise SessionTooLarge: if the session would outgrow ``SESSION_MAX_BYTES``.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        if self._cookies is not None:
            self._open()
        if self.standing in _ENDED:
            return Refused(self.standing)
        if self._id is None or self.standing is MISSING:
            return self.create(delta)
        caller = self.caller
        rotate_to = self._id.rotated(self.config.id_length) if delta.rotation else None
        offer = None if rotate_to or self.config.renew_after_ms is None else self._offer()
        self.unsettled = True
        if delta.principal is not None:
            self._enter(self._id, delta.principal)
        sent = now_ns()
        try:
            result = self._store.commit(
                self._id, delta, caller, rotate_to=rotate_to, offer=offer, meanwhile=self.meanwhile
            )
        except (SessionTooLarge, CorruptSession):
            self.unsettled = False
            raise
        self.unsettled = isinstance(result, Applied)
        if isinstance(result, Applied):
            self.standing = FORMER if result.former else LIVE
            if rotate_to:
                self._id = self.issued = rotate_to
            if rotate_to or result.offered:
                self.offered = offer
            self._note_commit(self._id, delta, result, sent)
        elif isinstance(result, Refused):
            return self._refused(delta, result)
        return result

    def _refused(self, delta: Delta, refused: Refused) -> Applied | Refused:
        self.standing = refused.standing
        if refused.standing is not MISSING:
            return refused
        if delta.base is not None:
            # It was there when it was read, so it has ended since.
            self.standing = GONE
            return Refused(GONE)
        return self.create(delta) if delta.creates else refused

    def create(self, delta: Delta) -> Applied | Refused:
        """Start a session of this request's own."""
        if not delta.creates:
            return Refused(MISSING)
        if self._closed:
            raise RuntimeError("the response has been sent: a session cannot be started any more")
        if delta.permanent is None:
            delta = delta._replace(permanent=self.config.permanent)
        session_id = new_session_id(self.config.id_length)
        caller = self.caller
        self._hint = 0
        self._principal = None
        self.unsettled = True
        if delta.principal is not None:
            self._enter(session_id, delta.principal)
        sent = now_ns()
        try:
            result = self._store.commit(session_id, delta, caller, create=True, meanwhile=self.meanwhile)
        except (SessionTooLarge, CorruptSession):
            self.unsettled = False
            raise
        self.unsettled = isinstance(result, Applied)
        if not isinstance(result, Applied):
            # Nobody else knows the handle, save who found it in its principal's index and ended it there.
            self.standing = GONE
            return Refused(GONE)
        self._id = self.issued = session_id
        self.offered = None
        self.standing = LIVE
        self.ended = False
        self._note_commit(session_id, delta, result, sent)
        return result

    def destroy(self) -> bool:
        """End the session, and tell whether there was one; under a former secret too (G8)."""
        self._open()
        if self._id is None or self.standing in (MISSING, GONE):
            return False
        destroyed = self._store.destroy(self._id.handle, self._id.digest, self.caller)
        self._leave(self._id)
        self.issued = self.offered = self.made = None
        self.ended = destroyed
        if destroyed:
            self.standing = MISSING
        # Else somebody was faster, and what is set afterwards is told so: it may have ended while this
        # request was open, and then starts no other one (G7).
        return destroyed

    def _offer(self) -> SessionId | None:
        # Whether the secret is due the script knows; here is only spared what cannot be.
        renew_after_ms = self.config.renew_after_ms
        if renew_after_ms is None or self.offered or self._id is None or self._closed:
            return None
        if self.seen is not None and self.now_ms - self.seen.created_ms < renew_after_ms:
            return None
        return self._id.rotated(self.config.id_length)

    def _enter(self, session_id: SessionId, change: Change) -> None:
        # Before the session says so: whoever ends all sessions of the principal finds it in any case.
        principal = change.value
        handle = session_id.handle
        if principal is not None and not self._has_entered(principal, handle):
            entered = (principal, handle, now_ns())
            self._store.enter(principal, handle, self.caller)
            self._entered = entered

    def _has_entered(self, principal: str, handle: str) -> bool:
        # By its age an entry is known to be of a log-in under way; an old one may have been taken out.
        entered = self._entered
        if entered is None or entered[:2] != (principal, handle):
            return False
        return now_ns() - entered[2] <= self.config.call_seconds * 1e9

    def _move_entry(self, session_id: SessionId, change: Change | None) -> None:
        principal = change.value if change else None
        if principal != self._principal:
            self._leave(session_id)
        self._principal = principal
        if principal is None or self._entered is None:
            return
        if not self._has_entered(principal, session_id.handle):
            # It took so long that the entry may have been taken for a stale one meanwhile.
            self._store.enter(principal, session_id.handle, self.caller)

    def _leave(self, session_id: SessionId) -> None:
        principal, self._principal = self._principal, None
        if principal is not None:
            # A stale entry does no harm: whoever meets it sees that the session says otherwise.
            with suppress(SessionUnavailable):
                self._store.index.leave(principal, [session_id.handle], self.caller)

    def touch(self, snapshot: Snapshot) -> None:
        """Refresh the TTL of a session that was only read, if that is due.

        A refresh that fails never fails the read.
        """
        if self._touched or self.standing is not LIVE or self._id is None:
            return
        interval = self.config.touch_ms(self.lifetime_ms, snapshot.lifetime_ms)
        if self.now_ms - snapshot.touched_ms < interval:
            return
        offer = self._offer()
        try:
            loaded = self._store.confirm(self._id, snapshot, self.caller, offer)
        except (SessionUnavailable, CorruptSession):
            return
        if loaded.snapshot is not None:
            self.standing = loaded.standing  # rotated away meanwhile: it is given no id (G8)
            self.seen = loaded.snapshot
        if loaded.offered:
            self.offered = offer
        if loaded.touched:
            self._note_touch()

    def size_of(self, delta: Delta) -> int:
        """Return how many bytes of names and values a delta comes to as it is stored."""
        return self._store.size_of(delta)

    def corrupt(self, key: str, error: Exception) -> None:
        """Log a key whose bytes do not decode, and send ``session_corrupt``."""
        handle = self.presented_handle
        _log.warning("session %s: the value of %r does not decode: %s", handle, key, type(error).__name__)
        self.notify(signals.session_corrupt, handle=handle, key=key, error=error)

    def close(self) -> None:
        """Start no session any more: the response is on its way."""
        self._closed = True
        self.meanwhile = None

    def must_confirm(self) -> bool:
        """Whether the hint may fall below what others have been told: every process has to confirm."""
        return self.others_wrote or now_ns() - self._sent > _PROMPT

    def withhold(self) -> None:
        """Have the answer carry cookies of what was committed and no others, as it is an error's."""
        self.refreshed, self.offered = False, None

    def turn(self) -> AbstractContextManager[bool]:
        """Return a turn at the session, to go on after a conflict; see :mod:`luasession.turns`."""
        return self._store.turn(self._id.handle if self._id else "")

    def count(self, name: str) -> None:
        """Count something for ``stats()``."""
        self._store.stats.add(name)

    def _note_touch(self) -> None:
        self._touched = True
        self.refreshed = self.refreshed or self.standing is LIVE

    def _note_commit(self, session_id: SessionId, delta: Delta, applied: Applied, sent: int) -> None:
        self._touched = True
        self._sent = sent
        if not applied.former:
            self.refreshed = self.refreshed or applied.touched
            self.expiry_changed = self.expiry_changed or applied.expiry_changed
            self.seen = applied.snapshot or Snapshot(applied.identity, applied.state, {})
        # The hint, as RFC 6265 cookies go, may be overtaken by an older answer's. So whoever commits on
        # top of a version that his browser had not seen made asks everybody to confirm for a while (G9).
        if applied.version != self._hint + 1:
            self.others_wrote = True
        self._hint = self.made = applied.version
        if delta.principal is not None or delta.cleared:
            self._move_entry(session_id, delta.principal)


_ENDED = (GONE, STALE)
_ABSENT = (MISSING, *_ENDED)


@lru_cache(maxsize=256)
def _cookies(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|;)\s*{re.escape(name)}(|_v|_o)=([^;]*)")
