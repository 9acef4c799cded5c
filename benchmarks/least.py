"""The least: apps that do one thing and nothing else, to tell what of a session's cost is whose.

They are of no use but to compare with. One asks Redis one question, as any session there has to. The other
does for one workload what the contract asks for, in as few lines as that takes.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import redis
from flask import Flask
from flask.sessions import SessionInterface, SessionMixin

from luasession.clock import now_ns
from luasession.config import read_config
from luasession.connections import pack_command
from luasession.delta import Check, Delta, Put
from luasession.ids import SessionId, new_session_id, same_digest
from luasession.packing import pack_numbers, pack_times
from luasession.scripts import Code, script
from luasession.spin import Spin
from luasession.store import Store

_COOKIE = re.compile(r"(?:^|;)\s*session=([\w-]{22})\.([\w-]{43})")
_HINT = "session_v=%d; HttpOnly; Path=/"
_DAY_MS = 86_400_000
# Check and no ttl; then name and value, each with its length.
_PUT = b"%b%b%b%b%b"
_BLIND, _CHECKED = (bytes([check, *bytes(6)]) for check in (Check.NONE, Check.REPORT))


class _Held(NamedTuple):
    """A version of a session: its pair, and its fields."""

    pair: bytes
    fields: Mapping[bytes, bytes]


class _Words(NamedTuple):
    """A commit of one key: the command, the key's field, and its value."""

    command: tuple[bytes, ...]
    name: bytes
    value: bytes


_Read = Callable[[SessionId], _Held]


class _Hash(dict[str, Any], SessionMixin):
    """A session that is a hash, read whole when it is first looked into."""

    def __init__(self, load: Callable[[], Mapping[bytes, bytes]]) -> None:
        super().__init__()
        self._load = load

    def get(self, key: str, default: Any = None) -> Any:
        return self._load().get(key.encode(), default)


class OneCommand(SessionInterface):
    """The least that a session on Redis can cost: one command by redis-py, and nothing else.

    No id, no cookie, no encoding, no comparing, no header.
    """

    def __init__(self, app: Flask, socket: str, *, reads: bool) -> None:
        self._client = redis.Redis(unix_socket_path=socket, protocol=2)
        # Shapes are measured beside each other, and those who read have no other's keys to read.
        self._key = f"least:{id(app)}"
        self._load = partial(self._client.hgetall, self._key) if reads else dict

    def open_session(self, app: Flask, request: Any) -> _Hash:
        return _Hash(self._load)

    def save_session(self, app: Flask, session: Any, response: Any) -> None:
        if session:
            self._client.hset(self._key, mapping={key: str(value) for key, value in session.items()})


class _Bare(dict[str, Any], SessionMixin):
    """A session of which one key is read, or set."""

    def __init__(self, cookie: str, read: _Read | None) -> None:
        super().__init__()
        found = _COOKIE.search(cookie)
        self.id = SessionId(found[1], found[2]) if found else None
        #: What was read, None if nothing was.
        self.held: _Held | None = None
        self._read = read

    def get(self, key: str, default: Any = None) -> Any:
        if self._read is None or self.id is None:
            return default
        if self.held is None:
            self.held = self._read(self.id)
        return json.loads(self.held.fields[key.encode()])


