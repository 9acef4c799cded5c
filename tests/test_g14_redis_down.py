"""G14: with Redis down the untouched is served and the rest is a 503; never an empty session."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Timer
from typing import Any

import pytest
import redis
from flask import Response, session
from flask_login import LoginManager

from luasession import SessionGone, SessionUnavailable
from luasession.connections import Connections

from .conftest import MakeApp, TestApp
from .proxy import Proxy
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


def test_out_of_reach_nothing_changes(proxy: Proxy, make_app: MakeApp) -> None:
    """What a request would read, change, rotate or end while Redis cannot be reached is as it was, cookies too."""
    app = make_app(SESSION_REDIS_URL=proxy.url, SESSION_REDIS_DEADLINE=0.02, SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, cookies = browser.run(lambda: session.handle), browser.cookies
    before = app.stored(handle)
    proxy.refuse()
    views: list[Callable[[], Any]] = [
        lambda: dict(session),
        lambda: session.update(a=2),
        lambda: session.regenerate(),
        lambda: session.clear(),
        lambda: session.destroy(),
    ]
    for view in views:
        browser.run(view, status=503)
        assert browser.set_cookies == {}
    assert browser.get("/untouched").status_code == 200
    proxy.accept()
    assert app.stored(handle) == before
    assert browser.cookies == cookies
    assert browser.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("with_flask_login", [False, True])
def test_out_of_reach_for_after_request(
    proxy: Proxy, make_app: MakeApp, with_flask_login: bool, mine: bool
) -> None:
    """An ``after_request`` that reads the session, Flask-Login's is one, meets a 503 as the view does, and no 500."""
    app = make_app(SESSION_REDIS_URL=proxy.url, SESSION_REDIS_DEADLINE=0.02, SESSION_CACHE_TTL=0)
    app.flask.secret_key = "for Flask-Login"
    ran = []

    def look(response: Response) -> Response:
        ran.append(session.get("a"))
        return response

    if with_flask_login:
        LoginManager(app.flask)
    else:
        app.flask.after_request(look)
    if mine:
        app.flask.register_error_handler(503, lambda error: (f"mine: {type(error).__name__}", 503))
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, cookies = browser.run(lambda: session.handle), browser.cookies
    before = app.stored(handle)
    proxy.refuse()

    def degrading() -> None:
        with suppress(SessionUnavailable):
            session["a"]

    views: list[Callable[[], Any]] = [
        lambda: dict(session),
        lambda: session.update(a=2),
        lambda: session.destroy(),
        lambda: None,
        degrading,
    ]
    for view in views:
        browser.run(view, status=503)
        assert browser.set_cookies == {}
        assert browser.response is not None
        if mine:
            assert browser.response.text == "mine: SessionUnavailable"
        else:
            assert browser.response.headers["Retry-After"] == "1"
    proxy.accept()
    assert app.stored(handle) == before
    assert browser.cookies == cookies
    assert browser.run(lambda: dict(session)) == {"a": 1}
    assert with_flask_login or ran[-1] == 1


def test_what_was_committed_before_is_in_the_answer(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an ``after_request`` fails, the id of a session that the view has started goes out all the same."""
    app = make_app(SESSION_CACHE_TTL=None, SESSION_REDIS_DEADLINE=0)

    def look(response: Response) -> Response:
        session["more"] = 1
        session.reload()
        return response

    def view() -> None:
        session["a"] = 1
        session.commit()
        monkeypatch.setattr(Connections, "exchange", down)

    def down(*_: Any) -> Any:
        raise redis.ConnectionError("down")

    app.flask.after_request(look)
    browser = app.browser()
    browser.run(view, status=503)
    monkeypatch.undo()
    app.flask.after_request_funcs.clear()
    assert browser.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("where", ["view", "after_request"])
def test_a_refreshed_id_does_not_go_with_a_503(
    make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A request that has refreshed the TTL by reading, and then cannot commit, is answered without a cookie."""
    app = make_valkey_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=0)
    down: list[bool] = []

    def commit(response: Response) -> Response:
        if down and where == "after_request":
            session.commit()  # type: ignore[attr-defined]
        return response

    app.flask.after_request(commit)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(lambda: session["a"])
    assert "session" in browser.set_cookies

    def unavailable(*_: Any, **__: Any) -> Any:
        raise SessionUnavailable("down")

    def view() -> None:
        assert session["a"] == 1
        session["b"] = 2
        monkeypatch.setattr(app.flask.session_interface.store, "commit", unavailable)  # type: ignore[attr-defined]
        down.append(True)
        if where == "view":
            session.commit()  # type: ignore[attr-defined]

    browser.run(view, status=503)
    assert browser.set_cookies == {}


