"""Flask-Login: a new id and the principal at each log-in and log-out, and nothing in flight over them."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, Response, request_finished, session, stream_with_context
from flask.sessions import SecureCookieSessionInterface
from flask_login import (
    LoginManager,
    UserMixin,
    confirm_login,
    current_user,
    login_user,
    logout_user,
    user_logged_in,
)

from luasession import Session, Sessions, session_created, session_discarded, session_rotated

from .conftest import Browser, MakeApp, TestApp

# Flask-Login 0.6.3 calls datetime.utcnow().
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


class User(UserMixin):
    def __init__(self, user_id: Any) -> None:
        self.id = user_id

    def get_id(self) -> Any:
        return self.id


def add_login(flask: Flask, **attributes: Any) -> LoginManager:
    manager = LoginManager()
    for name, value in attributes.items():
        setattr(manager, name, value)
    manager.user_loader(lambda user_id: User(user_id) if user_id != "deleted" else None)
    flask.secret_key = "key"
    manager.init_app(flask)
    return manager


@pytest.fixture
def app(make_valkey_app: MakeApp) -> TestApp:
    app = make_valkey_app()
    add_login(app.flask)
    return app


def sessions(app: TestApp) -> Sessions:
    found: Sessions = app.flask.extensions["luasession"]
    return found


def handles(app: TestApp, principal: str = "7") -> list[str]:
    return [info.handle for info in sessions(app).sessions_of(principal)]


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


def log_in(browser: Browser, user_id: Any = 7, **how: Any) -> None:
    browser.run(lambda: login_user(User(user_id), **how))


def see() -> tuple[str | None, str | None]:
    """Return whom Flask-Login and the session take this browser for."""
    user_id = current_user.get_id() if current_user.is_authenticated else None
    return user_id, session.principal


def counted(app: TestApp, signal: Any, function: Callable[[], Any]) -> int:
    told: list[Any] = []

    def receive(_sender: Any, **about: Any) -> None:
        told.append(about)

    with signal.connected_to(receive, app.flask):
        function()
    return len(told)


def test_a_log_in_rotates_and_sets_the_principal(app: TestApp) -> None:
    """The id is a new one, its session keeps data and handle, and is listed as the user's."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=["book"]))
    before = browser.cookies["session"]
    log_in(browser)
    assert browser.cookies["session"] != before
    assert browser.run(lambda: (session["cart"], session.principal)) == (["book"], "7")
    assert handles(app) == [before.partition(".")[0]]


def test_a_log_in_of_a_new_visitor(app: TestApp) -> None:
    """Without a session a log-in starts one of the user's; there is nothing to rotate."""
    browser = app.browser()
    assert counted(app, session_rotated, lambda: log_in(browser)) == 0
    assert browser.run(see) == (7, "7")
    assert handles(app) == [handle_of(browser)]


def test_a_log_in_of_a_new_visitor_stays_one(app: TestApp) -> None:
    """What is written once the response is made, an audit say, takes nothing away from a first log-in."""
    browser = app.browser()

    def audit(*_: Any, **_about: Any) -> None:
        session["audited"] = 1

    with request_finished.connected_to(audit, app.flask):
        assert counted(app, session_rotated, lambda: log_in(browser)) == 0
    assert browser.run(lambda: (see(), session["audited"])) == ((7, "7"), 1)
    assert handles(app) == [handle_of(browser)]


def test_fixation(app: TestApp) -> None:
    """Whoever planted a session in the victim's browser before the log-in sees nothing of it afterwards."""
    attacker = app.browser()
    attacker.run(lambda: session.update(a=1))
    victim = attacker.twin()
    log_in(victim)
    assert attacker.run(lambda: (dict(session), current_user.is_authenticated)) == ({}, False)
    assert attacker.twin(app.another()).run(lambda: dict(session)) == {}
    assert victim.run(see) == (7, "7")


def test_log_out_everywhere(app: TestApp) -> None:
    """revoke_all of the user's id ends what Flask-Login has logged in, on all devices."""
    laptop, phone, other = app.browser(), app.browser(), app.browser()
    log_in(laptop)
    log_in(phone)
    log_in(other, 8)
    assert sessions(app).revoke_all("7") == 2
    assert laptop.run(see) == phone.run(see) == (None, None)
    assert other.run(see) == (8, "8")


