"""What Flask documents of sessions holds here too."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import pytest
import redis
from flask import (
    Flask,
    Response,
    abort,
    copy_current_request_context,
    flash,
    g,
    get_flashed_messages,
    render_template_string,
    request,
    session,
)
from flask.sessions import NullSession, SecureCookieSessionInterface
from markupsafe import Markup

from luasession import (
    LuaSession,
    LuaSessionError,
    LuaSessionInterface,
    Session,
    SessionConflict,
    SessionTooLarge,
    SessionUnavailable,
)
from luasession.connections import Connections

from .conftest import MakeApp, TestApp
from .servers import Server
from .test_g15_late_writes import streamed

# -- session_transaction and request contexts ---------------------------------------------------------------


def test_a_cookie_setting_that_is_none(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt attribute is an error of the answer, and leaves the connection that a commit came by in step."""
    app = make_app()
    app.browser().run(lambda: session.update(a=1))
    assert app.server is not None
    with app.server.client() as client:
        before = client.info("stats")["total_connections_received"]
        app.flask.config["SESSION_COOKIE_SAMESITE"] = "Sometimes"
        app.browser().run(lambda: session.update(a=1), status=500)
        assert "SameSite" in caplog.text
        app.flask.config["SESSION_COOKIE_SAMESITE"] = "Lax"
        app.browser().run(lambda: session.update(a=1))
        assert client.info("stats")["total_connections_received"] == before


def test_session_transaction(app: TestApp) -> None:
    """The test client's session_transaction writes what a view reads, and reads what a view wrote."""
    browser = app.browser()
    with browser.client.session_transaction() as opened:
        opened["a"] = [1]
    browser.run(lambda: session["a"].append(2))
    with browser.client.session_transaction() as opened:
        assert type(opened) is LuaSession
        assert opened["a"] == [1, 2]
        opened["a"].append(3)
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": [1, 2, 3]}, 3)


def test_session_transaction_that_changes_nothing(app: TestApp) -> None:
    """It starts no session, sets no cookie and makes no version."""
    browser = app.browser()
    with browser.client.session_transaction() as opened:
        assert dict(opened) == {}
    assert browser.cookies == {}
    assert app.keys() == []
    browser.run(lambda: session.update(a=1))
    with browser.client.session_transaction() as opened:
        assert opened["a"] == 1
    assert browser.run(lambda: session.version) == 1


def test_session_transaction_that_logs_out(app: TestApp) -> None:
    """clear() in a session_transaction ends the session and takes the test client's cookies away."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    with browser.client.session_transaction() as opened:
        opened.clear()
    assert browser.cookies == {}
    assert browser.run(lambda: dict(session)) == {}


def test_the_session_is_there_while_the_client_keeps_the_context(app: TestApp) -> None:
    """Within ``with client:`` the session of the last request can be looked at after it."""
    browser = app.browser()
    with browser.client:
        browser.run(lambda: session.update(a=1))
        assert session["a"] == 1
        browser.run(lambda: session.update(a=2))
        assert session["a"] == 2
    assert browser.run(lambda: session.version) == 2


@pytest.mark.parametrize("what", ["large", "conflict", "down", "type"])
def test_session_transaction_raises(make_app: MakeApp, what: str) -> None:
    """A test that could not store what it wanted is told so, as nobody would see the answer."""
    app = make_app(SESSION_MAX_BYTES=1000, SESSION_CONFLICT="raise", SESSION_REDIS_DEADLINE=0)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    expected = {"large": SessionTooLarge, "conflict": SessionConflict, "down": SessionUnavailable}.get(
        what, TypeError
    )
    twin = browser.twin()
    opening = browser.client.session_transaction()
    opened = opening.__enter__()
    opened["n"] = {"large": "x" * 2000, "type": object()}.get(what, opened["n"] + 1)
    twin.run(lambda: session.update(n=5))
    with pytest.MonkeyPatch.context() as patched:
        if what == "down":
            patched.setattr(Connections, "exchange", down)
        with pytest.raises(expected):
            opening.__exit__(None, None, None)
    assert browser.run(lambda: session["n"]) == 5


def down(*_: Any) -> Any:
    raise redis.ConnectionError("down")


def test_nested_request_contexts(app: TestApp) -> None:
    """Each request context has a session of its own; without a response nothing is stored."""
    with app.flask.test_request_context():
        session["outer"] = 1
        with app.flask.test_request_context():
            assert dict(session) == {}
            session["inner"] = 1
        assert dict(session) == {"outer": 1}
    assert app.keys() == []


def test_a_response_made_by_hand(app: TestApp) -> None:
    """process_response() in a test_request_context saves, as in Flask."""
    with app.flask.test_request_context():
        session["a"] = 1
        response = app.flask.process_response(Response("by hand"))
        sid = session.sid  # type: ignore[attr-defined]
    assert f"session={sid}" in response.headers["Set-Cookie"]
    [key] = app.keys()
    assert key == (app.prefix + sid.partition(".")[0]).encode()


def test_no_session_outside_of_a_request(app: TestApp) -> None:
    """Outside of a request the session proxy says what Flask's own says."""
    with pytest.raises(RuntimeError, match="outside of request context"):
        session["a"] = 1


# -- what Flask's own session has of a dict -----------------------------------------------------------------


def test_copies_are_dicts_of_their_own(app: TestApp) -> None:
    """copy() and the copy module give dicts; changing them, or what a deep one holds, changes no session."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, cart=["x"]))

    def view() -> None:
        for shallow in (session.copy(), copy.copy(session._get_current_object())):
            assert type(shallow) is dict
            assert shallow.pop("a") == 1
            shallow["b"] = 2
        deep = copy.deepcopy(session._get_current_object())
        assert deep == {"a": 1, "cart": ["x"]}
        deep["cart"].append("y")

    browser.run(view)
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1, "cart": ["x"]}, 1)


def test_unions(app: TestApp) -> None:
    """``|`` gives a dict and changes nothing, ``|=`` changes the session, and neither takes anything else."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        mine = session._get_current_object()
        assert mine | {"a": 2, "b": 2} == {"a": 2, "b": 2}
        assert {"a": 2, "b": 2} | mine == {"a": 1, "b": 2}
        for wrong in (1, [("b", 2)]):
            with pytest.raises(TypeError):
                mine | wrong
        before = mine
        mine |= {"b": 2}
        mine |= [("c", 3)]
        assert mine is before

    browser.run(view)
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1, "b": 2, "c": 3}, 2)


