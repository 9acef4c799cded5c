"""Everything that luasession raises on purpose, under one root."""

from __future__ import annotations

from collections.abc import Collection

from werkzeug.exceptions import Conflict, RequestEntityTooLarge, ServiceUnavailable


class LuaSessionError(Exception):
    """The root of all errors of luasession."""


class ConfigurationError(LuaSessionError):
    """A setting is wrong; the message names it and says what was expected."""


class SessionUnavailable(LuaSessionError, ServiceUnavailable):
    """Redis could not be asked, or did not do as asked (503, with Retry-After).

    The answer that the browser gets says no more than that; what the server or
    the client library said is in :attr:`reason`, for logs.

    :param reason: the words of the server, or what was wrong with its reply.
    """

    #: What the server, or the way to it, said.
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__("The session store is unavailable. Try again shortly.", retry_after=1)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class SessionConflict(LuaSessionError, Conflict):
    """Somebody else changed what this request read and changed (409).

    :param keys: the session keys in conflict.
    """

    #: The session keys in conflict, sorted.
    keys: tuple[str, ...]

    def __init__(self, keys: Collection[str]) -> None:
        super().__init__("Another request changed the session meanwhile. Try again.")
        self.keys = tuple(sorted(keys))

    def __str__(self) -> str:
        return "changed by another request since it was read: " + ", ".join(map(repr, self.keys))


class SessionGone(LuaSessionError):
    """The session ended, or was rotated away, while this request was open.

    Raised by ``session.commit()``; at the end of a request the delta is
    dropped instead and ``session_discarded`` is sent.
    """


class SessionTooLarge(LuaSessionError, RequestEntityTooLarge):
    """The delta would grow the session over ``SESSION_MAX_BYTES`` (413).

    :param size: bytes that the session would have had, names and values.
    :param limit: bytes that it may have.
    """

    #: Bytes that the session would have had.
    size: int
    #: Bytes that it may have, ``SESSION_MAX_BYTES``.
    limit: int

    def __init__(self, size: int, limit: int) -> None:
        super().__init__("The session would become too large.")
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the session would have {self.size} bytes, SESSION_MAX_BYTES is {self.limit}"


class CorruptSession(LuaSessionError):
    """What is stored under the session key is not a session of a known format."""
