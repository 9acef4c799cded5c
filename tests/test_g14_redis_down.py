"""G14: with Redis down the untouched is served and the rest is a 503; never an empty session."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Timer
from typing import Any

import pytest
from flask import session

from luasession import SessionUnavailable

from .conftest import TestApp
from .servers import Server


def app_on(server: Server, **config: Any) -> TestApp:
    return TestApp(server, {"SESSION_REDIS_DEADLINE": 0.3, "SESSION_CACHE_TTL": 0, **config})


def test_down_and_up_again(own_server: Server) -> None:
    """Stopped: 200 for what does not touch the session, 503 with Retry-After and no cookie else."""
    app = app_on(own_server)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    own_server.stop()
    assert browser.get("/untouched").status_code == 200
    for view in (lambda: dict(session), lambda: session.update(b=1)):
        browser.run(view, status=503)
        assert browser.response is not None
        assert browser.response.headers["Retry-After"] == "1"
        assert browser.set_cookies == {}
    handling = app_on(own_server)
    handling.flask.register_error_handler(SessionUnavailable, lambda error: ("mine", 599))
    browser.twin(handling).run(lambda: session.update(b=1), status=599)
    own_server.restart()
    browser.run(lambda: session.update(c=1))


def test_back_within_the_deadline(own_server: Server) -> None:
    """A server that comes back within the deadline is waited for."""
    app = app_on(own_server, SESSION_REDIS_DEADLINE=10.0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    own_server.pause()
    timer = Timer(1.5, own_server.resume)  # longer than one call may take
    timer.start()
    browser.run(lambda: session.update(b=1))
    timer.join()
    assert browser.run(lambda: dict(session)) == {"a": 1, "b": 1}


def test_scripts_flushed_between_requests(own_server: Server) -> None:
    """SCRIPT FLUSH between any two requests shows nowhere but in the counter."""
    app = app_on(own_server)
    browser = app.browser()
    with own_server.client() as client:
        for n in range(5):
            browser.run(lambda n=n: session.update({f"k{n}": n}))
            client.script_flush()
            assert browser.run(lambda: len(session)) == n + 1
            client.script_flush()
    assert app.stats()["script_reloads"] > 5


@pytest.mark.parametrize("trouble", ["memory", "replica", "type"])
def test_a_server_that_refuses(own_server: Server, trouble: str) -> None:
    """Out of memory, read-only, wrong type: 503, the server's words in the reason, nothing half-written."""
    app = app_on(own_server)
    reasons: list[str] = []

    def answer(error: SessionUnavailable) -> tuple[str, int]:
        reasons.append(error.reason)
        return "unavailable", 503

    app.flask.register_error_handler(SessionUnavailable, answer)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    with own_server.client() as client:
        if trouble == "memory":
            client.config_set("maxmemory", "1")
        elif trouble == "replica":
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
        else:
            client.set(app.prefix + handle, "a string")
        browser.run(lambda: session.update(b=1, c=2), status=503)
        words = {"memory": "OOM", "replica": "READONLY", "type": "WRONGTYPE"}[trouble]
        low = reasons[0].lower()
        assert words.lower() in low or "read only replica" in low or "maxmemory" in low or "wrong kind" in low
        client.config_set("maxmemory", "0")
        client.execute_command("REPLICAOF", "NO", "ONE")
    if trouble != "type":
        time.sleep(0.05)
        assert browser.run(lambda: dict(session)) == {"a": 1}


def test_an_error_after_a_commit_carries_the_id(own_server: Server) -> None:
    """What a commit of this request made is sent on the error response too: id first, then the hint."""
    app = app_on(own_server)
    browser = app.browser()

    def view() -> None:
        session["a"] = 1
        session.commit()
        own_server.stop()
        session["b"] = 2

    browser.run(view, status=503)
    assert list(browser.set_cookies) == ["session", "session_v"]


def delete_and_set() -> None:
    del session["a"]
    session["b"] = 1


def new_lifetime() -> None:
    session.lifetime = 100
    session["b"] = 1


def clear_and_set() -> None:
    session.clear()
    session["b"] = 1


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(delete_and_set, id="delete and set"),
        pytest.param(new_lifetime, id="new lifetime"),
        pytest.param(clear_and_set, id="clear and set"),
    ],
)
def test_out_of_memory_changes_nothing(own_server: Server, view: Callable[[], None]) -> None:
    """Nothing that a commit also does, a deletion, a new TTL, a clear, gets it past the limit of memory."""
    app = app_on(own_server)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    stored = app.stored(handle)
    with own_server.client() as client:
        before = client.pttl(app.prefix + handle)
        client.config_set("maxmemory", "1")
        browser.run(view, status=503)
        client.config_set("maxmemory", "0")
        assert app.stored(handle) == stored
        assert before - 60_000 < client.pttl(app.prefix + handle) <= before