def test_popitem(app: TestApp) -> None:
    """It takes the last key, as a dict does, and raises KeyError where there is none."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=2))

    def view() -> None:
        keys = list(session)
        key, value = session.popitem()
        assert (key, value) == (keys[-1], {"a": 1, "b": 2}[key])
        session.popitem()
        with pytest.raises(KeyError, match="empty"):
            session.popitem()

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {}


# -- cookies ------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {}
STRICT = {
    "SESSION_COOKIE_NAME": "sid",
    "SESSION_COOKIE_DOMAIN": "example.org",
    "SESSION_COOKIE_PATH": "/app",
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "Strict",
}
PARTITIONED = {
    "SESSION_COOKIE_SECURE": True,
    "SESSION_COOKIE_SAMESITE": "None",
    "SESSION_COOKIE_PARTITIONED": True,
}
LOOSE = {"SESSION_COOKIE_HTTPONLY": False, "APPLICATION_ROOT": "/base", "SESSION_COOKIE_DOMAIN": False}
EXPECTED = {
    "plain": {"HttpOnly", "Path=/"},
    "strict": {"HttpOnly", "Path=/app", "Domain=example.org", "Secure", "SameSite=Strict"},
    "partitioned": {"HttpOnly", "Path=/", "Secure", "SameSite=None", "Partitioned"},
    "loose": {"Path=/base"},
}


def attributes_of(line: str) -> set[str]:
    """Return what follows the value of a Set-Cookie line, without its moments."""
    return {part for part in line.split("; ")[1:] if not part.startswith(("Expires=", "Max-Age="))}


def headers_of(app: TestApp, function: Callable[[], Any], cookies: dict[str, str]) -> list[str]:
    """Run a view with these cookies, whatever domain and path they are for; return Set-Cookie lines."""
    browser = app.browser_with_header("; ".join(f"{name}={value}" for name, value in cookies.items()))
    browser.run(function)
    assert browser.response is not None
    return browser.response.headers.getlist("Set-Cookie")


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize(
    ("name", "config"),
    [("plain", PLAIN), ("strict", STRICT), ("partitioned", PARTITIONED), ("loose", LOOSE)],
)
def test_cookie_attributes(
    make_valkey_app: MakeApp, name: str, config: dict[str, Any], permanent: bool
) -> None:
    """All SESSION_COOKIE_* stand on id and hints, on set as on delete, as on Flask's own cookie."""
    app = make_valkey_app(SESSION_PERMANENT=permanent, **config)
    cookie = config.get("SESSION_COOKIE_NAME", "session")
    made = headers_of(app, lambda: session.update(a=1), {})
    assert [line.partition("=")[0] for line in made] == [cookie, f"{cookie}_v"]
    cookies = {line.partition("=")[0]: line.partition("=")[2].partition(";")[0] for line in made}
    elsewhere = headers_of(app, lambda: session.update(a=2), {cookie: cookies[cookie]})
    assert [line.partition("=")[0] for line in elsewhere] == [f"{cookie}_v", f"{cookie}_o"]
    ended = headers_of(app, lambda: session.clear(), cookies)
    assert [line.partition("=")[0] for line in ended] == [cookie, f"{cookie}_v", f"{cookie}_o"]
    for line in (*made, *elsewhere, *ended):
        assert attributes_of(line) == EXPECTED[name], line
    for line in ended:
        assert "=; " in line
        assert "Max-Age=0" in line

    flasks = Flask("flask", static_folder=None)
    flasks.config.update(config, SECRET_KEY="x")
    with flasks.test_request_context():
        session["a"] = 1
        line = flasks.process_response(Response()).headers["Set-Cookie"]
    assert attributes_of(line) == EXPECTED[name]


def test_cookie_settings_may_change_late(make_valkey_app: MakeApp) -> None:
    """SESSION_COOKIE_* are read at each request, as Flask does."""
    app = make_valkey_app()
    app.flask.config.update(SESSION_COOKIE_NAME="late", SESSION_COOKIE_SAMESITE="Lax")
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert "SameSite=Lax" in browser.set_cookies["late"]
    assert browser.run(lambda: session["a"]) == 1


@pytest.mark.parametrize("end", [False, True])
def test_the_id_goes_first(app: TestApp, end: bool) -> None:
    """Before the cookies that a view sets; before the hints, too."""
    browser = app.browser()
    if end:
        browser.run(lambda: session.update(a=1))

    def view() -> Response:
        session.clear() if end else session.update(a=1)
        response = Response("done")
        response.set_cookie("view", "1")
        response.set_cookie("another", "2")
        return response

    browser.run(view)
    hints = ["session_v", "session_o"] if end else ["session_v"]
    assert list(browser.set_cookies) == ["session", *hints, "view", "another"]


def test_cookie_names_by_request(app: TestApp) -> None:
    """An interface whose get_cookie_name depends on the request keeps sessions apart."""

    class ByTenant(LuaSessionInterface):
        def get_cookie_name(self, _app: Flask) -> str:
            return "sid_" + request.args.get("tenant", "none")

    app.flask.session_interface.__class__ = ByTenant
    browser = app.browser()
    for tenant in ("one", "two"):
        path, name = f"/run?tenant={tenant}", f"sid_{tenant}"
        browser.run(lambda tenant=tenant: session.update(tenant=tenant), path=path)
        assert list(browser.set_cookies) == [name, f"{name}_v"]
    for tenant in ("one", "two"):
        path, name = f"/run?tenant={tenant}", f"sid_{tenant}"
        assert browser.run(lambda: dict(session), path=path) == {"tenant": tenant}
        browser.run(lambda: session.clear(), path=path)
        assert list(browser.set_cookies) == [name, f"{name}_v", f"{name}_o"]
    assert browser.cookies == {}


