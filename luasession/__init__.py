"""Server-side sessions for Flask on Redis that lose nothing when requests overlap.

A request on its way through the modules, from the browser to Redis and back:

====================================================  ========================================================
extension, interface, answer, replacement, ids        a cookie in, a session, cookies out
session                                               the mapping that ``flask.session`` is
transaction, ledger, delta, rounds, retry, threads    what one request read and changed, until it is committed
values, codec, vault                                  values as bytes: encoded, encrypted
policy, conflicts, merge                              what becomes of a key that two requests changed
visit, errand, outcome                                one request's dealings with one session, and their end
store, cache, snapshot, packing, turns                sessions in Redis, and for a short time in this process
calls, scripts, client                                one call: sent to the right server, proven, sent again
servers, connections, spin, clock                     where it goes, and how its reply is waited for
failures, errors, signals, stats                      what is told of it all
sessions, index, login, testing                       from outside of a request; principals; tests of apps
config, readers, location                             settings, checked when the app starts
embedded, demo                                        a server of one's own, and the demo
====================================================  ========================================================

The scripts in ``lua/`` say what they take and answer, and ``commit.lua`` how a session lies in Redis.
"""

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
