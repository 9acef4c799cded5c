"""The store: sessions in Redis, each call sent, proven and made a result.

Nothing else in luasession talks to Redis. Replies of the scripts become
results and exceptions here and nowhere else; a snapshot that was loaded or
made by a commit goes into the cache of the process on its way.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

from .cache import SnapshotCache
from .client import Client, Patience, connect
from .clock import now_ns
from .config import Config
from .connections import Connections
from .delta import Change, Delta
from .errors import CorruptSession, SessionTooLarge, SessionUnavailable
from .ids import SessionId, new_write_id, same_digest
from .outcome import Applied, Conflicting, Loaded, Refused, Standing
from .packing import pack_change, pack_delta, pack_offer
from .scripts import Code, script
from .snapshot import Snapshot, read_changes, read_hash
from .stats import Stats
from .vault import Vault

_NOTHING: Mapping[bytes, bytes | None] = MappingProxyType({})
# Milliseconds between two touches by those who do not use a session.
_NEVER = 1 << 47
# Microseconds that the scripts can be told.
_LONGEST = (1 << 56) - 1
# Entries of an index that are looked at when another one is entered.
_STALE_AT_ONCE = 8


class Caller(NamedTuple):
    """The request behind a call."""

    #: The monotonic nanosecond at which it opened its session.
    opened: int
    #: Idle lifetime, in milliseconds, of sessions that have none of their own.
    lifetime_ms: int
    patience: Patience
    #: Whether what it does is use, which keeps a session alive.
    uses: bool = True


class Entry(NamedTuple):
    """A session in its principal's index."""

    handle: str
    #: Milliseconds since it was entered.
    age_ms: int


class _Process:
    """What belongs to one process: a fork starts afresh with its own."""

    def __init__(self, config: Config) -> None:
        self.lock = Lock()
        self.client: Client | None = None
        self.cache = SnapshotCache(config.cache_bytes)
        self.stats = Stats()