def test_an_interface_that_fails(app: TestApp) -> None:
    """An interface of the app's own that fails over a cookie makes a 500; the commit stands, its reply is read."""

    class Failing(LuaSessionInterface):
        def get_cookie_path(self, app: Flask) -> str:
            if getattr(self, "fails", False):
                raise LookupError("no path")
            return super().get_cookie_path(app)

    interface = app.flask.session_interface
    interface.__class__ = Failing
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    idle = interface.store.calls.client._connections._idle  # type: ignore[attr-defined]
    before = list(idle)
    interface.fails = True  # type: ignore[attr-defined]
    browser.run(lambda: session.update(a=2), status=500)
    interface.fails = False  # type: ignore[attr-defined]
    assert list(idle) == before
    assert browser.run(lambda: session["a"]) == 2


@pytest.mark.parametrize("in_flight", [True, False])
def test_cookie_rules_that_read_the_session(app: TestApp, in_flight: bool) -> None:
    """An interface may ask the session how its cookie is to be, over a rotation and on a cold process, too."""

    class Embedded(LuaSessionInterface):
        def get_cookie_samesite(self, app: Flask) -> str:
            return "None" if session.get("embedded") else "Lax"

    other = app.another()
    for each in (app, other):
        each.flask.session_interface.__class__ = Embedded
    browser = app.browser()
    browser.run(lambda: session.update(embedded=True))
    browser = browser.twin(other)

    def view() -> None:
        session["x"] = 1
        session.regenerate(in_flight=in_flight)

    browser.run(view)
    assert "; SameSite=None" in browser.set_cookies["session"]


def test_a_response_class_with_rules_of_its_own(app: TestApp) -> None:
    """Cookies are set by the app's response class."""

    class Secure(Response):
        def set_cookie(self, *about: Any, **more: Any) -> None:
            super().set_cookie(*about, **{**more, "secure": True})

    app.flask.response_class = Secure
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert all("; Secure" in line for line in browser.set_cookies.values())


def test_apps_of_one_process_keep_their_rules(make_app: MakeApp) -> None:
    """An app that says 0 and one that says False get what each asked for."""
    for said in (0, False):
        browser = make_app(SESSION_COOKIE_SECURE=said).browser()
        browser.run(lambda: session.update(a=1))
        assert ("Secure" in browser.set_cookies["session"]) is (said is not False)


# -- permanence and refresh ---------------------------------------------------------------------------------


def test_permanent_and_its_expiry(make_app: MakeApp) -> None:
    """A permanent session's cookie expires after PERMANENT_SESSION_LIFETIME, another's with the browser."""
    app = make_app(PERMANENT_SESSION_LIFETIME=timedelta(days=3))
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert "Expires" not in browser.set_cookies["session"]
    assert browser.run(lambda: session.permanent) is False
    before = datetime.now(UTC)
    browser.run(lambda: setattr(session, "permanent", True))
    [moment] = [
        part.removeprefix("Expires=")
        for part in browser.set_cookies["session"].split("; ")
        if part.startswith("Expires=")
    ]
    assert timedelta(days=2) < parsedate_to_datetime(moment) - before < timedelta(days=4)
    assert browser.twin(app.another()).run(lambda: session.permanent) is True


@pytest.mark.parametrize("cache_ttl", [2.0, None])
def test_permanent_before_each_request_costs_no_commit(make_app: MakeApp, cache_ttl: float | None) -> None:
    """session.permanent = True in before_request makes no session and no commit by itself."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl)
    app.flask.before_request(lambda: setattr(session, "permanent", True))
    browser = app.browser()
    browser.get("/untouched")
    assert (app.keys(), browser.cookies) == ([], {})
    browser.run(lambda: session.update(a=1))
    assert "Expires=" in browser.set_cookies["session"]
    for _ in range(3):
        browser.get("/untouched")
        assert browser.set_cookies == {}
    assert browser.run(lambda: (session.version, session.permanent)) == (1, True)
    assert app.stats()["commits"] == 1


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("refresh", [False, True])
def test_refresh_each_request(make_app: MakeApp, permanent: bool, refresh: bool) -> None:
    """The id of a permanent session is sent again when its expiry is due, unless the setting is off."""
    app = make_app(
        SESSION_PERMANENT=permanent, SESSION_REFRESH_EACH_REQUEST=refresh, SESSION_TOUCH_INTERVAL=0
    )
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    sid = browser.run(lambda: session.sid)
    for use in (lambda: session["a"], lambda: session.update(b=1)):
        browser.run(use)
        assert ("session" in browser.set_cookies) is (permanent and refresh)
        if permanent and refresh:
            assert browser.set_cookies["session"].startswith(f"session={sid}; Expires=")
    browser.get("/untouched")
    assert browser.set_cookies == {}


def test_refresh_at_most_once_per_touch_interval(make_app: MakeApp) -> None:
    """Within the interval neither reads nor writes repeat the id, unlike Flask's, on each request."""
    app = make_app(SESSION_PERMANENT=True, SESSION_TOUCH_INTERVAL=3600)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(lambda: session["a"])
    assert browser.set_cookies == {}
    browser.run(lambda: session.update(b=1))
    assert list(browser.set_cookies) == ["session_v"]


# -- what a session tells of itself -------------------------------------------------------------------------


def test_vary_and_accessed(app: TestApp) -> None:
    """Touched it says Vary: Cookie, whether or not there is a session; untouched neither that nor a cookie."""
    browser = app.browser()
    for _ in range(2):
        for touch in (
            lambda: session.get("a"),
            lambda: "a" in session,
            lambda: bool(session),
            lambda: session.new,
            lambda: session.permanent,
        ):
            browser.run(touch)
            assert browser.response is not None
            assert browser.response.headers.getlist("Vary") == ["Cookie"]
        response = browser.get("/untouched")
        assert "Vary" not in response.headers
        assert browser.set_cookies == {}
        browser.run(lambda: session.update(a=1))
        assert browser.response is not None
        assert browser.response.headers.getlist("Vary") == ["Cookie"]
    browser.run(lambda: session.clear())
    assert browser.response.headers.getlist("Vary") == ["Cookie"]