class Bare(SessionInterface):
    """The least that luasession's contract leaves: its wire and its cookies, for one workload, by hand.

    The cookie is taken apart, the secret hashed; one HGETALL, load.lua or commit.lua on a connection of
    redis-py's; the reply is looked for as luasession does, and proves itself; one value is encoded or
    decoded; ``Vary``, and the hint of a commit. Left out is all that makes it fit for anything else: the
    mapping and what it remembers, other keys and types, conflicts, the refresh of a TTL, a cache with bounds
    and ends, errors, retries, and a server or connection that fails.

    :param reads: how: ``"whole"`` by HGETALL, ``"changes"`` by load.lua on what was read before, ``"held"``
        from there alone; empty, what is read is missing.
    """

    def __init__(self, app: Flask, socket: str, *, reads: str = "") -> None:
        config = read_config({**app.config, "SESSION_REDIS_URL": f"unix://{socket}"})
        # No age, not sent before; then what commit.lua is told each time. And the same for load.lua.
        self._numbers = bytes(14) + pack_numbers(config, False, False, True, _DAY_MS, True)
        self._times = bytes(7) + pack_times(_DAY_MS, config.touch_ms(_DAY_MS), config.grace_ms)
        self._sha = {name: script(name).sha for name in ("load", "commit")}
        self._pool = redis.Redis(unix_socket_path=socket, protocol=2).connection_pool
        # A web server's threads have one each.
        self._own = threading.local()
        self._spin = Spin()
        self._store = Store(config, "bare")
        self._read: _Read | None = {
            "": None,
            "whole": self._read_whole,
            "changes": self._read_changes,
            "held": self._read_held,
        }[reads]
        self._held: dict[str, _Held] = {}

    def open_session(self, app: Flask, request: Any) -> _Bare:
        return _Bare(request.environ.get("HTTP_COOKIE", ""), self._read)

    def save_session(self, app: Flask, session: Any, response: Any) -> None:
        if session and session.id is None:
            response.set_cookie("session", self.start(session).sid, httponly=True)
        elif session:
            version = self._commit(session.id, session.held, *session.items())
            response.headers.add("Set-Cookie", _HINT % version)
        if session or session.held:
            response.headers.add("Vary", "Cookie")

    def start(self, data: Mapping[str, Any]) -> SessionId:
        """Begin a session, as luasession does."""
        sets = {key.encode(): Put(json.dumps(value).encode()) for key, value in data.items()}
        session_id = new_session_id(32)
        self._store.commit(session_id, Delta(sets=sets), self._store.caller(now_ns(), _DAY_MS), create=True)
        return session_id

    def commit_words(self, session_id: SessionId, held: _Held | None, pair: tuple[str, Any]) -> _Words:
        """Return the command that sets one key, and what it is set to."""
        name, value = pair[0].encode(), json.dumps(pair[1]).encode()
        # What was read is reported if somebody else has changed it, as by default.
        head = _BLIND if held is None else _CHECKED
        put = _PUT % (head, len(name).to_bytes(4), name, len(value).to_bytes(4), value)
        base = () if held is None else (held.pair,)
        given = (os.urandom(8), session_id.digest, self._numbers, put, *base)
        return _Words((b"EVALSHA", self._sha["commit"], b"1", _key(session_id), *given), name, value)

    def _read_whole(self, session_id: SessionId) -> _Held:
        found = self._ask(b"HGETALL", _key(session_id))
        fields = dict(zip(found[::2], found[1::2], strict=True))
        if not same_digest(fields[b"@i"][1:33], session_id.digest):
            raise RuntimeError("the reply is about another session")
        return _Held(fields[b"@v"][:12], fields)

    def _read_held(self, session_id: SessionId) -> _Held:
        held = self._held.get(session_id.handle)
        if held is None:
            held = self._held[session_id.handle] = self._read_whole(session_id)
        return held

    def _read_changes(self, session_id: SessionId) -> _Held:
        held = self._read_held(session_id)
        call_id = os.urandom(8)
        given = (call_id, session_id.digest, self._times, held.pair)
        code, answered, *_ = self._ask(b"EVALSHA", self._sha["load"], b"1", _key(session_id), *given)
        if code != Code.UNCHANGED or answered != call_id:
            raise RuntimeError("changed, or about another session")
        return held

    def _commit(self, session_id: SessionId, held: _Held | None, pair: tuple[str, Any]) -> int:
        words, name, value = self.commit_words(session_id, held, pair)
        code, answered, _now, version, _before, _identity, state, *_ = self._ask(*words)
        if code != Code.APPLIED or answered != words[4]:
            raise RuntimeError("not applied")
        if held is not None:
            self._held[session_id.handle] = _Held(state[:12], {**held.fields, name: value})
        return int(version)

    def _ask(self, *words: bytes) -> Any:
        try:
            connection = self._own.connection
        except AttributeError:
            connection = self._own.connection = self._pool.get_connection()
        connection.send_packed_command([pack_command(words)])
        self._spin.watch(connection)
        return connection.read_response(disable_decoding=True)


def _key(session_id: SessionId) -> bytes:
    return b"session:" + session_id.handle.encode()
