"""G6 where a request breaks off: what may have been applied is not sent as another commit.

A killed greenlet, a timeout that is raised into it, a signal's handler that raises, memory that runs out: all of
them may come while a reply is waited for, and the view may catch them and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from flask import Response, session, stream_with_context

from luasession import (
    SessionConflict,
    SessionUnavailable,
    merge,
    retry_on_conflict,
    session_committed,
    session_created,
    session_discarded,
)
from luasession.connections import Connections
from luasession.visit import Visit

from .conftest import Browser, MakeApp, TestApp


class Killed(BaseException):
    """As gevent raises it into a greenlet."""


#: What may be raised while a reply is waited for.
BREAKS = [Killed(), SystemExit(1), KeyboardInterrupt(), MemoryError(), RuntimeError("an alarm")]


@contextmanager
def broken(error: BaseException, *, script: bytes = b"EVALSHA", after: int = 0) -> Iterator[None]:
    """Have the reply to a call be taken away by an error: it was sent, and applied."""
    original = Connections._exchange
    seen = 0

    def exchange(connection: Any, words: Any, *about: Any) -> Any:
        nonlocal seen
        reply = original(connection, words, *about)
        if words[0] == script:
            seen += 1
            if seen == after + 1:
                raise error
        return reply

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connections, "_exchange", staticmethod(exchange))
        yield


@pytest.fixture
def counting(make_app: MakeApp) -> tuple[TestApp, Browser]:
    """An app where all that is added counts, and a browser with a session."""
    app = make_app(SESSION_MERGE={"n": merge.add, "log": merge.append})
    browser = app.browser()
    browser.run(lambda: session.update(n=0, log=[]))
    return app, browser


def change() -> None:
    session["n"] += 1
    session["log"].append("x")


def stored(browser: Browser, app: TestApp) -> Any:
    return browser.twin(app.another()).run(lambda: (session["n"], session["log"], session.version))


def reasons(app: TestApp) -> list[str]:
    noted: list[str] = []
    session_discarded.connect(lambda _app, reason, **_: noted.append(reason), app.flask, weak=False)
    return noted


@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
def test_at_the_end_of_a_request(counting: tuple[TestApp, Browser], error: BaseException) -> None:
    """The last commit of a request, broken off between sending and reading, is applied once."""
    app, browser = counting
    with suppress(BaseException), broken(error):
        browser.run(change, status=500)
    assert stored(browser, app) == (1, ["x"], 2)


@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
def test_caught_by_the_view(counting: tuple[TestApp, Browser], error: BaseException) -> None:
    """Where the view catches what broke its commit off, nothing more of the request is stored, and that is told."""
    app, browser = counting
    noted = reasons(app)

    def view() -> None:
        change()
        with broken(error), suppress(type(error)):
            session.commit()
        session["more"] = 1

    browser.run(view)
    assert stored(browser, app) == (1, ["x"], 2)
    assert "more" not in browser.run(lambda: dict(session))
    assert noted == ["unavailable"]


@pytest.mark.parametrize("rotates", [False, True])
def test_no_second_session(make_app: MakeApp, rotates: bool) -> None:
    """A creation or a rotation that is broken off and caught makes no other session at the end."""
    app = make_app()
    created: list[str] = []
    session_created.connect(lambda _app, handle, **_: created.append(handle), app.flask, weak=False)
    browser = app.browser()
    if rotates:
        browser.run(lambda: session.update(a=1))

    def view() -> None:
        session["b"] = 2
        if rotates:
            session.regenerate()
        with broken(Killed()), suppress(Killed):
            session.commit()

    browser.run(view)
    assert len(created) == rotates
    assert len(app.keys()) == 1


@pytest.mark.parametrize("how", ["commit", "the end"])
def test_after_it_was_applied(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Broken off after the reply, while the principal's index is told, it is settled by nobody, and not sent again."""
    app = make_app(SESSION_MERGE={"n": merge.add})
    browser = app.browser()

    def start() -> None:
        session["n"] = 0
        session.principal = "ada"

    browser.run(start)

    def fail(*_: Any) -> None:
        raise SessionUnavailable("down")

    def view() -> None:
        monkeypatch.setattr(Visit, "_move_entry", fail)
        session["n"] += 1
        session.principal = None
        if how == "the end":
            return
        with suppress(SessionUnavailable):
            session.commit()

    browser.run(view, status=503 if how == "the end" else 200)
    monkeypatch.undo()
    assert browser.twin(app.another()).run(lambda: (session["n"], session.version)) == (1, 2)