@pytest.mark.parametrize(
    ("given", "expected"), [("Accept", "Accept, Cookie"), ("cookie", "cookie"), ("A, B", "A, B, Cookie")]
)
def test_one_merged_vary(make_valkey_app: MakeApp, given: str, expected: str) -> None:
    """A Vary of the view's own is kept, and Cookie stands in it once."""
    app = make_valkey_app()
    browser = app.browser()
    browser.run(lambda: Response(str(session.get("a")), headers={"Vary": given}))
    assert browser.response is not None
    assert browser.response.headers.getlist("Vary") == [expected]


def test_accessed(app: TestApp) -> None:
    """Flask marks the session as accessed when it is touched; looking its cookie up does not."""
    seen: list[bool] = []

    def look(response: Response) -> Response:
        from flask.globals import request_ctx

        seen.append(request_ctx._session.accessed)
        return response

    app.flask.after_request(look)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.get("/untouched")
    browser.run(lambda: session.get("a"))
    assert seen == [True, False, True]


def test_new_and_modified(app: TestApp) -> None:
    """``new`` until the session was there at the start; ``modified`` once anything changed, nested too."""
    browser = app.browser()

    def first() -> None:
        assert session.new
        assert not session.modified
        session["list"] = [1]
        assert session.modified
        session.commit()  # type: ignore[attr-defined]
        assert session.new
        assert session.modified

    browser.run(first)

    def second() -> None:
        assert not session.new
        assert session["list"] == [1]
        assert not session.modified
        session["list"].append(2)
        assert session.modified
        session["list"].pop()
        assert not session.modified

    browser.run(second)

    def assigned() -> None:
        session.modified = True
        assert session.modified

    browser.run(assigned)
    assert browser.run(lambda: session.version) == 1


def test_modified_as_flask_users_set_it(app: TestApp) -> None:
    """``session.modified = True`` after a nested change, and even ``= False``, takes nothing away."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=[]))

    def told(value: bool) -> None:
        session["cart"].append(value)
        session.modified = value
        assert session.modified is value

    browser.run(lambda: told(True))
    browser.run(lambda: told(False))
    assert browser.twin(app.another()).run(lambda: session["cart"]) == [True, False]


def test_a_mapping_as_any_other(app: TestApp) -> None:
    """The methods of a dict do what they do for a dict."""
    browser = app.browser()

    def view() -> None:
        session.update({"a": 1}, b=2)
        assert session.setdefault("c", 3) == 3
        assert session.setdefault("a", 9) == 1
        assert session.pop("b") == 2
        assert session.pop("b", None) is None
        with pytest.raises(KeyError):
            session.pop("b")
        assert sorted(session.items()) == [("a", 1), ("c", 3)]
        assert session == {"a": 1, "c": 3}
        assert session.popitem()[0] in "ac"
        assert len(session) == 1
        session.clear()
        assert not session
        session["z"] = 1

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"z": 1}
    # Once more, on top of what is stored.
    browser.run(lambda: session.clear())
    browser.run(lambda: session.update(a=1, b=2))
    browser.run(view)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"z": 1}


def test_cleared_while_it_is_walked_through(app: TestApp) -> None:
    """An iteration ends when the session is cleared, and shows nothing of what was there."""
    browser = app.browser()
    browser.run(lambda: session.update(a=[1], b=[2], c=[3]))

    def view() -> None:
        keys = iter(session)
        next(keys)
        session.clear()
        session["new"] = 1
        assert list(keys) == []
        assert dict(session) == {"new": 1}
        assert "b" not in session

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"new": 1}


@pytest.mark.parametrize("name", ["visit", "transaction", "save", "strict", "forget"])
def test_keys_in_templates(make_valkey_app: MakeApp, name: str) -> None:
    """``{{ session.visit }}`` shows the key of that name: nothing inside a session hides it."""
    browser = make_valkey_app().browser()
    browser.run(lambda: session.update({name: "mine"}))
    assert browser.run(lambda: render_template_string(f"{{{{ session.{name} }}}}")) == "mine"
    assert (
        browser.run(lambda: (session.clear(), render_template_string(f"{{{{ session.{name} }}}}"))[1]) == ""
    )


# -- around the view ----------------------------------------------------------------------------------------


def test_values_kept_on_g(app: TestApp) -> None:
    """A mutable value that before_request put on g and the view changed is stored."""

    def load() -> None:
        g.cart = session.get("cart")

    app.flask.before_request(load)
    browser = app.browser()
    browser.run(lambda: session.update(cart=[1]))
    browser.run(lambda: g.cart.append(2))
    assert browser.run(lambda: g.cart) == [1, 2]
    assert browser.run(lambda: session.version) == 2


def test_changes_in_after_request_and_teardown(app: TestApp) -> None:
    """What after_request changes is stored with the rest; what a later teardown changes, late (G15)."""

    def after(response: Response) -> Response:
        session["after"] = session.get("after", 0) + 1
        return response

    def teardown(_error: BaseException | None) -> None:
        session["torn"] = session.get("torn", 0) + 1

    app.flask.after_request(after)
    app.flask.teardown_request(teardown)
    browser = app.browser()
    browser.run(lambda: session.update(view=1))
    app.flask.after_request_funcs.clear()
    app.flask.teardown_request_funcs[None].remove(teardown)
    assert browser.run(lambda: dict(session)) == {"view": 1, "after": 1, "torn": 1}


def test_changes_while_the_request_is_torn_down(make_valkey_app: MakeApp) -> None:
    """What a teardown function that was registered before the extension sets is stored, and a receiver's too."""
    from flask import request_tearing_down

    app = make_valkey_app()
    functions = app.flask.teardown_request_funcs.setdefault(None, [])
    browser = app.browser()
    browser.run(lambda: session.update(view=1))
    functions.insert(0, lambda _error: session.update(first=1))

    def tear_down(_app: Flask, **_: Any) -> None:
        session["signal"] = 1

    with request_tearing_down.connected_to(tear_down, app.flask):
        browser.run(lambda: session["view"])
    functions.clear()
    assert browser.run(lambda: dict(session)) == {"view": 1, "first": 1, "signal": 1}


