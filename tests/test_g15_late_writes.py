"""G15: what is changed while the response is sent is committed; by then nothing is begun or rotated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Response, session, stream_with_context

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