class Store:
    """Sessions in Redis.

    :param name: names the app, for its embedded server.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self._name = name
        self._here = _Process(config)
        # What another thread held while it forked, a lock or half a conversation with Redis, is never
        # touched in the child. The hook holds the store weakly, as there is no way to take it back.
        os.register_at_fork(after_in_child=_starter_afresh(weakref.ref(self)))
        # A request lasts no longer once it waits for Redis, so that by twice that its log-in is through.
        self._youth_ms = math.ceil(config.redis_deadline * 2000)
        replicas = config.wait_replicas
        # What commit.lua is told each time.
        absolute_ms = config.absolute_ms or 0
        self._limits = absolute_ms.to_bytes(6) + config.grace_ms.to_bytes(6) + config.max_bytes.to_bytes(4)
        self._wait = (replicas, config.wait_timeout_ms) if replicas else None
        self._vault = Vault(config.encryption_keys) if config.encryption_keys else None

    # -- reading ------------------------------------------------------------

    def trusted(self, session_id: SessionId, hint: int, caller: Caller) -> Snapshot | None:
        """Return the cached snapshot if it needs no confirmation (G9, G10).

        :param hint: the version that the browser has seen made, 0 if none.
        """
        if self._config.cache_ttl is None:
            return None
        here = self._here
        entry = here.cache.get(session_id)
        if entry is None:
            return None
        window = self._config.trust_seconds(entry.snapshot.lifetime_ms or caller.lifetime_ms)
        if (
            entry.snapshot.version < hint
            or not 0 <= now_ns() - entry.sent < window * 1e9
            or entry.snapshot.ends_ms <= self.now_ms(session_id.handle)
        ):
            return None
        here.stats.add("cache_hits")
        return entry.snapshot

    def load(self, session_id: SessionId, caller: Caller, offer: SessionId | None = None) -> Loaded:
        """Read a session; only what changed, where an older snapshot is cached.

        :param offer: the id that it is to have next, if its secret is due to be renewed.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise CorruptSession: if what is stored is not a session of a known format.
        """
        here = self._here
        if not session_id.digest:
            return self._load(session_id, b"", caller, None)
        entry = None if self._config.cache_ttl is None else here.cache.get(session_id)
        if entry is None:
            snapshot = self._read_whole(session_id, caller)
            if snapshot is not None:
                return Loaded(Standing.LIVE, snapshot)
        return self._load(session_id, session_id.digest, caller, entry and entry.snapshot, offer)

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

    def _read_whole(self, session_id: SessionId, caller: Caller) -> Snapshot | None:
        # A plain HGETALL: Lua builds the same reply at several times the server's CPU. It proves itself
        # by the digest in it; without that it proves nothing, and load.lua is asked (G16).
        key = self._key(session_id.handle)
        words = (b"HGETALL", key)
        sent, reply, _server = self._client.call(lambda *_: words, _is_hash, caller.patience, None, key)
        if not isinstance(reply, dict):
            reply = _paired(reply)
        identity = reply.get(b"@i")
        if identity is None or not same_digest(identity[1:33], session_id.digest):
            return None
        snapshot = read_hash(reply)
        self._here.stats.add("loads", snapshot.size)
        self._remember(session_id.handle, snapshot, sent)
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
        offered = self._packed_offer(offer)
        lifetime_ms = (base and base.lifetime_ms) or caller.lifetime_ms

        def arguments(age: int, _resend: int) -> tuple[bytes, ...]:
            return (
                digest,
                b"%d" % age,
                base.pair if base else b"",
                b"%d" % caller.lifetime_ms,
                b"%d" % (self._config.touch_ms(lifetime_ms) if caller.uses else _NEVER),
                b"%d" % self._config.grace_ms,
                offered,
            )

        sent, (code, _id, _now, *rest) = self._run(
            "load", session_id.handle, new_write_id(), caller, arguments
        )
        if code not in _SNAPSHOTS:
            here.stats.add("loads")
            here.cache.drop(session_id.handle)
            return Loaded(_standing(code))
        identity, state, former, flags, *items = rest
        here.stats.add("loads", sum(len(item) for item in items if item))
        if code == Code.UNCHANGED and base:
            snapshot = base.at(identity, state)
        elif code == Code.CHANGED and base:
            snapshot = read_changes(base, (identity, state, *items))
        else:
            snapshot = read_hash(_paired(items))
        if former:
            return Loaded(Standing.FORMER, snapshot, bool(flags & 1))
        if digest:
            self._remember(session_id.handle, snapshot, sent)
        return Loaded(Standing.LIVE, snapshot, bool(flags & 1), bool(flags & 2))

    def _packed_offer(self, offer: SessionId | None) -> bytes:
        return pack_offer(offer.digest, self._config.renew_after_ms or 0) if offer else b""

    def open(self, handle: str, name: bytes, stored: bytes) -> bytes:
        """Return the bytes of a value as the serializer made them.

        :param name: the hash field.
        :raise ValueError: if the value is encrypted, and no key opens it.
        """
        return stored if self._vault is None else self._vault.open(handle, name, stored)

    def _sealed(self, handle: str, delta: Delta) -> Delta:
        return delta if self._vault is None else self._vault.seal(handle, delta)

    # -- writing ------------------------------------------------------------

    def commit(
        self,
        session_id: SessionId,
        delta: Delta,
        caller: Caller,
        *,
        rotate_to: SessionId | None = None,
        offer: SessionId | None = None,
    ) -> Applied | Conflicting | Refused:
        """Apply a delta to a session that is there.

        :param rotate_to: the id that it has afterwards, if the delta rotates.
        :param offer: the id that it is to have next, if its secret is due to be renewed.
        :raise SessionTooLarge: if it would outgrow ``SESSION_MAX_BYTES``.
        :raise SessionUnavailable: if Redis does not answer within the deadline, or
            answers that whether the commit was applied is no longer known.
        """
        return self._commit(session_id.handle, session_id.digest, delta, caller, rotate_to, offer)

    def commit_current(self, handle: str, delta: Delta, caller: Caller) -> Applied | Conflicting | Refused:
        """Apply a delta under whatever secret is current, for calls from outside a request."""
        return self._commit(handle, b"", delta, caller)

    def create(self, session_id: SessionId, delta: Delta, caller: Caller) -> Applied | Refused:
        """Start a session with a delta.

        :raise SessionTooLarge: if it would be over ``SESSION_MAX_BYTES``.
        :raise SessionUnavailable: as for :meth:`commit`.
        """
        result = self._commit(session_id.handle, session_id.digest, delta, caller, create=True)
        if isinstance(result, Conflicting):
            raise SessionUnavailable("a new session cannot be in conflict")
        return result

    def _commit(
        self,
        handle: str,
        digest: bytes,
        delta: Delta,
        caller: Caller,
        rotate_to: SessionId | None = None,
        offer: SessionId | None = None,
        *,
        create: bool = False,
    ) -> Applied | Conflicting | Refused:
        config = self._config
        delta = self._sealed(handle, delta)
        write_id = new_write_id()
        flags = create | delta.cleared << 1
        if delta.rotation is None or delta.rotation.in_flight:
            flags |= 4
        if config.touch_interval_ms is None and caller.uses:
            flags |= 8
        lifetime_ms = caller.lifetime_ms
        touch_ms = config.touch_ms(lifetime_ms) if caller.uses else _NEVER
        numbers = b"%c%b%b%b" % (flags, lifetime_ms.to_bytes(6), touch_ms.to_bytes(6), self._limits)
        packed = pack_delta(delta, rotate_to.digest if rotate_to else b"", self._packed_offer(offer))

        def arguments(age: int, resend: int) -> tuple[bytes, ...]:
            return (digest, age.to_bytes(7) + resend.to_bytes(7) + numbers, *packed)

        here = self._here
        try:
            sent, (code, _id, now_us, *rest) = self._run(
                "commit", handle, write_id, caller, arguments, self._wait
            )
        except SessionUnavailable:
            # It may have been applied all the same: what is held here may be of before it.
            here.cache.drop(handle)
            raise
        if code == Code.APPLIED:
            here.stats.add("commits", sum(map(len, packed)))
            expected = rotate_to.digest if rotate_to else digest
            fresh = create or delta.cleared
            return self._applied(
                handle, write_id, delta, rest, int.from_bytes(now_us) // 1000, sent, expected, fresh
            )
        if code == Code.CONFLICT:
            _identity, state, *items = rest
            current = _paired(items)
            everything = b"*" in current and delta.reads is None
            if everything:
                current.pop(b"*")
            return Conflicting(state[:12], current, everything)
        if code == Code.LARGE:
            raise SessionTooLarge(rest[0], config.max_bytes)
        if code == Code.UNKNOWN:
            raise SessionUnavailable("whether the commit was applied is no longer known")
        here.cache.drop(handle)
        return Refused(_standing(code), was_open=bool(rest and rest[0]))

    def _applied(
        self,
        handle: str,
        write_id: bytes,
        delta: Delta,
        rest: list[Any],
        now_ms: int,
        sent: int,
        expected: bytes,
        fresh: bool,
    ) -> Applied:
        cache = self._here.cache
        packed, *items = rest
        replaced, identity, state = packed[4:16], packed[18:63], packed[63:]
        former = bool(expected) and not same_digest(identity[1:33], expected)
        snapshot = None
        # If it was found in the ring, others may have come after it: then the state is theirs.
        if state[4:12] != write_id or former or self._config.cache_ttl is None:
            cache.drop(handle)
        elif fresh:
            snapshot = delta.over(None, identity, state, now_ms)
            cache.put(handle, snapshot, sent)
        else:
            snapshot = cache.advance(
                handle, replaced, lambda held: delta.over(held, identity, state, now_ms), sent
            )
        report = _paired(items) if items else _NOTHING
        return Applied(
            delta,
            int.from_bytes(packed[:4]),
            write_id,
            replaced,
            snapshot,
            former,
            identity,
            state,
            packed[16] & 1 == 1,
            packed[16] & 2 == 2,
            packed[17] == 1 or (packed[17] == 2 and _moves_expiry(delta)),
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

        def arguments(_age: int, resend: int) -> tuple[bytes, ...]:
            return (digest, b"%d" % resend, b"%d" % self._config.grace_ms, wanted, b"%d" % always)

        _sent, (code, *_) = self._run("destroy", handle, new_write_id(), caller, arguments, self._wait)
        self._here.cache.drop(handle)
        return bool(code == Code.DESTROYED)

    # -- the index of a principal ---------------------------------------------

    def enter(self, principal: str, handle: str, caller: Caller) -> None:
        """Enter a session into its principal's index, before the session says so.

        What expired without a log-out is looked for among the oldest entries, and taken out.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        entries = self._index(principal, caller, entered=handle, most=_STALE_AT_ONCE)
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
            self._index(principal, caller, taken_out=handles, most=0)

    def entries(self, principal: str, caller: Caller) -> list[Entry]:
        """Return a principal's index, the oldest entry first.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        return self._index(principal, caller)

    def owned(self, principal: str, handle: str, caller: Caller) -> Snapshot | None:
        """Return a session if it is there and says that it is the principal's.

        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        snapshot = self.load(SessionId.without_secret(handle), caller).snapshot
        return snapshot if snapshot is not None and snapshot.principal == principal else None

    def is_young(self, entry: Entry) -> bool:
        """Whether the log-in behind an entry may still be on its way."""
        return entry.age_ms < self._youth_ms

    def _index(
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
        _sent, (_code, _id, now_us, *items) = self._run(
            "index", f"principal:{digest}", new_write_id(), caller, lambda _age, _resend: packed, self._wait
        )
        now_ms = int.from_bytes(now_us) // 1000
        pairs = zip(items[::2], items[1::2], strict=True)
        return [Entry(handle.decode(), max(now_ms - int(float(moment)), 0)) for handle, moment in pairs]

    # -- the process --------------------------------------------------------

    def now_ms(self, handle: str) -> int:
        """Return the clock of a session's server in milliseconds, as last seen and counted on."""
        client = self._here.client
        server = None if client is None else client.known(self._key(handle))
        if server is None or server.clock_offset is None:
            return time.time_ns() // 1_000_000
        return (now_ns() // 1000 + server.clock_offset) // 1000

    @property
    def stats(self) -> Stats:
        """The counters of this process."""
        return self._here.stats

    def caller(self, opened: int, lifetime_ms: int) -> Caller:
        """Return a caller that waits for Redis as long as a request does."""
        return Caller(opened, lifetime_ms, Patience(self._config.redis_deadline))

    def start_afresh(self) -> None:
        """Forget connections, cache and counters, as in the child of a fork."""
        self._here = _Process(self._config)

    @property
    def _client(self) -> Client:
        here = self._here
        if here.client is None:
            client = connect(self._config, self._name, self._warm_up)
            with here.lock:
                if here.client is None:
                    here.client = client
        return here.client

    def _warm_up(self, server: Connections) -> None:
        # Best effort: without it the first calls cost an EVAL each, and the clock comes with their reply.
        # Each server when it is first used, so that none that is down delays those that are not.
        for name in ("load", "commit", "destroy", "index"):
            server.ask((b"SCRIPT", b"LOAD", script(name).text), _is_sha)
        sent, (seconds, microseconds) = server.ask((b"TIME",), _is_time)
        _set_clock(server, int(seconds) * 1_000_000 + int(microseconds), sent)

    def _key(self, handle: str) -> bytes:
        return (self._config.key_prefix + handle).encode()

    def _remember(self, handle: str, snapshot: Snapshot, sent: int) -> None:
        if self._config.cache_ttl is not None:
            self._here.cache.put(handle, snapshot, sent)

    def _run(
        self,
        name: str,
        handle: str,
        call_id: bytes,
        caller: Caller,
        arguments: Callable[[int, int], tuple[bytes, ...]],
        wait: tuple[int, int] | None = None,
    ) -> tuple[int, list[Any]]:
        """Run a script, and return when it was sent, and its reply.

        :param call_id: its first argument, which the reply has to echo (G16).
        :param arguments: makes the others of the age of the request, and of the microseconds since the
            first sending, 0 if this is the first.
        """
        text = script(name)
        key = self._key(handle)

        def words(sent: int, first: int, known: bool) -> tuple[bytes, ...]:
            if not known:
                self._here.stats.add("script_reloads")
            how = (b"EVALSHA", text.sha) if known else (b"EVAL", text.text)
            # Sent again it is marked so, even within a microsecond: not found in the ring, it may have
            # been applied.
            resend = _microseconds(sent - first) or 1 if sent != first else 0
            return (*how, b"1", key, call_id, *arguments(_microseconds(sent - caller.opened), resend))

        def accept(reply: Any) -> bool:
            return isinstance(reply, list) and len(reply) >= 3 and bool(reply[1] == call_id)

        sent, reply, server = self._client.call(words, accept, caller.patience, wait, key)
        _set_clock(server, int.from_bytes(reply[2]), sent)
        return sent, reply


def _set_clock(server: Connections, server_us: int, sent: int) -> None:
    # From the sending, so the clock is early by a transit at most: nothing outlives its end. A slow
    # reply tells little, so only the first one counts whatever it took.
    if server.clock_offset is None or now_ns() - sent < 20_000_000:
        server.clock_offset = server_us - sent // 1000


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
        Code.MISSING: Standing.MISSING,
        Code.GONE: Standing.GONE,
        Code.STALE: Standing.STALE,
    }[Code(code)]


def _paired(items: list[Any]) -> dict[bytes, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _is_hash(reply: Any) -> bool:
    # Another call's reply may be a list as well, of anything.
    items = [*reply, *reply.values()] if isinstance(reply, dict) else reply
    return isinstance(items, list) and len(items) % 2 == 0 and set(map(type, items)) <= {bytes}


def _microseconds(nanoseconds: int) -> int:
    # As the scripts take it, 7 bytes. A clock that was set back makes nobody younger than nothing.
    return min(max(nanoseconds // 1000, 0), _LONGEST)


def _is_time(reply: Any) -> bool:
    return isinstance(reply, list) and len(reply) == 2


def _is_sha(reply: Any) -> bool:
    return isinstance(reply, bytes)


def _moves_expiry(delta: Delta) -> bool:
    # Cleared, a session that is not permanent needs no new cookie: the id is not repeated for it (G8).
    if delta.cleared and not delta.permanent:
        return False
    return delta.permanent is not None or delta.lifetime_ms is not None
