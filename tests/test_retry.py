"""retry_on_conflict: a view runs again on a fresh snapshot until nobody came between."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, abort, flash, get_flashed_messages, session

from luasession import SessionConflict, merge, retry_on_conflict, session_conflict, session_discarded

from .conftest import Browser, MakeApp, TestApp


def increment() -> None:
    """Do what loses an update when it overlaps."""
    session["hits"] = session.get("hits", 0) + 1


class Interfering:
    """A view that increments, with other requests coming between its first runs."""

    def __init__(self, browser: Browser, times: int, other: Callable[[], Any] = increment) -> None:
        self.browser = browser
        self.left = times
        self.other = other
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        increment()
        if self.left:
            self.left -= 1
            self.browser.twin().run(self.other)


@pytest.mark.parametrize("cache_ttl", [2.0, 0, None])
def test_a_view_runs_again(make_app: MakeApp, cache_ttl: float | None) -> None:
    """Two requests come between: the view runs three times, and all three increments count."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl)
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 2)
    browser.run(retry_on_conflict()(view))
    assert view.runs == 3
    assert browser.run(lambda: (session["hits"], session.version)) == (3, 4)


def test_what_comes_in_the_pause_is_seen(app: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view runs again on what is stored after the pause, so what others do in it costs no third run."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        browser.twin().run(increment)

    monkeypatch.setattr("luasession.retry.time", SimpleNamespace(sleep=pause))
    view = Interfering(browser, 1)
    browser.run(retry_on_conflict()(view))
    assert (view.runs, len(pauses)) == (2, 1)
    assert browser.run(lambda: session["hits"]) == 3


def test_no_conflict_costs_no_second_run(app: TestApp) -> None:
    """Without a conflict it runs once, with one commit; a key that nobody else changed is no conflict."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 1, other=lambda: session.update(other=1))
    browser.run(retry_on_conflict()(view))
    assert view.runs == 1
    assert browser.run(lambda: (dict(session), session.version)) == ({"hits": 1, "other": 1}, 3)


def test_the_last_attempt_ends_in_409(app: TestApp) -> None:
    """After the last attempt the conflict goes its normal way, and nothing of the request is stored."""
    app.flask.register_error_handler(SessionConflict, lambda error: (f"keys {error.keys}", 409))
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 5)

    def first_more() -> None:
        session["more"] = 1
        view()

    browser.run(retry_on_conflict(attempts=2, backoff=0)(first_more), status=409)
    assert browser.response is not None
    assert browser.response.text == "keys ('hits',)"
    assert browser.set_cookies == {}
    assert view.runs == 2
    assert browser.run(lambda: dict(session)) == {"hits": 2}


def test_a_refresh_goes_with_no_conflict(make_app: MakeApp) -> None:
    """The answer of a last attempt repeats no id, as no error met at the end of a request does."""
    app = make_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=0, SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    browser.run(retry_on_conflict(attempts=2, backoff=0)(Interfering(browser, 5)), status=409)
    assert browser.set_cookies == {}


@pytest.mark.parametrize("inner_first", [False, True])
def test_one_decorated_view_in_another(app: TestApp, inner_first: bool) -> None:
    """Both are one attempt: committed once, and run again together when somebody came between."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 1)

    @retry_on_conflict()
    def inner() -> None:
        session["inner"] = session.get("inner", 0) + 1

    def outer() -> None:
        if inner_first:
            inner()
        view()
        if not inner_first:
            inner()

    browser.run(retry_on_conflict()(outer))
    assert view.runs == 2
    assert browser.run(lambda: (dict(session), session.version)) == ({"hits": 2, "inner": 1}, 3)


def test_what_the_page_of_a_conflict_sets(app: TestApp) -> None:
    """A message that the app's handler flashes is stored, and nothing of what the view had changed."""
    app.flask.register_error_handler(409, lambda _error: (flash("try again"), ("no", 409))[1])
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 5)

    def first_more() -> None:
        session["more"] = 1
        view()

    browser.run(retry_on_conflict(attempts=2, backoff=0)(first_more), status=409)
    assert browser.run(lambda: (get_flashed_messages(), dict(session))) == (["try again"], {"hits": 2})


def test_an_async_view_runs_again(app: TestApp) -> None:
    """An async view is retried as a plain one, and stays async for Flask."""
    browser = app.browser()
    view = Interfering(browser, 1)

    @app.flask.route("/async")
    @retry_on_conflict()
    async def run() -> str:
        view()
        return "done"

    browser.run(lambda: session.update(hits=0))
    assert browser.get("/async").text == "done"
    assert view.runs == 2
    assert browser.run(lambda: session["hits"]) == 2


