"""The way to Redis: one command on one connection, without anybody's retries.

redis-py (and valkey-py, its fork) send a command again on their own account
after a broken connection. For a commit that is wrong, since the first sending
may have been applied. So a call here takes a connection, sends once and reads
once, and what is sent again says so, under one deadline for the whole request
(:class:`Patience`).
"""

from __future__ import annotations

import inspect
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from . import embedded
from .clock import now_ns
from .config import Config
from .errors import ConfigurationError, SessionUnavailable

# Connections of one process to one server. More requests than that wait for one, and do not fail.
_MAX_CONNECTIONS = 64
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25

# Answers that pass by themselves: a server that starts, fails over or moves slots. 6.2 words a refused
# write inside a script as a plain error, so the words are looked for and not only the leading code.
_PASSING = (
    "LOADING",
    "BUSY ",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "READONLY",
    "read only replica",
    "UNBLOCKED",
)


class Unproven(Exception):
    """A reply that does not prove to be the answer to its call (G16)."""


class Patience:
    """What one request still waits for Redis, over all of its calls.

    :param seconds: ``SESSION_REDIS_DEADLINE``.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._pause = _FIRST_PAUSE

    def wait(self, error: Exception, failed_after: float) -> None:
        """Sleep before the next try, with jitter.

        :param error: what the last try ended in.
        :param failed_after: seconds that it took.
        :raise SessionUnavailable: if the deadline has passed.
        """
        self._left -= failed_after
        pause = self._pause * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, no secret
        if self._left < pause:
            raise _unavailable(error) from error
        time.sleep(pause)
        self._left -= pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)


def _unavailable(error: Exception) -> SessionUnavailable:
    """Return what a request is told of a failure: the kind and the server's words."""
    return SessionUnavailable(f"{type(error).__name__}: {error}")


def _is_a(error: Exception, name: str) -> bool:
    # By name, since valkey-py's classes are the same ones under another root.
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _is_no_script(error: Exception) -> bool:
    """Whether the server does not know the script."""
    return _is_a(error, "NoScriptError") or str(error).startswith("NOSCRIPT")


def _is_passing(error: Exception) -> bool:
    """Whether the same call may well succeed a little later."""
    if _is_a(error, "AuthenticationError") or _is_a(error, "AuthorizationError"):
        return False
    if isinstance(error, (Unproven, OSError)):
        return True
    if _is_a(error, "ConnectionError") or _is_a(error, "TimeoutError"):
        return True
    return any(words in str(error) for words in _PASSING)


def _is_known(error: Exception) -> bool:
    """Whether an exception comes from the client library or the system below it."""
    return isinstance(error, (Unproven, OSError)) or _is_a(error, "RedisError") or _is_a(error, "ValkeyError")


class _Connections:
    """Connections of luasession's own, the last used first.

    They are made as the client's pool would make them, save that connecting is
    not retried: how long a request waits is its deadline's business. The pools
    also look at the socket before each use, to see whether a connection was
    closed or has lost step. Here each reply proves itself, and what was sent into
    a closed connection is sent again, so that look is spared.

    :param pool: the client's pool, of which they keep settings and bound.
    :param seconds: how long to wait for a free one.
    """

    def __init__(self, pool: Any, seconds: float) -> None:
        # Not by the pool itself, which counts what it has ever made, and at a hundred makes no more.
        self._make = partial(pool.connection_class, **_without_retries(pool.connection_kwargs))
        self._seconds = seconds
        self._idle: deque[Any] = deque()
        # Freed with its app it closes what it holds: sockets left to the garbage collector warn.
        weakref.finalize(self, _disconnect, self._idle)
        # A queue and no semaphore: a greenlet that is killed inside of release() would keep its slot.
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(min(_MAX_CONNECTIONS, pool.max_connections)):
            self._slots.put(None)

    def take(self) -> Any:
        """Return one that is connected."""
        try:
            self._slots.get(timeout=self._seconds)
        except Empty:
            raise redis.ConnectionError(f"no connection became free within {self._seconds} s") from None
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            connection = self._make()
            connection.connect()
        except BaseException:
            self._slots.put(None)
            raise
        return connection

    def give(self, connection: Any) -> None:
        self._idle.append(connection)
        self._slots.put(None)

    def lose(self, connection: Any) -> None:
        try:
            connection.disconnect()
            # Its neighbours were connected to the same server, so they go as well; each is taken out
            # first, or another thread might be using it by then.
            with suppress(IndexError):
                while True:
                    self._idle.pop().disconnect()
        finally:
            self._slots.put(None)


def _without_retries(settings: dict[str, Any]) -> dict[str, Any]:
    retry = settings.get("retry")
    if retry is not None:
        retry = type(retry)(NoBackoff(), 0)
    off: dict[str, Any] = {"retry": retry, "retry_on_timeout": False, "retry_on_error": []}
    return {**settings, **{name: off[name] for name in off.keys() & settings.keys()}}


def _disconnect(connections: deque[Any]) -> None:
    while connections:
        connections.pop().disconnect()


