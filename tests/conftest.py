"""Fixtures: a real server of each kind, apps on it, and browsers with a cookie jar."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any
from uuid import uuid4

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import settings
from werkzeug.test import TestResponse

import luasession.store
from luasession import Session

from .proxy import Proxy
from .servers import ClusterTopology, SentinelTopology, Server, cluster, missing, sentinel, standalone

# In CI the same examples each time; elsewhere new ones, so that somebody finds what CI does not.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Seconds between the beginning of a request and of one inside of it.
_TRANSIT = 0.005
# How many views are open, by thread.
_views = threading.local()

#: The kinds that every guarantee is tested on.
GUARANTEED = ("valkey-9.1", "redis-7.0", "redis-6.2")


def require(kind: str) -> None:
    """Skip on a laptop that lacks a server; fail in CI, where nobody would notice the skip."""
    reason = missing(kind)
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"{kind}: {reason}")
        pytest.skip(f"{kind}: {reason}")


@pytest.fixture(scope="session", params=GUARANTEED)
def kind(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return request.param


@pytest.fixture(scope="session")
def server(kind: str) -> Iterator[Server]:
    """A server of each kind, shared by the tests of a run: they keep to their own key prefix."""
    with standalone(kind) as server:
        yield server


@pytest.fixture
def own_server(kind: str) -> Iterator[Server]:
    """A server of each kind for one test alone, which may flush, stop or fill it."""
    with standalone(kind) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy before the shared server."""
    with Proxy(server.socket_path) as proxy:
        yield proxy


@pytest.fixture
def own_proxy(own_server: Server) -> Iterator[Proxy]:
    """A proxy before the server of one test alone."""
    with Proxy(own_server.socket_path) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """The embedded default alone, for tests in which the kind of server plays no part."""
    with standalone("valkey-9.1") as server:
        yield server


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[[str], ClusterTopology]]:
    """Give the cluster of a kind, started when it is first wanted; whoever breaks it mends it."""
    with ExitStack() as stack:
        yield cache(lambda kind: (require(kind), stack.enter_context(cluster(kind)))[1])


@pytest.fixture(scope="session")
def sentinels() -> Iterator[Callable[[str], SentinelTopology]]:
    """Give the sentinels of a kind, and what they watch, started when they are first wanted."""
    with ExitStack() as stack:
        yield cache(lambda kind: (require(kind), stack.enter_context(sentinel(kind)))[1])


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even a small session confirmed by load.lua, as a large one is, so that only changes travel."""
    monkeypatch.setattr(luasession.store, "SMALL", -1)


class Browser:
    """A client with cookies of its own that runs a function as a view, in a real request.

    ``browser.run(function)`` returns what the function returned; the response is in
    ``browser.response``. Inside the function another browser may run another one: that is a
    request which begins and ends while this one is open.
    """

    def __init__(self, app: TestApp, client: FlaskClient | None = None) -> None:
        self.app = app
        self.client = client or app.flask.test_client()
        self.response: TestResponse | None = None

    def run(self, function: Callable[[], Any], *, status: int = 200, path: str = "/run") -> Any:
        """Run a function as the view of one request of this browser."""
        if getattr(_views, "open", 0):
            # Whether a request was open before another one is known to a call's transit: this is well over it.
            time.sleep(_TRANSIT)
        token = uuid4().hex
        self.app.views[token] = function
        self.response = self.client.get(path, headers={"X-Token": token})
        assert self.response.status_code == status, (self.response.status, self.response.text)
        return self.app.results.pop(token, None)

    def get(self, path: str) -> TestResponse:
        """Send a plain request."""
        self.response = self.client.get(path)
        return self.response

    @property
    def set_cookies(self) -> dict[str, str]:
        """The cookies that the last response set, whole, by name."""
        assert self.response is not None
        headers = self.response.headers.getlist("Set-Cookie")
        return {header.partition("=")[0]: header for header in headers}

    @property
    def cookies(self) -> dict[str, str]:
        """The browser's cookies."""
        return {cookie.key: cookie.value for cookie in self.client._cookies.values()}

    def twin(self, app: TestApp | None = None) -> Browser:
        """Return a browser with the same cookies as of now: what sends a parallel request.

        :param app: served by this app instead, which stands for another process.
        """
        twin = Browser(app or self.app)
        for name, value in self.cookies.items():
            twin.client.set_cookie(name, value)
        return twin


