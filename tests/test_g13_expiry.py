"""G13: idle and absolute lifetimes, on the server, to the millisecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from flask import session

from luasession.snapshot import Snapshot, read_hash

from .conftest import Browser, MakeApp, TestApp
from .servers import eventually

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def pttl(app: TestApp, handle: str) -> int:
    """Return the milliseconds that Redis will keep a session."""
    assert app.server is not None
    with app.server.client() as client:
        return int(client.pttl(app.prefix + handle))


def shorten(app: TestApp, handle: str, ms: int = 9_000) -> None:
    """Have Redis keep a session for so long, so that a refresh shows."""
    assert app.server is not None
    with app.server.client() as client:
        assert client.pexpire(app.prefix + handle, ms)


def stored(app: TestApp, handle: str) -> Snapshot:
    """Return what is stored of a session, with the moments in its metadata."""
    return read_hash(app.stored(handle))


def start(app: TestApp, **values: Any) -> tuple[Browser, str]:
    """Return a browser with a session, and its handle."""
    browser = app.browser()
    browser.run(lambda: session.update(values or {"a": 1}))
    return browser, browser.run(lambda: session.handle)


def expires(browser: Browser, name: str = "session") -> datetime:
    """Return when the browser will forget a cookie that was just set."""
    [attribute] = [part for part in browser.set_cookies[name].split("; ") if part.startswith("Expires=")]
    return parsedate_to_datetime(attribute.removeprefix("Expires="))


def read() -> None:
    assert session["a"]


def write() -> None:
    session["b"] = session.get("b", 0) + 1


def write_blindly() -> None:
    session["b"] = 1


uses = pytest.mark.parametrize("use", [read, write, write_blindly])


@uses
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("cache_ttl", [2.0, None])
def test_the_idle_lifetime_slides(
    make_app: MakeApp, use: Callable[[], None], permanent: bool, cache_ttl: float | None
) -> None:
    """Each use gives a session its whole lifetime again, permanent or not, to the millisecond."""
    app = make_app(
        PERMANENT_SESSION_LIFETIME=timedelta(milliseconds=60_503),
        SESSION_TOUCH_INTERVAL=0,
        SESSION_CACHE_TTL=cache_ttl,
        SESSION_PERMANENT=permanent,
    )
    browser, handle = start(app)
    first = stored(app, handle)
    assert first.permanent is permanent
    assert first.ends_ms - first.touched_ms == 60_503
    assert 9_000 < pttl(app, handle) <= 60_503
    shorten(app, handle)
    browser.run(use)
    again = stored(app, handle)
    assert again.ends_ms - again.touched_ms == 60_503
    assert again.touched_ms >= first.touched_ms
    assert 9_000 < pttl(app, handle) <= 60_503


@uses
def test_the_touch_interval_throttles(make_app: MakeApp, use: Callable[[], None]) -> None:
    """Within SESSION_TOUCH_INTERVAL no use refreshes the TTL."""
    app = make_app(SESSION_TOUCH_INTERVAL=HOUR)
    browser, handle = start(app)
    before = stored(app, handle)
    shorten(app, handle)
    browser.run(use)
    browser.twin(app.another()).run(use)
    after = stored(app, handle)
    assert (after.touched_ms, after.ends_ms) == (before.touched_ms, before.ends_ms)
    assert pttl(app, handle) <= 9_000


@uses
def test_the_touch_interval_passes(make_app: MakeApp, use: Callable[[], None]) -> None:
    """Once SESSION_TOUCH_INTERVAL has passed, the next use refreshes the TTL, out of the cache too."""
    app = make_app(SESSION_TOUCH_INTERVAL=0.1, SESSION_CACHE_TTL=HOUR.seconds)
    browser, handle = start(app)
    shorten(app, handle)

    def refreshed() -> bool:
        browser.run(use)
        return pttl(app, handle) > 9_000

    assert eventually(refreshed)


def test_requests_that_do_not_touch_the_session_do_not_refresh_it(make_app: MakeApp) -> None:
    """Static files and health checks are no use of the session."""
    app = make_app(SESSION_TOUCH_INTERVAL=0)
    browser, handle = start(app)
    shorten(app, handle)
    browser.get("/untouched")
    assert pttl(app, handle) <= 9_000


@uses
def test_a_short_lifetime_of_its_own_slides_too(make_app: MakeApp, use: Callable[[], None]) -> None:
    """By default the touch interval shrinks with session.lifetime: what is in use does not expire."""
    app = make_app()
    browser, handle = start(app)
    browser.run(lambda: setattr(session, "lifetime", 4))
    before = stored(app, handle)
    assert before.ends_ms - before.touched_ms == 4_000

    def refreshed() -> bool:
        browser.run(use)
        return stored(app, handle).touched_ms > before.touched_ms

    assert eventually(refreshed, 3.5)
    after = stored(app, handle)
    assert after.ends_ms - after.touched_ms == 4_000


@pytest.mark.parametrize("use", ["read", "write"])
def test_a_long_lifetime_of_its_own_is_refreshed_seldom(make_app: MakeApp, use: str) -> None:
    """By default the touch interval goes by the session's own lifetime, for commits as for reads."""
    app = make_app(PERMANENT_SESSION_LIFETIME=timedelta(seconds=60))
    browser = app.browser()

    def long() -> None:
        session["n"] = 0
        session.lifetime = 86_400

    browser.run(long)
    handle = browser.run(lambda: session.handle)
    for seconds, refreshes in ((50, False), (70, True)):
        back = seconds * 1000
        assert app.server is not None
        with app.server.client() as client:
            state = client.hget(app.prefix + handle, "@v")
            touched = int.from_bytes(state[19:25]) - back
            client.hset(app.prefix + handle, "@v", state[:19] + touched.to_bytes(6) + state[25:])
        browser.twin(app.another()).run(
            (lambda: session["n"]) if use == "read" else (lambda: session.update(n=1))
        )
        assert (stored(app, handle).touched_ms > touched) is refreshes


