"""Server-side sessions for Flask on Redis that lose nothing when requests overlap."""

from . import merge, signals
from .errors import (
    ConfigurationError,
    CorruptSession,
    LuaSessionError,
    SessionConflict,
    SessionGone,
    SessionTooLarge,
    SessionUnavailable,
)
from .extension import Session
from .interface import LuaSessionInterface
from .retry import retry_on_conflict
from .session import LuaSession
from .sessions import SessionInfo, Sessions
from .signals import (
    session_committed,
    session_conflict,
    session_corrupt,
    session_created,
    session_destroyed,
    session_discarded,
    session_rotated,
)

__all__ = [
    "ConfigurationError",
    "CorruptSession",
    "LuaSession",
    "LuaSessionError",
    "LuaSessionInterface",
    "Session",
    "SessionConflict",
    "SessionGone",
    "SessionInfo",
    "SessionTooLarge",
    "SessionUnavailable",
    "Sessions",
    "merge",
    "retry_on_conflict",
    "session_committed",
    "session_conflict",
    "session_corrupt",
    "session_created",
    "session_destroyed",
    "session_discarded",
    "session_rotated",
    "signals",
]