class TestApp:
    """A Flask app with luasession, and what tests want to know of it."""

    __test__ = False

    def __init__(
        self, server: Server | ClusterTopology | SentinelTopology | None, config: dict[str, Any]
    ) -> None:
        self.server: Any = server
        self.views: dict[str, Callable[[], Any]] = {}
        self.results: dict[str, Any] = {}
        self.flask = Flask("testapp")
        if server is not None:
            self.flask.config["SESSION_REDIS_URL"] = server.url
        self.flask.config.update(config)
        Session(self.flask)
        self.flask.add_url_rule("/run", view_func=self._run, methods=["GET", "POST"])
        self.flask.add_url_rule("/untouched", view_func=lambda: "untouched")

    def _run(self) -> Any:
        from flask import request

        token = request.headers["X-Token"]
        _views.open = getattr(_views, "open", 0) + 1
        try:
            result = self.views.pop(token)()
        finally:
            _views.open -= 1
        self.results[token] = result
        return result if isinstance(result, self.flask.response_class) else "done"

    def browser(self) -> Browser:
        """Return a browser without cookies."""
        return Browser(self)

    def browser_with_header(self, cookie: str) -> Browser:
        """Return a browser that sends this Cookie header, whatever it holds, and keeps no cookies."""
        client = self.flask.test_client(use_cookies=False)
        client.environ_base["HTTP_COOKIE"] = cookie.encode().decode("latin1")
        return Browser(self, client)

    @property
    def prefix(self) -> str:
        return str(self.flask.config.get("SESSION_KEY_PREFIX", "session:"))

    def stored(self, handle: str) -> dict[bytes, bytes]:
        """Return the whole hash of a session."""
        assert self.server is not None
        key = self.prefix + handle
        # Where it is, and not by way of a cluster's client, which takes its time to begin.
        with self.server.owner(key).client() as client:
            return client.hgetall(key)

    def keys(self) -> list[bytes]:
        """Return all keys of this app."""
        assert self.server is not None
        with self.server.client() as client:
            # SCAN, which a cluster's client asks of all primaries.
            return sorted(set(client.scan_iter(self.prefix + "*", count=10_000)))

    def stats(self) -> dict[str, int]:
        """Return the counters of this app's process."""
        return self.flask.extensions["luasession"].stats()

    def another(self, **config: Any) -> TestApp:
        """Return an app on the same sessions with a cache of its own: another process."""
        settings = {key: value for key, value in self.flask.config.items() if key.startswith("SESSION_")}
        settings["PERMANENT_SESSION_LIFETIME"] = self.flask.config["PERMANENT_SESSION_LIFETIME"]
        return TestApp(self.server, {**settings, **config})


MakeApp = Callable[..., TestApp]


@pytest.fixture
def make_app(server: Server) -> MakeApp:
    """Make an app on the shared server, under a key prefix of its own."""

    def make(**config: Any) -> TestApp:
        return TestApp(server, {"SESSION_KEY_PREFIX": f"t{uuid4().hex[:8]}:", **config})

    return make


@pytest.fixture
def make_valkey_app(valkey: Server) -> MakeApp:
    """Make an app on the embedded default alone."""

    def make(**config: Any) -> TestApp:
        return TestApp(valkey, {"SESSION_KEY_PREFIX": f"t{uuid4().hex[:8]}:", **config})

    return make


@pytest.fixture
def app(make_app: MakeApp) -> TestApp:
    """An app with the defaults."""
    return make_app()
