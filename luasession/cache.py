"""The cache of a process: snapshots, for a short time, bounded by their bytes.

It holds raw field bytes and no decoded value, so that nothing in it is ever
shared between two requests, and it gives a snapshot to nobody who could not
have it from Redis: the digest is compared here as it is there (G11).
"""

from __future__ import annotations

from operator import attrgetter
from sys import getsizeof
from threading import Lock
from typing import NamedTuple

from cachetools import Cache, LRUCache

from .delta import Draft
from .ids import SessionId, same_digest
from .snapshot import Pair, Snapshot

# Rough cost of the objects around the bytes: a snapshot, and each name and value.
_SNAPSHOT_BYTES = 600
_FIELD_BYTES = 120
# Rounded up, so that most commits leave an entry of the same size.
_ROUNDED_TO = 256


class Entry(NamedTuple):
    """A snapshot, and the monotonic nanosecond at which the call that confirmed it was sent."""

    snapshot: Snapshot
    sent: int


class _Place:
    """Where a session's entry is; another one of the same size may come into it, which moves nothing."""

    __slots__ = ("entry", "size")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.size = _size(entry)


def _size(entry: Entry) -> int:
    snapshot = entry.snapshot
    size = _SNAPSHOT_BYTES + snapshot.size + _FIELD_BYTES * (len(snapshot.fields) + len(snapshot.deadlines))
    if snapshot.label or snapshot.principal:
        # By what they take here: a character is up to four bytes.
        size += getsizeof(snapshot.label) + getsizeof(snapshot.principal)
    return size + -size % _ROUNDED_TO


class SnapshotCache:
    """Snapshots by handle.

    :param max_bytes: bound on the bytes held; the least recently used go first.
    """

    def __init__(self, max_bytes: int) -> None:
        # cachetools is corrupted for good by threads without a lock. No I/O is done under it.
        self._lock = Lock()
        self._places: LRUCache[str, _Place] = LRUCache(max_bytes, getsizeof=attrgetter("size"))

    def get(self, session_id: SessionId) -> Entry | None:
        """Return the entry of a session, if the id is the right one for it."""
        with self._lock:
            if session_id.handle not in self._places:  # cheaper than to meet the error
                return None
            entry = self._places[session_id.handle].entry
        if same_digest(entry.snapshot.digest, session_id.digest):
            return entry
        return None

    def peek(self, handle: str) -> Snapshot | None:
        """Return a session's snapshot, to whoever shows it to nobody; that is no use of it."""
        with self._lock:
            place = self._look(handle)
            return None if place is None else place.entry.snapshot

    def put(self, handle: str, snapshot: Snapshot, sent: int) -> None:
        """Keep what a call answered, unless something newer is there.

        Two loads overlap, and the older reply arrives last: the higher version
        stays if it was asked for no earlier. What was asked for later wins over a
        higher version, which a failover may have undone.
        """
        entry = Entry(snapshot, sent)
        with self._lock:
            place = self._look(handle)
            held = None if place is None else place.entry
            if held is not None and held.snapshot.version > snapshot.version and held.sent >= sent:
                return
            self._store(handle, entry, place)

    def advance(
        self, handle: str, replaced: Pair, draft: Draft, metadata: tuple[bytes, bytes], now_ms: int, sent: int
    ) -> Snapshot | None:
        """Put the snapshot that an own commit made in the place of the one it replaced.

        An entry of any other pair is dropped: foreign changes lie between.

        :param draft: lays over it what was committed.
        :param metadata: ``@i`` and ``@v`` as they now are.
        :param now_ms: the moment of the commit, milliseconds of the server's clock.
        :return: the new snapshot, if the one that was replaced was here.
        """
        with self._lock:
            place = self._look(handle)
            if place is None:
                return None
            before = place.entry.snapshot
            if before.pair != replaced:
                del self._places[handle]
                return None
            snapshot = draft.over(before, *metadata, now_ms)
            self._store(handle, Entry(snapshot, sent), place)
            return snapshot

    def drop(self, handle: str, digest: bytes = b"") -> None:
        """Forget a session.

        :param digest: forget it only if that is its secret's, so that whoever made up a secret for a handle
            takes nothing from its owner. Empty: whatever it is.
        """
        with self._lock:
            place = self._look(handle)
            if place is not None and (not digest or same_digest(place.entry.snapshot.digest, digest)):
                del self._places[handle]

    def _look(self, handle: str) -> _Place | None:
        # The plain cache's look-up: by that of LRUCache the entry would count as used.
        return Cache.__getitem__(self._places, handle) if handle in self._places else None

    def _store(self, handle: str, entry: Entry, place: _Place | None) -> None:
        # One object in the place of another: whoever looks without the lock sees one of the two.
        if place is not None and _size(entry) == place.size:
            place.entry = entry
            return
        try:
            self._places[handle] = _Place(entry)
        except ValueError:
            # Larger than the whole cache. cachetools leaves the old entry in its place.
            self._places.pop(handle, None)
