"""G8: within the grace time of a rotation a request that was open goes on, and after it nobody does."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from flask import session

from .conftest import MakeApp, TestApp


def nothing() -> None:
    pass


def see() -> None:
    assert session["a"] == 1


def write() -> None:
    session["late"] = 1


def read() -> None:
    assert dict(session) == {}


def late_look() -> None:
    assert "a" not in session
    session["late"] = 1


def destroy() -> None:
    session.destroy()


@pytest.mark.parametrize(
    ("before", "late"),
    [
        pytest.param(see, write, id="write"),
        pytest.param(nothing, read, id="read"),
        pytest.param(nothing, destroy, id="destroy"),
        pytest.param(nothing, write, id="blind write"),
    ],
)
def test_after_the_grace_a_former_secret_is_none(
    make_app: MakeApp, before: Callable[[], None], late: Callable[[], None]
) -> None:
    """A request that was open at a rotation and comes back after its grace reads, writes and ends nothing."""
    app = make_app(SESSION_ROTATION_GRACE=0.05, SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, other = browser.run(lambda: session.handle), browser.twin()

    def view() -> None:
        before()
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: session.regenerate())
        time.sleep(0.1)  # the grace passes
        late()

    browser.run(view)
    assert browser.set_cookies == {}
    assert app.keys() == [(app.prefix + handle).encode()]
    assert other.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.parametrize("rotations", [5, 6])
@pytest.mark.parametrize("late", [read, write, late_look, destroy])
def test_more_rotations_than_a_session_remembers(
    make_app: MakeApp, rotations: int, late: Callable[[], None]
) -> None:
    """A request that was open before all of them logs nobody out: it begins no session, and sets no cookie."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    other = browser.twin()

    def view() -> None:
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        for _ in range(rotations):
            other.run(lambda: session.regenerate())
        late()

    browser.run(view)
    assert browser.set_cookies == {}
    assert other.run(lambda: dict(session)) == {"a": 1}
    assert len(app.keys()) == 1


def test_within_the_grace_an_open_request_goes_on(make_app: MakeApp) -> None:
    """A request that was open at a rotation reads and writes within its grace, and leaves the cookies alone."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    other = browser.twin()

    def view() -> None:
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: session.regenerate())
        session["b"] = session["a"] + 1

    browser.run(view)
    assert "session" not in browser.set_cookies
    assert other.run(lambda: dict(session)) == {"a": 1, "b": 2}


def test_the_second_click_of_a_double_log_in(app: TestApp) -> None:
    """A request that rotates over another rotation gets a session of its own, with all that it had read from."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1], name="ada"))
    first, second = browser.twin(), browser.twin()

    def view() -> None:
        assert session["name"] == "ada"
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        first.run(lambda: session.regenerate())
        session["user"] = 7
        session.regenerate()

    second.run(view)
    assert first.cookies["session"].partition(".")[0] != second.cookies["session"].partition(".")[0]
    assert first.run(lambda: dict(session)) == {"cart": [1], "name": "ada"}
    assert second.run(lambda: dict(session)) == {"cart": [1], "name": "ada", "user": 7}


def test_the_session_of_a_second_click_is_like_its_base(app: TestApp) -> None:
    """It has what its base had besides the keys: ends of keys, permanence, lifetime, principal and label."""

    def start() -> None:
        session.set("token", "t", ttl=60)
        session.permanent = True
        session.lifetime, session.principal, session.label = 500, "ada", "phone"

    browser = app.browser()
    browser.run(start)
    first, second = browser.twin(), browser.twin()

    def view() -> None:
        assert session["token"] == "t"
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        first.run(lambda: session.regenerate())
        session.regenerate()

    second.run(view)

    def see() -> Any:
        return session.permanent, session.lifetime, session.principal, session.label

    expected = (True, timedelta(seconds=500), "ada", "phone")
    assert [first.run(see), second.run(see)] == [expected, expected]
    handles = [each.cookies["session"].partition(".")[0] for each in (first, second)]
    assert len(set(handles)) == 2
    assert all(b"@x" in app.stored(handle) for handle in handles)


def test_a_second_click_is_one_commit(app: TestApp) -> None:
    """A session of its own is not rotated once more, by the end of the request or by what is written late."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    first, second = browser.twin(), browser.twin()

    def view() -> None:
        assert session["a"] == 1
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        first.run(lambda: session.regenerate())
        session.regenerate()
        session.commit()

    second.run(view)
    assert second.twin().run(lambda: session.version) == 1


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_touch_under_a_former_secret_repeats_no_id(make_app: MakeApp, in_flight: bool) -> None:
    """A read from the cache that a rotation overtakes is told so by its touch, and sends the old id to nobody."""
    app = make_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=60.0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(see)
    assert "session" in browser.set_cookies
    other = browser.twin()

    def view() -> None:
        see()
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: session.regenerate(in_flight))

    browser.run(view)
    assert "session" not in browser.set_cookies
    assert other.run(lambda: session["a"]) == 1


@pytest.mark.parametrize(("rotations", "ends"), [(4, True), (5, False)])
def test_a_log_out_over_many_rotations(app: TestApp, rotations: int, ends: bool) -> None:
    """Over as many rotations as a session remembers a log-out ends it; over more it ends nothing, and no cookie goes."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    slow = browser.twin()

    def log_out() -> None:
        for _ in range(rotations):
            browser.run(lambda: session.regenerate())
        session.destroy()

    slow.run(log_out)
    assert bool(slow.set_cookies) is ends
    assert browser.run(lambda: session.get("a")) == (None if ends else 1)


@pytest.mark.parametrize("also_clears", [False, True])
@pytest.mark.parametrize("had_read", [False, True])
def test_a_rotation_over_a_clear(make_app: MakeApp, had_read: bool, also_clears: bool) -> None:
    """What was read before a log-out that cleared and rotated does not live on in a session of its own (G7).

    A second log-in that has read nothing, or clears as well, brings nothing of it, and gets its own (G8).
    """
    app = make_app()
    browser = app.browser()

    def log_in() -> None:
        session["user"], session["cart"] = "alice", [1]
        session.principal = "alice"

    browser.run(log_in)
    other = browser.twin()

    def log_out() -> None:
        session.clear()
        session.regenerate()
        session["message"] = "bye"

    def view() -> None:
        if had_read:
            assert session["user"] == "alice"
        other.run(log_out)
        if also_clears:
            session.clear()
        session.regenerate()
        session["new"] = 1

    browser.run(view)
    if had_read and not also_clears:
        assert browser.set_cookies == {}
        assert app.stats()["discards"] == 1
        return
    assert browser.run(lambda: (dict(session), session.principal)) == ({"new": 1}, None)
    assert other.run(lambda: dict(session)) == {"message": "bye"}