def test_a_log_out_rotates_and_clears_the_principal(app: TestApp) -> None:
    """The session is nobody's, under a new id, and what Flask-Login left in it is still there."""
    browser = app.browser()
    browser.run(lambda: session.update(cart=["book"]))
    log_in(browser)
    before = browser.twin()
    browser.run(logout_user)
    assert browser.cookies["session"] != before.cookies["session"]
    assert handles(app) == []
    assert browser.run(lambda: (dict(session), session.principal)) == ({"cart": ["book"]}, None)
    assert before.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("logged_in", [False, True], ids=["log-in", "log-out"])
def test_requests_in_flight_are_dropped(app: TestApp, logged_in: bool) -> None:
    """What a request writes that was open when its browser logged in or out is not stored, and a signal tells."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    if logged_in:
        log_in(browser)
    other = browser.twin()

    def view() -> None:
        session["b"] = session["a"] + 1
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(logout_user if logged_in else lambda: login_user(User(7)))

    assert counted(app, session_discarded, lambda: browser.run(view)) == 1
    assert browser.set_cookies == {}
    assert "b" not in other.run(lambda: dict(session))
    assert other.run(see) == ((None, None) if logged_in else (7, "7"))


def test_a_session_from_before_the_hooks_is_logged_out_as_well(app: TestApp) -> None:
    """Logged in while the hooks were off it has no principal; its log-out rotates and drops what is in flight."""
    off = app.another(SESSION_LOGIN_HOOKS=False)
    add_login(off.flask)
    early = off.browser()
    log_in(early)
    browser, other = early.twin(app), early.twin(app)

    def view() -> None:
        session["b"] = session["_user_id"]
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(logout_user)

    browser.run(view)
    assert other.cookies["session"] != early.cookies["session"]
    assert other.run(lambda: dict(session)) == {}


def test_the_same_user_logs_in_again(app: TestApp) -> None:
    """It is a new id, and what is in flight goes on, since it is the same user's; twice in a request is once."""
    browser = app.browser()
    log_in(browser)
    other, before = browser.twin(), browser.cookies["session"]

    def view() -> None:
        session["b"] = session["_user_id"]
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: (login_user(User(7)), login_user(User(7))))

    assert counted(app, session_rotated, lambda: browser.run(view)) == 1
    assert other.cookies["session"] != before
    assert other.run(lambda: session["b"]) == 7


@pytest.mark.parametrize("user_id", [7, 8], ids=["same", "another"])
def test_out_and_in_again_in_one_request(app: TestApp, user_id: int) -> None:
    """A request that logs somebody out and somebody in drops what is in flight, whoever the two are."""
    browser = app.browser()
    log_in(browser)
    other = browser.twin()

    def view() -> None:
        session["b"] = session["_user_id"]
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: (logout_user(), login_user(User(user_id))))

    browser.run(view)
    assert other.run(see) == (user_id, str(user_id))
    assert "b" not in other.run(lambda: dict(session))
    assert [bool(handles(app, "7")), bool(handles(app, "8"))] == [user_id == 7, user_id == 8]


def test_remember_me(app: TestApp) -> None:
    """A user who is reloaded from the remember-me cookie is logged in: a new id, and a session of his."""
    laptop = app.browser()
    log_in(laptop, "7", remember=True)
    assert "remember_token" in laptop.cookies
    sessions(app).revoke_all("7")
    # The browser has a session again by now, with nobody in it.
    anonymous = app.browser()
    anonymous.run(lambda: session.update(cart=["book"]))
    planted = anonymous.cookies["session"]
    laptop.client.set_cookie("session", planted)
    assert laptop.run(see) == ("7", "7")
    assert laptop.cookies["session"] != planted
    assert handles(app) == [planted.partition(".")[0]]
    assert anonymous.run(lambda: dict(session)) == {}


def test_remember_me_of_a_user_who_is_no_more(app: TestApp) -> None:
    """A remember-me cookie that Flask-Login finds nobody for is no log-in."""
    browser = app.browser()
    log_in(browser, "deleted", remember=True)
    browser.client.delete_cookie("session")
    assert browser.run(see) == (None, None)


