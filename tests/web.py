"""A real web server: gunicorn with several processes and threads, and browsers that use sockets."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from http.cookies import SimpleCookie
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlencode

from flask import Flask, request, session

from luasession import Session, merge, retry_on_conflict

from .servers import Server, eventually

#: The variable in which an app finds its settings.
SETTINGS = "LUASESSION_TEST_SETTINGS"


def create_app() -> Flask:
    """Make the app that the workers serve; its settings come as JSON in the environment."""
    app = Flask(__name__)
    app.config.update(json.loads(os.environ[SETTINGS]))
    app.config["SESSION_MERGE"] = {"merged": merge.add}
    Session(app)

    @app.route("/ready")
    def ready() -> str:
        return "ready"

    @app.route("/start", methods=["POST"])
    def start() -> str:
        session.update(request.get_json())
        return "ok"

    @app.route("/set/<key>")
    def set_key(key: str) -> str:
        time.sleep(0.05)
        session[key] = key
        return "ok"

    @app.route("/nest/<key>")
    def nest(key: str) -> str:
        values = session[key]
        time.sleep(0.05)
        values["added"] = key
        return "ok"

    @app.route("/delete/<key>")
    def delete(key: str) -> str:
        value = session[key]
        time.sleep(0.05)
        del session[key]
        return str(value)

    add_increments(app)
    add_principals(app)

    @app.route("/stats")
    def stats() -> dict[str, int]:
        return {"pid": os.getpid(), **app.extensions["luasession"].stats()}

    @app.route("/logout")
    def logout() -> str:
        session.clear()
        return "bye"

    @app.route("/")
    def show() -> dict[str, Any]:
        return {"pid": os.getpid(), "session": dict(session), "version": session.version}

    return app


def add_principals(app: Flask) -> None:
    """Add a log-in, and log out everywhere."""

    @app.route("/login/<user>")
    def login(user: str) -> str:
        session["user"] = session.principal = user
        session.regenerate()
        return "ok"

    @app.route("/revoke/<user>")
    def revoke(user: str) -> str:
        return str(app.extensions["luasession"].revoke_all(user))


def add_increments(app: Flask) -> None:
    """Add a view for each way to count; each returns how often it ran."""

    def plus_one(key: str) -> None:
        session[key] = session.get(key, 0) + 1

    @app.route("/increment/atomic")
    def increment_atomically() -> str:
        runs = []

        def function(hits: int) -> int:
            runs.append(hits)
            return hits + 1

        session.atomic_update("hits", function, 0)
        return str(len(runs))

    @app.route("/increment/merge")
    def increment_merged() -> str:
        plus_one("merged")
        return "1"  # the rounds come after the view: /stats counts them

    @app.route("/increment/retry")
    def increment_again_and_again() -> str:
        runs = []

        @retry_on_conflict(attempts=1000)
        def view() -> None:
            runs.append(1)
            plus_one("hits")

        view()
        return str(len(runs))


class Web:
    """A running web server."""

    def __init__(self, port: int) -> None:
        #: Where it listens, on 127.0.0.1.
        self.port = port

    def browser(self, cookies: dict[str, str] | None = None) -> WebBrowser:
        """Return a browser, with these cookies to begin with."""
        return WebBrowser(self.port, cookies or {})


class WebBrowser:
    """A cookie jar and a socket."""

    def __init__(self, port: int, cookies: dict[str, str]) -> None:
        self._port = port
        self.cookies = dict(cookies)

    def request(
        self, path: str, body: Any = None, form: dict[str, str] | None = None
    ) -> tuple[int, bytes, list[str]]:
        """Send one request, a body as JSON; return status, body and the cookies that were set."""
        headers = {}
        sent = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            sent = json.dumps(body) if body else None
        elif form is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            sent = urlencode(form)
        method = "GET" if body is None and form is None else "POST"
        status, content, answered = self.answer(path, 60, method, sent, headers)
        return status, content, answered.get_all("Set-Cookie") or []

    def answer(
        self,
        path: str,
        seconds: float,
        method: str = "GET",
        sent: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes, Message]:
        """Send one request; return status, body and headers.

        :param seconds: that the answer may take.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        try:
            connection.request(method, path, sent, {"Cookie": cookie, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        for line in response.headers.get_all("Set-Cookie") or []:
            for name, morsel in SimpleCookie(line).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value
        return response.status, content, response.headers

    def take(self, sent: dict[str, str], now: dict[str, str]) -> None:
        """Take over what an answer changed: the cookies that were sent, and what became of them."""
        for name in sent.keys() - now.keys():
            self.cookies.pop(name, None)
        self.cookies.update({name: value for name, value in now.items() if sent.get(name) != value})

    def show(self) -> dict[str, Any]:
        """Return the session as the app sees it."""
        status, body, _ = self.request("/")
        assert status == 200, (status, body)
        shown: dict[str, Any] = json.loads(body)
        return shown

    def overlapping(self, path: str) -> tuple[int, bytes]:
        """Send a request that may overlap others; its cookies go into the jar when its answer comes."""
        twin = WebBrowser(self._port, self.cookies)
        sent = dict(twin.cookies)
        status, body, _ = twin.request(path)
        self.take(sent, twin.cookies)
        return status, body

    def parallel(self, paths: list[str]) -> list[int]:
        """Send all at the same time, with the cookies of now; return their statuses."""
        begun = Barrier(len(paths))

        def send(path: str) -> int:
            begun.wait(30)
            return self.overlapping(path)[0]

        with ThreadPoolExecutor(len(paths)) as pool:
            return list(pool.map(send, paths))


@contextmanager
def serving(
    server: Server | None,
    *options: str,
    workers: int = 3,
    threads: int = 12,
    app: str = "tests.web:create_app()",
    **settings: Any,
) -> Iterator[Web]:
    """Serve an app by gunicorn on a free port until the block ends.

    :param server: whose URL is among the settings if this is None.
    """
    if server is not None:
        settings = {"SESSION_REDIS_URL": server.url, **settings}
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "port"
        config = Path(folder) / "gunicorn.conf.py"
        # Port 0 lets the kernel choose, so that no other process can take it in between.
        config.write_text(
            "def when_ready(server):\n"
            f"    open({str(chosen)!r} + '.new', 'w').write(str(server.LISTENERS[0].sock.getsockname()[1]))\n"
            f"    import os; os.rename({str(chosen)!r} + '.new', {str(chosen)!r})\n"
        )
        command = [sys.executable, "-m", "gunicorn", app, "--bind", "127.0.0.1:0"]
        command += ["--workers", str(workers), "--threads", str(threads), "--log-level", "error"]
        command += ["--config", str(config), *options]
        environment = {**os.environ, SETTINGS: json.dumps(settings), "XDG_RUNTIME_DIR": folder}
        process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])
        try:
            assert eventually(lambda: chosen.exists() or process.poll() is not None, 30)
            assert process.poll() is None, "gunicorn did not start"
            web = Web(int(chosen.read_text()))
            assert eventually(lambda: _answers(lambda: web.browser().request("/ready")), 30)
            yield web
        finally:
            process.terminate()
            process.wait(20)


def _answers(send: Callable[[], object]) -> bool:
    try:
        send()
    except OSError:
        return False
    return True