def test_a_lifetime_that_the_app_changes_late(make_app: MakeApp) -> None:
    """PERMANENT_SESSION_LIFETIME is read at each request, as Flask does."""
    app = make_app(SESSION_TOUCH_INTERVAL=0)
    browser, handle = start(app)
    app.flask.permanent_session_lifetime = timedelta(seconds=77)
    browser.run(read)
    assert 0 < pttl(app, handle) <= 77_000


@pytest.mark.parametrize("cache_ttl", [HOUR.seconds, None])
def test_a_session_in_no_use_ends(make_app: MakeApp, cache_ttl: float | None) -> None:
    """Past its end a session is gone, out of a trusted snapshot as well, and a write starts a new one."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl, SESSION_TOUCH_INTERVAL=HOUR)
    browser = app.browser()

    def short() -> None:
        session["a"] = 1
        session.lifetime = 0.25

    browser.run(short)
    handle = browser.run(lambda: session.handle)
    twin = browser.twin(app.another())
    twin.run(lambda: session.get("a"))
    time.sleep(0.4)  # asked for meanwhile it would go on
    assert browser.run(lambda: dict(session)) == {}
    assert twin.run(lambda: dict(session)) == {}
    assert app.stored(handle) == {}
    browser.run(lambda: session.update(b=1))
    assert browser.run(lambda: (dict(session), session.version)) == ({"b": 1}, 1)
    assert browser.run(lambda: session.handle) != handle


def test_a_lifetime_shorter_than_the_set_interval_slides(make_app: MakeApp) -> None:
    """In use a session lives on, also where its own lifetime is shorter than the interval that was set."""

    def short() -> None:
        session["n"] = 0
        session.lifetime = 3

    begun = []
    for interval in (None, 60):
        app = make_app(SESSION_TOUCH_INTERVAL=interval)
        for use in (lambda: session["n"], lambda: session.update(n=1)):
            browser = app.browser()
            browser.run(short)
            handle = browser.run(lambda: session.handle)
            begun.append((app, browser, use, handle, stored(app, handle).ends_ms))
    time.sleep(1.6)
    for app, browser, use, handle, before in begun:
        browser.run(use)
        assert stored(app, handle).ends_ms > before, (app.flask.config["SESSION_TOUCH_INTERVAL"], use)


@pytest.mark.parametrize("then", ["use", "rotate", "lifetime", "clear"])
def test_the_absolute_lifetime_stands(make_app: MakeApp, then: str) -> None:
    """Neither use nor rotation, a longer idle lifetime nor a clear moves the absolute end."""
    app = make_app(SESSION_ABSOLUTE_LIFETIME=100.5, SESSION_TOUCH_INTERVAL=0)
    browser, handle = start(app)
    before = stored(app, handle)
    assert before.ends_ms - before.created_ms == 100_500

    def change() -> None:
        if then == "rotate":
            session.regenerate()
        if then == "lifetime":
            session.lifetime = DAY
        if then == "clear":
            session.clear()
        session["a"] = 2

    browser.run(change)
    shorten(app, handle)
    browser.run(read)
    after = stored(app, handle)
    assert after.ends_ms == before.ends_ms
    assert after.created_ms == before.created_ms
    assert 9_000 < pttl(app, handle) <= 100_500


def test_the_absolute_lifetime_ends_a_session_in_use(make_app: MakeApp) -> None:
    """However much it is used and rotated, a session ends with its absolute lifetime."""
    app = make_app(SESSION_ABSOLUTE_LIFETIME=0.3, SESSION_TOUCH_INTERVAL=0)
    browser, handle = start(app)

    def ended() -> bool:
        def view() -> bool:
            if "a" not in session:
                return True
            session["a"] += 1
            session.regenerate()
            return False

        return bool(browser.run(view))

    assert eventually(ended, 5)
    assert app.stored(handle) == {}


def test_a_lifetime_of_its_own(app: TestApp) -> None:
    """session.lifetime counts instead of the app's until it is set to None; the same again is no commit."""
    browser = app.browser()
    other, other_handle = start(app)

    def short() -> None:
        session.lifetime = 50.25

    browser.run(lambda: (session.update(a=1), short()))
    handle = browser.run(lambda: session.handle)
    assert 9_000 < pttl(app, handle) <= 50_250
    browser.run(short)
    browser.twin(app.another()).run(short)
    assert browser.run(lambda: (session.version, session.lifetime)) == (1, timedelta(milliseconds=50_250))
    browser.run(lambda: session.update(b=1))
    kept = stored(app, handle)
    assert kept.ends_ms - kept.touched_ms == 50_250
    browser.run(lambda: setattr(session, "lifetime", None))
    assert pttl(app, handle) > 50_250
    assert browser.run(lambda: (session.version, session.lifetime)) == (3, None)
    assert other.run(lambda: session.lifetime) is None
    assert pttl(app, other_handle) > 50_250