def test_remember_me_while_the_response_is_sent(app: TestApp) -> None:
    """Too late for a new id, the user is known for this request and logged in by the next one."""
    browser = app.browser()
    log_in(browser, "7", remember=True)
    sessions(app).revoke_all("7")
    planted = app.browser()
    planted.run(lambda: session.update(cart=["book"]))
    browser.client.set_cookie("session", planted.cookies["session"])

    def stream() -> Response:
        session["cart"].append("pen")

        @stream_with_context
        def parts() -> Any:
            yield f"{current_user.get_id()} {sorted(session)}"

        return Response(parts())

    app.flask.after_request_funcs.clear()  # Flask-Login's own looks for the user before
    browser.run(stream)
    assert browser.response is not None
    assert browser.response.text == "7 ['cart']"
    assert planted.run(lambda: (dict(session), session.principal)) == ({"cart": ["book", "pen"]}, None)
    assert browser.run(see) == ("7", "7")
    assert planted.run(lambda: dict(session)) == {}


def test_a_confirmed_log_in_rotates(app: TestApp) -> None:
    """Logged in afresh, say by the password again, a session has a new id, and requests in flight go on."""
    browser = app.browser()
    log_in(browser, fresh=False)
    other, before = browser.twin(), browser.cookies["session"]

    def view() -> None:
        session["b"] = session["_user_id"]
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(confirm_login)

    browser.run(view)
    assert other.cookies["session"] != before
    assert other.run(lambda: (session["_fresh"], session["b"], session.principal)) == (True, 7, "7")


def agent(browser: Browser, name: str) -> Browser:
    browser.client.environ_base["HTTP_USER_AGENT"] = name
    return browser


@pytest.mark.parametrize("mode", ["basic", "strong"])
def test_session_protection(app: TestApp, mode: str) -> None:
    """A session that Flask-Login logs out as a stolen one is nobody's; one that it only marks is still the user's."""
    app.flask.config["SESSION_PROTECTION"] = mode
    browser = agent(app.browser(), "mine")
    log_in(browser, "7")
    before = browser.cookies["session"]
    assert browser.run(see) == ("7", "7")
    thief = agent(browser.twin(), "another")
    assert thief.run(see) == (("7", "7") if mode == "basic" else (None, None))
    assert len(handles(app)) == (1 if mode == "basic" else 0)
    assert thief.cookies["session"] == before


def test_session_protection_of_a_visitor(app: TestApp) -> None:
    """Strong protection of a session in which nobody is logged in does not make it anybody's."""
    app.flask.config["SESSION_PROTECTION"] = "strong"
    browser = app.browser()
    browser.run(lambda: session.update(cart=["book"]))
    before = browser.cookies["session"]
    assert browser.run(see) == (None, None)
    assert browser.cookies["session"] == before


@pytest.mark.parametrize("user_id", [None, "", 0, "Ünal"])
def test_ids_of_users(app: TestApp, user_id: Any) -> None:
    """The principal is the text of the id, and none where Flask-Login knows of none."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    log_in(browser, user_id)
    assert browser.run(lambda: session.principal) == (None if user_id is None else str(user_id))


def test_another_attribute_of_a_user(make_valkey_app: MakeApp) -> None:
    """The principal is what Flask-Login keeps of a user."""
    app = make_valkey_app()
    add_login(app.flask, id_attribute="get_token")
    user = User(7)
    user.get_token = lambda: "t-7"  # type: ignore[attr-defined]
    browser = app.browser()
    browser.run(lambda: login_user(user))
    assert handles(app, "t-7") == [handle_of(browser)]


def test_users_without_a_session(make_valkey_app: MakeApp) -> None:
    """Whoever comes with a token instead gets no session, by being known nor by a log-out."""
    app = make_valkey_app()
    add_login(app.flask).request_loader(lambda request: User(7))
    browser = app.browser()
    assert counted(app, session_created, lambda: browser.run(lambda: current_user.get_id())) == 0
    browser.run(lambda: (current_user.get_id(), logout_user()))
    assert browser.set_cookies == {}
    assert app.keys() == []


def test_a_log_out_of_nobody(app: TestApp) -> None:
    """It costs no commit, and a visitor's session keeps its id."""
    nobody, visitor = app.browser(), app.browser()
    nobody.run(logout_user)
    assert nobody.set_cookies == {}
    visitor.run(lambda: session.update(cart=[1]))
    visitor.run(lambda: session["cart"])
    assert counted(app, session_rotated, lambda: visitor.run(logout_user)) == 0
    assert visitor.run(lambda: session.version) == 1


