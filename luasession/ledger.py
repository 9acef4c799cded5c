"""The ledger: what one request read and changed, on top of one snapshot.

It is what a session is made of between the snapshot that came in and the delta
that goes out, and knows neither Redis nor Flask. Everything that is read comes
from one version, plus what the request itself has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any, Protocol

from .codec import is_immutable
from .conflicts import Conflicts
from .delta import KEEP, KEPT, Change, Check, Delta, Put
from .outcome import Applied
from .policy import Policies, Policy
from .snapshot import Pair, Snapshot, field_name, session_key
from .values import Given, Values, fingerprint

# A name of its own: looked up in an enumeration it costs as much as the rest of a key.
_UNCHECKED = Check.NONE
_NO_READS: frozenset[bytes] = frozenset()
# In the place of a value that another thread has taken out.
_GONE = object()
# Own commits that are told; the journal has room for fewer.
_OWN = 256


class Source(Protocol):
    """Where a ledger's snapshot comes from."""

    @property
    def now_ms(self) -> int:
        """The server's clock in milliseconds."""

    def load(self) -> Snapshot | None:
        """Return the snapshot to work on."""

    def open(self, name: bytes, stored: bytes) -> bytes:
        """Return the bytes of a field as the serializer made them, or raise :exc:`ValueError`."""

    def corrupt(self, key: str, error: Exception) -> None:
        """Take note of a key whose bytes do not decode."""