def to_the_end() -> Response:
    """Return a response that holds the request until it is closed."""
    session["c"] = 1
    response = Response("x")
    response.call_on_close(copy_current_request_context(lambda: None))
    return response


@pytest.mark.parametrize(
    "view", [lambda: None, lambda: session.get("a"), lambda: session.update(b=[2]), to_the_end]
)
def test_a_request_is_freed_at_its_end(app: TestApp, view: Callable[[], Any]) -> None:
    """A request, with what was uploaded, does not wait for the garbage collector."""
    browser = app.browser()
    browser.run(lambda: session.update(a=[1]))
    seen = []

    def watched() -> Any:
        seen.append(weakref.ref(request._get_current_object()))
        return view()

    gc.disable()
    try:
        browser.run(watched)
        assert browser.response is not None
        browser.response.close()
        browser.response = None
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


def test_flashes(app: TestApp) -> None:
    """Flashed messages arrive once, at the next request or at this one, with category and as Markup."""
    browser = app.browser()

    def view() -> None:
        flash(Markup("<b>"), "info")
        flash("plain")

    browser.run(view)
    categories = browser.run(lambda: get_flashed_messages(with_categories=True))
    assert categories == [("info", "<b>"), ("message", "plain")]
    assert [type(message) for _, message in categories] == [Markup, str]
    assert browser.run(get_flashed_messages) == []

    def at_once() -> list[str]:
        flash("now")
        return get_flashed_messages()

    assert browser.run(at_once) == ["now"]
    assert browser.run(get_flashed_messages) == []


def test_flashes_of_overlapping_requests(app: TestApp) -> None:
    """Messages flashed while another request flashes or shows its own are neither lost nor shown twice."""
    browser = app.browser()
    browser.run(lambda: flash("first"))
    other = browser.twin()

    def flashing() -> None:
        flash("second")
        other.run(lambda: flash("third"))

    browser.run(flashing)

    def showing() -> list[str]:
        shown = get_flashed_messages()
        other.run(lambda: flash("fourth"))
        return shown

    assert sorted(browser.run(showing)) == ["first", "second", "third"]
    assert browser.run(get_flashed_messages) == ["fourth"]
    assert browser.run(get_flashed_messages) == []


@pytest.mark.parametrize("failure", ["exception", "abort", "handled"])
def test_a_view_that_fails_still_saves(app: TestApp, failure: str) -> None:
    """As in Flask, what a failing view had put into the session is stored, cookie and all."""
    app.flask.register_error_handler(KeyError, lambda _error: ("handled", 418))
    browser = app.browser()

    def view() -> None:
        session["a"] = 1
        if failure == "abort":
            abort(404)
        raise KeyError if failure == "handled" else ValueError

    browser.run(view, status={"exception": 500, "abort": 404, "handled": 418}[failure])
    assert list(browser.set_cookies) == ["session", "session_v"]
    assert browser.run(lambda: dict(session)) == {"a": 1}


def test_an_error_handler_uses_the_session(app: TestApp) -> None:
    """A 500 handler and a 404 handler read and write it as a view does."""

    def answer(error: Any) -> tuple[str, int]:
        session["errors"] = [*session.get("errors", []), error.code]
        return "oops", error.code

    app.flask.register_error_handler(500, answer)
    app.flask.register_error_handler(404, answer)
    browser = app.browser()

    def view() -> None:
        raise ValueError

    browser.run(view, status=500)
    assert browser.get("/nowhere").status_code == 404
    assert browser.run(lambda: session["errors"]) == [500, 404]


# -- errors met while saving --------------------------------------------------------------------------------


def test_the_most_specific_handler_answers(make_valkey_app: MakeApp) -> None:
    """Of handlers for an error met while saving, the one nearest to its class answers."""
    handlers = [(Exception, "any"), (LuaSessionError, "root"), (SessionTooLarge, "class")]
    for last in range(len(handlers)):
        app = make_valkey_app(SESSION_MAX_BYTES=50)
        for handled, text in reversed(handlers[: last + 1]):
            app.flask.register_error_handler(handled, lambda _error, text=text: (text, 413))
        browser = app.browser()
        browser.run(lambda: session.update(a="x" * 100), status=413)
        assert browser.response is not None
        assert browser.response.text == handlers[last][1]
        assert browser.set_cookies == {}
        assert app.keys() == []


@pytest.mark.parametrize("handled", [413, None])
def test_an_error_while_saving_becomes_the_response(make_app: MakeApp, handled: int | None) -> None:
    """Status, body and headers are the error's; nothing of the view's response is left, and no cookie."""
    app = make_app(SESSION_MAX_BYTES=50)
    if handled:
        app.flask.register_error_handler(handled, lambda _error: ("mine", 413, {"X-Mine": "1"}))
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    closed: list[bool] = []

    def view() -> Response:
        session["a"] = "x" * 100
        session.regenerate()  # type: ignore[attr-defined]
        response = Response("view", headers={"X-View": "1"}, content_type="text/plain")
        response.set_cookie("view", "1")
        response.call_on_close(lambda: closed.append(True))
        return response

    browser.run(view, status=413)
    assert browser.response is not None
    assert ("mine" if handled else "too large") in browser.response.text
    assert "X-View" not in browser.response.headers
    assert ("X-Mine" in browser.response.headers) is bool(handled)
    assert browser.response.headers.getlist("Vary") == ["Cookie"]
    assert int(browser.response.headers["Content-Length"]) == len(browser.response.data)
    assert browser.set_cookies == {}
    browser.response.close()
    assert closed == [True]
    assert browser.run(lambda: dict(session)) == {"a": 1}


def test_an_error_while_saving_closes_a_stream_unread(make_valkey_app: MakeApp) -> None:
    """A streamed response that an error takes the place of is closed, and no part of it is sent."""
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    events: list[str] = []

    def view() -> Response:
        session["a"] = "x" * 100

        class Body:
            def __iter__(self) -> Iterator[str]:
                events.append("read")
                return iter(("streamed",))

            def close(self) -> None:
                events.append("closed")

        return Response(Body())  # type: ignore[arg-type]

    browser = app.browser()
    browser.run(view, status=413)
    assert browser.response is not None
    assert "streamed" not in browser.response.text
    browser.response.close()
    assert events == ["closed"]


