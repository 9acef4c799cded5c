"""G15: what is changed while the response is sent is committed; by then nothing is begun or rotated."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from blinker import NamedSignal
from flask import (
    Blueprint,
    Response,
    copy_current_request_context,
    request,
    request_finished,
    session,
    stream_with_context,
)

from luasession import session_committed, session_created, session_rotated

from .conftest import Browser, TestApp


def streamed(browser: Browser, late: Callable[[], Any]) -> str:
    """Run a view whose response does something while it is sent; return the text of it."""

    def view() -> Response:
        def generate() -> Iterator[str]:
            yield "begun,"
            try:
                yield str(late())
            except RuntimeError as error:
                yield f"RuntimeError: {error}"

        return Response(stream_with_context(generate()))

    browser.run(view)
    assert browser.response is not None
    return browser.response.text


def test_a_streamed_response_reads(app: TestApp) -> None:
    """stream_with_context gives the generator the session of its request."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert streamed(browser, lambda: session["a"]) == "begun,1"
    assert browser.run(lambda: session.version) == 1


@pytest.mark.parametrize("before", ["unused", "read", "written"])
def test_late_writes_are_committed(app: TestApp, before: str) -> None:
    """Changes made while a response is streamed are stored, whatever the view did before."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, gone=1, nested=[1]))

    def view() -> Response:
        if before == "read":
            assert session["nested"] == [1]
        if before == "written":
            session["view"] = 1
            session["nested"].append(2)

        def generate() -> Iterator[str]:
            yield "begun,"
            session["late"] = 1
            del session["gone"]
            session["nested"].append("late")
            yield "done"

        return Response(stream_with_context(generate()))

    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "begun,done"
    expected = {"a": 1, "late": 1, "nested": [1, "late"]}
    if before == "written":
        expected |= {"view": 1, "nested": [1, 2, "late"]}
    seen = browser.twin(app.another()).run(lambda: (session.version, dict(session)))
    assert seen == (3 if before == "written" else 2, expected)


def test_a_late_rotation_or_start_raises(app: TestApp) -> None:
    """Once the response is on its way no id can be made: RuntimeError where it is tried."""
    known, stranger = app.browser(), app.browser()
    known.run(lambda: session.update(a=1))
    sid = known.run(lambda: session.sid)
    assert "RuntimeError: the response has been sent" in streamed(known, lambda: session.regenerate())
    assert known.run(lambda: (session.sid, session.version)) == (sid, 1)
    assert "RuntimeError: the response has been sent" in streamed(stranger, lambda: session.update(a=1))
    assert "RuntimeError: the response has been sent" in streamed(
        stranger, lambda: setattr(session, "principal", "ada")
    )
    assert len(app.keys()) == 1
    assert stranger.cookies == {}


def test_a_late_write_to_an_ended_session_is_dropped(app: TestApp) -> None:
    """Ended by another request while the response was sent: the late write brings nothing back (G7)."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    other, handle = browser.twin(), browser.run(lambda: session.handle)

    def late() -> str:
        assert session["a"] == 1
        other.run(lambda: session.destroy())
        session["late"] = 1
        return "done"

    assert streamed(browser, late) == "begun,done"
    assert app.stored(handle).keys() == {b"@t"}
    assert len(app.keys()) == 1


@pytest.mark.parametrize("before", ["blind", "read"])
def test_a_late_write_under_a_dead_id_starts_nothing(app: TestApp, before: str) -> None:
    """The id names nothing any more and the response is on its way: no session is made, none is lost."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    late, handle = browser.twin(), browser.run(lambda: session.handle)
    browser.run(lambda: session.destroy())

    def write() -> str:
        if before == "read":
            assert "a" not in session
        session["late"] = 1
        return "done"

    assert streamed(late, write).startswith("begun,done" if before == "blind" else "begun,RuntimeError")
    assert app.keys() == [(app.prefix + handle).encode()]
    assert app.stored(handle).keys() == {b"@t"}


def test_a_late_write_to_a_session_that_has_vanished(app: TestApp) -> None:
    """Evicted between the save and the late write, a session is not begun anew without a cookie for it."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> Response:
        session["blind"] = 1

        def generate() -> Iterator[str]:
            yield "begun,"
            assert app.server is not None
            with app.server.client() as client:
                client.delete(*app.keys())
            session["late"] = 1
            yield "done"

        return Response(stream_with_context(generate()))

    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "begun,done"
    assert app.keys() == []