class Ledger:
    """What one request read and changed.

    :param source: asked for the snapshot once, when something is read.
    """

    # Defaults stand here, on the class: most requests change none of them.
    _loaded = False
    _snapshot: Snapshot | None = None
    # The moment by which keys with an end of their own are judged, one for the request.
    _now_ms = 0
    _base: Pair | None = None
    _own: tuple[bytes, ...] = ()
    _read_all = False
    _corrupt_keys: frozenset[str] = frozenset()
    #: How many assignments there have been, and clears; the number of the last clear.
    assignments = 0
    _cleared_at = 0
    cleared = False
    #: Whether ``"overwrite"`` counts as ``"raise"``.
    strict = False

    def __init__(self, source: Source, values: Values, policies: Policies) -> None:
        self._source = source
        self._values = values
        self._policies = policies
        # What was read, and what was set.
        self._live: dict[str, Any] = {}
        # Of the mutable ones that came from the snapshot, or were committed: what they were then.
        self._given: dict[str, Given] = {}
        # Those themselves, as the app may have put objects of its own in their place.
        self._handed_out: dict[str, Any] = {}
        # Assigned by this request, with the ttl in milliseconds (0: none), and the number of the assignment.
        self._sets: dict[str, tuple[int, int]] = {}
        self._deletes: set[str] = set()
        # Keys whose stored value, or absence, this request knows of.
        self._reads: set[str] = set()
        self._lock = Lock()

    def afresh(self) -> Ledger:
        """Return an empty one of the same sort."""
        ledger = Ledger(self._source, self._values, self._policies)
        ledger.strict = self.strict
        return ledger

    # -- reading ------------------------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """Return the snapshot, loading it at the first time."""
        if not self._loaded:
            snapshot = self._source.load()
            with self._lock:
                # Of two threads of a request that read at once both go on from what the first one got (G4).
                if not self._loaded:
                    self.start_from(snapshot)
        return self._snapshot

    def start_from(self, snapshot: Snapshot | None) -> None:
        """Work on this snapshot, and load none."""
        if snapshot is not None:
            self._snapshot = snapshot
            self._base = snapshot.pair
            if snapshot.deadlines:
                self._now_ms = self._source.now_ms
        self._loaded = True

    @property
    def position(self) -> tuple[Pair | None, tuple[bytes, ...]]:
        """The base, and the write ids that this request has committed since."""
        self.snapshot()
        return self._base, self._own

    @property
    def loaded(self) -> Snapshot | None:
        """The snapshot, if one has been loaded."""
        return self._snapshot

    def get(self, key: str) -> Any:
        """Return a value.

        :raise KeyError: if the key is missing, or does not decode.
        """
        if key in self._live:
            return self._live[key]
        if key in self._deletes or self.cleared or not isinstance(key, str):
            raise KeyError(key)
        snapshot = self.snapshot()
        self._reads.add(key)
        name = field_name(key)
        raw = None if snapshot is None else snapshot.value(name, self._now_ms)
        if raw is None:
            raise KeyError(key)
        return self._decode(key, name, raw)

    def _decode(self, key: str, name: bytes, raw: bytes) -> Any:
        try:
            raw = self._source.open(name, raw)
            value = self._values.load(raw)
        except MemoryError:
            raise
        except Exception as error:
            if key not in self._corrupt_keys:
                self._corrupt_keys |= {key}
                self._source.corrupt(key, error)
            raise KeyError(key) from error
        # Two threads of the request that read it first hold one and the same: none of their changes is lost.
        if is_immutable(value):
            return self._live.setdefault(key, value)
        given = Given(raw, fingerprint(value), self._end_of(name))
        held = self._live.setdefault(key, value)
        if held is value:
            self._given[key] = given
            self._handed_out[key] = value
        return held

    def keys(self) -> Iterator[str]:
        """Yield the keys that are there, stored ones first."""
        stored: dict[str, bytes] = {}
        snapshot = None
        if not self.cleared:
            self._read_all = True
            snapshot = self.snapshot()
            if snapshot is not None:
                names = snapshot.names(self._now_ms)
                stored = {key: name for name in names if (key := session_key(name)) is not None}
        for key, name in stored.items():
            if self.cleared:  # meanwhile
                return
            if key in self._deletes:
                continue
            if key not in self._live and snapshot is not None:
                self._reads.add(key)
                try:
                    self._decode(key, name, snapshot.fields[name])
                except KeyError:
                    continue
            yield key
        yield from [key for key in self._sets if key not in stored]

    # -- changing -----------------------------------------------------------

    def set(self, key: str, value: Any, ttl_ms: int = 0) -> None:
        """Set a key, without reading anything."""
        self._deletes.discard(key)
        self._given.pop(key, None)
        self._live[key] = value
        self.assignments += 1
        self._sets[key] = ttl_ms, self.assignments

    def delete(self, key: str) -> None:
        """Delete a key.

        :raise KeyError: if it is missing.
        """
        if key not in self._sets:
            self.get(key)
        self._sets.pop(key, None)
        self._given.pop(key, None)
        self._live.pop(key, None)
        if not self.cleared:
            self._deletes.add(key)

    def clear(self) -> None:
        """Delete everything, without reading anything."""
        for part in (self._sets, self._given, self._live, self._deletes):
            part.clear()
        self.cleared = True
        self.assignments += 1
        self._cleared_at = self.assignments

    # -- the delta ----------------------------------------------------------

    def delta(self) -> Delta:
        """Return what changed.

        :raise TypeError: if a value is of a type that cannot be stored; names the key.
        """
        sets: dict[bytes, Put] = {}
        encode, live, reads = self._values.encode, self._live, self._reads
        # Another thread of the request may change all of these meanwhile: so lists, and what is deleted comes
        # first; what is gone by then is deleted next time.
        deletes: dict[bytes, Check] = {}
        for key in list(self._deletes):
            if self._may_hold(key):
                deletes[field_name(key)] = self._check(key)
        for key, (ttl_ms, _) in list(self._sets.items()):
            value = live.get(key, _GONE)
            if value is _GONE:
                continue
            raw = encode(key, value)
            if key not in reads:
                sets[field_name(key)] = Put(raw, _UNCHECKED, ttl_ms)
            elif ttl_ms or not self._is_stored(key, raw):
                sets[field_name(key)] = Put(raw, self._check(key), ttl_ms)
        for key, given in list(self._given.items()):
            # Set while another thread was handing out the value before: that one is no more.
            changed = None if key in self._sets else self._changed_in_place(key, given)
            if changed is not None:
                # Changed in place, a key keeps the end that it was given.
                kept = KEPT + given.end if given.end else KEEP
                sets[field_name(key)] = Put(changed, self._check(key), kept)
        if deletes:
            deletes = {name: check for name, check in deletes.items() if name not in sets}
        return Delta(self._base, self._own, sets, deletes, _NO_READS, self.cleared)

    def guarded(self, delta: Delta) -> Delta:
        """Return a delta that is stored only if what was read still holds, where the policy wants that."""
        if not self._policies.serializable or self._base is None or not delta:
            return delta
        changed = delta.sets.keys() | delta.deletes.keys()
        reads = None if self._read_all else frozenset(map(field_name, self._reads)) - changed
        return delta._replace(reads=reads)

    def may_have_changed(self) -> bool:
        """Whether making the delta is worth the while."""
        return bool(self._sets or self._deletes or self._given or self.cleared)

    def is_pending(self, key: str) -> bool:
        """Whether this request has changed a key and not committed it yet."""
        if key in self._sets or key in self._deletes:
            return True
        given = self._given.get(key)
        return given is not None and self._changed_in_place(key, given) is not None

    def delta_of(self, key: str) -> Delta:
        """Return what changed about one key."""
        delta, name = self.delta(), field_name(key)
        sets = {name: delta.sets[name]} if name in delta.sets else {}
        deletes = {name: delta.deletes[name]} if name in delta.deletes else {}
        return self.guarded(delta._replace(sets=sets, deletes=deletes))

    def is_default(self, key: str) -> bool:
        """Whether this request has set a key since it had found it missing, as ``setdefault`` does."""
        if key not in self._sets or key not in self._reads or self._sets[key][0]:
            return False
        stored = self._snapshot and self._snapshot.value(field_name(key), self._now_ms)
        return stored is None and not self.cleared

    def whole(self, delta: Delta) -> Delta:
        """Return a delta that sets all that this request sees, for a session of its own."""
        snapshot = self._snapshot
        if snapshot is None or delta.cleared:
            return delta
        ends = snapshot.deadlines
        sets = {
            name: Put(raw, ttl_ms=KEPT + ends[name] if name in ends else 0)
            for name in snapshot.names(self._now_ms)
            if name not in delta.deletes and (raw := self._opened(name, snapshot.fields[name]))
        }
        return delta._replace(
            sets={**sets, **delta.sets},
            deletes={},
            permanent=snapshot.permanent if delta.permanent is None else delta.permanent,
            lifetime_ms=snapshot.lifetime_ms if delta.lifetime_ms is None else delta.lifetime_ms,
            principal=delta.principal or Change(snapshot.principal),
            label=delta.label or Change(snapshot.label),
        )

    def encoded(self, key: str) -> bytes:
        """Return the bytes of a key's value, as this request has it."""
        return self._values.encode(key, self._live[key])

    def forget(self, key: str) -> None:
        """Undo what this request did to a key."""
        self._sets.pop(key, None)
        self._live.pop(key, None)
        self._given.pop(key, None)

    def changed(self) -> bool:
        """Whether there is anything in the delta."""
        if self.cleared:
            return True
        try:
            return bool(self.delta())
        except (TypeError, ValueError):
            return True

    def _changed_in_place(self, key: str, given: Given) -> bytes | None:
        """Return the bytes of a value if they are others than those that it was given with."""
        # Most are only read, and encoding is what costs.
        value = self._live.get(key, _GONE)
        if value is _GONE or (given.fingerprint is not None and given.fingerprint == fingerprint(value)):
            return None
        raw = self._values.encode(key, value)
        return None if self._values.same(raw, given.raw) else raw

    def _is_stored(self, key: str, raw: bytes) -> bool:
        # Set to the value that it has, as read in this request: no change (G2).
        if self.cleared or self._snapshot is None:
            return False
        name = field_name(key)
        stored = self._opened(name, self._snapshot.value(name, self._now_ms))
        if stored is None or name in self._snapshot.deadlines:
            return False
        return self._values.same(raw, stored)

    def _end_of(self, name: bytes) -> int | None:
        return self._snapshot.deadlines.get(name) if self._snapshot else None

    def _may_hold(self, key: str) -> bool:
        # What is known to be missing need not be deleted.
        if not self._loaded:
            return True
        return self._snapshot is not None and field_name(key) in self._snapshot.fields

    def _check(self, key: str) -> Check:
        if key not in self._reads or self._base is None or self.cleared:
            return Check.NONE
        return Check.REPORT if self._policy(key) == "overwrite" else Check.STRICT

    # -- conflicts ----------------------------------------------------------

    @property
    def conflicts(self) -> Conflicts:
        """What to make of changes that others made of the same keys."""
        return Conflicts(self._values, self._opened, self._policy, self._snapshot, self._now_ms)

    def _policy(self, key: str) -> Policy:
        policy = self._policies.of(key)
        return "raise" if self.strict and policy == "overwrite" else policy

    def _opened(self, name: bytes, stored: bytes | None) -> bytes | None:
        try:
            return stored and self._source.open(name, stored)
        except ValueError:
            return None

    # -- afterwards ---------------------------------------------------------

    def settle(self, ours: Delta, sent: Delta, applied: Applied, assignments: int, *, created: bool) -> None:
        """Go on after a commit: this request's own changes are now part of what it sees.

        Those of others are not, so that all that is read is still of one version. Values that were
        handed out keep the bytes that they were handed out with, or were committed with.

        :param ours: what this request changed.
        :param sent: what was applied: the same, or merged with what somebody else stored.
        :param assignments: how many there had been when it was made: what another thread has assigned since
            is not settled.
        """
        self._advance(sent, applied, created=created)
        for name in sent.deletes:
            key = session_key(name) or ""
            if key not in self._sets:  # else it was assigned meanwhile, by another thread
                self.forget_stored(key)
        live, given = self._live, self._given
        for name, put in sent.sets.items():
            key = session_key(name) or ""
            if key in self._sets and self._sets[key][1] > assignments:
                continue
            if sent is not ours and put is not ours.sets.get(name):
                self._take_over(key, put.value)
                continue
            self._sets.pop(key, None)
            if key in live and not is_immutable(live[key]):
                # No fingerprint: while the commit was on its way another thread may have changed the value.
                given[key] = Given(put.value, None, self._end_of(name))
            else:
                given.pop(key, None)
        if sent.cleared and self._cleared_at <= assignments:
            self.cleared = False

    def _advance(self, sent: Delta, applied: Applied, *, created: bool) -> None:
        # Whoever commits on top of the version that he has read has seen everything up to his own.
        exact = created or sent.cleared or (self._base is not None and applied.replaced == self._base)
        if exact and applied.snapshot is not None:
            self._snapshot, self._loaded = applied.snapshot, True
        elif exact or self._loaded:
            base = None if created else self._snapshot
            state = applied.state
            if base is not None and not exact and sent.permanent is None:
                # Permanence is of the version that was read, as all else is.
                state = state[:35] + base.state[35:36] + state[36:]
            self._snapshot = applied.stored.over(base, applied.identity, state, applied.now_ms)
            self._loaded = True
        self._now_ms = self._now_ms or applied.now_ms
        if exact:
            self._base, self._own = applied.version.to_bytes(4) + applied.write_id, ()
        elif self._base is not None:
            # The journal holds no more commits than that, so none before them could be found in it.
            self._own = (*self._own[1 - _OWN :], applied.write_id)

    def _take_over(self, key: str, raw: bytes) -> None:
        # Merged with what somebody else stored. Who holds the value goes on with the merged one if it came
        # out of the session: what the app has put in is the app's, and all requests may share it.
        live: Any = self._live.get(key)
        merged = self._values.decode(raw)
        self.forget_stored(key)
        ours = key in self._handed_out and live is self._handed_out[key]
        if ours and type(live) is type(merged) and isinstance(live, (list, dict, set)):
            live.clear()
            (live.extend if isinstance(live, list) else live.update)(merged)
            self._live[key], self._given[key] = live, Given(raw, None, self._end_of(field_name(key)))

    def forget_stored(self, key: str) -> None:
        """Undo what this request did to a key, its deletion too: it is read afresh."""
        self._deletes.discard(key)
        self.forget(key)
