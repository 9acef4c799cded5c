"""Outcomes: what a load or a commit came to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from .delta import Delta
from .snapshot import Pair, Snapshot


class Standing(Enum):
    """How a request stands to the session that its id names."""

    #: The session is there, under its current secret.
    LIVE = "live"
    #: Under a secret that was rotated away while this request was open, or renewed within the grace: it
    #: may commit, and is given no id.
    FORMER = "former"
    #: There is no such session.
    MISSING = "missing"
    #: It ended, or was cleared, while this request was open.
    GONE = "gone"
    #: Under a secret that was rotated away: nothing may be read or written.
    STALE = "stale"


# Names of their own: in Python 3.11 a look-up in an enumeration costs as much as a call.
LIVE = Standing.LIVE
FORMER = Standing.FORMER
MISSING = Standing.MISSING
GONE = Standing.GONE
STALE = Standing.STALE


class Loaded(NamedTuple):
    """What a load found."""

    standing: Standing
    snapshot: Snapshot | None = None
    #: Whether this call refreshed the TTL.
    touched: bool = False
    #: Whether the secret that the call offered was taken, to be presented from now on.
    offered: bool = False


class Applied(NamedTuple):
    """A commit was applied."""

    #: What was applied, its values as they are stored.
    stored: Delta
    version: int
    write_id: bytes
    #: The pair that it replaced; zeros where that is no longer known.
    replaced: Pair
    #: The session as it now is, None if it is not known here what it was before.
    snapshot: Snapshot | None
    #: Whether the secret was a former one: no cookie, no cache entry.
    former: bool
    #: The metadata ``@i`` and ``@v`` as they now are.
    identity: bytes
    state: bytes
    touched: bool
    offered: bool
    expiry_changed: bool
    now_ms: int
    #: Fields that were changed by others since the base, and what this commit replaced there.
    report: Mapping[bytes, bytes | None]


class Conflicting(NamedTuple):
    """Nothing was applied: strict fields have been changed by others."""

    #: The pair that the values are of.
    pair: Pair
    current: Mapping[bytes, bytes | None]
    #: Whether any field at all counts, and one has changed.
    everything: bool


class Refused(NamedTuple):
    """Nothing was applied: the session is not there for this request."""

    standing: Standing
    #: Whether the request was open before the rotation that it stumbled over.
    was_open: bool = False
