"""What each request costs in commands, counted at the server: the table of the contract, row by row."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import session

from luasession import SessionTooLarge, merge, retry_on_conflict

from .conftest import Browser, MakeApp, TestApp

LONG = {"SESSION_CACHE_TTL": 60.0}


def spent(app: TestApp, do: Callable[[], Any]) -> list[str]:
    """Return the commands that something costs."""
    assert app.server is not None
    with app.server.counting() as commands:
        do()
    return commands.names


def started(app: TestApp, **values: Any) -> Browser:
    """Return a browser with a session; the process has its client, its scripts and the snapshot."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=2, cart=["book"], **values))
    return browser


def cold(browser: Browser, **config: Any) -> Browser:
    """Return the browser before another process, which has a client and no snapshot of this session."""
    app = browser.app.another(**config)
    app.browser().run(lambda: session.update(warm=1))
    return browser.twin(app)


def unknown(app: TestApp) -> Browser:
    """Return a browser whose id names nothing any more, or never did."""
    browser = app.browser()
    browser.client.set_cookie("session", "x" * 22 + "." + "y" * 43)
    return browser


def test_untouched(app: TestApp) -> None:
    """A request that does not touch the session: no command, no Set-Cookie, no Vary, with or without cookie."""
    for browser in (app.browser(), started(app), unknown(app)):
        assert spent(app, lambda browser=browser: browser.get("/untouched")) == []
        assert browser.response is not None
        assert "Set-Cookie" not in browser.response.headers
        assert "Vary" not in browser.response.headers


def test_read_of_a_trusted_snapshot(make_app: MakeApp) -> None:
    """A read of a snapshot that is trusted: none."""
    app = make_app(**LONG)
    browser = started(app)
    assert spent(app, lambda: browser.run(lambda: dict(session))) == []


def test_read_of_a_snapshot_that_is_too_old(make_app: MakeApp) -> None:
    """A read of a snapshot that is too old: one, and the reply carries only what changed."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = started(app, big="x" * 100_000)
    before = app.stats()["bytes"]
    assert spent(app, lambda: browser.run(lambda: dict(session))) == ["EVALSHA"]
    assert app.stats()["bytes"] == before
    other = cold(browser)
    other.run(lambda: session.update(a=5))
    assert spent(app, lambda: browser.run(lambda: session["a"])) == ["EVALSHA"]
    assert 0 < app.stats()["bytes"] - before < 1000
    assert browser.run(lambda: session["a"]) == 5


@pytest.fixture(params=["small", "large"])
def confirmed(request: pytest.FixtureRequest) -> str:
    """The command that confirms a cached snapshot: a small session is read whole, a large one by the script."""
    if request.param == "large":
        request.getfixturevalue("nothing_is_small")
    return {"small": "HGETALL", "large": "EVALSHA"}[request.param]


def test_read_after_hints(make_app: MakeApp, confirmed: str) -> None:
    """A read where the browser has seen newer, or others were writing: one, and none once it is confirmed."""
    app = make_app(**LONG)
    browser = started(app)
    elsewhere = cold(browser)
    elsewhere.run(lambda: session.update(a=7))
    twin = elsewhere.twin(app)
    assert spent(app, lambda: twin.run(lambda: session["a"])) == [confirmed]
    assert spent(app, lambda: twin.run(lambda: session["a"])) == []
    twin.client.set_cookie("session_o", "1")
    assert spent(app, lambda: twin.run(lambda: session["a"])) == [confirmed]


def test_cold_read(app: TestApp) -> None:
    """A read with nothing cached: one; two if the session is not there."""
    elsewhere = cold(started(app))
    assert spent(app, lambda: elsewhere.run(lambda: session["a"])) == ["HGETALL"]
    missing = unknown(app)
    assert spent(app, lambda: missing.run(lambda: session.get("a"))) == ["HGETALL", "EVALSHA"]


@pytest.mark.parametrize("cache_ttl", [60.0, 0, None])
def test_blind_write(make_app: MakeApp, cache_ttl: float | None) -> None:
    """A blind write: one; two if the session is not there and a new one starts."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl)
    browser = started(app)
    for writer in (browser, cold(browser)):
        assert spent(app, lambda writer=writer: writer.run(lambda: session.update(b=3))) == ["EVALSHA"]
    missing = unknown(app)
    assert spent(app, lambda: missing.run(lambda: session.update(b=3))) == ["EVALSHA", "EVALSHA"]
    assert missing.run(lambda: dict(session)) == {"b": 3}