@pytest.mark.parametrize("known", [True, False])
def test_an_error_handler_that_writes_the_session(app: TestApp, known: bool) -> None:
    """What a handler of an error met while saving mends or adds comes too late: nothing is stored."""

    def answer(_error: TypeError) -> tuple[str, int]:
        session.pop("thing")
        session["handled"] = 1
        return "mine", 422

    app.flask.register_error_handler(TypeError, answer)
    browser = app.browser()
    if known:
        browser.run(lambda: session.update(a=1))
    browser.run(lambda: session.update(b=1, thing=object()), status=422)
    assert browser.response is not None
    assert browser.response.text == "mine"
    assert browser.set_cookies == {}
    assert browser.run(lambda: dict(session)) == ({"a": 1} if known else {})
    assert len(app.keys()) == int(known)


def test_a_commit_before_the_error_keeps_its_cookies(make_app: MakeApp) -> None:
    """An id that an applied commit made is sent even if the rest of the request fails to be saved."""
    app = make_app(SESSION_MAX_BYTES=50)
    browser = app.browser()

    def view() -> None:
        session["a"] = 1
        session.commit()  # type: ignore[attr-defined]
        session["b"] = "x" * 100

    browser.run(view, status=413)
    assert list(browser.set_cookies) == ["session", "session_v"]
    assert browser.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("fails", ["view and save", "view and commit", "after_request"])
def test_a_commit_before_a_failure_keeps_its_cookies(
    make_valkey_app: MakeApp, fails: str, rotates: bool
) -> None:
    """The page of an error that none of the app's handlers answers carries the id as well: nobody is logged out."""
    app = make_valkey_app(PROPAGATE_EXCEPTIONS=False)
    browser = app.browser()
    if rotates:
        browser.run(lambda: session.update(user="ada"))

    def view() -> None:
        session["a"] = 1
        if rotates:
            session.regenerate()  # type: ignore[attr-defined]
        session.commit()  # type: ignore[attr-defined]
        if fails == "after_request":
            return
        session["b"] = object()
        if fails == "view and commit":
            session.commit()  # type: ignore[attr-defined]
        raise ValueError

    def fail(_response: Response) -> Response:
        raise ValueError

    if fails == "after_request":
        app.flask.after_request_funcs.setdefault(None, []).append(fail)
    browser.run(view, status=500)
    assert list(browser.set_cookies) == ["session", "session_v"]
    assert browser.response is not None
    assert len(browser.response.headers.getlist("Set-Cookie")) == 2
    app.flask.after_request_funcs.clear()
    assert browser.run(lambda: dict(session)) == {"a": 1} | ({"user": "ada"} if rotates else {})


@pytest.mark.parametrize("streamed", [False, True])
def test_after_request_sees_the_page_of_an_error(make_valkey_app: MakeApp, streamed: bool) -> None:
    """What after_request functions add, headers for CORS say, is on the error's page too, as on each other one."""
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    seen: list[int] = []

    def allow(response: Response) -> Response:
        seen.append(response.status_code)
        response.headers["Access-Control-Allow-Origin"] = "*"
        session["seen"] = "too late"
        return response

    app.flask.after_request(allow)
    browser = app.browser()

    def view() -> Response:
        session["a"] = "x" * 100
        return Response(iter(["a", "b"]) if streamed else "ab")

    browser.run(view, status=413)
    assert seen == [200, 413]
    assert browser.response is not None
    assert browser.response.headers["Access-Control-Allow-Origin"] == "*"
    assert browser.response.headers.getlist("Vary") == ["Cookie"]
    assert browser.set_cookies == {}
    assert app.keys() == []


def test_an_after_request_that_fails_on_the_page_of_an_error(make_valkey_app: MakeApp) -> None:
    """Where it fails on the answer to an error met while saving, that is a 500, as in Flask."""
    app = make_valkey_app(SESSION_MAX_BYTES=50, PROPAGATE_EXCEPTIONS=False)

    def fail(response: Response) -> Response:
        if response.status_code == 413:
            raise ValueError
        return response

    app.flask.after_request(fail)
    browser = app.browser()
    browser.run(lambda: session.update(a="x" * 100), status=500)
    assert browser.set_cookies == {}
    assert app.keys() == []


