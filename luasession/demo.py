"""The main job, shown: three parallel requests, each of which sets its own key.

One small app is served by several processes and threads over real HTTP, with
Flask's cookie session, with Flask-Session and with luasession. A browser sends
each the same parallel requests; afterwards it asks which keys are there.
"""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.cookies import SimpleCookie
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from flask import Flask, session

from . import embedded
from .extension import Session

_HOST = "127.0.0.1"
_PROCESSES, _THREADS = 3, 4
_PAUSE = 1.0
_SOCKET = "LUASESSION_DEMO_SOCKET"
_KINDS = {
    "cookie": "Flask's cookie session",
    "flask-session": "Flask-Session on Redis",
    "luasession": "luasession",
}


def create_app(kind: str) -> Flask:
    """Make the demo's app.

    :param kind: ``"cookie"``, ``"flask-session"`` or ``"luasession"``.
    """
    app = Flask(__name__)
    # For the signed cookie, on this machine, while the demo runs: no secret of anybody's.
    app.config["SECRET_KEY"] = "demo"  # noqa: S105
    if kind == "luasession":
        app.config["SESSION_REDIS_URL"] = f"unix://{os.environ[_SOCKET]}"
        Session(app)
    elif kind == "flask-session":
        # Imported here, since only the demo needs it.
        import redis  # noqa: PLC0415
        from flask_session import Session as FlaskSession  # noqa: PLC0415

        app.config["SESSION_TYPE"] = "redis"
        app.config["SESSION_REDIS"] = redis.Redis(unix_socket_path=os.environ[_SOCKET])
        FlaskSession(app)

    @app.route("/set/<key>")
    def set_key(key: str) -> str:
        time.sleep(_PAUSE)
        session[key] = "done"
        return "ok\n"

    @app.route("/")
    def show() -> dict[str, str]:
        return dict(session)

    return app


class _Browser:
    """As much of a browser as matters: a cookie jar that takes answers in the order they come."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._jar: dict[str, str] = {}
        self._lock = Lock()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=30)
        with self._lock:
            cookies = "; ".join(f"{name}={value}" for name, value in self._jar.items())
        connection.request("GET", path, headers={"Cookie": cookies} if cookies else {})
        response = connection.getresponse()
        body = response.read()
        with self._lock:
            for header in response.headers.get_all("Set-Cookie") or ():
                for name, morsel in SimpleCookie(header).items():
                    self._jar[name] = morsel.value
        connection.close()
        return response.status, body


@contextmanager
def _serving(kind: str, port: int, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "gunicorn", f"luasession.demo:create_app({kind!r})"]
    command += ["--bind", f"{_HOST}:{port}", "--workers", str(_PROCESSES), "--threads", str(_THREADS)]
    command += ["--log-level", "error"]
    # gunicorn keeps a socket for its own control; it goes with the rest of the demo's files.
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
    server = subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True)
    try:
        _wait_until_it_answers(port, server)
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(15)


def _wait_until_it_answers(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise OSError(f"the web server ended with status {server.returncode}")
        try:
            socket.create_connection((_HOST, port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise OSError(f"nothing answers on {_HOST}:{port}")


def _race(port: int, keys: list[str]) -> tuple[list[str], list[str]]:
    """Send one request for each key at the same time; return the keys acknowledged and kept."""
    browser = _Browser(port)
    browser.get("/set/first")
    with ThreadPoolExecutor(len(keys)) as pool:
        answers = list(pool.map(lambda key: browser.get(f"/set/{key}"), keys))
    acknowledged = [
        key for key, (status, _) in zip(keys, answers, strict=True) if status == http.HTTPStatus.OK
    ]
    kept = browser.get("/")[1].decode()
    return acknowledged, [key for key in keys if f'"{key}"' in kept]


def run(*, port: int, requests: int, once: bool) -> int:
    """Compare, then serve luasession's app until Ctrl-C; return the exit status.

    :param requests: how many are sent in parallel.
    :param once: exit after the comparison.
    :raise ConfigurationError: if the embedded server cannot be started.
    :raise OSError: if the port is taken, or the web server does not start.
    """
    for package in ("gunicorn", "flask_session"):
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install 'luasession[demo]'")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise OSError(f"port {port} is not free ({error.strerror}); choose another with --port") from None
    # Stopped from outside, or its terminal closed, it cleans up as after Ctrl-C: the web server is a process
    # group of its own.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    keys = [f"key{number}" for number in range(1, requests + 1)]
    with tempfile.TemporaryDirectory(prefix="luasession-demo-") as folder:
        directory = Path(folder)
        logging.getLogger("luasession").setLevel(logging.ERROR)  # that this is a demo is no news here
        os.environ[_SOCKET] = embedded.start(directory / "server", name="demo")
        print(
            f"One browser sends {requests} requests at the same time; each sets a key of its own after"
            f" {_PAUSE:.0f} s.\n{_PROCESSES} processes of {_THREADS} threads serve them on port {port}.\n"
        )
        print(f"{'':24}{'acknowledged':28}survived")
        lost = True
        for kind, title in _KINDS.items():
            with _serving(kind, port, directory):
                acknowledged, kept = _race(port, keys)
                print(
                    f"{title:24}{' '.join(acknowledged) or 'none':28}{' '.join(kept) or 'none'}", flush=True
                )
                lost = kept != keys or acknowledged != keys
                if kind == "luasession" and not once:
                    _go_on(port)
    return int(lost)


def _go_on(port: int) -> None:
    url = f"http://localhost:{port}"
    print(
        "\nluasession's goes on serving until Ctrl-C. Try it:\n"
        f"  curl -c cookie {url}/set/first\n"
        f"  curl -b cookie {url}/set/a & curl -b cookie {url}/set/b & wait; curl -b cookie {url}/",
        flush=True,
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        print()
