"""G5: versions only grow, by one per applied commit."""

from __future__ import annotations

from flask import session

from .conftest import TestApp


def test_one_for_each_commit(app: TestApp) -> None:
    """Sets, deletes, rotation, clear and mid-request commits each count one; reads count none."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    steps = [
        (lambda: session.update(b=2), 2),
        (lambda: session.pop("b"), 3),
        (lambda: session.regenerate(), 4),
        (lambda: dict(session), 4),
        (lambda: (session.clear(), session.update(c=1)), 5),
        (lambda: (session.update(d=1), session.commit(), session.update(e=1)), 7),
    ]
    for step, version in steps:
        browser.run(step)
        assert browser.twin().run(lambda: session.version) == version


def test_rotation_keeps_data_and_handle(app: TestApp) -> None:
    """After regenerate() the data, the handle and the age are the same, and the old id reads nothing."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    old, about = browser.twin(), browser.run(lambda: (session.handle, session.created_at))
    browser.run(lambda: session.regenerate())
    assert browser.run(lambda: (session.handle, session.created_at)) == about
    assert browser.run(lambda: dict(session)) == {"a": 1}
    assert old.run(lambda: dict(session)) == {}
    old.run(lambda: session.update(b=1))
    assert old.set_cookies == {}
    assert browser.run(lambda: dict(session)) == {"a": 1}
