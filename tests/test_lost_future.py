"""A failover that takes a session back in time: what was made of the lost versions is neither shown for long nor built on.

A failover is played by putting the hash back as it was a commit earlier.
"""

from __future__ import annotations

from typing import Any

import pytest
from flask import session

from luasession import SessionConflict, merge

from .conftest import Browser, MakeApp, TestApp


def back(app: TestApp, browser: Browser, before: dict[bytes, bytes]) -> None:
    """Put a session's hash back as it was."""
    assert app.server is not None
    key = app.prefix + browser.cookies["session"].partition(".")[0]
    with app.server.client() as client:
        client.delete(key)
        client.hset(key, mapping=before)  # type: ignore[arg-type]
        client.pexpire(key, 60_000)


def stored(app: TestApp, browser: Browser) -> dict[bytes, bytes]:
    return app.stored(browser.cookies["session"].partition(".")[0])


def lose_one(app: TestApp, **lost: Any) -> Browser:
    """Return a browser whose last commit, which its process has cached, is lost."""
    browser = app.browser()
    browser.run(lambda: session.update(n=1, log=["kept"]))
    before = stored(app, browser)
    browser.run(lambda: session.update(lost))
    back(app, browser, before)
    return browser


@pytest.mark.parametrize("ttl", [0, None])
def test_what_is_lost_is_not_shown(make_app: MakeApp, ttl: float | None) -> None:
    """Asked for, the session is as the server has it, and the hint above it is set back."""
    app = make_app(SESSION_CACHE_TTL=ttl)
    browser = lose_one(app, n=2)
    assert browser.run(lambda: (session["n"], session.version)) == (1, 1)
    if ttl is not None:
        assert browser.cookies["session_v"] == "1"


@pytest.mark.usefixtures("nothing_is_small")
def test_a_change_on_what_is_lost_is_read_whole(make_app: MakeApp) -> None:
    """A process that has cached a lost version is sent all there is, of a session that is only just created too."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = lose_one(app, n=2, lost=True)
    assert browser.run(lambda: (dict(session), session.version)) == ({"n": 1, "log": ["kept"]}, 1)


def test_a_cached_one_is_shown_for_the_window_at_most(make_app: MakeApp) -> None:
    """In the process that had cached it the lost version ends with the trust window; elsewhere it is not there."""
    import time

    app = make_app(SESSION_CACHE_TTL=0.3)
    browser = lose_one(app, n=2)
    assert browser.twin(app.another()).run(lambda: session["n"]) == 1
    time.sleep(0.3)
    assert browser.run(lambda: session["n"]) == 1
    assert browser.cookies["session_v"] == "1"


def test_the_same_number_again_is_another_version(make_app: MakeApp) -> None:
    """Counted again by another commit, a number is told from the lost one by its write id."""
    app = make_app(SESSION_CACHE_TTL=60.0)
    browser = lose_one(app, n=2)
    other = app.another()
    browser.twin(other).run(lambda: session.update(m=5))
    # As a commit of its own on top, which finds that its base is none.
    browser.run(lambda: session.update(x=session["n"]))
    assert browser.twin(app.another()).run(lambda: {k: session[k] for k in ("n", "m", "x")}) == {
        "n": 1,
        "m": 5,
        "x": 2,
    }
    assert browser.run(lambda: {k: session[k] for k in ("n", "m", "x")}) == {"n": 1, "m": 5, "x": 2}


def test_nothing_checked_is_built_on_what_is_lost(make_app: MakeApp) -> None:
    """For the checking policies a base from the lost future counts as changed: refused, merged, or computed anew."""
    app = make_app(
        SESSION_CACHE_TTL=60.0, SESSION_MERGE={"n": "raise", "log": merge.append, "hits": merge.add}
    )
    browser = lose_one(app, n=2, log=["kept", "lost"])

    def build() -> int:
        assert (session["n"], session["log"]) == (
            2,
            ["kept", "lost"],
        )  # its own process trusts what it has made
        session["n"] = 3
        with pytest.raises(SessionConflict):
            session.commit()
        session.reload()
        session["log"].append("new")
        total: int = session.atomic_update("n", lambda n: n + 10)
        return total

    assert browser.run(build) == 11
    assert browser.twin(app.another()).run(lambda: (session["n"], session["log"])) == (11, ["kept", "new"])


def test_a_merge_on_what_is_lost(make_app: MakeApp) -> None:
    """A merge takes the base that it was made from, the lost one, against what is there."""
    app = make_app(SESSION_CACHE_TTL=60.0, SESSION_MERGE={"log": merge.append})
    browser = lose_one(app, log=["kept", "lost"])
    browser.run(lambda: session["log"].append("new"))
    assert browser.twin(app.another()).run(lambda: session["log"]) == ["kept", "new"]
    assert browser.run(lambda: session["log"]) == ["kept", "new"]
