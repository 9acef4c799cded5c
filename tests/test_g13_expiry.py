"""G13: idle and absolute lifetimes, on the server, to the millisecond."""

from __future__ import annotations

from datetime import timedelta

from flask import session

from .conftest import MakeApp, TestApp
from .servers import eventually


def pttl(app: TestApp, handle: str) -> int:
    assert app.server is not None
    with app.server.client() as client:
        return int(client.pttl(app.prefix + handle))


def test_idle_lifetime_slides_with_reads_and_writes(make_app: MakeApp) -> None:
    """The TTL is the lifetime in milliseconds; with an interval of 0 each use renews it, reads too."""
    app = make_app(PERMANENT_SESSION_LIFETIME=timedelta(milliseconds=60_500), SESSION_TOUCH_INTERVAL=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    for use in (lambda: dict(session), lambda: session.update(b=1)):
        with app.server.client() as client:
            client.pexpire(app.prefix + handle, 9_000)
        browser.run(use)
        assert 50_000 < pttl(app, handle) <= 60_500


def test_the_touch_interval_throttles(make_app: MakeApp) -> None:
    """Within the interval neither reads nor writes renew the TTL."""
    app = make_app(SESSION_TOUCH_INTERVAL=3600)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    with app.server.client() as client:
        client.pexpire(app.prefix + handle, 9_000)
    browser.run(lambda: dict(session))
    browser.run(lambda: session.update(b=1))
    assert pttl(app, handle) <= 9_000


def test_the_absolute_lifetime_is_not_extended(make_app: MakeApp) -> None:
    """Neither use nor rotation nor a longer idle lifetime moves the absolute end."""
    app = make_app(SESSION_ABSOLUTE_LIFETIME=100, SESSION_TOUCH_INTERVAL=0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)

    def change() -> None:
        session.regenerate()
        session.lifetime = timedelta(days=1)

    browser.run(change)
    browser.run(lambda: session.update(b=1))
    assert 90_000 < pttl(app, handle) <= 100_000


def test_a_lifetime_of_its_own(app: TestApp) -> None:
    """session.lifetime overrides the app's, and None takes it back; setting the same is no commit."""
    browser = app.browser()

    def short() -> None:
        session.lifetime = 50

    browser.run(lambda: (session.update(a=1), short()))
    handle = browser.run(lambda: session.handle)
    assert 40_000 < pttl(app, handle) <= 50_000
    browser.run(short)
    assert browser.run(lambda: (session.version, session.lifetime)) == (1, timedelta(seconds=50))


def test_emptied_it_lives_for_the_grace_time(make_app: MakeApp) -> None:
    """Its last key deleted, a session's TTL falls to the grace time, and back up with the next key."""
    app = make_app(SESSION_ROTATION_GRACE=30)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.pop("a"))
    assert 0 < pttl(app, handle) <= 30_000
    assert "session" in browser.cookies
    browser.run(lambda: session.update(b=1))
    assert pttl(app, handle) > 30_000
    assert browser.run(lambda: session.handle) == handle


def test_a_key_with_an_end_of_its_own(make_app: MakeApp) -> None:
    """It is gone on time, out of a cached snapshot too, leaves with the next commit, and can be made to stay."""
    app = make_app(SESSION_CACHE_TTL=3600.0)
    browser = app.browser()

    def view() -> None:
        session.set("soon", 1, ttl=0.2)
        session.set("stays", 1, ttl=0.2)
        session["stays"] = 2
        session["other"] = 1

    browser.run(view)
    handle = browser.run(lambda: session.handle)
    assert browser.run(lambda: session["soon"]) == 1
    assert eventually(lambda: browser.run(lambda: dict(session)) == {"stays": 2, "other": 1}, 3)
    assert b"soon" in app.stored(handle)
    browser.run(lambda: session.update(other=2))
    assert b"soon" not in app.stored(handle)
    assert b"@x" not in app.stored(handle)


def test_the_cookie_follows(make_app: MakeApp) -> None:
    """Permanent, the id cookie carries an expiry; an ordinary write does not repeat it."""
    app = make_app()
    browser = app.browser()

    def permanent() -> None:
        session.permanent = True
        session["a"] = 1

    browser.run(permanent)
    assert "Expires=" in browser.set_cookies["session"]
    browser.run(lambda: session.update(a=2))
    assert set(browser.set_cookies) == {"session_v"}

    def no_longer() -> None:
        session.permanent = False

    browser.run(no_longer)
    assert "Expires=" not in browser.set_cookies["session"]
