"""How a call to Redis fails: the exceptions of the client libraries, sorted by what may be done about them.

redis-py and valkey-py name the same errors by the same words under different
roots, and versions of them know more codes or fewer. So errors are told apart
by the code that the server sent, wherever the library put it.
"""

from __future__ import annotations

from .errors import SessionUnavailable

# Answers that pass by themselves: a server that starts, fails over or moves slots. 6.2 words a refused
# write inside a script as a plain error, so the words are looked for and not only the leading code.
_PASSING_CODES = {
    *("LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "UNBLOCKED"),
    *("MOVED", "ASK"),
}
_PASSING_WORDS = ("LOADING", "BUSY ", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "read only replica")

#: Answers before anything of a command was done.
REFUSALS = {"NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING"}

# Exceptions that a library makes of a code, which is then missing in their words.
_CODES = {
    "MovedError": "MOVED",
    "AskError": "ASK",
    "TryAgainError": "TRYAGAIN",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "ReadOnlyError": "READONLY",
    "BusyLoadingError": "LOADING",
    "NoScriptError": "NOSCRIPT",
}


class Unproven(Exception):
    """A reply that does not prove to be the answer to its call (G16)."""


class Nowhere(Exception):
    """Nobody could say which server to send a call to.

    :param passing: whether somebody may be able to a little later.
    """

    def __init__(self, words: str, *, passing: bool = True) -> None:
        super().__init__(words)
        self.passing = passing


def is_a(error: BaseException | None, name: str) -> bool:
    """Whether an exception is of a class of that name, whichever library it comes from."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def code_of(error: Exception) -> str:
    """Return the code that the server began its error with, or an empty text."""
    for kind in type(error).__mro__:
        if kind.__name__ in _CODES:
            return _CODES[kind.__name__]
    return str(error).partition(" ")[0] if is_a(error, "ResponseError") else ""


def is_read_only(error: Exception) -> bool:
    """Whether the server says that it is a replica, in the words of any version."""
    # A Sentinel's connection puts an error of its own in the place of the server's.
    if is_a(error, "ReadOnlyError") or is_a(error.__context__, "ReadOnlyError"):
        return True
    return is_a(error, "ResponseError") and ("READONLY" in str(error) or "read only replica" in str(error))


def is_passing(error: Exception) -> bool:
    """Whether the same call may well succeed a little later."""
    if isinstance(error, Nowhere):
        return error.passing
    if is_a(error, "AuthenticationError") or is_a(error, "AuthorizationError"):
        return False
    if isinstance(error, (Unproven, OSError)):
        return True
    if is_a(error, "ConnectionError") or is_a(error, "TimeoutError"):
        return True
    return code_of(error) in _PASSING_CODES or any(words in str(error) for words in _PASSING_WORDS)


def is_known(error: Exception) -> bool:
    """Whether an exception comes from the client library or the system below it."""
    return (
        isinstance(error, (Unproven, Nowhere, OSError))
        or is_a(error, "RedisError")
        or is_a(error, "ValkeyError")
    )


def words_of(error: Exception) -> str:
    """Return what was said: the server's words, or the library's about the way to it."""
    if isinstance(error, (Nowhere, SessionUnavailable)):
        return str(error)
    said = error.__context__ if is_a(error.__context__, "ReadOnlyError") else error
    return f"{type(said).__name__}: {said}"


def unavailable(error: Exception, server: str) -> SessionUnavailable:
    """Return what a request is told of a failure: the server, the kind, and the words.

    :param server: its name, empty if none was found.
    """
    return SessionUnavailable(f"{server}: {words_of(error)}" if server else words_of(error))
