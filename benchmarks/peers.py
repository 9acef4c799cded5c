"""The peers: one small app under each kind of session, called in this process."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import redis
from flask import Flask
from flask.sessions import SecureCookieSession, SessionInterface

from luasession import Session

from .least import Bare, OneCommand
from .workloads import install


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

FLOOR, COOKIE, LOADED, RIVAL = "no sessions", "signed cookie", "Flask-Session", "Flask-Session, no refresh"
COLD, VALIDATING, CACHED = "luasession, cold", "luasession, validating", "luasession, cached"
CHECKED, DEFAULTS = "luasession, checked", "luasession, defaults"

ONE_HSET, ONE_HGETALL = "one HSET", "one HGETALL"
BARE_COMMIT, BARE_CHANGE, BARE_READ = "bare commit", "bare read and commit", "bare read"
BARE_CONFIRMATION, BARE_MIX = "bare confirmation", "bare, the mix"


def _one(*, reads: bool) -> Setup:
    return lambda app, socket: setattr(app, "session_interface", OneCommand(app, socket, reads=reads))


def _bare(reads: str = "") -> Setup:
    return lambda app, socket: setattr(app, "session_interface", Bare(app, socket, reads=reads))


#: Those that are called in this process.
PEERS: dict[str, Setup] = {
    FLOOR: _floor,
    COOKIE: _cookie,
    LOADED: _flask_session,
    RIVAL: lambda app, socket: _flask_session(app, socket, SESSION_REFRESH_EACH_REQUEST=False),
    COLD: lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=None),
    VALIDATING: lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=0),
    # A window that outlasts the run, so that what is measured is the cached read and nothing else.
    CACHED: lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=3600.0),
    CHECKED: lambda app, socket: _luasession(app, socket, SESSION_CACHE_TTL=3600.0, SESSION_CONFLICT="raise"),
    ONE_HSET: _one(reads=False),
    ONE_HGETALL: _one(reads=True),
    BARE_COMMIT: _bare(),
    BARE_CHANGE: _bare("held"),
    BARE_READ: _bare("whole"),
    BARE_CONFIRMATION: _bare("changes"),
}
#: What a session must do at least, with the workloads that it is the least of.
LEAST = {
    ONE_HSET: ("write blind", "read, change"),
    ONE_HGETALL: ("read one key",),
    BARE_COMMIT: ("write blind",),
    BARE_CHANGE: ("read, change",),
    BARE_READ: ("read one key",),
    BARE_CONFIRMATION: ("read one key",),
}
#: Those under gunicorn, where the cache is as it comes.
SERVED: dict[str, Setup] = {name: PEERS[name] for name in (FLOOR, COOKIE, LOADED, RIVAL, COLD)} | {
    DEFAULTS: _luasession,
    BARE_MIX: _bare("whole"),
}


def family(name: str) -> str:
    """Return where a peer keeps its sessions: all of a family share them."""
    return name.partition(",")[0]


def make_app(name: str, socket: str, data: Mapping[str, Any], **config: Any) -> Flask:
    """Make the app of one peer, over the server of this unix socket."""
    app = Flask(__name__)
    app.config.update(SESSION_MAX_BYTES=8 << 20, **config)
    (PEERS | SERVED)[name](app, socket)
    install(app, data)
    return app


class Peer:
    """An app under one kind of session, and a browser that calls it without a network.

    :param start: the path that begins the session: ``/plain`` for one of its data alone.
    """

    def __init__(
        self, name: str, socket: str, data: Mapping[str, Any], *, start: str = "/start", **config: Any
    ) -> None:
        self.flask = make_app(name, socket, data, **config)
        #: What is called: the app, or what was put around it.
        self.app: Callable[..., Iterable[bytes]] = self.flask
        self.jar: dict[str, str] = {}
        self.body = b""
        self.call(start)

    def call(self, path: str, jar: dict[str, str] | None = None) -> float:
        """Send one request, and return the seconds that the app took for it.

        :param jar: the cookies of another browser than this peer's own.
        """
        jar = self.jar if jar is None else jar
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SCRIPT_NAME": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "localhost",
            "HTTP_COOKIE": "; ".join(f"{name}={value}" for name, value in list(jar.items())),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
        }
        answer: list[Any] = []
        started = time.perf_counter()
        body = self.app(environ, lambda *head: answer.append(head))
        parts = list(body)
        taken = time.perf_counter() - started
        status, headers = answer[0][:2]
        if not status.startswith("200"):
            raise RuntimeError(f"{path}: {status}")
        self.body = b"".join(parts)
        for name, value in headers:
            if name == "Set-Cookie":
                key, _, rest = value.partition("=")
                jar[key] = rest.partition(";")[0]
        # What a browser would have dropped by its Max-Age of a few seconds, long before the next click.
        jar.pop("session_o", None)
        return taken
