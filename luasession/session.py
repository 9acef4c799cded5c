"""The session that a view works with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

from flask.sessions import SessionMixin

from . import merge, signals
from .clock import now_ns
from .delta import KEEP, Change, Check, Delta, Put, Rotation
from .errors import ConfigurationError, SessionConflict, SessionGone
from .ledger import Conflict, Ledger
from .outcome import Applied, Conflicting, Refused, Standing
from .readers import milliseconds
from .snapshot import Pair, field_name, session_key

if TYPE_CHECKING:
    from blinker import NamedSignal

    from .codec import Serializer
    from .policy import Policies
    from .snapshot import Snapshot
    from .visit import Visit

# Merge rounds go on until the deadline, but never fewer than that.
_ROUNDS = 64
# Seconds, at most, before another round.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class LuaSession(SessionMixin):
    """A Flask session that sends what one request changed.

    A mapping with str keys. It is lazy: opening it costs nothing, setting a key
    reads nothing, and the first read loads one snapshot, which all later reads
    of the request are served from. A mutable value that was handed out is
    compared with what it was, so ``session["cart"].append(1)`` counts without
    ``session.modified = True``.
    """

    # Defaults stand here, on the class: most requests change none of them.
    _modified: bool | None = None
    _committed = False
    _created = False
    _saved = False
    _destroyed = False
    # What a commit of the view's own refused; the view has been told by the exception.
    _refused: Delta | None = None

    def __init__(self, visit: Visit, serializer: Serializer, policies: Policies) -> None:
        self._visit = visit
        self._ledger = Ledger(visit, serializer, policies)
        # What changes about the session beside its keys, by the names of the delta.
        self._changes: dict[str, Any] = {}

    def _start(self) -> None:
        self._changes = {}
        self._ledger = self._ledger.afresh()

    @property
    def _handle(self) -> str | None:
        return self._visit.id.handle if self._visit.id else None

    # -- the mapping --------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        return self._ledger.get(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        self._visit.used = True
        self._ledger.delete(key)

    def __iter__(self) -> Iterator[str]:
        return self._ledger.keys()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._visit.presented_handle or 'new'}>"

    def set(self, key: str, value: Any, ttl: float | timedelta | None = None) -> None:
        """Set a key that disappears by itself.

        :param ttl: seconds or a timedelta after which it does; None for never.
            Setting the key again without one makes it stay.
        :raise TypeError: if the key is not a str.
        :raise ValueError: if ``ttl`` is not a positive time.
        """
        _check_key(key)
        ttl_ms = 0 if ttl is None else _milliseconds(ttl, "ttl", at_least=1)
        self._visit.used = True
        if self._saved:
            self._may_still_start()
        self._ledger.set(key, value, ttl_ms)

    def clear(self) -> None:
        """Delete all keys; ends principal, label, lifetime and permanence too.

        With nothing set after it the session is destroyed at the end of the request.
        """
        self._visit.used = True
        if self._destroyed:
            # What there was ends anyway; only what was set since is to go.
            self._start()
            self._ledger.start_from(None)
            return
        self._ledger.clear()
        self._changes |= {
            "permanent": self._visit.config.permanent,
            "lifetime_ms": 0,
            "principal": Change(None),
            "label": Change(None),
        }

    # -- attributes ---------------------------------------------------------

    @property
    def _snapshot(self) -> Snapshot | None:
        return self._ledger.snapshot()

    @property
    def sid(self) -> str | None:
        """The session id that the cookie carries; secret. None until the session exists."""
        if not self._visit.has_browser:
            return None
        return self._visit.id.sid if self._snapshot and self._visit.id else None

    @property
    def handle(self) -> str | None:
        """The name of the session, which may be logged; None until the session exists."""
        return self._handle if self._snapshot else None

    @property
    def version(self) -> int:
        """How many commits the session has seen; 0 until it exists."""
        return self._snapshot.version if self._snapshot else 0

    @property
    def created_at(self) -> datetime | None:
        """When the session was created, in UTC; None until it exists."""
        if self._snapshot is None:
            return None
        return datetime.fromtimestamp(self._snapshot.created_ms / 1000, UTC)

    @property
    def new(self) -> bool:  # type: ignore[override]
        """Whether there was no session when this request began."""
        return self._created or self._snapshot is None

    @property
    def modified(self) -> bool:
        """Whether this request changed anything, nested values included.

        Assigning it changes only what it reads back.
        """
        if self._modified is not None:
            return self._modified
        return self._committed or self._destroyed or bool(self._changes) or self._ledger.changed()

    @modified.setter
    def modified(self, value: bool) -> None:
        self._modified = value

    @property
    def permanent(self) -> bool:
        """Whether the browser keeps the session over its own end."""
        if "permanent" in self._changes:
            return bool(self._changes["permanent"])
        return self._snapshot.permanent if self._snapshot else self._visit.config.permanent

    @permanent.setter
    def permanent(self, value: bool) -> None:
        self._visit.used = True
        self._changes["permanent"] = bool(value)

    @property
    def lifetime(self) -> timedelta | None:
        """The idle lifetime of this session, None where ``PERMANENT_SESSION_LIFETIME`` counts.

        Takes seconds too.
        """
        lifetime_ms = self._changes.get("lifetime_ms")
        if lifetime_ms is None and self._snapshot:
            lifetime_ms = self._snapshot.lifetime_ms
        return timedelta(milliseconds=lifetime_ms) if lifetime_ms else None

    @lifetime.setter
    def lifetime(self, value: float | timedelta | None) -> None:
        self._visit.used = True
        lifetime_ms = 0 if value is None else _milliseconds(value, "lifetime", at_least=1)
        self._changes["lifetime_ms"] = lifetime_ms

    @property
    def principal(self) -> str | None:
        """The user that the session belongs to, for "log out everywhere"."""
        change: Change | None = self._changes.get("principal")
        if change:
            return change.value
        return self._snapshot.principal if self._snapshot else None

    @principal.setter
    def principal(self, value: str | None) -> None:
        self._visit.used = True
        self._changes["principal"] = Change(_text(value, "principal"))
        if value is not None:
            self._may_still_start()

    @property
    def label(self) -> str | None:
        """What the app calls this session, say the name of a device."""
        change: Change | None = self._changes.get("label")
        if change:
            return change.value
        return self._snapshot.label if self._snapshot else None

    @label.setter
    def label(self, value: str | None) -> None:
        self._visit.used = True
        self._changes["label"] = Change(_text(value, "label"))

    # -- what is done to the session ----------------------------------------

    def regenerate(self, in_flight: bool = True) -> None:
        """Replace the secret at the end of the request; the data stays.

        To be done whenever rights change, against session fixation (OWASP Session
        Management Cheat Sheet, "Renew the Session ID After Any Privilege Level Change").

        :param in_flight: whether requests that are open now may still commit.
        :raise RuntimeError: once the response has been sent, and outside of a request.
        """
        if self._saved and not self._visit.failed:
            raise RuntimeError("the response has been sent: the session id cannot be replaced any more")
        if not self._visit.has_browser:
            raise RuntimeError("there is no browser here that a new session id could be given to")
        self._visit.used = True
        before: Rotation | None = self._changes.get("rotation")
        self._changes["rotation"] = Rotation(in_flight and (before is None or before.in_flight))

    def destroy(self) -> None:
        """End the session on the server and in the browser, at the end of the request.

        What is set afterwards starts a new session.
        """
        self._visit.used = True
        self._start()
        self._ledger.start_from(None)
        self._destroyed = True

    def commit(self) -> None:
        """Apply the delta now, and go on.

        If it is refused, nothing of it is stored, now or at the end of the request; :meth:`reload` and
        do it anew, or let the error be answered.

        :raise SessionConflict: if a policy says so.
        :raise SessionGone: if the session has ended, or was rotated away.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise TypeError: if a value is of a type that cannot be stored.
        """
        self._finish(self._apply())

    def reload(self) -> None:
        """Forget local changes and read the newest snapshot.

        Values that were handed out before are detached: changing them has no effect.
        """
        self._destroyed = False
        self._start()
        self._ledger.start_from(self._visit.reload())
        self._visit.failed = False

    def atomic_update(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it, exactly, under any concurrency.

        The function runs again until its result was stored on the very value that it
        was given, so it must do nothing but compute. It is stored at once. A key with an
        end of its own (``ttl``) keeps that.

        :param default: what the function gets where the key is missing.
        :return: the value stored.
        :raise SessionConflict: if it did not succeed within ``SESSION_REDIS_DEADLINE``.
        :raise SessionGone: if the session has ended, or was rotated away.
        """
        _check_key(key)
        if self._destroyed or self._ledger.cleared:
            self.commit()
        if self._ledger.is_default(key):
            # Set because it was missing: for whoever finds one by now, that counts.
            default = self._ledger.get(key)
            self._ledger.forget(key)
        elif self._ledger.is_pending(key):
            # This request's own change comes first, and is decided about as it would be anyway.
            self._finish(self._commit(self._ledger.delta_of(key)))
            self._ledger.forget(key)
        name = field_name(key)

        def stored_on(given: Any, base: Pair | None, own: tuple[bytes, ...] = ()) -> Delta:
            self._ledger.set(key, function(given))
            raw = self._ledger.encoded(key)
            return Delta(base, own, {name: Put(raw, Check.STRICT if base else Check.NONE, KEEP)})

        def again(_delta: Delta, conflicting: Conflicting) -> Delta:
            given = self._ledger.stored(key, conflicting.current)
            return stored_on(default if given is merge.MISSING else given, conflicting.pair)

        position = self._ledger.position
        given = self.get(key, default)
        try:
            delta = stored_on(given, *position)
            result = self._visit.commit(delta)
            if isinstance(result, Conflicting):
                delta, result = self._again(delta, result, again)
        except Exception:
            self._ledger.forget(key)
            raise
        if isinstance(result, Applied):
            self._settle(delta, delta, result)
            return self._ledger.get(key)
        self._finish(result)
        raise AssertionError("unreachable")

    # -- the end of the request, for the interface --------------------------

    @property
    def visit(self) -> Visit:
        """What this request has had to do with the store."""
        return self._visit

    @property
    def strict(self) -> bool:
        """Whether ``"overwrite"`` counts as ``"raise"`` now, as in ``retry_on_conflict``."""
        return self._ledger.strict

    @strict.setter
    def strict(self, value: bool) -> None:
        self._ledger.strict = value

    def abandon(self) -> None:
        """Store nothing more of this request."""
        self._visit.failed = True

    def save(self) -> None:
        """Apply what is left at the end of the request; a delta without a session is dropped.

        :raise SessionConflict: if a policy says so.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise TypeError: if a value is of a type that cannot be stored.
        """
        self._saved = True
        visit = self._visit
        if visit.failed or not visit.used:
            visit.close()
            if visit.failed and self._may_have_changed():
                # It could not be read or stored, and whoever caught that error goes on. So it is told.
                self._tell_discarded("unavailable")
            return
        try:
            refused = self._apply()
            if refused is not None:
                self._discard(refused)
            elif self._ledger.loaded is not None:
                visit.touch(self._ledger.loaded)
        except Exception:
            visit.failed = True
            raise
        finally:
            # The response goes out now: an id made later would never reach the browser.
            visit.close()

    def save_late(self) -> None:
        """Apply what was changed after :meth:`save`, while the response was sent (G15)."""
        if self._saved and not self._visit.failed and self._may_have_changed() and self._ledger.changed():
            self.save()

    def _may_have_changed(self) -> bool:
        # The cheap half of the question: what only reads is through with it here.
        return self._ledger.may_have_changed() or self._destroyed or bool(self._changes)

    def _may_still_start(self) -> None:
        # After a failure nothing is stored anyway, and an error handler that flashes must not fail over it.
        if self._saved and not self._visit.failed and self._visit.id is None:
            raise RuntimeError("the response has been sent: a session cannot be started any more")

    def _apply(self) -> Refused | None:
        if not self._may_have_changed():
            return None
        if self._destroyed:
            self._end()
        delta = self._delta()
        if delta.cleared and not delta.creates and self._visit.id is not None:
            self._end()
            return None
        if not delta or delta == self._refused:
            return None
        try:
            return self._commit(delta)
        except SessionConflict:
            self._refused = delta
            raise

    def _end(self) -> None:
        handle = self._handle
        self._committed = True
        if self._visit.destroy():
            self._visit.notify(signals.session_destroyed, handle=handle)
        self._destroyed = False
        if self._ledger.cleared:
            self._start()
        self._ledger.start_from(None)

    def _delta(self) -> Delta:
        delta = self._ledger.delta()
        if not self._changes:
            return self._ledger.guarded(delta)
        changes = dict(self._changes)
        if self._visit.id is None:
            changes.pop("rotation", None)
        elif not delta.cleared and changes.keys() != {"rotation"} and ("principal" in changes or not delta):
            # Never blind: set to what is stored, they change nothing. What rides on other changes anyway
            # need not be compared, except for the principal, whose index entry moves with it.
            self._drop_unchanged(changes)
        return self._ledger.guarded(delta._replace(**changes))

    def _drop_unchanged(self, changes: dict[str, Any]) -> None:
        if (snapshot := self._snapshot) is None:
            return
        stored = {
            "permanent": snapshot.permanent,
            "lifetime_ms": snapshot.lifetime_ms or 0,
            "principal": Change(snapshot.principal),
            "label": Change(snapshot.label),
        }
        for name, value in stored.items():
            if changes.get(name) == value:
                del changes[name]

    def _again(
        self, delta: Delta, conflicting: Conflicting, resolve: Callable[[Delta, Conflicting], Delta]
    ) -> tuple[Delta, Applied | Refused]:
        """Commit with what is made of a conflict, until there is none any more."""
        started = now_ns()
        longest = _FIRST_PAUSE
        for rounds in count(1):
            delta = resolve(delta, conflicting)
            self._visit.count("merges")
            if rounds >= _ROUNDS and now_ns() - started > self._visit.config.redis_deadline * 1e9:
                raise SessionConflict([key for name in conflicting.current if (key := session_key(name))])
            time.sleep(random.uniform(0, longest))  # noqa: S311 - jitter, no secret
            longest = min(longest * 2, _LONGEST_PAUSE)
            result = self._visit.commit(delta)
            if not isinstance(result, Conflicting):
                return delta, result
            conflicting = result
        raise AssertionError("unreachable")

    def _commit(self, ours: Delta) -> Refused | None:
        conflicts: dict[str, Conflict] = {}

        def resolve(delta: Delta, conflicting: Conflicting) -> Delta:
            found = self._ledger.conflicts(ours, conflicting.current)
            try:
                merged = self._ledger.resolve(ours, delta, conflicting, found)
            except SessionConflict:
                self._report(found, refused=True)
                raise
            conflicts.update({conflict.key: conflict for conflict in found})
            return merged

        delta, result = ours, self._visit.commit(ours)
        if isinstance(result, Conflicting):
            delta, result = self._again(ours, result, resolve)
        if isinstance(result, Refused):
            if result.standing is Standing.STALE and ours.rotation:
                return self._own_session(ours, result)
            return None if result.standing is Standing.MISSING and not ours.creates else result
        if result.report:
            found = self._ledger.conflicts(ours, result.report)
            conflicts.update({conflict.key: conflict for conflict in found})
        self._settle(ours, delta, result)
        if conflicts:
            self._report(conflicts.values(), refused=False)
        return None

    def _own_session(self, ours: Delta, refused: Refused) -> Refused | None:
        # The second click of a double log-in: a session of its own, cookie included (G8).
        delta = self._ledger.whole(ours) if refused.was_open else ours
        result = self._visit.create(delta._replace(base=None, own=(), rotation=None))
        if isinstance(result, Refused):
            return refused
        self._settle(delta, delta, result)
        return None

    def _finish(self, refused: Refused | None) -> None:
        if refused is not None:
            self._discard(refused)
            raise SessionGone(f"the session is {refused.standing.value}; nothing was stored")

    def _settle(self, ours: Delta, delta: Delta, applied: Applied) -> None:
        created = applied.version == 1
        self._committed = True
        self._created = self._created or created
        self._ledger.settle(ours, delta, applied, created=created)
        if self._changes:
            self._changes = {
                name: change for name, change in self._changes.items() if getattr(delta, name) is None
            }
        signal: NamedSignal = signals.session_created if created else signals.session_committed
        self._visit.notify(signal, handle=self._handle, version=applied.version)
        if delta.rotation:
            self._visit.notify(signals.session_rotated, handle=self._handle, version=applied.version)

    def _report(self, conflicts: Iterable[Conflict], *, refused: bool) -> None:
        for conflict in conflicts:
            self._visit.count("conflicts")
            self._visit.notify(
                signals.session_conflict,
                handle=self._handle,
                key=conflict.key,
                base=conflict.base,
                theirs=conflict.theirs,
                ours=conflict.ours,
                outcome=conflict.theirs if refused else conflict.outcome,
                policy=conflict.policy,
            )

    def _discard(self, refused: Refused) -> None:
        self._tell_discarded(refused.standing.value)
        self._start()
        self._ledger.start_from(None)

    def _tell_discarded(self, reason: str) -> None:
        self._visit.count("discards")
        self._visit.notify(signals.session_discarded, handle=self._visit.presented_handle, reason=reason)


def _check_key(key: str) -> None:
    if not isinstance(key, str):
        raise TypeError(f"a session key must be a str, not {type(key).__name__}: {key!r}")


def _milliseconds(value: float | timedelta, name: str, at_least: int) -> int:
    try:
        return milliseconds(value, name, at_least)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"session.{name} must be a str or None, not {type(value).__name__}")
    return value