def test_a_merged_key_is_no_reason_to_run_again(make_app: MakeApp) -> None:
    """Inside, a key with a merge function is merged as ever, in one run."""
    app = make_app(SESSION_MERGE={"hits": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 1)
    browser.run(retry_on_conflict()(view))
    assert view.runs == 1
    assert browser.run(lambda: session["hits"]) == 2


def test_each_conflict_is_told(app: TestApp) -> None:
    """session_conflict is sent for each run that was in vain, with the policy as it counts inside."""
    told: list[Any] = []

    def receive(_sender: Any, **about: Any) -> None:
        told.append((about["key"], about["theirs"], about["ours"], about["outcome"], about["policy"]))

    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    with session_conflict.connected_to(receive, app.flask):
        browser.run(retry_on_conflict()(Interfering(browser, 2)))
    assert told == [("hits", 1, 1, 1, "raise"), ("hits", 2, 2, 2, "raise")]
    assert app.stats()["conflicts"] == 2


def test_after_an_exception_the_ordinary_policy_counts(app: TestApp) -> None:
    """A view that raises is not run again; what it changed is stored by the app's own policy."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 1)

    def run() -> None:
        view()
        abort(418)

    browser.run(retry_on_conflict()(run), status=418)
    assert view.runs == 1
    assert browser.run(lambda: session["hits"]) == 1


def test_what_was_changed_before_the_view_stays(app: TestApp) -> None:
    """A change made before the view survives that the view starts again."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 1)

    def run() -> None:
        session["before"] = True
        session.permanent = True
        retry_on_conflict()(view)()

    browser.run(run)
    assert browser.run(lambda: (dict(session), session.permanent)) == ({"hits": 2, "before": True}, True)


def test_a_session_that_ends_meanwhile_stays_ended(app: TestApp) -> None:
    """A log-out while the view runs: no error, no second run, no cookie, and the signal tells."""
    told: list[Any] = []

    def receive(_sender: Any, **about: Any) -> None:
        told.append(about["reason"])

    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    handle = browser.run(lambda: session.handle)
    view = Interfering(browser, 1, other=lambda: session.clear())
    with session_discarded.connected_to(receive, app.flask):
        browser.run(retry_on_conflict()(view))
    assert view.runs == 1
    assert told == ["gone"]
    assert browser.set_cookies == {}
    assert set(app.stored(handle)) == {b"@t"}


def test_a_session_that_ended_before_the_view(app: TestApp) -> None:
    """What was changed before the view of a session that has ended is dropped; the view runs."""
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    view = Interfering(browser, 0)

    def run() -> None:
        session["late"] = session["hits"]
        browser.twin().run(lambda: session.clear())
        retry_on_conflict()(view)()

    browser.run(run)
    assert view.runs == 1
    assert browser.set_cookies == {}


def test_a_new_session(app: TestApp) -> None:
    """A visitor's first request may be retried too: it starts one session."""
    browser = app.browser()
    browser.run(retry_on_conflict()(increment))
    assert browser.run(lambda: (session["hits"], session.version)) == (1, 1)
    assert len(app.keys()) == 1


def test_messages_are_flashed_and_shown_once(app: TestApp) -> None:
    """A message flashed, or taken out, by a run that was in vain is flashed, or shown, once in the end."""
    browser = app.browser()
    browser.run(lambda: (session.update(hits=0), flash("old")))
    view = Interfering(browser, 1)
    shown: list[Any] = []

    def run() -> None:
        shown.append(get_flashed_messages())
        flash("new")
        view()

    browser.run(retry_on_conflict()(run))
    assert shown == [["old"], ["old"]]
    assert browser.run(get_flashed_messages) == ["new"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attempts": 0}, ValueError, "1 at least, not 0"),
        ({"attempts": lambda: "x"}, TypeError, r"@retry_on_conflict\(attempts=3\)"),
        ({"attempts": True}, TypeError, "must be an int"),
        ({"backoff": -1}, ValueError, "not -1"),
        ({"backoff": float("nan")}, ValueError, "not nan"),
        ({"backoff": "1"}, TypeError, "number of seconds"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    """A wrong argument, such as the view itself, is told where the decorator stands."""
    with pytest.raises(error, match=words):
        retry_on_conflict(**arguments)


def test_another_kind_of_session() -> None:
    """On an app without luasession it says what is missing."""
    app = Flask("other", instance_relative_config=False)
    app.secret_key = "x"

    @app.route("/")
    @retry_on_conflict()
    def view() -> str:
        return "x"

    app.testing = True
    with pytest.raises(TypeError, match="needs a LuaSession, and this is a SecureCookieSession"):
        app.test_client().get("/")
