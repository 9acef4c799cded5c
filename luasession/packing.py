"""Packing: a delta as commit.lua takes it; the forms are those of the script's header."""

from __future__ import annotations

from .config import Config
from .delta import NOTHING_ELSE, Change, Delta

#: Milliseconds between two touches by those who do not use a session.
NEVER = 1 << 47

_NO_CHECK_NO_TTL = bytes(7)


def pack_delta(delta: Delta, new_digest: bytes, offer: bytes = b"") -> list[bytes]:
    """Return the arguments of commit.lua from the fields set on.

    :param new_digest: of the secret that the session has afterwards, empty if it keeps its own.
    :param offer: see :func:`pack_offer`; empty for none.
    """
    own = b"".join([write_id[:4] for write_id in delta.own]) if delta.own else b""
    parts: list[bytes] = []
    for name, (value, check, ttl_ms) in delta.sets.items():
        head = check.to_bytes(1) + ttl_ms.to_bytes(6) if check or ttl_ms else _NO_CHECK_NO_TTL
        parts += (head, len(name).to_bytes(4), name, len(value).to_bytes(4), value)
    arguments = [b"".join(parts), delta.base or b"", own]
    if delta[3:] != NOTHING_ELSE or offer or new_digest:
        arguments += _pack_rest(delta, new_digest, offer)
    while arguments and not arguments[-1]:  # what changes rarely stands last, and may be left out
        arguments.pop()
    return arguments


def _pack_rest(delta: Delta, new_digest: bytes, offer: bytes) -> list[bytes]:
    return [
        _pack_deletes(delta) if delta.deletes else b"",
        b"*" if delta.reads is None else b"".join([_pack_name(name) for name in delta.reads]),
        new_digest,
        b"" if delta.permanent is None else b"%d" % delta.permanent,
        b"" if delta.lifetime_ms is None else b"%d" % delta.lifetime_ms,
        pack_change(delta.principal) if delta.principal else b"",
        pack_change(delta.label) if delta.label else b"",
        offer,
    ]


def pack_numbers(
    config: Config, create: bool, cleared: bool, in_flight: bool, lifetime_ms: int, uses: bool
) -> bytes:
    """Return what commit.lua is told of flags, times and bounds, which is the same for most commits."""
    by_default = config.touch_interval_ms is None and uses
    flags = create | cleared << 1 | in_flight << 2 | by_default << 3 | bool(config.wait_replicas) << 4
    touch_ms = config.touch_ms(lifetime_ms) if uses else NEVER
    times = pack_times(lifetime_ms, touch_ms, config.absolute_ms or 0, config.grace_ms)
    return b"%c%b%b" % (flags, times, config.max_bytes.to_bytes(4))


def pack_times(*milliseconds: int) -> bytes:
    """Return times as the scripts take them, 6 bytes each."""
    return b"".join([ms.to_bytes(6) for ms in milliseconds])


def pack_offer(digest: bytes, renew_after_ms: int) -> bytes:
    """Return the offer of another secret, for a session whose own is of that age or older."""
    return digest + renew_after_ms.to_bytes(6)


def pack_change(change: Change) -> bytes:
    """Return a text or its removal."""
    if change.value is None:
        return b"-"
    return b"=" + change.value.encode("utf-8", "surrogatepass")


def _pack_name(name: bytes) -> bytes:
    return len(name).to_bytes(4) + name


def _pack_deletes(delta: Delta) -> bytes:
    return b"".join([check.to_bytes(1) + _pack_name(name) for name, check in delta.deletes.items()])