@pytest.mark.parametrize("lifetime", [0, -1, "5", float("nan"), True])
def test_a_lifetime_that_is_none(make_valkey_app: MakeApp, lifetime: Any) -> None:
    """What is no positive time is refused where it is assigned."""
    app = make_valkey_app()

    def view() -> None:
        for assign in (
            lambda: setattr(session, "lifetime", lifetime),
            lambda: session.set("a", 1, ttl=lifetime),  # type: ignore[attr-defined]
        ):
            with pytest.raises(ValueError, match=r"lifetime|ttl"):
                assign()

    app.browser().run(view)
    assert app.keys() == []


@pytest.mark.parametrize("touch_interval", [None, 0])
def test_emptied_it_lives_for_the_grace_time(make_app: MakeApp, touch_interval: int | None) -> None:
    """Its last key deleted, a session's TTL falls to the grace time, and back up with the next key."""
    app = make_app(SESSION_ROTATION_GRACE=30, SESSION_TOUCH_INTERVAL=touch_interval)
    browser, handle = start(app, a=1, b=2)
    browser.run(lambda: session.pop("a"))
    assert pttl(app, handle) > 30_000
    browser.run(lambda: session.pop("b"))
    assert 0 < pttl(app, handle) <= 30_000
    assert "session" in browser.cookies
    assert "session" not in browser.set_cookies
    browser.run(lambda: dict(session))
    assert 0 < pttl(app, handle) <= 30_000
    browser.run(lambda: session.update(c=1))
    assert pttl(app, handle) > 30_000
    assert browser.run(lambda: (session.handle, session.version)) == (handle, 4)


def test_emptied_under_a_parallel_request(make_app: MakeApp) -> None:
    """A key that a parallel request adds to a session being emptied keeps it alive."""
    app = make_app(SESSION_ROTATION_GRACE=30)
    browser, handle = start(app)
    other = browser.twin()

    def empty() -> None:
        session.pop("a")
        other.run(lambda: session.update(b=1))

    browser.run(empty)
    assert pttl(app, handle) > 30_000
    browser.run(lambda: session.pop("b"))
    assert 0 < pttl(app, handle) <= 30_000

    def add() -> None:
        session["c"] = 1
        assert dict(other.run(lambda: dict(session))) == {}

    browser.run(add)
    assert pttl(app, handle) > 30_000
    assert browser.run(lambda: dict(session)) == {"c": 1}


def test_emptied_with_a_principal_it_lives_on(make_app: MakeApp) -> None:
    """A session that belongs to somebody is not emptied by deleting its keys."""
    app = make_app(SESSION_ROTATION_GRACE=30)
    browser = app.browser()
    browser.run(lambda: (session.update(a=1), setattr(session, "principal", "ada")))
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.pop("a"))
    assert pttl(app, handle) > 30_000