def test_a_late_write_that_fails_is_logged(app: TestApp, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can be told any more but the log; the response is whole."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    with caplog.at_level(logging.ERROR):
        assert streamed(browser, lambda: session.update(late=object())) == "begun,None"
    [record] = caplog.records
    assert record.exc_info is not None
    assert "'late'" in str(record.exc_info[1])
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1}, 1)


@pytest.mark.parametrize("how", ["streamed", "request_finished"])
def test_a_late_write_after_a_first_log_in(app: TestApp, how: str) -> None:
    """A visitor logs in with a new id and something is written late: the id that the answer carries stays."""
    browser, told = app.browser(), []

    def audit(*_: Any, **_about: Any) -> None:
        session["late"] = 1

    def log_in() -> Any:
        session["user"] = "ada"
        session.regenerate()  # type: ignore[attr-defined]
        return Response(stream_with_context((audit(), "done")[1] for _ in "1")) if how == "streamed" else None

    def receive(_sender: Any, **about: Any) -> None:
        told.append(about)

    with session_rotated.connected_to(receive, app.flask):
        if how == "streamed":
            browser.run(log_in)
            assert browser.response is not None
            assert browser.response.text == "done"
        else:
            with request_finished.connected_to(audit, app.flask):
                browser.run(log_in)
    assert told == []
    for reader in (browser, browser.twin(app.another())):
        seen = reader.run(lambda: (session["user"], session["late"], session.version))  # type: ignore[attr-defined]
        assert seen == ("ada", 1, 2)


def test_a_late_destroy(app: TestApp) -> None:
    """A session that is ended while the response is sent has ended."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    assert streamed(browser, lambda: (session["a"], session.destroy())) == "begun,(1, None)"
    assert app.stored(handle).keys() == {b"@t"}
    for reader in (browser, browser.twin(app.another())):
        assert reader.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("start", ["key", "principal"])
def test_a_late_destroy_and_a_start_raises(app: TestApp, start: str) -> None:
    """What is set after a late destroy() would start a session: RuntimeError, and the old one has ended."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)

    def late() -> None:
        session.destroy()  # type: ignore[attr-defined]
        if start == "key":
            session["b"] = 1
        else:
            session.principal = "ada"  # type: ignore[attr-defined]

    assert streamed(browser, late).startswith("begun,RuntimeError: the response has been sent")
    assert app.stored(handle).keys() == {b"@t"}
    assert len(app.keys()) == 1


@pytest.mark.parametrize("view", ["unused", "read"])
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("principal", "bob"),
        ("principal", None),
        ("label", "phone"),
        ("lifetime", timedelta(seconds=99)),
        ("permanent", True),
    ],
)
def test_late_attributes_are_committed(app: TestApp, attribute: str, value: Any, view: str) -> None:
    """An attribute set while the response is sent counts without any key; set to what it is, it is no commit."""
    browser = app.browser()
    browser.run(lambda: (session.update(a=1), setattr(session, "principal", "ada")))

    def late() -> None:
        if view == "read":
            assert session["a"] == 1
        setattr(session, attribute, value)

    for _ in range(2):
        assert streamed(browser, late) == "begun,None"
        reader = browser.twin(app.another())
        seen = reader.run(lambda: (getattr(session, attribute), session["a"], session.version))
        assert seen == (value, 1, 2)
    users = app.flask.extensions["luasession"].sessions_of
    owner = value if attribute == "principal" else "ada"
    assert [len(users(user)) for user in ("ada", "bob")] == [owner == "ada", owner == "bob"]


def _by_a_receiver(app: TestApp, late: Callable[[], None]) -> Callable[[], None]:
    def receiver(*_: Any, **__: Any) -> None:
        late()

    request_finished.connect(receiver, app.flask)
    return lambda: request_finished.disconnect(receiver, app.flask)


def _by_a_teardown(app: TestApp, late: Callable[[], None]) -> Callable[[], None]:
    app.flask.teardown_request(lambda _error: late())
    return lambda: None


