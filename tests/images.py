"""Images of sessions for tests without a server: the metadata as commit.lua writes it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import sha256

from luasession.snapshot import Snapshot

#: The server's clock in these tests, milliseconds.
NOW_MS = 1_700_000_000_000


def digest_of(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def write_id(number: int) -> bytes:
    """Return the write id that an image gives to the commit of a version."""
    return struct.pack(">8s", b"w%d" % number)


def identity(
    secret: str = "secret", *, created_ms: int = NOW_MS, absolute_ms: int = 0, form: int = 1
) -> bytes:
    """Return the metadata field ``@i``."""
    return b"%c%b%b%b" % (form, digest_of(secret), created_ms.to_bytes(6), absolute_ms.to_bytes(6))


def state(
    version: int = 1,
    *,
    by: bytes | None = None,
    committed_us: int = NOW_MS * 1000,
    touched_ms: int = NOW_MS,
    ends_ms: int = NOW_MS + 60_000,
    size: int = 0,
    permanent: bool = False,
    rare: bool = False,
    fields: int = 0,
) -> bytes:
    """Return the metadata field ``@v``.

    :param by: the write id of the commit that made the version.
    """
    return b"".join(
        (
            version.to_bytes(4),
            write_id(version) if by is None else by,
            committed_us.to_bytes(7),
            touched_ms.to_bytes(6),
            ends_ms.to_bytes(6),
            size.to_bytes(4),
            bytes((permanent, rare)),
            fields.to_bytes(4),
        )
    )


def deadlines(ends: Mapping[bytes, int]) -> bytes:
    """Return the metadata field ``@x``."""
    return b"".join(len(name).to_bytes(4) + name + end.to_bytes(6) for name, end in ends.items())


def image(version: int = 1, secret: str = "secret", /, **fields: bytes) -> Snapshot:
    """Return a snapshot of these fields."""
    stored = {name.encode(): value for name, value in fields.items()}
    size = sum(len(name) + len(value) for name, value in stored.items())
    return Snapshot(identity(secret), state(version, size=size, fields=len(stored)), stored)
