"""Connections to one server, made as a client library's pool would make them, save its retries."""

from __future__ import annotations

import queue
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff

from .clock import now_ns
from .errors import ConfigurationError, SessionUnavailable
from .failures import Unproven, is_a, is_known, is_read_only
from .spin import Spin

#: Connections of one process to one server. More requests than that wait for one, and do not fail.
MAX_CONNECTIONS = 64

#: What a node that a slot is on its way to wants to hear before a command.
ASKING = b"*1\r\n$6\r\nASKING\r\n"


def timeouts(settings: dict[str, Any], at_most: float) -> dict[str, Any]:
    """Return the timeouts of a connection's settings, or what they may be at most, seconds."""
    names = {"socket_timeout", "socket_connect_timeout"}
    if "path" in settings:  # the classes of unix sockets do not all know of connecting
        names &= {"socket_timeout", *settings}
    return {
        name: at_most if (theirs := settings.get(name)) is None else min(theirs, at_most) for name in names
    }


class Recipe(NamedTuple):
    """How connections are made: a library's class, its settings, and how many there may be."""

    kind: Callable[..., Any]
    settings: dict[str, Any]
    bound: int

    @classmethod
    def of(cls, pool: Any, at_most: float | None = None) -> Recipe:
        """Return a pool's, without its retries.

        :param at_most: seconds that one call may take where the pool allows for more; None: as long as there.
        """
        settings: dict[str, Any] = dict(pool.connection_kwargs)
        if at_most is not None:
            settings |= timeouts(settings, at_most)
        retry = settings.get("retry")
        if retry is not None:
            retry = type(retry)(NoBackoff(), 0)
        off: dict[str, Any] = {"retry": retry, "retry_on_timeout": False, "retry_on_error": []}
        settings |= {name: off[name] for name in off.keys() & settings.keys()}
        return cls(pool.connection_class, settings, min(MAX_CONNECTIONS, pool.max_connections))

    def at(self, host: str, port: int) -> Recipe:
        """Return the same for another address."""
        return self._replace(settings={**self.settings, "host": host, "port": port})

    def without(self, *names: str) -> Recipe:
        """Return the same, with defaults for some settings."""
        kept = {name: value for name, value in self.settings.items() if name not in names}
        return self._replace(settings=kept)


