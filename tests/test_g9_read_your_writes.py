"""G9: once the answer to a write has arrived, every later request of that browser sees it."""

from __future__ import annotations

import time
from itertools import permutations

import pytest
from flask import Response, session

from .conftest import Browser, MakeApp


@pytest.mark.parametrize("cache_ttl", [3600.0, 0, None])
def test_a_warm_process_sees_what_another_wrote(make_app: MakeApp, cache_ttl: float | None) -> None:
    """Written through one process, read at once through another with a warm cache."""
    one = make_app(SESSION_CACHE_TTL=cache_ttl)
    two = one.another()
    browser = one.browser()
    browser.run(lambda: session.update(n=0))
    for n in range(1, 6):
        assert browser.twin(two).run(lambda: session["n"]) == n - 1
        browser.run(lambda n=n: session.update(n=n))
        assert browser.twin(two).run(lambda: session["n"]) == n


def test_every_order_of_commits_answers_and_processes(make_app: MakeApp) -> None:
    """Two overlapping writes over two warm processes, in every order of commits and of answers:
    whichever process is read afterwards, both are seen.
    """
    one = make_app(SESSION_CACHE_TTL=3600.0)
    processes = [one, one.another()]
    checked = 0
    for commits in permutations((0, 1)):
        for answers in permutations((0, 1)):
            for served in ((0, 0), (0, 1), (1, 0), (1, 1)):
                browser = one.browser()
                browser.run(lambda: session.update(base=1))
                for process in processes:
                    assert browser.twin(process).run(lambda: dict(session)) == {"base": 1}
                writers = [browser.twin(processes[served[n]]) for n in (0, 1)]
                for n in commits:
                    writers[n].run(lambda n=n: session.update({f"w{n}": 1}))
                for n in answers:
                    _take_answer(browser, writers[n])
                for process in processes:
                    for _ in range(2):
                        seen = browser.twin(process).run(lambda: dict(session))
                        assert seen == {"base": 1, "w0": 1, "w1": 1}, (commits, answers, served)
                        checked += 1
    assert checked == 2 * 2 * 4 * 2 * 2


def _take_answer(browser: Browser, writer: Browser) -> None:
    for line in writer.set_cookies.values():
        name, _, rest = line.partition("=")
        browser.client.set_cookie(name, rest.partition(";")[0])


def test_the_hints(make_app: MakeApp) -> None:
    """`_v` carries the version made; `_o` comes only where others were writing, for TTL + 1 s."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert browser.cookies["session_v"] == "1"
    assert "session_o" not in browser.set_cookies
    other = browser.twin()
    other.run(lambda: session.update(b=1))
    assert set(other.set_cookies) == {"session_v"}
    browser.run(lambda: session.update(c=1))
    assert set(browser.set_cookies) == {"session_v", "session_o"}
    assert "Max-Age=3" in browser.set_cookies["session_o"]


def test_an_answer_long_after_its_commit(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that commits early and goes on for long may set the hint back: so every process has to confirm.

    Others have written and been answered meanwhile, and the hint that said so has expired.
    """
    monkeypatch.setattr("luasession.visit._PROMPT", 0)
    one = make_app()
    two = one.another()
    browser = one.browser()
    browser.run(lambda: session.update(n=0))
    early = browser.twin()

    def view() -> None:
        session.atomic_update("early", lambda _: 1)  # type: ignore[attr-defined]
        browser.run(lambda: session.update(n=1))
        del browser.client._cookies[next(key for key in browser.client._cookies if key[2] == "session_o")]
        browser.twin(two).run(lambda: session["n"])
        browser.run(lambda: session.update(n=2))

    early.run(view)
    assert "Max-Age=3" in early.set_cookies["session_o"]
    _take_answer(browser, early)
    assert browser.cookies["session_v"] == "2"
    assert browser.twin(two).run(lambda: session["n"]) == 2


@pytest.mark.parametrize("fails", ["after_request", "at the end"])
def test_the_page_of_an_error_long_after_a_commit(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The same holds where what follows the commit fails, and for the page of that."""
    monkeypatch.setattr("luasession.visit._PROMPT", 0)
    app = make_app(PROPAGATE_EXCEPTIONS=False, SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    twin = browser.twin()

    def fail(_response: Response) -> Response:
        raise ValueError

    def view() -> None:
        session["n"] += 1
        session.commit()  # type: ignore[attr-defined]
        if fails == "after_request":
            app.flask.after_request_funcs.setdefault(None, []).append(fail)
            return
        # What is refused is sent promptly, and is not what the hint is of.
        monkeypatch.setattr("luasession.visit._PROMPT", 100_000_000)
        time.sleep(0.2)
        session["n"] += 1
        twin.run(lambda: session.update(n=50))

    browser.run(view, status=500 if fails == "after_request" else 409)
    assert {name for name in browser.set_cookies if name != "session"} == {"session_v", "session_o"}


def test_a_hint_above_the_version_is_reset(make_app: MakeApp) -> None:
    """After a failover that took versions back the hint is set to what is stored, once."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.client.set_cookie("session_v", "9")
    assert browser.run(lambda: session["a"]) == 1
    assert browser.cookies["session_v"] == "1"
    # As it falls it may fall below what others are being told.
    assert "session_o" in browser.set_cookies
    browser.run(lambda: session["a"])
    assert browser.set_cookies == {}


@pytest.mark.parametrize("hint", ["", "x", "-1", "1" * 50, "٣", "1.5"])
def test_forged_hints_are_harmless(make_app: MakeApp, hint: str) -> None:
    """Whatever stands in the hints, the session is read as it is."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    headers = f"session={browser.cookies['session']}; session_v={hint}; session_o="
    twin = app.browser_with_header(headers)
    assert twin.run(lambda: dict(session)) == {"a": 1}