@pytest.mark.parametrize("cache_ttl", [HOUR.seconds, 0, None])
def test_a_key_with_an_end_of_its_own(make_app: MakeApp, cache_ttl: float | None) -> None:
    """It is gone on time for every reader, out of a trusted snapshot too; what is set again stays."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl)
    browser = app.browser()

    def view() -> None:
        session.set("soon", 1, ttl=0.3)
        session.set("later", 1, ttl=HOUR)
        session.set("stays", 1, ttl=0.3)
        session["stays"] = 2
        session["other"] = 1

    browser.run(view)
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.set("again", 1, ttl=0.3))
    browser.run(lambda: session.update(again=2))
    deadlines = stored(app, handle).deadlines
    assert deadlines.keys() == {b"soon", b"later"}
    elsewhere = browser.twin(app.another())
    kept = {"later": 1, "stays": 2, "other": 1, "again": 2}
    # The other process holds a snapshot from before the end, if it caches at all.
    assert elsewhere.run(lambda: dict(session)) in (kept, kept | {"soon": 1})
    assert eventually(lambda: browser.run(lambda: "soon" not in session), 5)
    for reader in (browser, elsewhere, browser.twin(app.another())):
        assert reader.run(lambda: (dict(session), len(session), session.get("soon"))) == (kept, 4, None)


def test_an_ended_key_leaves_with_the_next_commit(make_app: MakeApp) -> None:
    """The next commit, of whatever key, takes it out of the hash; its bytes no longer count."""
    app = make_app(SESSION_MAX_BYTES=200)
    browser = app.browser()
    browser.run(lambda: (session.update(other=1), session.set("soon", "x" * 150, ttl=0.2)))
    handle = browser.run(lambda: session.handle)
    assert eventually(lambda: browser.run(lambda: "soon" not in session), 5)
    assert b"soon" in app.stored(handle)
    browser.run(lambda: session.update(new="y" * 150))
    assert not {b"soon", b"@x"} & app.stored(handle).keys()
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"other": 1, "new": "y" * 150}
    assert stored(app, handle).size == sum(
        len(name) + len(value) for name, value in stored(app, handle).fields.items()
    )


def test_a_key_changed_in_place_keeps_its_end(make_app: MakeApp) -> None:
    """A nested change is no new set: the key ends when it was said to."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.set("code", [1], ttl=HOUR))
    handle = browser.run(lambda: session.handle)
    [before] = stored(app, handle).deadlines.values()
    browser.run(lambda: session["code"].append(2))
    [after] = stored(app, handle).deadlines.values()
    # Counted anew from what was left of it: the clock here is known to a call's transit.
    assert abs(after - before) < 1_000
    assert browser.run(lambda: session["code"]) == [1, 2]