@pytest.mark.parametrize("how", ["subclass", "wrapped before", "wrapped after"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_process_response_of_the_apps_own(valkey: Server, how: str, fails: bool) -> None:
    """What an app does around it is done once to what is sent, and whatever fails there, cookies go once."""

    class Mine(Flask):
        def process_response(self, response: Response) -> Response:  # type: ignore[override]
            return around(super().process_response, response)

    def around(process: Callable[[Response], Any], response: Response) -> Response:
        answer: Response = process(response)
        answer.headers.add("X-Mine", "1")
        if fails and answer.status_code == 200:
            raise ValueError
        return answer

    app = (Mine if how == "subclass" else Flask)("mine")
    app.config.update(SESSION_REDIS_URL=valkey.url, SESSION_KEY_PREFIX=f"{how}{fails}:", SESSION_MAX_BYTES=50)
    for when in ("wrapped before", "wrapped after"):
        if how == when:
            app.process_response = partial(around, app.process_response)  # type: ignore[method-assign]
        if when == "wrapped before":
            Session(app)

    @app.route("/<int:size>")
    def view(size: int) -> str:
        session["a"] = "x" * size
        return "x"

    client = app.test_client()
    answer = client.get("/1")
    names = [header.partition("=")[0] for header in answer.headers.getlist("Set-Cookie")]
    assert answer.status_code == (500 if fails else 200)
    # One that fails around ours is none of ours, and Flask's page for it comes by here anew.
    assert names == ["session", "session_v"]
    answer = client.get("/100")
    assert answer.status_code == 413
    assert answer.headers.getlist("X-Mine") == ["1"]
    assert answer.headers.getlist("Set-Cookie") == []


def test_a_handler_that_raises_the_error_again(make_valkey_app: MakeApp) -> None:
    """It is asked once, and what it raises is a 500, as in Flask."""
    app = make_valkey_app(SESSION_MAX_BYTES=50, PROPAGATE_EXCEPTIONS=False)
    asked: list[Exception] = []

    def again(error: SessionTooLarge) -> Response:
        asked.append(error)
        raise error

    app.flask.register_error_handler(SessionTooLarge, again)
    app.browser().run(lambda: session.update(a="x" * 100), status=500)
    assert len(asked) == 1


@pytest.mark.parametrize("new", [False, True])
def test_what_an_error_takes_the_place_of_is_closed(make_valkey_app: MakeApp, new: bool) -> None:
    """Once, when the answer is: the view's response, or the one that an after_request function made of it."""
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    closed: list[str] = []

    def make(name: str) -> Response:
        response = Response(name)
        response.call_on_close(lambda: closed.append(name))
        return response

    app.flask.after_request(lambda response: make("new") if new and response.status_code == 200 else response)

    def view() -> Response:
        session["a"] = "x" * 100
        return make("old")

    browser = app.browser()
    browser.run(view, status=413)
    assert closed == ["new" if new else "old"]
    assert browser.response is not None
    browser.response.close()
    assert len(closed) == 1


def test_a_page_that_is_sent_again_and_again(
    make_valkey_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler may answer with one and the same response: what it takes the place of is closed once all the same.

    One that fails to close changes nothing about the answer, and is logged.
    """
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    page = Response("too large", 413)
    app.flask.register_error_handler(413, lambda _error: page)
    closed: list[int] = []

    def close(number: int) -> None:
        closed.append(number)
        if number == 2:
            raise RuntimeError

    browser = app.browser()
    for number in range(3):

        def view(number: int = number) -> Response:
            session["a"] = "x" * 100
            response = Response("x")
            response.call_on_close(lambda: close(number))
            return response

        browser.run(view, status=413)
        assert closed == [*range(number + 1)]
    assert "did not close" in caplog.text


def test_a_handler_that_answers_with_what_the_view_made(make_valkey_app: MakeApp) -> None:
    """What is sent in the end is not taken for what was replaced."""
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    made: list[Response] = []
    app.flask.register_error_handler(413, lambda _error: made[0])

    def view() -> Response:
        session["a"] = "x" * 100
        made.append(Response("mine"))
        return made[0]

    browser = app.browser()
    browser.run(view)
    assert browser.response is not None
    assert browser.response.text == "mine"
    assert browser.set_cookies == {}
    browser.response.close()


def test_a_page_that_is_sent_in_the_end_carries_the_id(make_valkey_app: MakeApp) -> None:
    """Where the answer to an error of saving fails as well, the page that Flask falls back to is whole."""
    app = make_valkey_app(PROPAGATE_EXCEPTIONS=False)
    closed: list[bool] = []

    def page(_error: Exception) -> tuple[Response, int]:
        response = Response(iter(["a ", "page"]))
        response.call_on_close(lambda: closed.append(True))
        return response, 500

    def fail(response: Response) -> Response:
        if response.status_code == 418:
            raise RuntimeError
        return response

    app.flask.register_error_handler(500, page)
    app.flask.register_error_handler(TypeError, lambda _error: ("cannot", 418))
    app.flask.after_request(fail)
    browser = app.browser()

    def view() -> None:
        session["a"] = 1
        session.commit()  # type: ignore[attr-defined]
        session["b"] = object()
        raise ValueError

    browser.run(view, status=500)
    assert browser.response is not None
    assert browser.response.text == "a page"
    assert list(browser.set_cookies) == ["session", "session_v"]
    browser.response.close()
    assert closed == [True]


def test_process_response_takes_its_argument_by_name(make_valkey_app: MakeApp) -> None:
    """As Flask's own does."""
    app = make_valkey_app().flask
    with app.test_request_context():
        response = Response("x")
        assert app.process_response(response=response) is response
        assert app.process_response(response) is response


@pytest.mark.parametrize("error", ["type", "conflict", "large"])
def test_a_refresh_goes_with_no_error(make_app: MakeApp, error: str) -> None:
    """A TTL refresh that was met while reading repeats the id on a response, but not on an error's."""
    app = make_app(
        SESSION_PERMANENT=True,
        SESSION_TOUCH_INTERVAL=0,
        SESSION_CACHE_TTL=0,
        SESSION_CONFLICT="raise",
        SESSION_MAX_BYTES=1000,
    )
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    twin = browser.twin()
    browser.run(lambda: session["n"])
    assert list(browser.set_cookies) == ["session"]

    def view() -> None:
        session["n"] += 1
        if error == "conflict":
            twin.run(lambda: session.update(n=5))
        if error == "type":
            session["n"] = object()
        if error == "large":
            session["n"] = "x" * 2000

    browser.run(view, status={"type": 500, "conflict": 409, "large": 413}[error])
    assert browser.set_cookies == {}
    assert browser.run(lambda: session["n"]) == (5 if error == "conflict" else 1)


def test_errors_are_raised_in_testing(make_valkey_app: MakeApp) -> None:
    """With TESTING a TypeError met while saving reaches the test, as any unhandled error does in Flask."""
    app = make_valkey_app(TESTING=True)
    with pytest.raises(TypeError, match="'a'"):
        app.browser().run(lambda: session.update(a=object()))


# -- the interface and the extension ------------------------------------------------------------------------


def test_saving_without_a_session(make_valkey_app: MakeApp) -> None:
    """After an open that failed Flask saves None; that does nothing."""
    app = make_valkey_app().flask
    response = Response("x")
    with app.test_request_context():
        app.session_interface.save_session(app, None, response)  # type: ignore[arg-type]
        app.session_interface.save_session(app, NullSession(), response)
    assert "Set-Cookie" not in response.headers
    assert "Vary" not in response.headers


def test_the_null_session_is_flasks(make_valkey_app: MakeApp) -> None:
    """make_null_session and is_null_session are untouched; a LuaSession is no null session."""
    app = make_valkey_app().flask
    null = app.session_interface.make_null_session(app)
    assert type(null) is NullSession
    assert app.session_interface.is_null_session(null)
    with app.test_request_context():
        opened = app.session_interface.open_session(app, request)
        assert type(opened) is LuaSession
        assert not app.session_interface.is_null_session(opened)


def test_no_secret_key_is_needed(make_valkey_app: MakeApp) -> None:
    """Ids are proven by their secret, so an app without SECRET_KEY has sessions."""
    app = make_valkey_app()
    assert app.flask.secret_key is None
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert browser.run(lambda: session["a"]) == 1


def test_regenerate_by_the_interface(app: TestApp) -> None:
    """app.session_interface.regenerate(session) rotates, for code written for Flask-Session."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    before = browser.run(lambda: (session.sid, session.handle))
    browser.run(lambda: app.flask.session_interface.regenerate(session))  # type: ignore[attr-defined]
    after = browser.run(lambda: (session.sid, session.handle))
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert browser.run(lambda: dict(session)) == {"a": 1}


@pytest.mark.parametrize("served", [False, True])
def test_an_app_is_freed(make_valkey_app: MakeApp, served: bool) -> None:
    """Nothing of luasession keeps an app alive, neither one that served requests nor one that did not."""
    app = make_valkey_app(SESSION_MAX_BYTES=50)
    if served:
        browser = app.browser()
        browser.run(lambda: session.update(a=[1]))
        browser.run(lambda: session["a"].append(1))
        browser.run(lambda: session.clear())
        browser.run(lambda: session.update(a="x" * 100), status=413)
        del browser
    references = [weakref.ref(app.flask), weakref.ref(app.flask.session_interface)]
    del app
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_freed_app_closes_its_connections(make_valkey_app: MakeApp) -> None:
    """No socket is left to the garbage collector, which would warn of it in whatever test runs then."""
    app = make_valkey_app()
    app.browser().run(lambda: session.update(a=1))
    [connection] = app.flask.session_interface._store.calls.client._connections._idle  # type: ignore[attr-defined]
    assert connection._sock is not None
    del app
    gc.collect()
    assert connection._sock is None


def make_two(make_app: MakeApp) -> list[TestApp]:
    """Return two apps that one extension has been given, each with a prefix of its own."""
    apps = [make_app(), make_app()]
    extension = Session()
    for app in apps:
        extension.init_app(app.flask)
    return apps


def test_one_extension_for_several_apps(make_app: MakeApp) -> None:
    """One Session serves several apps, each with its own settings, sessions and counters."""
    one, two = make_two(make_app)
    browsers = [one.browser(), two.browser()]
    for browser, n in zip(browsers, (1, 2), strict=True):
        browser.run(lambda n=n: session.update(n=n))
    assert [browser.run(lambda: dict(session)) for browser in browsers] == [{"n": 1}, {"n": 2}]
    assert browsers[0].twin(two).run(lambda: dict(session)) == {}
    assert (len(one.keys()), len(two.keys())) == (1, 1)
    assert one.flask.extensions["luasession"] is not two.flask.extensions["luasession"]
    assert (one.stats()["commits"], two.stats()["commits"]) == (1, 1)


def test_app_factories(make_app: MakeApp) -> None:
    """Session() made at import time and init_app in the factory: each app is set up by its own config."""
    extension = Session()
    shared = make_app()

    def create_app(**config: Any) -> Flask:
        app = Flask("factory")
        app.config.update(SESSION_REDIS_URL=shared.flask.config["SESSION_REDIS_URL"], **config)
        extension.init_app(app)
        app.add_url_rule("/set", "set", lambda: (session.update(a=1), "set")[1])
        app.add_url_rule("/get", "get", lambda: repr(dict(session)))
        return app

    one = create_app(SESSION_KEY_PREFIX=shared.prefix)
    two = create_app(SESSION_KEY_PREFIX=shared.prefix, SESSION_COOKIE_NAME="other")
    client = one.test_client()
    client.get("/set")
    assert client.get("/get").text == "{'a': 1}"
    [cookie] = [cookie for cookie in client._cookies.values() if cookie.key == "session"]
    elsewhere = two.test_client()
    elsewhere.set_cookie("other", cookie.value)
    assert elsewhere.get("/get").text == "{'a': 1}"


def test_set_up_twice(app: TestApp) -> None:
    """init_app a second time takes the newer settings and saves late changes once."""
    app.flask.config["SESSION_KEY_PREFIX"] = app.prefix + "again:"
    Session(app.flask)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert app.keys() == [(app.prefix + browser.run(lambda: session.handle)).encode()]
    assert streamed(browser, lambda: session.update(late=1)) == "begun,None"
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1, "late": 1}, 2)


def test_flasks_own_interface_is_replaced(make_valkey_app: MakeApp) -> None:
    """The app's interface is luasession's, and open_session returns a lazy LuaSession for each request."""
    app = make_valkey_app()
    assert isinstance(app.flask.session_interface, LuaSessionInterface)
    assert not isinstance(app.flask.session_interface, SecureCookieSessionInterface)
    before = app.stats()
    for _ in range(3):
        app.browser_with_header(f"session={'A' * 22}.{'B' * 43}").get("/untouched")
    assert app.stats() == before


@pytest.mark.parametrize("handle", ["view", "signal"])
def test_async_views(make_valkey_app: MakeApp, handle: str) -> None:
    """An async view uses the session as any other; an async receiver of a signal is awaited."""
    from luasession.signals import session_created

    app = make_valkey_app()
    seen: list[str] = []

    async def receive(_sender: Any, handle: str, **_about: Any) -> None:
        seen.append(handle)

    if handle == "signal":
        session_created.connect(receive, app.flask)

    async def view() -> str:
        session["a"] = 1
        return "done"

    app.flask.add_url_rule("/async", view_func=view)
    browser = app.browser()
    assert browser.get("/async").status_code == 200
    assert browser.run(lambda: dict(session)) == {"a": 1}
    assert seen == ([browser.run(lambda: session.handle)] if handle == "signal" else [])