@pytest.mark.parametrize("end", ["clear", "destroy"])
def test_a_log_out_that_ends_the_session(app: TestApp, end: str) -> None:
    """Before or after logout_user(), clear() and destroy() end the session and its cookie as ever."""
    for order in (1, -1):
        browser = app.browser()
        log_in(browser)
        handle = handle_of(browser)
        browser.run(lambda order=order: [each() for each in (logout_user, getattr(session, end))[::order]])
        assert browser.cookies == {}
        assert set(app.stored(handle)) == {b"@t"}
        assert handles(app) == []


def test_hooks_off(make_valkey_app: MakeApp) -> None:
    """SESSION_LOGIN_HOOKS = False leaves id and principal to the app."""
    app = make_valkey_app(SESSION_LOGIN_HOOKS=False)
    add_login(app.flask)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    before = browser.cookies["session"]
    log_in(browser)
    assert browser.run(see) == (7, None)
    assert browser.cookies["session"] == before


def test_flask_login_comes_first(make_valkey_app: MakeApp) -> None:
    """A login manager that was there before Session(app) is followed as one that comes later."""
    first = make_valkey_app()
    flask = Flask("first")
    flask.config.update({k: v for k, v in first.flask.config.items() if k.startswith("SESSION_")})
    add_login(flask)
    Session(flask)
    flask.add_url_rule("/in", view_func=lambda: str(login_user(User(7))))
    assert flask.test_client().get("/in").text == "True"
    assert len(flask.extensions["luasession"].sessions_of("7")) == 1


def test_a_login_manager_after_the_first_context(make_valkey_app: MakeApp) -> None:
    """A request context from before there was a login manager does not end the looking for one."""
    app = make_valkey_app()
    with app.flask.test_request_context():
        assert session.get("a") is None
    add_login(app.flask)
    browser = app.browser()
    log_in(browser)
    assert handles(app) == [handle_of(browser)]


def test_several_apps(app: TestApp, make_valkey_app: MakeApp) -> None:
    """An app follows its own log-ins, once each, and one with hooks off none while others have them on."""
    other, off = make_valkey_app(), make_valkey_app(SESSION_LOGIN_HOOKS=False)
    add_login(other.flask)
    add_login(off.flask)
    for each in (app, other, off):
        log_in(each.browser())
    assert [len(handles(each)) for each in (app, other, off)] == [1, 1, 0]


def test_a_session_of_somebody_else(app: TestApp) -> None:
    """An app that has changed its session interface since is left alone."""
    browser = app.browser()
    log_in(browser)
    assert user_logged_in.has_receivers_for(app.flask)
    app.flask.session_interface = SecureCookieSessionInterface()
    other = app.browser()

    def view() -> list[str]:
        login_user(User(7))
        confirm_login()
        keys = sorted(session)
        logout_user()
        return keys

    assert other.run(view) == ["_fresh", "_id", "_user_id"]


def test_an_app_that_nobody_holds_is_freed(make_valkey_app: MakeApp) -> None:
    """The hooks hold no app, and go with it."""
    app = make_valkey_app()
    add_login(app.flask)
    browser = app.browser()
    log_in(browser)
    assert user_logged_in.has_receivers_for(app.flask)
    flask = weakref.ref(app.flask)
    del app, browser
    gc.collect()
    assert flask() is None


def test_flask_login_is_not_imported() -> None:
    """Neither import luasession nor an app without a login manager imports flask_login."""
    program = (
        "import sys; from flask import Flask; from luasession import Session;"
        "app = Flask('x'); Session(app); app.add_url_rule('/', view_func=lambda: 'ok');"
        "assert app.test_client().get('/').text == 'ok'; print('flask_login' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_login_manager_of_another_kind(make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an app calls its login manager need not be Flask-Login's, which need not be installed."""
    monkeypatch.setitem(sys.modules, "flask_login", None)
    app = make_valkey_app()
    app.flask.login_manager = object()  # type: ignore[attr-defined]
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert browser.run(lambda: dict(session)) == {"a": 1}
