"""The transaction: what one request changes about its session, until it is committed.

It brings together the keys (:mod:`luasession.ledger`), what else changes about the session, and the visit
that takes the delta to the store: round by round where others changed the same keys, and told by signals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import merge, signals
from .conflicts import Conflict
from .delta import KEEP, Change, Check, Delta, Put, Rotation
from .errors import SessionConflict, SessionGone, SessionTooLarge, SessionUnavailable
from .ledger import Ledger
from .outcome import MISSING, STALE, Applied, Conflicting, Refused
from .rounds import commit_again
from .snapshot import Pair, field_name, session_key
from .threads import OneAtATime

if TYPE_CHECKING:
    from blinker import NamedSignal

    from .policy import Policies
    from .values import Values
    from .visit import Visit


class Transaction:
    """What one request changes about its session.

    :param visit: takes the delta to the store.
    """

    # Defaults stand here, on the class: most requests change none of them.
    #: Whether this request has committed anything, and whether that made the session.
    committed = False
    created = False
    #: Whether the session ends at the next commit, before whatever else is changed.
    destroyed = False
    #: The identity of the error that saving it has met, 0 for none; the error itself would keep all of this.
    failure = 0
    _saved = False
    # Whether an exception has told that nothing is stored.
    _told = False
    # What was refused to a commit of the view's own, and what of it the view has not changed again since. The
    # exception has told that it is not stored.
    _refused: Delta | None = None
    # How many assignments the delta has that is on its way.
    _assignments = 0

    def __init__(self, visit: Visit, values: Values, policies: Policies) -> None:
        self.visit = visit
        #: The keys: what was read, and what changed.
        self.ledger = Ledger(visit, values, policies)
        #: What changes about the session beside its keys, by the names of the delta.
        self.changes: dict[str, Any] = {}
        self._alone = OneAtATime(visit)

    def _start(self) -> None:
        self._refused = None
        self.changes = {}
        self.ledger = self.ledger.afresh()

    @property
    def handle(self) -> str | None:
        """The name of the session, None while there is none."""
        return self.visit.id.handle if self.visit.id else None

    @property
    def modified(self) -> bool:
        """Whether this request changed anything, nested values included."""
        return self.committed or self.destroyed or bool(self.changes) or self.ledger.changed()

    def set(self, key: str, value: Any, ttl_ms: int = 0) -> None:
        """Set a key, without reading anything."""
        self.visit.used = True
        if self._saved:
            self.may_still_start()
        if self._refused is not None:
            self._refused = self._refused.without_field(field_name(key))
        self.ledger.set(key, value, ttl_ms)

    def delete(self, key: str) -> None:
        """Delete a key.

        :raise KeyError: if it is missing.
        """
        self.visit.used = True
        self.ledger.delete(key)
        if self._refused is not None:
            self._refused = self._refused.without_field(field_name(key))

    def change(self, name: str, value: Any) -> None:
        """Change what is known of the session beside its keys.

        :param name: as the delta has it.
        """
        self.visit.used = True
        if self._refused is not None:
            anew: dict[str, Any] = {name: None}
            self._refused = self._refused._replace(**anew)
        self.changes[name] = value

    def clear(self) -> None:
        """Delete all keys, and what else is known of the session."""
        self.visit.used = True
        if self.destroyed:
            # What there was ends anyway; only what was set since is to go.
            self._start()
            self.ledger.start_from(None)
            return
        self._refused = None
        self.ledger.clear()
        self.changes |= self._cleared()

    def rotate(self, in_flight: bool) -> None:
        """Have the secret replaced at the end of the request; see :meth:`luasession.LuaSession.regenerate`.

        :raise RuntimeError: once the response has been sent, and outside of a request.
        """
        if self._saved and not self.visit.failed:
            raise RuntimeError("the response has been sent: the session id cannot be replaced any more")
        if not self.visit.has_browser:
            raise RuntimeError("there is no browser here that a new session id could be given to")
        before: Rotation | None = self.changes.get("rotation")
        self.change("rotation", Rotation(in_flight and (before is None or before.in_flight)))

    def destroy(self) -> None:
        """End the session at the next commit."""
        self.visit.used = True
        self._start()
        self.ledger.start_from(None)
        self.destroyed = True

    def commit(self) -> None:
        """Apply what has changed now; see :meth:`luasession.LuaSession.commit`."""
        with self._alone:
            self._must_not_have_failed()
            refused = self._apply(anew=True)
            self._refused = None
            self._finish(refused)

    def _must_not_have_failed(self) -> None:
        # What could not be read may be what the change was made from; what was sent may have been applied.
        if self.visit.failed or self.visit.unsettled:
            raise SessionUnavailable("this request could not read or store the session before; reload() it")

    def reload(self) -> None:
        """Forget local changes and read the newest snapshot."""
        with self._alone:
            snapshot = self.visit.reload()
            self.forget()
            self.ledger.start_from(snapshot)
            self.visit.failed = self.visit.unsettled = self._told = False

    def forget(self) -> None:
        """Forget local changes; what is read next is read anew."""
        self.destroyed = False
        self._start()

    def give_up(self) -> None:
        """Forget local changes, as an exception tells that they are not stored."""
        self.forget()
        self.visit.withhold()

    def atomic_update(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Change one key exactly; see :meth:`luasession.LuaSession.atomic_update`."""
        with self._alone:
            self._must_not_have_failed()
            return self._atomic_update(key, function, default)

    def _atomic_update(self, key: str, function: Callable[[Any], Any], default: Any) -> Any:
        if self.destroyed or self.ledger.cleared:
            self.commit()
        if self._refused is not None:
            if self.ledger.is_pending(key) and not self.ledger.delta_of(key).without(self._refused):
                self.ledger.forget_stored(key)  # it is not stored, so it is not what the update is of
            self._refused = self._refused.without_field(field_name(key))
        was_default = self.ledger.is_default(key)
        if was_default:
            # Set because it was missing: for whoever finds one by now, that counts.
            default = self.ledger.get(key)
            self.ledger.forget(key)
        elif self.ledger.is_pending(key):
            # This request's own change comes first, and is decided about as it would be anyway.
            self._assignments = self.ledger.assignments
            self._finish(self._commit(self.ledger.delta_of(key)))
            self.ledger.forget(key)
        try:
            refused = self._update(key, function, default)
        except BaseException:
            self.ledger.forget(key)
            if was_default:
                self.ledger.set(key, default)
            raise
        self._finish(refused)
        return self.ledger.get(key)

    def _update(self, key: str, function: Callable[[Any], Any], default: Any) -> Refused | None:
        name = field_name(key)

        def stored_on(given: Any, base: Pair | None, own: tuple[bytes, ...] = ()) -> Delta:
            found = given is not merge.MISSING
            self.ledger.set(key, function(given if found else default))
            self._assignments = self.ledger.assignments
            raw = self.ledger.encoded(key)
            # What is missing has no end to keep: the one that has passed may still stand in the hash.
            put = Put(raw, Check.STRICT if base else Check.NONE, KEEP if found else 0)
            return self.ledger.guarded(Delta(base, own, {name: put}))

        def again(_delta: Delta, conflicting: Conflicting) -> Delta:
            others = conflicting.current.keys() - {name}
            if others or conflicting.everything:
                # Under "serializable" what else this request has read counts, and cannot be read again.
                raise SessionConflict([session_key(other) or "" for other in others] or [key])
            return stored_on(self.ledger.conflicts.stored(key, conflicting.current), conflicting.pair)

        position = self.ledger.position
        try:
            given = self.ledger.get(key)
        except KeyError:
            given = merge.MISSING
        delta = stored_on(given, *position)
        result = self.visit.commit(delta)
        if isinstance(result, Conflicting):
            delta, result = commit_again(self.visit, delta, result, again)
        if isinstance(result, Refused):
            return result
        self._settle(delta, delta, result)
        return None

    def may_still_start(self) -> None:
        """Refuse what would start a session.

        :raise RuntimeError: if there is none, and the response has been sent.
        """
        # After a failure nothing is stored anyway, and an error handler that flashes must not fail over it.
        if self._saved and not self.visit.failed and (self.destroyed or self.visit.id is None):
            raise RuntimeError("the response has been sent: a session cannot be started any more")

    def save(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Apply what is left at the end of the request; a delta without a session is dropped.

        :param meanwhile: what can be done for the response while the commit is on its way.
        :raise SessionConflict: if a policy says so.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise TypeError: if a value is of a type that cannot be stored.
        """
        self._saved = True
        visit = self.visit
        try:
            if not visit.used or (visit.failed and self._told):
                return
            if not self._may_have_changed():
                if not visit.failed and (snapshot := self.ledger.loaded) is not None:
                    visit.touch(snapshot)
                return
            with self._alone:
                if visit.failed or visit.unsettled:
                    self._drop()
                    return
                visit.meanwhile = meanwhile
                refused = self._apply()
                if refused is not None:
                    self._discard(refused)
                elif (snapshot := self.ledger.loaded) is not None:
                    visit.touch(snapshot)
        except BaseException as error:
            self.failure = id(error)
            visit.failed = self._told = True
            raise
        finally:
            if visit.failed:
                visit.withhold()
            # The response goes out now: an id made later would never reach the browser.
            visit.close()

    def drop(self) -> None:
        """Store nothing more, and tell so."""
        with self._alone:
            self._drop()
        self.visit.withhold()

    def _drop(self) -> None:
        # It could not be read or stored, and whoever caught that error goes on. So it is told, once.
        self.visit.failed = True
        if not self._told and self._may_have_changed():
            self._told = True
            self._tell_discarded("unavailable")

    def save_late(self) -> None:
        """Apply what was changed after :meth:`save`, while the response was sent (G15)."""
        visit = self.visit
        if not (visit.used and self._saved and self._may_have_changed()):
            return
        with self._alone:  # it may be that what has changed is just being saved, by another thread
            if visit.failed or visit.unsettled:
                self._drop()
                return
            if self.destroyed or self.ledger.changed() or (self.changes and self._delta()):
                self.save()

    def _may_have_changed(self) -> bool:
        # The cheap half of the question: what only reads is through with it here.
        return self.ledger.may_have_changed() or self.destroyed or bool(self.changes)

    def _apply(self, *, anew: bool = False) -> Refused | None:
        if not self._may_have_changed():
            return None
        if self.destroyed:
            # What cannot be stored is told before anything has ended.
            size = self.visit.size_of(self.ledger.delta())
            if size > self.visit.config.max_bytes:
                raise SessionTooLarge(size, self.visit.config.max_bytes)
            self._end()
        delta = self._delta()
        if self._refused is not None and not anew:
            # Guarded again: of what is left out, what this request read of it counts all the same.
            delta = self.ledger.guarded(delta.without(self._refused))
        if delta.cleared and not delta.creates:
            self._end()
            return None
        if not delta:
            return None
        try:
            return self._commit(delta)
        except (SessionConflict, SessionTooLarge):
            self._refused = delta
            raise

    def _end(self) -> None:
        handle = self.handle
        if handle is not None:
            self.committed = True
        if self.visit.destroy():
            self._alone.tell(signals.session_destroyed, handle=handle)
        self.destroyed = False
        if self.ledger.cleared:
            # What was set after the clear, a label say, is of the next session.
            cleared = self._cleared()
            kept = {name: value for name, value in self.changes.items() if value != cleared.get(name)}
            kept.pop("rotation", None)
            self._start()
            self.changes = kept
        self.ledger.start_from(None)

    def _delta(self) -> Delta:
        self._assignments = self.ledger.assignments
        delta = self.ledger.delta()
        if not self.changes:
            return self.ledger.guarded(delta)
        changes = dict(self.changes)
        if self.visit.id is None:
            changes.pop("rotation", None)
        elif not delta.cleared and changes.keys() != {"rotation"} and ("principal" in changes or not delta):
            # Never blind: set to what is stored, they change nothing. What rides on other changes anyway
            # need not be compared, except for the principal, whose index entry moves with it.
            self._drop_unchanged(changes)
        return self.ledger.guarded(delta._replace(**changes))

    def _drop_unchanged(self, changes: dict[str, Any]) -> None:
        if (snapshot := self.ledger.snapshot()) is None:
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

    def _commit(self, ours: Delta) -> Refused | None:
        conflicts: dict[str, Conflict] = {}
        delta, result = ours, self.visit.commit(ours)
        if isinstance(result, Conflicting):
            delta, result = self._merge(ours, result, conflicts)
        if isinstance(result, Refused):
            if result.standing is STALE and ours.rotation:
                return self._own_session(ours, result)
            return None if result.standing is MISSING and not ours.creates else result
        if result.report:
            found = self.ledger.conflicts.find(ours, result.report)
            conflicts.update({conflict.key: conflict for conflict in found})
        self._settle(ours, delta, result)
        if conflicts:
            self._report(conflicts.values(), refused=False)
        return None

    def _merge(
        self, ours: Delta, conflicting: Conflicting, conflicts: dict[str, Conflict]
    ) -> tuple[Delta, Applied | Refused]:
        def resolve(delta: Delta, conflicting: Conflicting) -> Delta:
            found = self.ledger.conflicts.find(ours, conflicting.current)
            try:
                merged = self.ledger.conflicts.resolve(ours, delta, conflicting, found)
            except SessionConflict:
                self._report(found, refused=True)
                raise
            conflicts.update({conflict.key: conflict for conflict in found})
            return merged

        return commit_again(self.visit, ours, conflicting, resolve)

    def _own_session(self, ours: Delta, refused: Refused) -> Refused | None:
        # The second click of a double log-in: a session of its own, cookie included (G8).
        delta = self.ledger.whole(ours) if refused.was_open else ours
        result = self.visit.create(delta._replace(base=None, own=(), rotation=None))
        if isinstance(result, Refused):
            return refused
        self._settle(delta, delta, result)
        return None

    def _cleared(self) -> dict[str, Any]:
        return {
            "permanent": self.visit.config.permanent,
            "lifetime_ms": 0,
            "principal": Change(None),
            "label": Change(None),
        }

    def _finish(self, refused: Refused | None) -> None:
        if refused is not None:
            self._discard(refused)
            raise SessionGone(f"the session is {refused.standing.value}; nothing was stored")

    def _settle(self, ours: Delta, delta: Delta, applied: Applied) -> None:
        created = applied.version == 1
        self.committed = True
        self.created = self.created or created
        self.ledger.settle(ours, delta, applied, self._assignments, created=created)
        self.visit.unsettled = False
        if created:
            self.changes.pop("rotation", None)  # its secret is new as it is
        if self.changes:
            # What another thread has changed meanwhile stays.
            self.changes = {
                name: change for name, change in self.changes.items() if getattr(delta, name) is not change
            }
        signal: NamedSignal = signals.session_created if created else signals.session_committed
        if signal.receivers:
            self._alone.tell(signal, handle=self.handle, version=applied.version)
        if delta.rotation and not created:
            self._alone.tell(signals.session_rotated, handle=self.handle, version=applied.version)

    def _report(self, conflicts: Iterable[Conflict], *, refused: bool) -> None:
        for conflict in conflicts:
            self.visit.count("conflicts")
            self._alone.tell(
                signals.session_conflict,
                handle=self.handle,
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
        self.ledger.start_from(None)

    def _tell_discarded(self, reason: str) -> None:
        self.visit.count("discards")
        self._alone.tell(signals.session_discarded, handle=self.visit.presented_handle, reason=reason)