class Client:
    """A server, by way of a client library's connections.

    :param connections: where they are taken from and given back to.
    """

    def __init__(self, connections: _Connections) -> None:
        self._connections = connections

    def call(
        self,
        words: Callable[[int, int, bool], Sequence[bytes]],
        accept: Callable[[Any], bool],
        patience: Patience,
        wait: tuple[int, int] | None = None,
    ) -> tuple[int, Any]:
        """Send one command until it is answered, and return when that was sent, and the reply, undecoded.

        :param words: makes the command when a connection is there for it, since the age of a request
            counts up to the sending. It gets the monotonic nanosecond of this sending and of the first
            one, and whether the server may know the script.
        :param accept: tells whether a reply is the answer to this call. If it is not, the connection
            has lost step, and with it goes the reply.
        :param wait: so many replicas have to acknowledge within so many milliseconds.
        :raise SessionUnavailable: if there is no answer within the deadline, or one that does not pass
            by itself, or too few replicas acknowledged.
        """
        first = 0
        known = True
        while True:
            begun = now_ns()
            try:
                connection = self._connections.take()
                try:
                    sent = now_ns()
                    first = first or sent
                    reply = self._exchange(connection, words(sent, first, known), wait)
                    if not accept(reply):
                        raise Unproven("the reply answers another call")
                except BaseException as error:
                    if isinstance(error, Exception) and _is_a(error, "ResponseError"):
                        self._connections.give(connection)
                    else:
                        # Whatever breaks off between sending and reading, a killed greenlet too, leaves a
                        # reply behind that the connection's next user would take for its own (G16).
                        self._connections.lose(connection)
                    raise
                self._connections.give(connection)
            except Exception as error:
                if not _is_known(error):
                    raise
                if known and _is_no_script(error):
                    known = False
                    continue
                if not _is_passing(error):
                    raise _unavailable(error) from error
                patience.wait(error, max(now_ns() - begun, 0) / 1e9)
            else:
                return sent, reply

    @staticmethod
    def _exchange(connection: Any, words: Sequence[bytes], wait: tuple[int, int] | None) -> Any:
        if wait is None:
            connection.send_packed_command([_packed(words)])
            return connection.read_response(disable_decoding=True)
        # WAIT speaks of the writes of its own connection, so it shares the write's.
        connection.send_packed_command(
            [_packed(words) + _packed((b"WAIT", b"%d" % wait[0], b"%d" % wait[1]))]
        )
        failed: Exception | None = None
        reply = None
        try:
            reply = connection.read_response(disable_decoding=True)
        except Exception as error:
            if not _is_a(error, "ResponseError"):
                raise
            failed = error
        acknowledged = connection.read_response(disable_decoding=True)
        if failed is not None:
            raise failed
        if not isinstance(acknowledged, int):
            raise Unproven("the reply answers another call than WAIT")
        if acknowledged < wait[0]:
            raise SessionUnavailable(f"{acknowledged} of {wait[0]} replicas acknowledged within {wait[1]} ms")
        return reply


def _packed(words: Sequence[bytes]) -> bytes:
    # A RESP array of bulk strings. The libraries' packers convert each word first, which costs more.
    parts: list[int | bytes] = [len(words)]
    for word in words:
        parts.append(len(word))
        parts.append(word)
    return (b"*%d\r\n" + b"$%d\r\n%b\r\n" * len(words)) % tuple(parts)


def connect(config: Config, name: str) -> Client:
    """Build the client of this process; no connection is opened yet.

    :param name: names the app, for its embedded server.
    :raise ConfigurationError: if the kind of client or URL is not one that works here.
    """
    if config.redis is None:
        return Client(_Connections(_pool_of(config, name), config.redis_timeout))
    if not hasattr(config.redis, "connection_pool"):
        raise ConfigurationError(
            f"SESSION_REDIS is a {type(config.redis).__name__}; expected a redis-py Redis,"
            " a Sentinel's master_for(), or a valkey-py Valkey"
        )
    return Client(_Connections(config.redis.connection_pool, config.redis_timeout))


def _pool_of(config: Config, name: str) -> redis.ConnectionPool:
    url = config.redis_url
    scheme, _, rest = url.partition("://")
    if "+" in scheme:
        raise ConfigurationError(
            f"SESSION_REDIS_URL: {scheme}:// is not supported yet; expected redis://, rediss://,"
            " unix:// or embedded://"
        )
    if scheme == "embedded":
        url = "unix://" + quote(embedded.start(embedded.directory_from(rest), name=name))
    elif scheme in {"valkey", "valkeys"}:
        url = ("rediss://" if scheme == "valkeys" else "redis://") + rest
    options: dict[str, Any] = {"protocol": 2}
    if "driver_info" in inspect.signature(redis.connection.AbstractConnection).parameters:
        # Two round trips less for each new connection: the library's name is not announced.
        options["driver_info"] = None
    return redis.ConnectionPool.from_url(
        url,
        socket_timeout=config.redis_timeout,
        socket_connect_timeout=config.redis_timeout,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
