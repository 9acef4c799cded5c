"""The peers: one small app under each kind of session, called in this process."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import redis
from flask import Flask, session
from flask.sessions import SecureCookieSession, SessionInterface

from luasession import Session


class NoSessions(SessionInterface):
    """The floor: Flask itself, with a session that is neither read nor stored."""

    def open_session(self, app: Flask, request: Any) -> SecureCookieSession:
        return SecureCookieSession()

    def save_session(self, app: Flask, session: Any, response: Any) -> None:
        pass


def _floor(app: Flask, _socket: str) -> None:
    app.session_interface = NoSessions()


def _cookie(app: Flask, _socket: str) -> None:
    app.secret_key = "benchmark"


def _flask_session(app: Flask, socket: str, **config: Any) -> None:
    from flask_session import Session as FlaskSession

    client = redis.Redis(unix_socket_path=socket, protocol=2)
    app.config.update(SESSION_TYPE="redis", SESSION_REDIS=client, SESSION_KEY_PREFIX="fs:", **config)
    FlaskSession(app)


def _luasession(app: Flask, socket: str, **config: Any) -> None:
    app.config.update(SESSION_REDIS_URL=f"unix://{socket}", **config)
    Session(app)


Setup = Callable[[Flask, str], None]

PEERS: dict[str, Setup] = {
    "no sessions": _floor,
    "signed cookie": _cookie,
    "Flask-Session": _flask_session,
    "Flask-Session, no refresh": lambda app, socket: _flask_session(
        app, socket, SESSION_REFRESH_EACH_REQUEST=False
    ),
    # A window that outlasts the run, so that what is measured is the cached read and nothing else.
    "luasession, cached": lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=3600.0),
    "luasession, validating": lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=0),
    "luasession, cold": lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=None),
}

#: What a session holds, by the name of its shape.
SHAPES: dict[str, dict[str, Any]] = {
    "8 x 40 B": {f"key{n}": "v" * 38 for n in range(8)},
    "100 x 1 KB": {f"key{n}": "v" * 1022 for n in range(100)},
    "1000 x 1 KB": {f"key{n}": "v" * 1022 for n in range(1000)},
}


class Peer:
    """An app under one kind of session, and a browser that calls it without a network."""

    def __init__(self, name: str, socket: str, shape: str) -> None:
        self.app = Flask(__name__)
        self.app.config["SESSION_MAX_BYTES"] = 8 << 20
        PEERS[name](self.app, socket)
        self._jar: dict[str, str] = {}
        self._writes = 0
        self.app.add_url_rule("/untouched", view_func=lambda: "x")
        self.app.add_url_rule("/read", view_func=self._read)
        self.app.add_url_rule("/write", view_func=self._write)
        self.app.add_url_rule("/change", view_func=self._change)
        self.app.add_url_rule("/start", "start", view_func=lambda: self._start(shape))
        self.call("/start")

    @staticmethod
    def _start(shape: str) -> str:
        session.update(SHAPES[shape], count=0)
        return "x"

    @staticmethod
    def _read() -> str:
        return str(session.get("key1"))[:1]

    def _write(self) -> str:
        self._writes += 1
        session["key1"] = f"{self._writes:038}"
        return "x"

    @staticmethod
    def _change() -> str:
        session["count"] = session.get("count", 0) + 1
        return "x"

    def call(self, path: str) -> float:
        """Send one request, and return the seconds that the app took for it."""
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SCRIPT_NAME": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "localhost",
            "HTTP_COOKIE": "; ".join(f"{name}={value}" for name, value in self._jar.items()),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
        }
        answer: list[Any] = []
        started = time.perf_counter()
        body = self.app(environ, lambda *head: answer.append(head))
        for _ in body:
            pass
        taken = time.perf_counter() - started
        status, headers = answer[0][:2]
        if not status.startswith("200"):
            raise RuntimeError(f"{path}: {status}")
        for name, value in headers:
            if name == "Set-Cookie":
                key, _, rest = value.partition("=")
                self._jar[key] = rest.partition(";")[0]
        # What a browser would have dropped by its Max-Age of a few seconds, long before the next click.
        self._jar.pop("session_o", None)
        return taken
