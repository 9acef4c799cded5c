"""Deltas: what one request changed, as a value of its own.

A delta is made by the session, sent by the store and laid over the snapshot
that the commit replaced. It knows neither Redis nor Flask.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from .snapshot import Pair, Snapshot

_NOTHING: Final[Mapping[bytes, Any]] = MappingProxyType({})

#: What a snapshot has beside the metadata: fields, lifetime, principal, label, deadlines.
Content: TypeAlias = tuple[Mapping[bytes, bytes], int | None, str | None, str | None, Mapping[bytes, int]]


class Check(IntEnum):
    """What commit.lua does when somebody else changed a field since the base."""

    #: Nothing: the request did not read it.
    NONE = 0
    #: Store it, and tell what it replaced.
    REPORT = 1
    #: Store nothing of the delta.
    STRICT = 2


#: In the place of a ttl: the end that the field has now, if it has one.
KEEP: Final = (1 << 48) - 1
#: Plus an end, milliseconds of the server's clock, in the place of a ttl: the same, or this end where the
#: field is gone by now.
KEPT: Final = 1 << 47


class Put(NamedTuple):
    """One field set."""

    value: bytes
    check: Check = Check.NONE
    #: Milliseconds after which it disappears by itself, 0 for never, :data:`KEEP` for when it would anyway,
    #: :data:`KEPT` plus an end where that is known.
    ttl_ms: int = 0


class Rotation(NamedTuple):
    """A new secret for the session."""

    #: Whether requests that are open now may still commit.
    in_flight: bool = True


class Change(NamedTuple):
    """A new value of an attribute that may also be None."""

    value: str | None


class Delta(NamedTuple):
    """What one request changed."""

    #: The pair of the snapshot that it was made from, None for a blind write.
    base: Pair | None = None
    #: The write ids that this request itself has committed since the base.
    own: tuple[bytes, ...] = ()
    #: Hash field names to what they are set to.
    sets: Mapping[bytes, Put] = _NOTHING
    #: Hash field names deleted.
    deletes: Mapping[bytes, Check] = _NOTHING
    #: Fields that were read and must not have changed either, None for all of them.
    reads: frozenset[bytes] | None = frozenset()
    cleared: bool = False
    rotation: Rotation | None = None
    #: New permanence, None for no change.
    permanent: bool | None = None
    #: New idle lifetime of its own in milliseconds, 0 for none any more, None for no change.
    lifetime_ms: int | None = None
    principal: Change | None = None
    label: Change | None = None

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(
            self.sets
            or self.deletes
            or self.cleared
            or self.rotation
            or self.permanent is not None
            or self.lifetime_ms is not None
            or self.principal
            or self.label
        )

    @property
    def creates(self) -> bool:
        """Whether it starts a session where there is none."""
        return bool(self.sets or (self.principal and self.principal.value is not None))

    @property
    def size(self) -> int:
        """Bytes of the names and values that it sets."""
        return sum(len(name) + len(put.value) for name, put in self.sets.items())

    def without(self, other: Delta) -> Delta:
        """Return what changes beside what another delta changes in the same way, however that was checked."""
        attributes: dict[str, Any] = {
            name: mine if (mine := getattr(self, name)) != getattr(other, name) else None
            for name in _ATTRIBUTES
        }
        return self._replace(
            sets={name: put for name, put in self.sets.items() if not _is_same(put, other.sets.get(name))},
            deletes={name: check for name, check in self.deletes.items() if name not in other.deletes},
            cleared=self.cleared and not other.cleared,
            **attributes,
        )

    def without_field(self, name: bytes) -> Delta:
        """Return the same, save for what becomes of one field."""
        sets = {other: put for other, put in self.sets.items() if other != name}
        deletes = {other: check for other, check in self.deletes.items() if other != name}
        return self._replace(sets=sets, deletes=deletes)

    def over(self, base: Snapshot | None, identity: bytes, state: bytes, now_ms: int) -> Snapshot:
        """Return the snapshot that this delta makes of the one it replaced.

        :param base: the snapshot replaced; None for a creation.
        :param identity: ``@i`` as it now is.
        :param state: ``@v`` as it now is.
        :param now_ms: the moment of the commit, milliseconds of the server's clock.
        """
        return Snapshot(identity, state, *self.content_over(base, now_ms))

    def content_over(self, base: Snapshot | None, now_ms: int) -> Content:
        """Return the same without the metadata."""
        ends: Mapping[bytes, int] = {}
        if base is None or self.cleared:
            fields: dict[bytes, bytes] = {}
            deadlines: dict[bytes, int] = {}
            lifetime_ms = principal = label = None
        else:
            ends = base.deadlines
            fields, deadlines = _left_of(base, now_ms) if ends else (dict(base.fields), {})
            lifetime_ms, principal, label = base.lifetime_ms, base.principal, base.label
        for name in self.deletes:
            fields.pop(name, None)
            deadlines.pop(name, None)
        for name, put in self.sets.items():
            if not ends and not put.ttl_ms:
                fields[name] = put.value
                continue
            deadlines.pop(name, None)
            # What has lapsed is out of ``fields`` by now, and in the hash until this commit.
            is_there = name in fields or name in ends
            end = _end(put, ends.get(name, 0), now_ms, is_there=is_there)
            if end is None:  # it was to keep its end, and that has passed
                continue
            fields[name] = put.value
            if end:
                deadlines[name] = end
        if self.lifetime_ms is not None:
            lifetime_ms = self.lifetime_ms or None
        if self.principal:
            principal = self.principal.value
        if self.label:
            label = self.label.value
        return fields, lifetime_ms, principal, label, deadlines


#: What follows the sets of a delta that changes nothing else, as is mostly the case.
NOTHING_ELSE: Final = Delta()[3:]
# What a delta changes beside fields, where it is not None.
_ATTRIBUTES: Final = ("rotation", "permanent", "lifetime_ms", "principal", "label")


def _is_same(put: Put, other: Put | None) -> bool:
    return other is not None and (put.value, put.ttl_ms) == (other.value, other.ttl_ms)


class Draft:
    """What a delta will have made of a snapshot, drawn up before it is known what it met.

    A commit is on its way for longer than that takes, even for a thousand fields.
    """

    __slots__ = ("_after", "_before", "_delta")

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self._before: Snapshot | None = None
        self._after: Content | None = None

    def draw(self, before: Snapshot | None) -> None:
        """Assume that this is the snapshot that will be replaced, None for nothing to assume."""
        if before is not None:
            *_, deadlines = after = self._delta.content_over(before, 0)
            # Keys with an end of their own would depend on the moment of the commit.
            if not deadlines:
                self._before, self._after = before, after

    def over(self, base: Snapshot, identity: bytes, state: bytes, now_ms: int) -> Snapshot:
        """Return what :meth:`Delta.over` does."""
        if self._after is None or base is not self._before:
            return self._delta.over(base, identity, state, now_ms)
        return Snapshot(identity, state, *self._after)


def _left_of(base: Snapshot, now_ms: int) -> tuple[dict[bytes, bytes], dict[bytes, int]]:
    fields, deadlines = dict(base.fields), dict(base.deadlines)
    for name, deadline in base.deadlines.items():
        if deadline <= now_ms:
            fields.pop(name, None)
            del deadlines[name]
    return fields, deadlines


def _end(put: Put, before: int, now_ms: int, *, is_there: bool) -> int | None:
    if put.ttl_ms < KEPT:
        return now_ms + put.ttl_ms if put.ttl_ms else 0
    if not is_there and put.ttl_ms < KEEP:
        before = put.ttl_ms - KEPT
    return None if 0 < before <= now_ms else before
