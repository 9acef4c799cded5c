"""Calls: commands and scripts, sent to where their key lives, their replies proven.

The store and the index of principals speak to Redis through here, and nobody
else does. What a reply means is theirs to say; that it answers this call is
made sure of here (G16).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

from .client import Client, Patience, connect
from .clock import now_ns
from .config import Config
from .connections import Connections
from .scripts import Code, script
from .stats import Stats

# Nanoseconds after which a server is not believed that there is no such session.
_SLOW = 50_000_000
# The scripts that are told how old a request is.
_BY_AGE = ("load", "commit")
# Nanoseconds within which a reply tells well what its server's clock says.
_QUICK = 20_000_000
# Microseconds that the scripts can be told.
_LONGEST = (1 << 56) - 1


class Caller(NamedTuple):
    """The request behind a call."""

    #: The monotonic nanosecond at which it opened its session.
    opened: int
    #: Idle lifetime, in milliseconds, of sessions that have none of their own.
    lifetime_ms: int
    patience: Patience
    #: Whether what it does is use, which keeps a session alive.
    uses: bool = True


class Calls:
    """The calls of one process.

    :param name: names the app, for its embedded server.
    """

    def __init__(self, config: Config, name: str, stats: Stats) -> None:
        self._config = config
        self._name = name
        self._stats = stats
        self._lock = Lock()
        self._client: Client | None = None
        self._prefix = config.key_prefix.encode()
        replicas = config.wait_replicas
        self._wait = (replicas, config.wait_timeout_ms) if replicas else None

    @property
    def client(self) -> Client:
        """The way to the servers, made when it is first asked for."""
        if self._client is None:
            client = connect(self._config, self._name, _warm_up)
            with self._lock:
                if self._client is None:
                    self._client = client
        return self._client

    def key(self, handle: str) -> bytes:
        """Return the key of a session."""
        return self._prefix + handle.encode()

    def now_ms(self, handle: str) -> int:
        """Return the clock of a session's server in milliseconds, as last seen and counted on."""
        client = self._client
        server = None if client is None else client.known(self._prefix + handle.encode())
        if server is None or server.clock_offset is None:
            return time.time_ns() // 1_000_000
        return (now_ns() // 1000 + server.clock_offset) // 1000

    def whole(
        self, handle: str, caller: Caller, meanwhile: Callable[[], object]
    ) -> tuple[int, dict[bytes, bytes]]:
        """Read a hash as it is, and return when that was asked, and its fields.

        That it has the form of a hash is all that is known of the reply: until something in it proves
        that it answers this call, it may be another one's, of anything.

        :param meanwhile: what can be done while the server works, as for :meth:`Client.call`.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        """
        key = self.key(handle)
        words = (b"HGETALL", key)
        fields: dict[bytes, bytes] | None = None

        def accept(reply: Any) -> bool:
            nonlocal fields
            fields = _fields_of(reply)
            return fields is not None

        sent, _reply, _ = self.client.call(lambda *_: words, accept, caller.patience, None, key, meanwhile)
        return sent, fields or {}

    def run(
        self,
        name: str,
        handle: str,
        call_id: bytes,
        caller: Caller,
        arguments: Callable[[int, int], tuple[bytes, ...]],
        *,
        writes: bool = True,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[int, list[Any]]:
        """Run a script, and return when it was sent, and its reply.

        :param call_id: its first argument, which the reply has to echo (G16).
        :param arguments: makes the others of the age of the request, and of the microseconds since the
            first sending, 0 if this is the first.
        :param writes: whether replicas have to acknowledge it, where that is asked for.
        :param meanwhile: as for :meth:`Client.call`.
        :raise SessionUnavailable: if Redis does not answer within the deadline, or replicas do not.
        """
        text = script(name)
        key = self.key(handle)
        client = self._client or self.client
        since = began = 0

        def words(sent: int, first: int, known: bool) -> tuple[bytes, ...]:
            nonlocal began
            began = first = since or first
            if not known:
                self._stats.add("script_reloads")
            command, named = (b"EVALSHA", text.sha) if known else (b"EVAL", text.text)
            # Sent again it is marked so, even within a microsecond: not found in the ring, it may have
            # been applied.
            resend = 0 if sent == first else _microseconds(sent - first) or 1
            age = _microseconds(sent - caller.opened)
            return (command, named, b"1", key, call_id, *arguments(age, resend))

        def accept(reply: Any) -> bool:
            return isinstance(reply, list) and len(reply) >= 3 and bool(reply[1] == call_id)

        wait = self._wait if writes else None
        sent, reply, server = client.call(words, accept, caller.patience, wait, key, meanwhile)
        answered = now_ns()
        elapsed = answered - sent
        # No such session, or none any more for a request that came after the rotation.
        refused = reply[0] == Code.MISSING or (reply[0] == Code.STALE and not reply[3])
        # From the first sending: what gave no answer then may answer the next one at once.
        slow = answered - began > _SLOW and refused
        if slow and (client.doubt(server) or name in _BY_AGE):
            # A server that hung takes a request for younger than it is, by as long as that took: who was open
            # at a log-out, or over a rotation, seems to have come after it (G7, G8). And one that was
            # replaced meanwhile answers, when it goes on, what was sent to it before it hears of that: it
            # knows no secret and no session that its successor has made. Whoever believed either would begin
            # a new session, and take the browser out of its own. This is one more sending of the same, as an
            # earlier one may have been applied elsewhere (G6).
            since = began
            sent, reply, server = client.call(words, accept, caller.patience, wait, key)
            elapsed = now_ns() - sent
        _set_clock(server, reply[2], sent, elapsed)
        return sent, reply


def _warm_up(server: Connections) -> None:
    # Best effort: without it the first calls cost an EVAL each, and the clock comes with their reply.
    # Each server when it is first used, so that none that is down delays those that are not.
    for name in ("load", "commit", "destroy", "index"):
        server.ask((b"SCRIPT", b"LOAD", script(name).text), _is_sha)
    sent, (seconds, microseconds) = server.ask((b"TIME",), _is_time)
    _set_clock(server, int(seconds) * 1_000_000 + int(microseconds), sent, now_ns() - sent)


def _set_clock(server: Connections, server_us: int, sent: int, elapsed: int) -> None:
    # From the sending, so the clock is early by a transit at most: nothing outlives its end. A slow
    # reply tells little, so only the first one counts whatever it took.
    if server.clock_offset is None or elapsed < _QUICK:
        server.clock_offset = server_us - sent // 1000


def _microseconds(nanoseconds: int) -> int:
    # As the scripts take it, 7 bytes. A clock that was set back makes nobody younger than nothing.
    microseconds = nanoseconds // 1000
    if 0 <= microseconds <= _LONGEST:
        return microseconds
    return 0 if microseconds < 0 else _LONGEST


def _is_time(reply: Any) -> bool:
    return isinstance(reply, list) and len(reply) == 2


def _is_sha(reply: Any) -> bool:
    return isinstance(reply, bytes)


def _fields_of(reply: Any) -> dict[Any, Any] | None:
    if isinstance(reply, dict):
        return reply
    if not isinstance(reply, list) or len(reply) % 2:
        return None
    try:
        return dict(zip(reply[::2], reply[1::2], strict=True))
    except TypeError:  # a list in the place of a name
        return None