def _by_a_blueprint(app: TestApp, late: Callable[[], None]) -> Callable[[], None]:
    blueprint = Blueprint("late", __name__)
    blueprint.teardown_request(lambda _error: late())
    blueprint.add_url_rule("/late", view_func=app._run)
    app.flask.register_blueprint(blueprint)
    return lambda: None


@pytest.mark.parametrize("whose", [_by_a_receiver, _by_a_teardown, _by_a_blueprint])
def test_late_changes_in_place(app: TestApp, whose: Callable[..., Callable[[], None]]) -> None:
    """What code of the app's changes in place after the save is found, wherever that code stands."""
    armed: list[list[int]] = []

    def late() -> None:
        while armed:
            armed.pop().append(2)

    undo = whose(app, late)
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1]))
    try:
        path = "/late" if whose is _by_a_blueprint else "/run"
        browser.run(lambda: armed.append(session["cart"]), path=path)
    finally:
        undo()
    assert browser.run(lambda: session["cart"]) == [1, 2]


def test_late_changes_in_place_of_a_streamed_response(app: TestApp) -> None:
    """A value that the view was given, and that is changed while the response is sent, is stored."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1]))

    def view() -> Response:
        cart = session["cart"]
        return Response(stream_with_context(str(cart.append(2)) for _ in "x"))

    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "None"
    assert browser.run(lambda: session["cart"]) == [1, 2]


@pytest.mark.parametrize("signal", [session_committed, session_created, session_rotated])
def test_receivers_of_a_commit_change_in_place(app: TestApp, signal: NamedSignal) -> None:
    """Who is told of a commit, and then changes a value in place, is heard as well."""
    browser = app.browser()
    if signal is not session_created:
        browser.run(lambda: session.update(log=[1]))
    told: list[int] = []

    def receiver(*_: Any, **__: Any) -> None:
        if not told:
            told.append(1)
            session["log"].append(2)

    def view() -> None:
        session["log"] = [1]
        session["n"] = 1
        if signal is session_rotated:
            session.regenerate()

    with signal.connected_to(receiver, app.flask):
        browser.run(view)
    assert told
    assert browser.run(lambda: session["log"]) == [1, 2]


def test_work_that_goes_on_after_the_response(app: TestApp) -> None:
    """What a copied context changes in place is stored when that ends, long after the response."""
    browser = app.browser()
    browser.run(lambda: session.update(jobs=["begun"]))
    answered = threading.Event()
    threads: list[threading.Thread] = []

    def view() -> None:
        assert session["jobs"] == ["begun"]

        @copy_current_request_context
        def work() -> None:
            answered.wait(5)
            session["jobs"].append("done")

        threads.append(threading.Thread(target=work))
        threads[0].start()

    browser.run(view)
    answered.set()
    threads[0].join()
    assert browser.run(lambda: session["jobs"]) == ["begun", "done"]


def test_a_change_in_place_while_the_commit_is_on_its_way(app: TestApp) -> None:
    """What somebody who shares the value does to it between sending and reply is stored afterwards."""
    browser = app.browser()
    calls = app.flask.session_interface.store.calls  # type: ignore[attr-defined]
    run, carts = calls.run, []

    def slow(*about: Any, **more: Any) -> Any:
        answer = run(*about, **more)
        while carts:
            carts.pop().append(2)
        return answer

    def view() -> None:
        session["cart"] = [1]
        carts.append(session["cart"])

    calls.run = slow
    try:
        browser.run(view)
    finally:
        del calls.run
    assert browser.run(lambda: session["cart"]) == [1, 2]


def test_two_sessions_of_one_request(app: TestApp) -> None:
    """Another session that is opened for a request in its view takes no late change from the request's own."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def late() -> None:
        app.flask.session_interface.open_session(app.flask, request)
        session["late"] = 1

    streamed(browser, late)
    assert browser.run(lambda: dict(session)) == {"a": 1, "late": 1}


def test_a_session_of_what_is_no_request(app: TestApp) -> None:
    """Whatever has the cookies opens a session; only a request of Flask's has an end at which to store."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    cookies = SimpleNamespace(environ={"HTTP_COOKIE": f"session={browser.cookies['session']}"})
    with app.flask.test_request_context():
        opened: Any = app.flask.session_interface.open_session(app.flask, cookies)  # type: ignore[arg-type]
        assert dict(opened) == {"a": 1}
