"""What Flask documents of sessions holds here too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from flask import Flask, Response, flash, get_flashed_messages, session, stream_with_context
from markupsafe import Markup

from luasession import Session

from .conftest import MakeApp, TestApp


def test_session_transaction(app: TestApp) -> None:
    """The test client's session_transaction writes what a view reads, and reads what a view wrote."""
    browser = app.browser()
    with browser.client.session_transaction() as opened:
        opened["a"] = [1]
    browser.run(lambda: session["a"].append(2))
    with browser.client.session_transaction() as opened:
        assert opened["a"] == [1, 2]


def test_late_writes_of_a_streamed_response(app: TestApp) -> None:
    """A change while the response is streamed is stored (G15); a rotation or a new session then raises."""
    browser, stranger = app.browser(), app.browser()
    browser.run(lambda: session.update(a=1))
    raised: list[str] = []

    def view() -> Response:
        def generate() -> Iterator[str]:
            yield "x"
            for late in (lambda: session.update(late=1), lambda: session.regenerate()):
                try:
                    late()
                except RuntimeError as error:
                    raised.append(str(error))
            yield str(session.get("a"))

        return Response(stream_with_context(generate()))

    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "x1"
    assert len(raised) == 1
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "late": 1}
    stranger.run(view)
    assert stranger.response is not None
    assert stranger.response.text == "xNone"
    assert len(raised) == 3
    assert len(app.keys()) == 1


def test_cookie_attributes_are_the_same_on_set_and_delete(make_app: MakeApp) -> None:
    """Domain, path, flags and Partitioned stand on id and hint, on set and on delete; the id goes first."""
    app = make_app(
        SESSION_COOKIE_NAME="sid",
        SESSION_COOKIE_DOMAIN="localhost",
        SESSION_COOKIE_PATH="/run",
        SESSION_COOKIE_SECURE=True,
        SESSION_COOKIE_SAMESITE="None",
        SESSION_COOKIE_PARTITIONED=True,
    )
    attributes = ["Domain=localhost", "Secure", "HttpOnly", "Path=/run", "SameSite=None", "Partitioned"]

    def run(view: object) -> dict[str, str]:
        browser.client.environ_base["wsgi.url_scheme"] = "https"
        browser.run(view)  # type: ignore[arg-type]
        return browser.set_cookies

    browser = app.browser()
    made = run(lambda: session.update(a=1))
    assert list(made) == ["sid", "sid_v"]
    for name, value in (("sid", made["sid"]), ("sid_v", made["sid_v"])):
        browser.client.set_cookie(name, value.partition("=")[2].partition(";")[0], domain="localhost")
    gone = run(lambda: session.clear())
    assert list(gone) == ["sid", "sid_v", "sid_o"]
    for line in (*made.values(), *gone.values()):
        assert set(attributes) <= set(line.split("; "))


def test_vary_and_accessed(app: TestApp) -> None:
    """Touched it says Vary: Cookie once; untouched neither that nor a cookie."""
    browser = app.browser()
    browser.run(lambda: session.get("a"))
    assert browser.response is not None
    assert browser.response.headers.getlist("Vary") == ["Cookie"]
    response = browser.get("/untouched")
    assert "Vary" not in response.headers
    assert browser.set_cookies == {}
    browser.run(lambda: Response(str(session.get("a")), headers={"Vary": "Accept"}))
    assert browser.response.headers.getlist("Vary") == ["Accept, Cookie"]


def test_permanent_before_each_request_costs_no_commit(make_app: MakeApp) -> None:
    """session.permanent = True in before_request makes no session and no commit by itself."""
    app = make_app(SESSION_PERMANENT=False)
    app.flask.before_request(lambda: setattr(session, "permanent", True))
    browser = app.browser()
    browser.get("/untouched")
    assert app.keys() == []
    browser.run(lambda: session.update(a=1))
    browser.get("/untouched")
    assert browser.run(lambda: (session.version, session.permanent)) == (1, True)


def test_flashes_with_markup(app: TestApp) -> None:
    """A flashed Markup arrives as Markup at the next request."""
    browser = app.browser()
    browser.run(lambda: flash(Markup("<b>")))
    [message] = browser.run(get_flashed_messages)
    assert type(message) is Markup


def test_a_view_that_fails_still_saves(app: TestApp) -> None:
    """As in Flask, what a failing view had put into the session is stored."""
    browser = app.browser()

    def view() -> None:
        session["a"] = 1
        raise ValueError

    browser.run(view, status=500)
    assert browser.run(lambda: dict(session)) == {"a": 1}


def test_an_app_is_freed(make_valkey_app: MakeApp) -> None:
    """Nothing of luasession keeps an app alive that served requests."""
    app = make_valkey_app()
    app.browser().run(lambda: session.update(a=1))
    reference = weakref.ref(app.flask)
    del app
    gc.collect()
    assert reference() is None


def test_one_extension_for_several_apps(make_valkey_app: MakeApp) -> None:
    """init_app reads each app's own settings."""
    extension = Session()
    apps = [Flask(name) for name in ("one", "two")]
    for app, prefix in zip(apps, ("one:", "two:"), strict=True):
        app.config["SESSION_KEY_PREFIX"] = prefix
        extension.init_app(app)
    assert apps[0].session_interface is not apps[1].session_interface
    assert set(apps[0].extensions["luasession"].stats()) == {
        *("loads", "cache_hits", "commits", "conflicts", "merges", "discards", "script_reloads", "bytes"),
    }


@pytest.mark.parametrize("name", ["sid_a", "sid_b"])
def test_dynamic_cookie_names(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An interface whose cookie name depends on the request reads and writes under that name."""
    app = make_app()
    monkeypatch.setattr(app.flask.session_interface, "get_cookie_name", lambda _app: name)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert set(browser.cookies) == {name, f"{name}_v"}
    assert browser.run(lambda: dict(session)) == {"a": 1}