@pytest.mark.parametrize(
    ("error", "handled", "expected"),
    [
        (KeyError("a"), False, (500, None)),
        (SessionGone("gone"), False, (500, None)),
        (SessionGone("gone"), True, (410, "gone")),
    ],
)
def test_other_errors_of_after_request_go_on(
    make_app: MakeApp, error: Exception, handled: bool, expected: tuple[int, str | None]
) -> None:
    """What is not luasession's goes its way, and what has no status of its own is a 500 unless the app has a handler."""
    app = make_app()
    app.flask.config["PROPAGATE_EXCEPTIONS"] = False

    def after(_response: Response) -> Response:
        raise error

    app.flask.after_request(after)
    if handled:
        app.flask.register_error_handler(SessionGone, lambda error: (str(error), 410))
    response = app.browser().get("/untouched")
    status, text = expected
    assert response.status_code == status
    assert text is None or response.text == text


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


@pytest.mark.parametrize(
    "end", [lambda: session.destroy(), lambda: session.clear()], ids=["destroy", "clear"]
)
def test_a_log_out_that_nobody_has_confirmed(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    """It may have ended the session all the same: the process that asked does not show what it had cached."""
    app = make_app(SESSION_CACHE_TTL=3600.0, SESSION_REDIS_DEADLINE=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    original = Connections._exchange

    def lossy(*about: Any) -> Any:
        original(*about)
        raise redis.ConnectionError("the reply is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Connections, "_exchange", staticmethod(lossy))
        browser.run(end, status=503)
    assert browser.run(lambda: dict(session)) == {}


def test_replicas_are_waited_for_longer_than_an_answer(valkey: Server) -> None:
    """The wait for replicas comes on top of the time for an answer: what is told is how many there were."""
    app = app_on(
        valkey,
        SESSION_KEY_PREFIX="waiting:",
        SESSION_REDIS_TIMEOUT=0.2,
        SESSION_REDIS_DEADLINE=1,
        SESSION_WAIT_REPLICAS=1,
        SESSION_WAIT_TIMEOUT=0.6,
    )
    reasons: list[str] = []

    @app.flask.errorhandler(SessionUnavailable)
    def remember(error: SessionUnavailable) -> Any:
        reasons.append(error.reason)
        return error

    with valkey.counting() as commands:
        app.browser().run(lambda: session.update(a=1), status=503)
    assert ["0 of 1 replicas" in reason for reason in reasons] == [True], reasons
    assert commands.names[-2:] == ["EVALSHA", "WAIT"]


@pytest.mark.usefixtures("nothing_is_small")
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


def reasons_of(app: TestApp) -> list[str]:
    """Return a list that fills with what each 503 was for."""
    reasons: list[str] = []

    def answer(error: SessionUnavailable) -> tuple[str, int]:
        reasons.append(error.reason.lower())
        return "unavailable", 503

    app.flask.register_error_handler(SessionUnavailable, answer)
    return reasons


def write() -> None:
    session.update(b=1, c=2)


def test_a_server_without_memory(own_server: Server) -> None:
    """Out of memory: 503, the server's words in the reason, nothing half-written."""
    app = app_on(own_server)
    reasons = reasons_of(app)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    with own_server.client() as client:
        client.config_set("maxmemory", "1")
        browser.run(write, status=503)
        client.config_set("maxmemory", "0")
    assert "oom" in reasons[0] or "maxmemory" in reasons[0]
    assert browser.run(lambda: dict(session)) == {"a": 1}


def test_a_server_that_is_a_replica(own_server: Server) -> None:
    """Read-only: 503, the server's words in the reason, nothing half-written."""
    app = app_on(own_server)
    reasons = reasons_of(app)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    with own_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        browser.run(write, status=503)
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert "readonly" in reasons[0] or "read only replica" in reasons[0]
    time.sleep(0.05)
    assert browser.run(lambda: dict(session)) == {"a": 1}


def test_a_key_of_another_type(own_server: Server) -> None:
    """Wrong type under the key: 503, the server's words in the reason, and it is left alone."""
    app = app_on(own_server)
    reasons = reasons_of(app)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    key = app.prefix + browser.run(lambda: session.handle)
    with own_server.client() as client:
        client.set(key, "a string")
        browser.run(write, status=503)
        assert client.get(key) == b"a string"
    assert "wrongtype" in reasons[0] or "wrong kind" in reasons[0]


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
    # Where to stop the servers took long, the answer asks everybody to confirm as well.
    assert [name for name in browser.set_cookies if name != "session_o"] == ["session", "session_v"]


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