class Connections:
    """Connections of luasession's own to one server, the last used first.

    Connecting is not retried: how long a request waits is its deadline's
    business. The pools also look at the socket before each use, to see whether a
    connection was closed or has lost step. Here each reply proves itself, and what
    was sent into a closed connection is sent again, so that look is spared.

    A server alone is also where every key is: see :class:`~luasession.servers.Servers`.

    :param recipe: how one is made; not by the pool itself, which counts what it
        has ever made, and at a hundred makes no more.
    :param seconds: how long to wait for a free one.
    :param revive: starts a server of our own anew, should it have died.
    """

    def __init__(self, recipe: Recipe, seconds: float, revive: Callable[[], object] | None = None) -> None:
        self._recipe = recipe
        self._seconds = seconds
        self._revive = revive
        self._idle: deque[Any] = deque()
        self._spin = Spin()
        # Freed with its app it closes what it holds: sockets left to the garbage collector warn.
        weakref.finalize(self, _disconnect, self._idle)
        # A queue and no semaphore: a greenlet that is killed inside of release() would keep its slot. By the
        # module's name, as gevent may put its own kind there after this was imported.
        self._slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(recipe.bound):
            self._slots.put(None)
        #: Whether the scripts were loaded here, or this was tried.
        self.greeted = False
        #: Microseconds of this server's clock less those of the monotonic clock here. Each server has one
        #: of its own, since the moments that a session keeps are by the clock of the server it is on.
        self.clock_offset: int | None = None

    def __str__(self) -> str:
        return self._recipe.settings.get("path") or f"{self.host}:{self.port}"

    @property
    def host(self) -> str:
        """The host, as it was given."""
        return str(self._recipe.settings.get("host", "localhost"))

    @property
    def port(self) -> int:
        """The port."""
        return int(self._recipe.settings.get("port", 6379))

    # -- the only server there is ---------------------------------------------

    def of(self, _key: bytes) -> Connections:
        """Return the connections to the server that has a key."""
        return self

    known = of

    def heard(self, error: Exception, _server: Connections, _key: bytes) -> None:
        """Take in what a call ended in."""
        if is_read_only(error):
            # Behind one name there may be another server by now.
            self.drop()

    def doubt(self, _server: Connections) -> bool:
        """Know of no other server."""
        return False

    # -- one connection -------------------------------------------------------

    def take(self) -> Any:
        """Return one that is connected."""
        try:
            self._slots.get(timeout=self._seconds)
        except queue.Empty:
            raise redis.ConnectionError(f"no connection became free within {self._seconds} s") from None
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            connection = self._recipe.kind(**self._recipe.settings)
            try:
                _connect(connection)
            except Exception as error:
                if self._revive is None or not is_a(error, "ConnectionError"):
                    raise
                with suppress(ConfigurationError):  # what is in the way of that is in the log
                    self._revive()
                _connect(connection)
        except BaseException:
            self._slots.put(None)
            raise
        return connection

    def give(self, connection: Any) -> None:
        """Take one back that is in step."""
        self._idle.append(connection)
        self._slots.put(None)

    def lose(self, connection: Any) -> None:
        """Close one that is not, and its neighbours, which were connected to the same server."""
        try:
            connection.disconnect()
            self.drop()
        finally:
            self._slots.put(None)

    def drop(self) -> None:
        """Close those that nobody uses."""
        # Each is taken out first, or another thread might be using it by then.
        _disconnect(self._idle)

    def exchange(
        self,
        connection: Any,
        words: Callable[[], Sequence[bytes]],
        accept: Callable[[Any], bool],
        wait: tuple[int, int] | None = None,
        asking: bytes = b"",
        meanwhile: Callable[[], object] | None = None,
    ) -> Any:
        """Send one command on a connection that was taken, return the reply, and give the connection back.

        :param wait: so many replicas have to acknowledge within so many milliseconds.
        :param asking: :data:`ASKING`, if the server takes the command only so.
        :param meanwhile: called between sending and reading, while the server works.
        :raise SessionUnavailable: if too few replicas acknowledged.
        """
        try:
            reply = self._exchange(connection, words(), wait, asking, meanwhile, self._spin)
            if not accept(reply):
                raise Unproven("the reply answers another call")
        except BaseException as error:
            if is_a(error, "ResponseError") or isinstance(error, SessionUnavailable):
                self.give(connection)
            else:
                # Whatever breaks off between sending and reading, a killed greenlet too, leaves a
                # reply behind that the connection's next user would take for its own (G16).
                self.lose(connection)
            raise
        self.give(connection)
        return reply

    @staticmethod
    def _exchange(
        connection: Any,
        words: Sequence[bytes],
        wait: tuple[int, int] | None,
        asking: bytes,
        meanwhile: Callable[[], object] | None,
        spin: Spin,
    ) -> Any:
        if wait is None and not asking:
            connection.send_packed_command([pack_command(words)])
            if meanwhile is not None:
                meanwhile()
            spin.watch(connection)
            return connection.read_response(disable_decoding=True)
        # WAIT speaks of the writes of its own connection, and ASKING of its next command, so they share it.
        trailer = b"" if wait is None else pack_command((b"WAIT", b"%d" % wait[0], b"%d" % wait[1]))
        connection.send_packed_command([asking + pack_command(words) + trailer])
        if meanwhile is not None:
            meanwhile()
        if asking and _reply_or_error(connection) != b"OK":
            raise Unproven("the reply answers another call than ASKING")
        reply = _reply_or_error(connection)
        acknowledged = reply if wait is None else _reply_or_error(connection)
        for answer in (reply, acknowledged):
            # The command's own first: a replica refuses both, and only one of them says to go elsewhere.
            if isinstance(answer, Exception):
                raise answer
        if wait is None:
            return reply
        if not isinstance(acknowledged, int):
            raise Unproven("the reply answers another call than WAIT")
        if acknowledged < wait[0]:
            raise SessionUnavailable(f"{acknowledged} of {wait[0]} replicas acknowledged within {wait[1]} ms")
        return reply

    def ask(self, words: Sequence[bytes], accept: Callable[[Any], bool]) -> tuple[int, Any]:
        """Send one command, once, and return when, and the reply.

        :raise Exception: whatever the library raises.
        """
        connection = self.take()
        sent = now_ns()
        return sent, self.exchange(connection, lambda: words, accept)


def _connect(connection: Any) -> None:
    try:
        connection.connect()
    except Exception as error:
        if is_known(error):
            raise
        # A credential provider of the app's, say: without it there is no way to Redis either. Its words might
        # quote a secret; they stay in the chain of causes.
        connection.disconnect()
        raise redis.ConnectionError(f"connecting ended in {type(error).__name__}") from error


def _disconnect(connections: deque[Any]) -> None:
    with suppress(IndexError):
        while True:
            connections.pop().disconnect()


def _reply_or_error(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except Exception as error:
        if not is_a(error, "ResponseError"):
            raise
        return error


def pack_command(words: Sequence[bytes]) -> bytes:
    """Return a command as it is sent, a RESP array of bulk strings."""
    # The libraries' packers convert each word first, which costs more.
    parts: list[int | bytes] = [len(words)]
    for word in words:
        parts += (len(word), word)
    return (b"*%d\r\n" + b"$%d\r\n%b\r\n" * len(words)) % tuple(parts)
