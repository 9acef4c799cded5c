"""The store: sessions in Redis, each call sent, proven and made a result.

Replies of the scripts become results and exceptions here; a snapshot that was
loaded or made by a commit goes into the cache of the process on its way.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

from .cache import SnapshotCache
from .calls import Caller, Calls
from .client import Patience
from .clock import now_ns
from .config import Config
from .delta import Change, Delta, Draft
from .errors import CorruptSession, SessionTooLarge, SessionUnavailable
from .ids import SessionId, new_write_id, same_digest
from .index import TOLD, PrincipalIndex
from .outcome import FORMER, GONE, LIVE, MISSING, STALE, Applied, Conflicting, Loaded, Refused, Standing
from .packing import NEVER, pack_change, pack_delta, pack_numbers, pack_offer, pack_times
from .scripts import APPLIED, Code
from .snapshot import Snapshot, read_changes, read_hash
from .stats import Stats
from .turns import Turns
from .vault import SEAL_BYTES, Vault

#: Bytes up to which a session is read whole, rather than asked for what changed.
SMALL = 2048
_NOTHING: Mapping[bytes, bytes | None] = MappingProxyType({})
# Entries that one log-in looks at, of which it makes one: so there are fewer and fewer stale ones.
_LOOKED_AT = 2


class _Process:
    """What belongs to one process: a fork starts afresh with its own."""

    def __init__(self, config: Config, name: str) -> None:
        self.stats = Stats()
        self.calls = Calls(config, name, self.stats)
        self.cache = SnapshotCache(config.cache_bytes)
        self.turns = Turns()


class Store:
    """Sessions in Redis.

    :param name: names the app, for its embedded server.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self._name = name
        self._here = _Process(config, name)
        # What another thread held while it forked, a lock or half a conversation with Redis, is never
        # touched in the child. The hook holds the store weakly, as there is no way to take it back.
        os.register_at_fork(after_in_child=_starter_afresh(weakref.ref(self)))
        # What commit.lua and load.lua are told each time; it changes little.
        self._numbers = lru_cache(maxsize=64)(partial(pack_numbers, config))
        self._times = lru_cache(maxsize=64)(pack_times)
        #: Seals and opens values; None where they are stored as the serializer makes them.
        self.vault = Vault(config.encryption_keys) if config.encryption_keys else None

    # -- reading ------------------------------------------------------------

    def trusted(self, session_id: SessionId, hint: int, lifetime_ms: int) -> Snapshot | None:
        """Return the cached snapshot if it needs no confirmation (G9, G10).

        :param hint: the version that the browser has seen made, 0 if none.
        :param lifetime_ms: idle lifetime of sessions that have none of their own, milliseconds.
        """
        if not self._config.cache_ttl:  # nothing is kept, or nothing is trusted
            return None
        here = self._here
        entry = here.cache.get(session_id)
        if entry is None:
            return None
        window = self._config.trust_seconds(entry.snapshot.lifetime_ms or lifetime_ms)
        if (
            entry.snapshot.version < hint
            or not 0 <= now_ns() - entry.sent < window * 1e9
            or entry.snapshot.ends_ms <= self.now_ms(session_id.handle)
        ):
            return None
        here.stats.add("cache_hits")
        return entry.snapshot

    def load(self, session_id: SessionId, caller: Caller, offer: SessionId | None = None) -> Loaded:
        """Read a session; only what changed, where an older snapshot is cached and it is not small.

        :param offer: the id that it is to have next, if its secret is due to be renewed.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise CorruptSession: if what is stored is not a session of a known format.
        """
        here = self._here
        if not session_id.secret:
            return self._load(session_id, b"", caller, None)
        held, is_cheap = None, True
        if self._config.cache_ttl is not None:
            if (entry := here.cache.get(session_id)) is not None:
                held = entry.snapshot
                is_cheap = offer is None and self._is_cheap(held, session_id, caller)
            elif (held := here.cache.peek(session_id.handle)) is not None:
                # Under another secret: rotated elsewhere, or somebody who has seen the handle made up a
                # secret. The script tells, and sends nothing to whoever does not know the right one.
                is_cheap = False
        if is_cheap:
            snapshot = self._read_whole(session_id, caller)
            if snapshot is not None:
                return Loaded(LIVE, snapshot)
        return self._load(session_id, session_id.digest, caller, held, offer)

    def confirm(
        self, session_id: SessionId, snapshot: Snapshot, caller: Caller, offer: SessionId | None = None
    ) -> Loaded:
        """Ask whether a snapshot still holds, which refreshes the TTL if that is due.

        It does not wait for a server that is down.

        :param offer: the id that it is to have next, if its secret is due to be renewed.
        :raise SessionUnavailable: if Redis does not answer at once.
        """
        impatient = caller._replace(patience=Patience(0))
        return self._load(session_id, session_id.digest, impatient, snapshot, offer)

    def _is_cheap(self, snapshot: Snapshot, session_id: SessionId, caller: Caller) -> bool:
        # A script that finds nothing new takes the server some 12 microseconds, a small hash 3. Where the TTL
        # is due a refresh the script does both.
        interval = self._config.touch_ms(caller.lifetime_ms, snapshot.lifetime_ms)
        return snapshot.size <= SMALL and self.now_ms(session_id.handle) - snapshot.touched_ms < interval

    def _read_whole(self, session_id: SessionId, caller: Caller) -> Snapshot | None:
        # A plain HGETALL: Lua builds the same reply at several times the server's CPU. It proves itself
        # by the digest in it; without that it proves nothing, and load.lua is asked (G16).
        here = self._here
        sent, reply = here.calls.whole(session_id.handle, caller, lambda: session_id.digest)
        identity = reply.get(b"@i")
        if not isinstance(identity, bytes) or not same_digest(identity[1:33], session_id.digest):
            return None
        snapshot = read_hash(reply)
        here.stats.add("loads", snapshot.size)
        if self._config.cache_ttl is not None:
            here.cache.put(session_id.handle, snapshot, sent)
        return snapshot

    def _load(
        self,
        session_id: SessionId,
        digest: bytes,
        caller: Caller,
        base: Snapshot | None,
        offer: SessionId | None = None,
    ) -> Loaded:
        here = self._here
        own_ms = base.lifetime_ms if base else None
        interval_ms = self._config.touch_ms(caller.lifetime_ms, own_ms) if caller.uses else NEVER
        numbers = self._times(caller.lifetime_ms, interval_ms, self._config.grace_ms)
        held = base.pair if base else b""
        rest = (held, self._packed_offer(offer)) if offer else (held,) if held else ()

        def arguments(age: int, _resend: int) -> tuple[bytes, ...]:
            return (digest, age.to_bytes(7) + numbers, *rest)

        sent, (code, _id, _now, *found) = here.calls.run(
            "load", session_id.handle, new_write_id(), caller, arguments, writes=False
        )
        if code not in _SNAPSHOTS:
            here.stats.add("loads")
            here.cache.drop(session_id.handle, b"" if code == Code.GONE else digest)
            return Loaded(_standing(code))
        identity, state, former, flags, *items = found
        here.stats.add("loads", sum(len(item) for item in (items[0] if code == Code.FULL else items) if item))
        if code == Code.UNCHANGED and base:
            snapshot = base.at(identity, state)
        elif code == Code.CHANGED and base:
            snapshot = read_changes(base, (identity, state, *items))
        else:
            snapshot = read_hash(_paired(items[0]))
        if former:
            return Loaded(FORMER, snapshot, bool(flags & 1))
        if digest and self._config.cache_ttl is not None:
            here.cache.put(session_id.handle, snapshot, sent)
        return Loaded(LIVE, snapshot, bool(flags & 1), bool(flags & 2))

    def _packed_offer(self, offer: SessionId) -> bytes:
        return pack_offer(offer.digest, self._config.renew_after_ms or 0)

    def size_of(self, delta: Delta) -> int:
        """Return how many bytes of names and values a delta comes to as it is stored."""
        return delta.size + (len(delta.sets) * SEAL_BYTES if self.vault else 0)

    # -- writing ------------------------------------------------------------

    def commit(
        self,
        session_id: SessionId,
        delta: Delta,
        caller: Caller,
        *,
        create: bool = False,
        rotate_to: SessionId | None = None,
        offer: SessionId | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Applied | Conflicting | Refused:
        """Apply a delta to a session, which has to be there, or must not be if it is to be created.

        :param session_id: without a secret, it is the session whatever its secret is.
        :param rotate_to: the id that it has afterwards, if the delta rotates.
        :param offer: the id that it is to have next, if its secret is due to be renewed.
        :param meanwhile: what can be done while the server works, as for :meth:`Client.call`.
        :raise SessionTooLarge: if it would outgrow ``SESSION_MAX_BYTES``.
        :raise SessionUnavailable: if Redis does not answer within the deadline, or
            answers that whether the commit was applied is no longer known.
        """
        handle, digest = session_id.handle, session_id.digest
        if self.vault is not None:
            delta = self.vault.seal(handle, delta)
        write_id = new_write_id()
        in_flight = delta.rotation is None or delta.rotation.in_flight
        numbers = self._numbers(create, delta.cleared, in_flight, caller.lifetime_ms, caller.uses)
        packed = pack_delta(
            delta, rotate_to.digest if rotate_to else b"", self._packed_offer(offer) if offer else b""
        )

        def arguments(age: int, resend: int) -> tuple[bytes, ...]:
            return (digest, age.to_bytes(7) + resend.to_bytes(7) + numbers, *packed)

        here, draft = self._here, Draft(delta)

        def prepare() -> None:
            draft.draw(None if create else here.cache.peek(handle))
            if meanwhile is not None:
                meanwhile()

        try:
            sent, (code, _id, now_us, *rest) = here.calls.run(
                "commit", handle, write_id, caller, arguments, meanwhile=prepare
            )
        except BaseException:
            # It may have been applied all the same: what is held here may be of before it.
            here.cache.drop(handle)
            raise
        if code != APPLIED:
            return self._not_applied(session_id, delta, code, rest)
        here.stats.add("commits", sum(map(len, packed)))
        expected = rotate_to.digest if rotate_to else digest
        fresh = create or delta.cleared
        # Sent again it may have been applied before: the ends of keys count from that moment.
        state = rest[3]
        if state[4:12] == write_id:
            now_us = int.from_bytes(state[12:19])
        return self._applied(handle, write_id, delta, draft, rest, now_us // 1000, sent, expected, fresh)

    def _not_applied(
        self, session_id: SessionId, delta: Delta, code: bytes, rest: list[Any]
    ) -> Conflicting | Refused:
        if code == Code.CONFLICT:
            _identity, state, *items = rest
            current = _paired(items)
            everything = b"*" in current and delta.reads is None
            if everything:
                current.pop(b"*")
            return Conflicting(state[:12], current, everything)
        if code == Code.LARGE:
            raise SessionTooLarge(rest[0], self._config.max_bytes)
        if code == Code.UNKNOWN:
            raise SessionUnavailable("whether the commit was applied is no longer known")
        self._here.cache.drop(session_id.handle, b"" if code == Code.GONE else session_id.digest)
        return Refused(_standing(code), was_open=bool(rest and rest[0]))

    def _applied(
        self,
        handle: str,
        write_id: bytes,
        delta: Delta,
        draft: Draft,
        rest: list[Any],
        now_ms: int,
        sent: int,
        expected: bytes,
        fresh: bool,
    ) -> Applied:
        cache = self._here.cache
        version, replaced_state, identity, state, flags, *items = rest
        replaced = replaced_state[:12]
        former = bool(expected) and not same_digest(identity[1:33], expected)
        snapshot = None
        # If it was found in the ring, others may have come after it: then the state is theirs.
        if state[4:12] != write_id or former or self._config.cache_ttl is None:
            cache.drop(handle)
        elif fresh:
            snapshot = delta.over(None, identity, state, now_ms)
            cache.put(handle, snapshot, sent)
        else:
            snapshot = cache.advance(handle, replaced, draft, (identity, state), now_ms, sent)
        report = _paired(items) if items else _NOTHING
        return Applied(
            delta,
            version,
            write_id,
            replaced,
            snapshot,
            former,
            identity,
            state,
            flags & 1 != 0,
            flags & 2 != 0,
            flags & 4 != 0 or (flags & 8 != 0 and _moves_expiry(delta)),
            now_ms,
            report,
        )

    def destroy(
        self,
        handle: str,
        digest: bytes,
        caller: Caller,
        *,
        principal: str | None = None,
        always: bool = False,
    ) -> bool:
        """End a session, and tell whether there was one.

        :param digest: of the secret, current or former; empty for whatever is current.
        :param principal: end it only if it is this principal's.
        :param always: leave a tombstone even where there is no session yet.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        wanted = b"" if principal is None else pack_change(Change(principal))
        waited_for = b"1" if self._config.wait_replicas else b""

        def arguments(_age: int, resend: int) -> tuple[bytes, ...]:
            return (digest, b"%d" % resend, b"%d" % self._config.grace_ms, wanted, b"%d" % always, waited_for)

        cache = self._here.cache
        try:
            _sent, (code, *_) = self.calls.run("destroy", handle, new_write_id(), caller, arguments)
        except BaseException:
            cache.drop(handle)  # it may have ended all the same
            raise
        destroyed = bool(code == Code.DESTROYED)
        cache.drop(handle, b"" if destroyed else digest)
        return destroyed

    # -- principals -----------------------------------------------------------

    def owned(self, principal: str, handle: str, caller: Caller) -> Snapshot | None:
        """Return a session if it is there and says that it is the principal's.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        # Looking is no use of it: a log-in elsewhere keeps no session alive (G13).
        looking = caller._replace(uses=False)
        snapshot = self.load(SessionId.without_secret(handle), looking).snapshot
        return snapshot if snapshot is not None and snapshot.principal == principal else None

    def enter(self, principal: str, handle: str, caller: Caller) -> None:
        """Enter a session into its principal's index, before the session says so.

        Where there are many, what expired without a log-out is looked for among the oldest, and taken out.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        entries = self.index.enter(principal, handle, caller)
        if len(entries) < TOLD:
            return  # a few stale ones do no harm, and a log-in mostly costs this one call
        oldest = [entry.handle for entry in entries[:_LOOKED_AT] if entry.age_ms > caller.lifetime_ms]
        with suppress(SessionUnavailable, CorruptSession):  # it stays, and the next log-in looks again
            stale = [handle for handle in oldest if not self.owned(principal, handle, caller)]
            self.index.leave(principal, stale, caller)

    # -- the process --------------------------------------------------------

    def now_ms(self, handle: str) -> int:
        """Return the clock of a session's server in milliseconds, as last seen and counted on."""
        return self._here.calls.now_ms(handle)

    def turn(self, handle: str) -> AbstractContextManager[bool]:
        """Return a turn at a session, among the requests of this process."""
        return self._here.turns.one(handle)

    @property
    def calls(self) -> Calls:
        """The calls of this process."""
        return self._here.calls

    @property
    def index(self) -> PrincipalIndex:
        """The index of principals."""
        return PrincipalIndex(self._config, self.calls)

    @property
    def stats(self) -> Stats:
        """The counters of this process."""
        return self._here.stats

    def caller(self, opened: int, lifetime_ms: int) -> Caller:
        """Return a caller that waits for Redis as long as a request does."""
        return Caller(opened, lifetime_ms, Patience(self._config.redis_deadline))

    def start_afresh(self) -> None:
        """Forget connections, cache and counters, as in the child of a fork."""
        self._here = _Process(self._config, self._name)


def _starter_afresh(reference: weakref.ref[Store]) -> Callable[[], None]:
    def start() -> None:
        store = reference()
        if store is not None:
            store.start_afresh()

    return start


_SNAPSHOTS = (Code.UNCHANGED, Code.CHANGED, Code.FULL)


def _standing(code: bytes) -> Standing:
    if code == Code.CORRUPT:
        raise CorruptSession("the metadata of the session is of another format, cut off or missing")
    return {
        Code.MISSING: MISSING,
        Code.GONE: GONE,
        Code.STALE: STALE,
    }[Code(code)]


def _paired(items: list[Any]) -> dict[bytes, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _moves_expiry(delta: Delta) -> bool:
    # Cleared, a session that is not permanent needs no new cookie: the id is not repeated for it (G8).
    if delta.cleared and not delta.permanent:
        return False
    return delta.permanent is not None or delta.lifetime_ms is not None
