"""G2: a request that changes nothing leaves data and version alone."""

from __future__ import annotations

import pytest
from flask import session

from .conftest import TestApp


@pytest.mark.parametrize("how", ["write", "delete", "logout"])
def test_a_reader_over_another_request_changes_nothing(app: TestApp, how: str) -> None:
    """A read-only request that overlaps a write, a delete or a logout does not undo it."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, nested=[1]))
    handle = browser.run(lambda: session.handle)
    other, reader = browser.twin(), browser.twin()
    changes = {
        "write": lambda: session.update(a=2),
        "delete": lambda: session.pop("a"),
        "logout": lambda: session.clear(),
    }
    before: dict[bytes, bytes] = {}

    def read() -> None:
        assert session["a"] == 1
        assert session["nested"] == [1]
        other.run(changes[how])
        before.update(app.stored(handle))
        assert dict(session) == {"a": 1, "nested": [1]}

    reader.run(read)
    assert app.stored(handle) == before
    assert reader.set_cookies == {}


def test_the_same_value_again_is_no_change(app: TestApp) -> None:
    """A key set to the value that was read in this request sends nothing; a blind set counts."""
    browser = app.browser()
    browser.run(lambda: session.update(a=[1, {"b": 2}]))

    def again() -> None:
        session["a"] = [*session["a"]]

    browser.run(again)
    assert browser.run(lambda: session.version) == 1
    browser.run(lambda: session.update(a=[1, {"b": 2}]))
    assert browser.run(lambda: session.version) == 2


def test_set_and_taken_back_is_no_change(app: TestApp) -> None:
    """A nested value changed and changed back, or a missing key set and deleted, sends nothing."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1]))

    def there_and_back() -> None:
        session["cart"].append(2)
        session["cart"].pop()
        assert "new" not in session
        session["new"] = 1
        del session["new"]

    browser.run(there_and_back)
    assert browser.run(lambda: session.version) == 1
