"""G1: overlapping requests that change different keys lose nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from flask import session

from .conftest import MakeApp, TestApp


def test_a_request_inside_another_keeps_both_keys(app: TestApp) -> None:
    """Two requests that set different keys, one inside the other: both keys are there."""
    browser = app.browser()
    browser.run(lambda: session.update(start=1))
    other = browser.twin()

    def outer() -> None:
        session["outer"] = 1
        other.run(lambda: session.update(inner=2))

    browser.run(outer)
    assert browser.run(lambda: dict(session)) == {"start": 1, "outer": 1, "inner": 2}


def test_deletes_and_nested_changes_merge(app: TestApp) -> None:
    """A delete, an in-place change of a nested value and a set, all overlapping, all count."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1], drop="x", keep="y"))
    first, second = browser.twin(), browser.twin()

    def outer() -> None:
        session["cart"].append(2)
        first.run(lambda: session.pop("drop"))
        second.run(lambda: session.update(added=True))

    browser.run(outer)
    assert browser.run(lambda: dict(session)) == {"cart": [1, 2], "keep": "y", "added": True}


@pytest.mark.parametrize("cache_ttl", [2.0, 0, None])
@pytest.mark.parametrize("policy", ["overwrite", "raise"])
def test_threads_at_a_barrier(make_app: MakeApp, cache_ttl: float | None, policy: str) -> None:
    """Thirty requests that read at the same time and then each change a key of their own: all count."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl, SESSION_CONFLICT=policy)
    browser = app.browser()
    browser.run(lambda: session.update({f"list{n}": [] for n in range(30)}))
    barrier = Barrier(30)

    def change(n: int) -> None:
        def view() -> None:
            nested = session[f"list{n}"]
            barrier.wait(10)
            nested.append(n)

        browser.twin().run(view)

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(change, range(30)))
    assert browser.run(lambda: dict(session)) == {f"list{n}": [n] for n in range(30)}