def test_deleted_before_its_end(make_app: MakeApp) -> None:
    """A key deleted before its end leaves no deadline behind for a later key of that name."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: (session.set("code", 1, ttl=0.2), session.update(other=1)))
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.pop("code"))
    browser.run(lambda: session.update(code=2))
    assert stored(app, handle).deadlines == {}
    assert browser.twin(app.another()).run(lambda: session["code"]) == 2


def test_a_permanent_cookie_lasts_as_the_session(make_app: MakeApp) -> None:
    """Id and hint of a permanent session expire with it; others end with the browser."""
    app = make_app(PERMANENT_SESSION_LIFETIME=DAY)
    browser = app.browser()
    before = datetime.now(UTC)

    def permanent(on: bool) -> None:
        session.permanent = on
        session["a"] = on

    browser.run(lambda: permanent(True))
    for name in ("session", "session_v"):
        assert DAY - HOUR < expires(browser, name) - before < DAY + HOUR
    browser.run(lambda: permanent(False))
    assert "Expires=" not in browser.set_cookies["session"]
    assert "Expires=" not in browser.set_cookies["session_v"]
    browser.run(lambda: permanent(True))
    assert expires(browser) - before > DAY - HOUR


def empty() -> None:
    session.pop("a")


def assert_no_short_end(browser: Browser, before: datetime) -> None:
    """No cookie that a browser needs to stay with its session may end with the grace."""
    for name, line in browser.set_cookies.items():
        if name != "session_o":  # says for a moment that others are writing, and nothing else
            assert "Expires=" in line
            assert expires(browser, name) - before > DAY


def test_an_emptied_permanent_session_keeps_its_cookies(make_app: MakeApp) -> None:
    """Emptied key by key it ends with the grace on the server, and the browser is told of no such end."""
    app = make_app(SESSION_PERMANENT=True)
    before = datetime.now(UTC)
    browser, handle = start(app)
    browser.run(empty)
    assert stored(app, handle).ends_ms - stored(app, handle).touched_ms == 60_000
    assert list(browser.set_cookies) == ["session_v"]
    assert_no_short_end(browser, before)


@pytest.mark.parametrize("cache_ttl", [2.0, 0, None])
def test_use_of_an_emptied_session_sends_no_short_end(make_app: MakeApp, cache_ttl: float | None) -> None:
    """Nor does any later use that refreshes the TTL of a session without keys, read or write."""
    app = make_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=cache_ttl)
    before = datetime.now(UTC)
    browser, handle = start(app)
    browser.run(empty)
    assert_no_short_end(browser, before)
    shorten(app, handle)
    browser.run(lambda: session.get("a"))
    assert pttl(app, handle) > 9_000
    assert browser.set_cookies == {}
    browser.run(lambda: setattr(session, "label", "empty"))
    assert "session" not in browser.set_cookies
    assert_no_short_end(browser, before)
    browser.run(write_blindly)
    assert "session" in browser.set_cookies
    assert_no_short_end(browser, before)


def test_a_new_lifetime_of_an_emptied_session(make_app: MakeApp) -> None:
    """Where the id is sent for a new lifetime, it is with that lifetime's end, not with the grace's."""
    app = make_app(SESSION_PERMANENT=True)
    before = datetime.now(UTC)
    browser, _ = start(app)
    browser.run(lambda: (empty(), setattr(session, "lifetime", 2 * DAY)))
    assert 2 * DAY - HOUR < expires(browser) - before < 2 * DAY + HOUR
    assert_no_short_end(browser, before)


def test_an_emptied_session_of_a_user_slides_as_ever(make_app: MakeApp) -> None:
    """With a principal a session needs no keys: its cookie is refreshed, with its whole lifetime."""
    app = make_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=0)
    before = datetime.now(UTC)
    browser = app.browser()
    browser.run(lambda: (session.update(a=1), setattr(session, "principal", "ada")))
    for use in (empty, lambda: session.get("a")):
        browser.run(use)
        assert "session" in browser.set_cookies
        assert_no_short_end(browser, before)


@pytest.mark.parametrize("added", ["in order", "late", "by edit"])
def test_a_key_added_to_an_emptied_session_is_reached(make_app: MakeApp, added: str) -> None:
    """A parallel request adds a key, or somebody from outside: the browser, by the ends it was told, still finds it."""
    app = make_app(SESSION_PERMANENT=True)
    before = datetime.now(UTC)
    browser, handle = start(app)
    emptying, adding = browser.twin(), browser.twin()
    emptying.run(empty)
    answers = [emptying]
    if added == "by edit":
        with app.flask.extensions["luasession"].edit(handle) as edited:
            edited["b"] = 1
    else:
        adding.run(write_blindly)
        answers = [emptying, adding] if added == "in order" else [adding, emptying]
    for answer in answers:
        assert_no_short_end(answer, before)
        for name, line in answer.set_cookies.items():
            browser.client.set_cookie(name, line.partition("=")[2].partition(";")[0])
    assert browser.run(lambda: dict(session)) == {"b": 1}
    assert_no_short_end(browser, before)


def test_the_cookie_follows_the_lifetime(make_app: MakeApp) -> None:
    """A change of session.lifetime sends the id cookie with the new expiry; the same again does not."""
    app = make_app(SESSION_PERMANENT=True)
    browser, _ = start(app)
    before = datetime.now(UTC)
    for lifetime in (DAY, 2 * DAY):
        browser.run(lambda lifetime=lifetime: setattr(session, "lifetime", lifetime))
        assert lifetime - HOUR < expires(browser) - before < lifetime + HOUR
    browser.run(lambda: setattr(session, "lifetime", 2 * DAY))
    assert browser.set_cookies == {}
    browser.run(lambda: setattr(session, "lifetime", None))
    assert expires(browser) - before > 30 * DAY


def test_the_cookie_ends_with_the_absolute_lifetime(make_app: MakeApp) -> None:
    """The browser is not told to keep an id longer than the server does."""
    app = make_app(SESSION_PERMANENT=True, SESSION_ABSOLUTE_LIFETIME=DAY)
    browser = app.browser()
    before = datetime.now(UTC)
    browser.run(lambda: session.update(a=1))
    assert expires(browser) - before < DAY + HOUR
    browser.run(empty)
    assert expires(browser, "session_v") - before < DAY + HOUR
    user = app.browser()
    user.run(lambda: setattr(session, "principal", "ada"))
    assert expires(user) - before < DAY + HOUR