@pytest.mark.parametrize("policy", ["overwrite", "raise", "serializable", merge.append])
def test_read_and_write(make_app: MakeApp, policy: Any, confirmed: str) -> None:
    """Reads and writes: one with a trusted snapshot, else two, under every policy as long as nobody came between."""
    app = make_app(SESSION_CONFLICT=policy, **LONG)
    browser = started(app)

    def view() -> None:
        session["cart"].append("pen")

    assert spent(app, lambda: browser.run(view)) == ["EVALSHA"]
    elsewhere = cold(browser)
    assert spent(app, lambda: elsewhere.run(view)) == ["HGETALL", "EVALSHA"]
    assert elsewhere.run(lambda: session["cart"]) == ["book", "pen", "pen"]
    validating = cold(browser, SESSION_CACHE_TTL=0)
    validating.run(lambda: session["a"])
    assert spent(app, lambda: validating.run(view)) == [confirmed, "EVALSHA"]


def test_new_visitors(app: TestApp) -> None:
    """The first write of a new visitor: one. One who only reads: none, and no cookie."""
    started(app)
    writer, reader = app.browser(), app.browser()
    assert spent(app, lambda: writer.run(lambda: session.update(a=1))) == ["EVALSHA"]
    assert spent(app, lambda: reader.run(lambda: session.get("a"))) == []
    assert reader.set_cookies == {}


@pytest.mark.parametrize("how", ["at the end", "commit", "retry"])
def test_a_new_visitor_who_logs_in(app: TestApp, how: str) -> None:
    """The first write of a new visitor that asks for a new id as well, committed midway or not: one."""
    started(app)

    def log_in() -> None:
        session["user"] = "ada"
        session.regenerate()
        if how == "commit":
            session.commit()

    browser = app.browser()
    view = retry_on_conflict()(log_in) if how == "retry" else log_in
    assert spent(app, lambda: browser.run(view)) == ["EVALSHA"]
    assert browser.run(lambda: (session["user"], session.version)) == ("ada", 1)


@pytest.mark.parametrize("then", ["nothing", "read", "room"])
@pytest.mark.parametrize("known", [False, True])
def test_a_commit_that_was_too_large(make_app: MakeApp, known: bool, then: str) -> None:
    """Refused and caught, it is not sent again at the end, whatever was read or made room for meanwhile."""
    app = make_app(SESSION_MAX_BYTES=1000, **LONG)
    browser = started(app)
    if known:
        browser.run(lambda: session.update(fill="x" * 600))
        browser.run(lambda: session["a"])
    else:
        browser = app.browser()
    twin = browser.twin()
    told: list[int] = []

    def view() -> None:
        session["more"] = "y" * (700 if known else 2000)
        with pytest.raises(SessionTooLarge) as caught:
            session.commit()
        told.append(caught.value.limit)
        if then == "read":
            assert session.get("other") is None
        if then == "room" and known:
            twin.run(lambda: session.pop("fill"))

    others = 1 if then == "room" and known else 0
    assert spent(app, lambda: browser.run(view)) == ["EVALSHA"] * (1 + others)
    assert told == [1000]
    assert "more" not in browser.twin(app.another()).run(lambda: dict(session))
    assert bool(browser.cookies) is known


