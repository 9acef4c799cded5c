"""G11: ids that the server did not issue are never adopted; the secret stays with the browser."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
from flask import session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luasession.calls import Calls
from luasession.ids import SessionId, new_session_id, parse_session_id

from .conftest import MakeApp, TestApp
from .servers import Server

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def send(app: TestApp, cookie: str) -> dict[str, str]:
    browser = app.browser_with_header(f"session={cookie}")
    result: dict[str, str] = browser.run(lambda: dict(session))
    assert browser.set_cookies == {}
    return result


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.text(st.characters(codec="latin-1")),
        st.text(ALPHABET + "."),
        st.binary().map(lambda b: b.decode("latin1")),
    )
)
def test_garbage_costs_nothing(make_valkey_app: MakeApp, valkey: Server, cookie: str) -> None:
    """Cookies of any bytes and any length: an empty session, no command, no exception."""
    if parse_session_id(cookie.partition(";")[0].strip(), 32) is not None:
        return
    app = make_valkey_app()
    assert send(app, cookie) == {}
    assert app.stats()["loads"] == 0


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        ".",
        "a.b",
        "A" * 22 + "." + "B" * 42,
        "A" * 21 + "." + "B" * 43,
        "A" * 22 + "." + "B" * 42 + "=",
        "A" * 100_000,
        "A" * 22 + "B" * 43,
        '"' + "A" * 22 + "." + "B" * 43 + '"',
    ],
)
def test_malformed_ids_send_no_command(app: TestApp, cookie: str) -> None:
    """An id that is off in length or alphabet is refused before Redis is asked, counted at the server."""
    assert app.server is not None
    send(app, cookie)
    with app.server.counting() as commands:
        assert send(app, cookie) == {}
    assert len(commands) == 0


def test_an_unknown_id_is_never_adopted(app: TestApp) -> None:
    """An id of the right form that was not issued reads nothing, and a write makes an id of the server's."""
    forged = new_session_id(32)
    assert send(app, forged.sid) == {}
    browser = app.browser()
    browser.client.set_cookie("session", forged.sid)
    browser.run(lambda: session.update(a=1))
    assert browser.cookies["session"].partition(".")[0] != forged.handle
    assert app.stored(forged.handle) == {}


def test_the_cache_checks_the_secret(make_app: MakeApp) -> None:
    """A right handle with a wrong secret gets nothing, with the session warm in the cache."""
    app = make_app(SESSION_CACHE_TTL=3600.0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    wrong = SessionId(handle, new_session_id(32).secret)
    assert send(app, wrong.sid) == {}
    thief = app.browser()
    thief.client.set_cookie("session", wrong.sid)
    thief.run(lambda: session.update(stolen=1))
    assert browser.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.parametrize("way", ["read", "write", "log out"])
def test_a_made_up_secret_takes_nothing_from_the_owner(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whoever knows a handle and no secret is sent nothing of the session, and leaves its snapshot in the cache."""
    app = make_app(SESSION_CACHE_TTL=3600.0)
    browser = app.browser()
    browser.run(lambda: session.update(a="x" * 100_000))
    handle = browser.run(lambda: session.handle)
    thief = app.browser()
    thief.client.set_cookie("session", SessionId(handle, new_session_id(32).secret).sid)
    views: dict[str, Callable[[], Any]] = {
        "read": lambda: dict(session),
        "write": lambda: session.update(b=1),
        "log out": lambda: session.destroy(),
    }
    before = app.stats()
    with monkeypatch.context() as patch:
        patch.setattr(Calls, "whole", lambda *_: pytest.fail("the whole hash is asked for"))
        thief.run(views[way])
    assert len(browser.run(lambda: session["a"])) == 100_000
    assert app.stats()["cache_hits"] - before["cache_hits"] == 1


@pytest.mark.usefixtures("nothing_is_small")
def test_a_secret_of_elsewhere_is_sent_changes_only(make_app: MakeApp) -> None:
    """A session rotated by another process is read anew by what changed, under the new secret."""
    app = make_app(SESSION_CACHE_TTL=3600.0)
    browser = app.browser()
    browser.run(lambda: session.update(a="x" * 100_000, b=1))
    assert browser.run(lambda: session["b"]) == 1
    elsewhere = browser.twin(app.another())
    elsewhere.run(lambda: (session.regenerate(), session.update(b=2)))
    before = app.stats()["bytes"]
    back = elsewhere.twin(app)
    assert back.run(lambda: (session["b"], len(session["a"]), session.version)) == (2, 100_000, 2)
    assert app.stats()["bytes"] - before < 1000
    # Under the old one nothing is shown, of what is cached by now under the new one neither.
    assert browser.run(lambda: dict(session)) == {}


def test_the_secret_is_neither_stored_nor_logged(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """Neither Redis, nor any log record, nor the repr of any object around holds the secret."""
    caplog.set_level(logging.DEBUG)
    app = make_app()
    browser = app.browser()
    shown: list[str] = []

    def view() -> None:
        session["a"] = 1
        session.commit()
        shown.extend(
            repr(thing)
            for thing in (
                session,
                session._get_current_object(),
                session._transaction.visit,
                session._transaction.visit.id,
            )
        )
        session["b"] = 2

    browser.run(view)
    browser.run(lambda: session.update(c=1))
    handle, _, secret = browser.cookies["session"].partition(".")
    stored = repr(app.stored(handle))
    shown += [
        repr(thing) for thing in gc.get_objects() if str(type(thing).__module__).startswith("luasession")
    ]
    assert secret not in stored
    assert secret not in caplog.text
    assert secret not in "".join(shown)
    assert handle in "".join(shown)


def test_what_redis_holds_is_no_cookie(app: TestApp) -> None:
    """The digest, in whatever spelling, does not open the session."""
    from base64 import urlsafe_b64encode

    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, _, secret = browser.cookies["session"].partition(".")
    digest = hashlib.sha256(secret.encode()).digest()
    assert digest in app.stored(handle)[b"@i"]
    assert send(app, f"{handle}.{urlsafe_b64encode(digest).rstrip(b'=').decode()}") == {}


def test_a_wrong_secret_ends_nothing(app: TestApp) -> None:
    """Who knows the handle alone cannot log anybody out."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    stored = app.stored(handle)
    guesser = app.browser_with_header(f"session={handle}.{'A' * 43}")
    guesser.run(lambda: session.destroy())
    guesser.run(lambda: session.clear())
    assert app.stored(handle) == stored
