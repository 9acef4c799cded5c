"""The public errors: one root, a status each where a browser may meet them, and words that help."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, Response, abort, session
from werkzeug.exceptions import HTTPException

import luasession
from luasession import (
    ConfigurationError,
    CorruptSession,
    LuaSessionError,
    Session,
    SessionConflict,
    SessionGone,
    SessionTooLarge,
    SessionUnavailable,
)

from .conftest import MakeApp, TestApp

ANSWERED: list[tuple[LuaSessionError, int]] = [
    (SessionUnavailable("OOM command not allowed"), 503),
    (SessionConflict({"cart"}), 409),
    (SessionTooLarge(2000, 1000), 413),
]
OTHERS = [ConfigurationError("x"), SessionGone("x"), CorruptSession("x")]
EVERY = [error for error, _ in ANSWERED] + OTHERS


def test_one_root() -> None:
    """Every error of luasession is a LuaSessionError, which is a plain Exception."""
    assert LuaSessionError.__bases__ == (Exception,)
    assert all(isinstance(error, LuaSessionError) for error in EVERY)
    public = [value for value in vars(luasession).values() if isinstance(value, type)]
    errors = {kind for kind in public if issubclass(kind, Exception)}
    assert errors == {type(error) for error in EVERY} | {LuaSessionError}


@pytest.mark.parametrize(("error", "status"), ANSWERED, ids=lambda value: type(value).__name__)
def test_errors_that_answer(error: Any, status: int) -> None:
    """503, 409 and 413 are HTTP errors with a text for the browser that gives nothing away."""
    assert isinstance(error, HTTPException)
    assert error.code == status
    response = error.get_response()
    assert response.status_code == status
    text = response.get_data(as_text=True)
    for private in ("OOM", "cart", "2000", "1000"):
        assert private not in text


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_errors_that_do_not_answer(error: LuaSessionError) -> None:
    """A mistake of the programmer, or of the stored data, is no answer to a browser: Flask makes a 500."""
    assert not isinstance(error, HTTPException)
    assert str(error) == "x"


def test_unavailable() -> None:
    """It keeps the server's words for the log, and asks the browser to come back."""
    error = SessionUnavailable("ConnectionError: refused")
    assert error.reason == str(error) == "ConnectionError: refused"
    assert int(error.get_response().headers["Retry-After"]) >= 1


def test_conflict() -> None:
    """It names the keys, sorted, as attribute and in its words."""
    error = SessionConflict({"b", "a", "ü\x00"})
    assert error.keys == ("a", "b", "ü\x00")
    assert str(error) == "changed by another request since it was read: 'a', 'b', 'ü\\x00'"


def test_too_large() -> None:
    """It says how large the session would have been, and which setting is in the way."""
    error = SessionTooLarge(2000, 1000)
    assert (error.size, error.limit) == (2000, 1000)
    assert str(error) == "the session would have 2000 bytes, SESSION_MAX_BYTES is 1000"


def test_raised_in_a_view_they_answer() -> None:
    """Without a handler Flask answers with their status; abort() takes them as a response does."""
    app = Flask("app")
    raised: list[Exception] = [error for error, _ in ANSWERED]

    @app.route("/<int:n>")
    def view(n: int) -> str:
        raise raised[n]

    @app.route("/abort/<int:n>")
    def view_that_aborts(n: int) -> None:
        abort(raised[n].get_response())  # type: ignore[attr-defined]

    client = app.test_client()
    for n, (_, status) in enumerate(ANSWERED):
        assert client.get(f"/{n}").status_code == status
        assert client.get(f"/abort/{n}").status_code == status


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_one_handler_for_all(error: LuaSessionError) -> None:
    """errorhandler(LuaSessionError) meets each of them, the HTTP ones too."""
    app = Flask("app")
    app.register_error_handler(LuaSessionError, lambda met: Response(type(met).__name__, 418))

    @app.route("/")
    def view() -> str:
        raise error

    response = app.test_client().get("/")
    assert (response.status_code, response.text) == (418, type(error).__name__)


def test_configuration_errors_name_the_setting() -> None:
    """A wrong setting stops the app where it is set up, and the message says which and what was expected."""
    app = Flask("app")
    app.config["SESSION_MAX_BYTES"] = "1 MB"
    with pytest.raises(ConfigurationError, match=r"SESSION_MAX_BYTES must be an integer.*'1 MB'"):
        Session(app)


def test_gone_says_what_happened(app: TestApp) -> None:
    """session.commit() on a session that has ended meanwhile raises SessionGone; the view may go on."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    other = browser.twin()

    def view() -> None:
        session["b"] = session["a"]
        other.run(lambda: session.destroy())
        with pytest.raises(SessionGone, match="gone; nothing was stored"):
            session.commit()

    browser.run(view)
    assert browser.set_cookies == {}


@pytest.mark.parametrize("field", [b"@i", b"@v"])
@pytest.mark.parametrize("spoiled", [b"", b"\x02" + bytes(44), b"rubbish"])
def test_corrupt_metadata(make_app: MakeApp, field: bytes, spoiled: bytes) -> None:
    """Metadata of no known format is CorruptSession for who reads, and nothing is written over it."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    with app.server.client() as client:
        identity = client.hget(app.prefix + handle, "@i")
        # The digest stays what it was, so that it is the format that is refused.
        value = spoiled[:1] + identity[1:] if field == b"@i" and len(spoiled) == 45 else spoiled
        client.hset(app.prefix + handle, field, value)
    before = app.stored(handle)
    other = browser.twin(app.another())
    seen: list[Any] = []

    def answer(error: Any) -> tuple[str, int]:
        seen.append(error.original_exception)
        return "no", 500

    other.app.flask.register_error_handler(500, answer)
    for use in (lambda: dict(session), lambda: session.update(blind=1)):
        other.run(use, status=500)
        assert type(seen.pop()) is CorruptSession
        assert other.set_cookies == {}
    assert app.stored(handle) == before


def test_a_read_that_is_done_is_not_failed_by_its_refresh(make_app: MakeApp) -> None:
    """Metadata that has gone bad since the read is no error of a request that asks only to refresh the TTL."""
    app = make_app(SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=60.0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)

    def view() -> Any:
        found = session["a"]
        assert app.server is not None
        with app.server.client() as client:
            client.hset(app.prefix + handle, "@i", b"\x02" + client.hget(app.prefix + handle, "@i")[1:])
        return found

    assert browser.run(view) == 1
    assert browser.set_cookies == {}