@pytest.mark.parametrize("how", ["clear", "destroy"])
@pytest.mark.parametrize("reads", [False, True])
def test_logout(make_app: MakeApp, how: str, reads: bool) -> None:
    """A log-out: one more than what was read costs, also where nobody is logged in any more."""
    app = make_app(**LONG)

    def view() -> None:
        if reads:
            session.get("a")
        getattr(session, how)()

    warm = started(app)
    late = cold(warm)
    assert spent(app, lambda: warm.run(view)) == ["EVALSHA"]
    reading = ["HGETALL", "EVALSHA"] if reads else []
    assert spent(app, lambda: late.run(view)) == (reading or ["EVALSHA"])
    elsewhere = cold(started(app))
    assert spent(app, lambda: elsewhere.run(view)) == [*reading[:1], "EVALSHA"]


def test_rotation_rides_on_the_commit(make_app: MakeApp) -> None:
    """A rotation: the one command of the commit, with keys set or without, read or blind, cached or cold."""
    app = make_app(**LONG)
    views: list[Callable[[], Any]] = [
        lambda: session.regenerate(),
        lambda: (session.regenerate(), session.update(user="ada")),
        lambda: (session["a"], session.regenerate(), session.update(user="ada")),
    ]
    for view in views:
        browser = started(app)
        assert spent(app, lambda browser=browser, view=view: browser.run(view)) == ["EVALSHA"]
    for view in views[:2]:
        elsewhere = cold(started(app))
        assert spent(app, lambda browser=elsewhere, view=view: browser.run(view)) == ["EVALSHA"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_merge_rounds(make_app: MakeApp, times: int) -> None:
    """A conflict under a merging policy: one more for each time that somebody else was faster."""
    left = [times]

    def append(base: Any, theirs: Any, ours: Any) -> Any:
        if left[0]:
            left[0] -= 1
            other.run(lambda: session["cart"].append("other"))
        return merge.append(base, theirs, ours)

    app = make_app(SESSION_MERGE={"cart": append}, **LONG)
    browser = started(app)
    other = cold(browser)
    other.run(lambda: session["a"])

    def view() -> None:
        session["cart"].append("mine")
        left[0] -= 1
        other.run(lambda: session["cart"].append("other"))

    theirs = ["EVALSHA"] * times
    assert spent(app, lambda: browser.run(view)) == ["EVALSHA", *["EVALSHA"] * times, *theirs]
    assert other.twin(app.another()).run(lambda: sorted(session["cart"])) == [
        "book",
        "mine",
        *["other"] * times,
    ]


def test_touch(make_app: MakeApp) -> None:
    """A session that is only read: one more when its TTL refresh is due, and not again within the interval."""
    app = make_app(SESSION_TOUCH_INTERVAL=0.2, **LONG)
    browser = started(app)
    time.sleep(0.25)
    assert spent(app, lambda: browser.run(lambda: session["a"])) == ["EVALSHA"]
    assert spent(app, lambda: [browser.run(lambda: session["a"]) for _ in range(2)]) in ([], ["EVALSHA"])
    lasting = make_app(SESSION_TOUCH_INTERVAL=60, **LONG)
    browser = started(lasting)
    assert spent(lasting, lambda: [browser.run(lambda: session["a"]) for _ in range(5)]) == []


def test_permanent_set_at_each_request(make_app: MakeApp) -> None:
    """``session.permanent = True`` before each request costs no commit."""
    app = make_app(**LONG)
    app.flask.before_request(lambda: setattr(session, "permanent", True))
    browser = started(app)
    assert browser.run(lambda: session.version) == 1
    assert spent(app, lambda: [browser.run(lambda: session["a"]) for _ in range(3)]) == []
    assert browser.run(lambda: (session.version, session.permanent)) == (1, True)


def test_setting_what_is_there(make_app: MakeApp) -> None:
    """A key set to what was read of it: no command."""
    app = make_app(**LONG)
    browser = started(app)

    def view() -> None:
        session["a"] = session["a"]
        session["cart"] = list(session["cart"])

    assert spent(app, lambda: browser.run(view)) == []
