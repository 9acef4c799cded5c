"""Snapshots: the immutable image of a session at one version.

What Redis answers is kept as it came, names and values as bytes, and taken
apart when somebody asks: a request that reads one key of a thousand pays for
one. The layout of the metadata is that of the scripts' headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from .errors import CorruptSession

#: The format number of the metadata that this version writes and reads.
FORMAT = 1

_IDENTITY_BYTES = 45
_STATE_BYTES = 41
# Of the longest lifetime, milliseconds; the scripts have the same bound.
_LIFETIME_DIGITS = 14
_NONE: Mapping[bytes, int] = MappingProxyType({})
# An app has few names of keys, and asks for them all the time.
_NAMES = 1024


#: A version and the write id of the commit that made it, as the metadata has them: 4 and 8 bytes. A
#: failover can lose a commit and count the same number again; the pair tells the two apart.
Pair = bytes


@lru_cache(maxsize=_NAMES)
def field_name(key: str) -> bytes:
    """Return the hash field of a session key: itself, or with its leading ``@`` doubled."""
    if key.startswith("@"):
        key = "@" + key
    return key.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=_NAMES)
def session_key(name: bytes) -> str | None:
    """Return the session key that a hash field holds, None for what is none."""
    if name.startswith(b"@"):
        if not name.startswith(b"@@"):
            return None
        name = name[1:]
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None


class Snapshot(NamedTuple):
    """A session at one version."""

    #: The metadata field ``@i``: format, digest, creation, absolute deadline.
    identity: bytes
    #: The metadata field ``@v``: version pair, moments, byte count, permanence.
    state: bytes
    #: Hash field names to stored bytes, metadata left out.
    fields: Mapping[bytes, bytes]
    #: Idle lifetime of its own in milliseconds, None where the app's counts.
    lifetime_ms: int | None = None
    principal: str | None = None
    label: str | None = None
    #: Hash field names to the millisecond of the server's clock at which they end.
    deadlines: Mapping[bytes, int] = _NONE

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of version {self.version}>"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the current secret."""
        return self.identity[1:33]

    @property
    def created_ms(self) -> int:
        """Moment of creation, milliseconds of the server's clock."""
        return int.from_bytes(self.identity[33:39])

    @property
    def absolute_ms(self) -> int:
        """Moment at which it ends whatever happens, milliseconds of the server's clock; 0 for none."""
        return int.from_bytes(self.identity[39:45])

    @property
    def version(self) -> int:
        """How many commits the session has seen."""
        return int.from_bytes(self.state[:4])

    @property
    def pair(self) -> Pair:
        """The version and the write id that made it."""
        return self.state[:12]

    @property
    def touched_ms(self) -> int:
        """Moment of the last TTL refresh, milliseconds of the server's clock."""
        return int.from_bytes(self.state[19:25])

    @property
    def ends_ms(self) -> int:
        """Moment at which the session ends by itself, milliseconds of the server's clock."""
        return int.from_bytes(self.state[25:31])

    @property
    def size(self) -> int:
        """Bytes of all names and values."""
        return int.from_bytes(self.state[31:35])

    @property
    def permanent(self) -> bool:
        """Whether the browser is to keep the cookie over its own end."""
        return self.state[35] == 1

    def value(self, name: bytes, now_ms: int) -> bytes | None:
        """Return a field's bytes, None if it is missing or past its own deadline."""
        value = self.fields.get(name)
        if value is not None and self.deadlines and self.deadlines.get(name, now_ms + 1) <= now_ms:
            return None
        return value

    def names(self, now_ms: int) -> Iterator[bytes]:
        """Yield the names of the fields that are there."""
        if not self.deadlines:
            yield from self.fields
            return
        for name in self.fields:
            if self.deadlines.get(name, now_ms + 1) > now_ms:
                yield name

    def at(self, identity: bytes, state: bytes) -> Snapshot:
        """Return the same fields under newer metadata, as a confirmation or a refresh sends it."""
        if state == self.state and identity == self.identity:
            return self
        return self._replace(identity=_checked(identity, state), state=state)


def _checked(identity: bytes | None, state: bytes | None) -> bytes:
    if not identity or not state:
        raise CorruptSession("the metadata of the session is incomplete")
    if identity[0] > FORMAT:
        raise CorruptSession(
            f"the session is of format {identity[0]}, written by a newer luasession;"
            f" this one reads format {FORMAT}"
        )
    if identity[0] != FORMAT or len(identity) != _IDENTITY_BYTES or len(state) != _STATE_BYTES:
        raise CorruptSession("the metadata of the session does not have the right form")
    return identity


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "surrogatepass")


def _extras(
    lifetime: bytes | None, principal: bytes | None, label: bytes | None, deadlines: bytes | None
) -> tuple[int | None, str | None, str | None, dict[bytes, int]]:
    try:
        return (
            None if lifetime is None else _lifetime(lifetime),
            _text(principal),
            _text(label),
            _unpack_deadlines(deadlines or b""),
        )
    except ValueError as error:
        raise CorruptSession("the metadata of the session does not decode") from error


def _lifetime(raw: bytes) -> int:
    if not raw.isdigit() or raw[:1] == b"0" or len(raw) > _LIFETIME_DIGITS:
        raise ValueError("a lifetime is a positive number of milliseconds")
    return int(raw)


def _unpack_deadlines(packed: bytes) -> dict[bytes, int]:
    deadlines = {}
    at = 0
    while at < len(packed):
        end = at + 4 + int.from_bytes(packed[at : at + 4])
        if end + 6 > len(packed):
            raise ValueError("deadlines are cut off")
        deadlines[packed[at + 4 : end]] = int.from_bytes(packed[end : end + 6])
        at = end + 6
    return deadlines


def read_hash(raw: dict[bytes, bytes]) -> Snapshot:
    """Make a snapshot of a whole hash, which it keeps: pass a dict of one's own.

    :raise CorruptSession: if the metadata is of another format, cut off or missing.
    """
    pop = raw.pop
    state = pop(b"@v", None)
    identity = _checked(pop(b"@i", None), state)
    pop(b"@r", None)
    pop(b"@j", None)
    if state is None or state[36] == 0:  # nothing that is used rarely
        return Snapshot(identity, state or b"", raw)
    for name in (b"@f", b"@c", b"@n"):
        pop(name, None)
    lifetime, principal, label = pop(b"@e", None), pop(b"@p", None), pop(b"@l", None)
    deadlines = pop(b"@x", None)
    return Snapshot(identity, state or b"", raw, *_extras(lifetime, principal, label, deadlines))


def read_changes(base: Snapshot, reply: Sequence[bytes | None]) -> Snapshot:
    """Lay what load.lua sent as ``changed`` over the snapshot that it was asked from.

    :param reply: ``@i``, ``@v``, ``@e``, ``@p``, ``@l``, ``@x``, then names and values.
    """
    identity, state, lifetime, principal, label, deadlines, *changes = reply
    fields = dict(base.fields)
    pairs = iter(changes)
    for name, value in zip(pairs, pairs, strict=True):
        if name is None:
            raise CorruptSession("a changed field has no name")
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    return Snapshot(
        _checked(identity, state),
        state or b"",
        fields,
        *_extras(lifetime, principal, label, deadlines),
    )