@pytest.mark.parametrize("breaks", ["the function", "the reply"])
def test_an_update_that_breaks_off(make_app: MakeApp, breaks: str) -> None:
    """What an update was about to store does not take the place of what others have stored since."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    twin = browser.twin()
    runs: list[int] = []

    def add(n: int) -> int:
        runs.append(n)
        if len(runs) == 1:
            twin.run(lambda: session.atomic_update("n", lambda n: n + 1))
        elif breaks == "the function":
            raise Killed
        return n + 1

    def view() -> None:
        with suppress(Killed):
            if breaks == "the function":
                session.atomic_update("n", add)
            else:
                with broken(Killed()):
                    session.atomic_update("n", lambda n: n + 1)
        for _ in range(3):
            twin.run(lambda: session.atomic_update("n", lambda n: n + 1))

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["n"]) == 4


def test_an_update_whose_receiver_fails(make_app: MakeApp) -> None:
    """What was stored is not undone by a receiver that fails: not by the default that it was set over either."""
    app = make_app(PROPAGATE_EXCEPTIONS=False)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def fail(_app: Any, **_: Any) -> None:
        raise RuntimeError

    def view() -> None:
        session.setdefault("n", 0)
        with session_committed.connected_to(fail, app.flask), suppress(RuntimeError):
            session.atomic_update("n", lambda n: n + 1)

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["n"]) == 1


@pytest.mark.parametrize("how", ["commit", "atomic_update"])
def test_a_second_attempt_is_refused(counting: tuple[TestApp, Browser], how: str) -> None:
    """After a commit of unknown outcome another one raises, until the session was read again."""
    app, browser = counting

    def again() -> None:
        session.commit() if how == "commit" else session.atomic_update("n", lambda n: n + 1)

    def view() -> None:
        change()
        with broken(Killed()), suppress(Killed):
            session.commit()
        with pytest.raises(SessionUnavailable, match=r"reload\(\)"):
            again()
        session.reload()
        assert session["n"] == 1
        session["log"].append("y")
        again()

    browser.run(view)
    assert stored(browser, app) == ((1, ["x", "y"], 3) if how == "commit" else (2, ["x", "y"], 4))


# -- what could not be read -------------------------------------------------------------------------------------


def degraded() -> None:
    """Read the cart as a view does that would rather go on without it, while Redis does not answer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connections, "exchange", _down)
        try:
            cart = session["cart"]
        except SessionUnavailable:
            cart = []
    session["cart"] = [*cart, "new"]


def _down(*_: Any) -> Any:
    raise SessionUnavailable("down")


@pytest.mark.parametrize(
    ("view", "status"),
    [
        (degraded, 200),
        (lambda: (degraded(), session.commit()), 503),
        (lambda: (degraded(), session.atomic_update("n", lambda n: 1)), 503),
        (retry_on_conflict()(degraded), 503),
    ],
    ids=["plain", "commit", "atomic_update", "retry_on_conflict"],
)
def test_what_was_not_read_is_not_built_on(make_app: MakeApp, view: Callable[[], Any], status: int) -> None:
    """What a view makes of a key that it could not read is stored by no way."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(cart=["a"]))
    browser.run(view, status=status)
    assert browser.run(lambda: dict(session)) == {"cart": ["a"]}


def test_a_reload_that_fails(make_app: MakeApp) -> None:
    """It is as a read that fails: nothing of the request is stored, what it had changed before included, and told."""
    app = make_app(SESSION_CACHE_TTL=None)
    noted = reasons(app)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        session["b"] = 2
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Connections, "exchange", _down)
            with suppress(SessionUnavailable):
                session.reload()
        assert session["b"] == 2
        session["c"] = 3

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"a": 1}
    assert noted == ["unavailable"]


def test_a_late_change_after_a_read_that_failed(make_app: MakeApp) -> None:
    """What a streamed response sets after it could not read is dropped, and told."""
    app = make_app(SESSION_CACHE_TTL=None)
    noted = reasons(app)
    browser = app.browser()
    browser.run(lambda: session.update(cart=["a"]))

    def view() -> Response:
        def generate() -> Iterator[str]:
            yield "begun"
            degraded()

        return Response(stream_with_context(generate()))

    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "begun"
    assert browser.run(lambda: dict(session)) == {"cart": ["a"]}
    assert noted == ["unavailable"]


def test_a_conflict_is_no_doubt(make_app: MakeApp) -> None:
    """What is known to be refused leaves a request able to store what it sets next."""
    app = make_app(SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    twin = browser.twin()

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=10))
        with pytest.raises(SessionConflict):
            session.commit()
        session["more"] = 1

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"n": 10, "more": 1}
