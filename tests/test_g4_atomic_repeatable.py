"""G4: a commit applies whole or not at all, and all reads of a request are of one version."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session

from luasession import SessionConflict, SessionTooLarge, session_destroyed

from .conftest import MakeApp, TestApp


def test_reads_are_of_one_version(app: TestApp) -> None:
    """What others commit while a request is open is not seen by it, key by key or whole."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=1))
    other = browser.twin()

    def view() -> None:
        assert session["a"] == 1
        other.run(lambda: session.update(a=2, b=2))
        assert session["b"] == 1
        session["c"] = 1
        session.commit()
        assert dict(session) == {"a": 1, "b": 1, "c": 1}
        session.reload()
        assert dict(session) == {"a": 2, "b": 2, "c": 1}

    browser.run(view)


def test_a_reader_stays_a_reader_over_a_commit(app: TestApp) -> None:
    """A value read before session.commit() is compared with what it was then, and not written back."""
    browser = app.browser()
    browser.run(lambda: session.update(read=[1], own=0))
    other = browser.twin()

    def view() -> None:
        assert session["read"] == [1]
        other.run(lambda: session.update(read=[2]))
        session["own"] = 1
        session.commit()
        assert session["read"] == [1]

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"read": [2], "own": 1}


def test_an_unserializable_value_stores_nothing(app: TestApp) -> None:
    """One value that cannot be stored stops the whole delta; the old data stays."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        session["a"] = 2
        session["b"] = object()

    browser.run(view, status=500)
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1}, 1)


def test_too_large_stores_nothing(make_app: MakeApp) -> None:
    """Over SESSION_MAX_BYTES it is a 413 and nothing is written; what does not grow still passes."""
    app = make_app(SESSION_MAX_BYTES=1000)
    browser = app.browser()
    browser.run(lambda: session.update(a="x" * 900))

    def grow() -> None:
        session["b"] = "y" * 200
        with pytest.raises(SessionTooLarge) as caught:
            session.commit()
        assert caught.value.limit == 1000

    # The view was told, and goes on; it is not sent again at the end of the request.
    browser.run(grow)
    assert browser.run(lambda: sorted(session)) == ["a"]
    browser.run(lambda: session.update(b="y" * 200), status=413)
    assert browser.run(lambda: sorted(session)) == ["a"]
    browser.run(lambda: session.update(a="z" * 900))
    assert browser.run(lambda: session["a"]) == "z" * 900


def test_what_is_added_to_a_refused_commit_is_sent(make_app: MakeApp) -> None:
    """A view that was told that it was too much, and puts less there instead, has that stored."""
    app = make_app(SESSION_MAX_BYTES=1000)
    browser = app.browser()

    def view() -> None:
        session["b"] = "y" * 2000
        with pytest.raises(SessionTooLarge):
            session.commit()
        session["b"] = "less"

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"b": "less"}


@pytest.mark.parametrize("wrong", ["type", "large"])
@pytest.mark.parametrize("midway", [False, True])
def test_a_destroy_with_what_cannot_be_stored(make_app: MakeApp, wrong: str, midway: bool) -> None:
    """destroy() and a value that cannot be stored is an error, after which the old session is as it was."""
    app = make_app(SESSION_MAX_BYTES=1000)
    told: list[Any] = []
    session_destroyed.connect(lambda _app, **about: told.append(about), app.flask, weak=False)
    browser = app.browser()
    browser.run(lambda: session.update(cart=["book"]))
    before = app.stored(browser.run(lambda: session.handle))

    def view() -> None:
        session.destroy()
        session["user"] = object() if wrong == "type" else "x" * 2000
        if midway:
            session.commit()

    browser.run(view, status=500 if wrong == "type" else 413)
    assert browser.set_cookies == {}
    assert told == []
    assert app.stored(browser.run(lambda: session.handle)) == before
    for reader in (browser, browser.twin(app.another())):
        assert reader.run(lambda: dict(session)) == {"cart": ["book"]}


def test_an_end_is_an_addition_to_a_refused_commit(make_app: MakeApp) -> None:
    """The refused value itself, set again with an end, is sent as any other change of mind is."""
    app = make_app(SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    twin = browser.twin()

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=5))
        with pytest.raises(SessionConflict):
            session.commit()
        session.set("n", session["n"], ttl=60)

    browser.run(view, status=409)
    assert browser.run(lambda: session["n"]) == 5
