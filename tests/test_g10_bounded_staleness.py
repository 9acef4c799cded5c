"""G10: a cached snapshot is trusted for a bounded time, and never past its session's end."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from flask import session

import luasession.store

from .conftest import MakeApp
from .servers import eventually


def test_a_revoked_session_is_read_no_longer_than_the_window(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with a warm cache shows a deleted session within the window, and not after it."""
    app = make_app(SESSION_CACHE_TTL=30.0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    with app.server.client() as client:
        client.delete(app.prefix + handle)
    assert browser.run(lambda: dict(session)) == {"a": 1}
    now = luasession.store.now_ns
    monkeypatch.setattr(luasession.store, "now_ns", lambda: now() + 31 * 10**9)
    assert browser.run(lambda: dict(session)) == {}


def test_never_past_its_own_end(make_app: MakeApp) -> None:
    """A snapshot whose session has ended is not served, however long it would be trusted."""
    app = make_app(
        SESSION_CACHE_TTL=0.5, PERMANENT_SESSION_LIFETIME=timedelta(seconds=1), SESSION_TOUCH_INTERVAL=0.4
    )
    app.flask.config["PERMANENT_SESSION_LIFETIME"] = timedelta(milliseconds=200)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    time.sleep(0.25)
    assert browser.run(lambda: dict(session)) == {}


def test_validating_travels_only_what_changed(make_app: MakeApp) -> None:
    """With a TTL of 0 each read asks, and only changes come back."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(big="x" * 50_000, n=0))
    before = app.stats()
    app.another()
    browser.twin(app.another()).run(lambda: session.update(n=1))
    assert browser.run(lambda: session["n"]) == 1
    after = app.stats()
    assert after["loads"] - before["loads"] == 1
    assert 0 < after["bytes"] - before["bytes"] < 1000


def test_no_cache_at_all(make_app: MakeApp) -> None:
    """With None each request reads from Redis, and no hints are set."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert set(browser.set_cookies) == {"session"}
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    with app.server.client() as client:
        client.delete(app.prefix + handle)
    assert eventually(lambda: browser.run(lambda: dict(session)) == {}, 1)
    assert app.stats()["cache_hits"] == 0


@pytest.mark.usefixtures("nothing_is_small")
def test_a_base_beyond_the_journal_is_read_whole(make_app: MakeApp) -> None:
    """A process whose snapshot is older than the journal gets all there is, deletions included."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=1))
    elsewhere = browser.twin(app.another())

    def view() -> None:
        del session["a"]
        for n in range(150):
            session[f"some-longer-name-{n}"] = n
            session.commit()

    elsewhere.run(view)
    expected = {"b": 1, **{f"some-longer-name-{n}": n for n in range(150)}}
    assert browser.run(lambda: dict(session)) == expected


@pytest.mark.usefixtures("nothing_is_small")
def test_a_clear_elsewhere_is_read_whole(make_app: MakeApp) -> None:
    """A process whose snapshot is from before a clear gets what was set after it and nothing else."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=1))
    elsewhere = browser.twin(app.another())

    def view() -> None:
        session.clear()
        session["new"] = 1

    elsewhere.run(view)
    assert browser.run(lambda: dict(session)) == {"new": 1}
