"""The least: apps that do one thing and nothing else, to tell what of a session's cost is whose.

They are of no use but to compare with. One asks Redis one question, as any session there has to. The other
does for one workload what the contract asks for, in as few lines as that takes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import redis
from flask import Flask
from flask.sessions import SessionInterface, SessionMixin

from luasession.clock import now_ns
from luasession.config import read_config
from luasession.connections import pack_command
from luasession.delta import Delta, Put
from luasession.ids import SessionId, new_session_id, same_digest
from luasession.packing import pack_numbers
from luasession.scripts import Code, script
from luasession.spin import Spin
from luasession.store import Store

_COOKIE = re.compile(r"(?:^|;)\s*session=([\w-]{22})\.([\w-]{43})")
_HINT = "session_v=%d; HttpOnly; Path=/"
_DAY_MS = 86_400_000
# No check, no ttl; then name and value, each with its length.
_PUT = bytes(7) + b"%b%b%b%b"


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
    """A session that reads one key, or has one set."""

    def __init__(self, cookie: str, read: Callable[[SessionId, str], Any] | None) -> None:
        super().__init__()
        found = _COOKIE.search(cookie)
        self.id = SessionId(found[1], found[2]) if found else None
        self.was_read = False
        self._read = read

    def get(self, key: str, default: Any = None) -> Any:
        if self._read is None or self.id is None:
            return default
        self.was_read = True
        return self._read(self.id, key)


class Bare(SessionInterface):
    """The least that luasession's contract leaves: its wire and its cookies, for one workload, by hand.

    The cookie is taken apart, the secret hashed; one HGETALL or one commit.lua on a connection of redis-py's;
    the reply is looked for as luasession does, and proves itself; one value is encoded or decoded; ``Vary``,
    and the hint of a commit. Left out is all that makes it fit for anything else: the mapping and what it
    remembers, other keys and types, conflicts, cache, errors, retries, and a server or connection that fails.
    """

    def __init__(self, app: Flask, socket: str, *, reads: bool) -> None:
        config = read_config({**app.config, "SESSION_REDIS_URL": f"unix://{socket}"})
        # No age, not sent before; then what commit.lua is told each time.
        self._numbers = bytes(14) + pack_numbers(config, False, False, True, _DAY_MS, True)
        self._sha = script("commit").sha
        self._connection: Any = redis.Redis(
            unix_socket_path=socket, protocol=2
        ).connection_pool.get_connection()
        self._spin = Spin()
        self._store = Store(config, "bare")
        self._reads = reads

    def open_session(self, app: Flask, request: Any) -> _Bare:
        return _Bare(request.environ.get("HTTP_COOKIE", ""), self._read if self._reads else None)

    def save_session(self, app: Flask, session: Any, response: Any) -> None:
        if session and session.id is None:
            self._start(session, response)
        elif session:
            version = self._commit(session.id, *session.items())
            response.headers.add("Set-Cookie", _HINT % version)
        if session or session.was_read:
            response.headers.add("Vary", "Cookie")

    def _start(self, session: Any, response: Any) -> None:
        sets = {key.encode(): Put(json.dumps(value).encode()) for key, value in session.items()}
        session_id = new_session_id(32)
        self._store.commit(session_id, Delta(sets=sets), self._store.caller(now_ns(), _DAY_MS), create=True)
        response.set_cookie("session", session_id.sid, httponly=True)

    def _read(self, session_id: SessionId, key: str) -> Any:
        found = self._ask(b"HGETALL", b"session:" + session_id.handle.encode())
        fields = dict(zip(found[::2], found[1::2], strict=True))
        if not same_digest(fields[b"@i"][1:33], session_id.digest):
            raise RuntimeError("the reply is about another session")
        return json.loads(fields[key.encode()])

    def _commit(self, session_id: SessionId, pair: tuple[str, Any]) -> int:
        name, value = pair[0].encode(), json.dumps(pair[1]).encode()
        put = _PUT % (len(name).to_bytes(4), name, len(value).to_bytes(4), value)
        write_id = os.urandom(8)
        code, answered, _now, version, *_ = self._ask(
            b"EVALSHA",
            self._sha,
            b"1",
            b"session:" + session_id.handle.encode(),
            write_id,
            session_id.digest,
            self._numbers,
            put,
        )
        if code != Code.APPLIED or answered != write_id:
            raise RuntimeError("not applied")
        return int(version)

    def _ask(self, *words: bytes) -> Any:
        self._connection.send_packed_command([pack_command(words)])
        self._spin.watch(self._connection)
        return self._connection.read_response(disable_decoding=True)
