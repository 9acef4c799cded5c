"""Extensions that live in the session, over real HTTP with requests in parallel: Flask-WTF, Flask-Security."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Thread
from typing import Any
from uuid import uuid4

import pytest
from flask import Flask, session
from flask_security import RoleMixin, Security, UserDatastore, UserMixin, auth_required, current_user
from flask_security.datastore import Datastore
from flask_wtf import CSRFProtect, FlaskForm
from werkzeug.serving import make_server
from wtforms import StringField

from luasession import Session, session_conflict

from .servers import Server
from .web import Web, WebBrowser

# Flask-Login 0.6.3 calls datetime.utcnow().
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


@contextmanager
def serving(app: Flask) -> Iterator[Web]:
    """Serve an app by threads on a free port until the block ends."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Web(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_app(server: Server) -> Flask:
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="key",
        SESSION_REDIS_URL=server.url,
        SESSION_KEY_PREFIX=f"t{uuid4().hex[:8]}:",
    )
    Session(app)
    app.add_url_rule("/set/<key>", view_func=set_key)
    app.add_url_rule("/show", view_func=lambda: dict(session))
    return app


def set_key(key: str) -> str:
    time.sleep(0.05)
    session[key] = key
    return "ok"


def shown(browser: WebBrowser) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(browser.request("/show")[1])
    return found


# -- Flask-WTF --------------------------------------------------------------------------------------


class Note(FlaskForm):
    text = StringField()


@pytest.fixture
def notes(valkey: Server) -> Iterator[Web]:
    """An app with a form, all of it protected by CSRF tokens."""
    app = make_app(valkey)
    CSRFProtect(app)

    @app.route("/note", methods=["GET", "POST"])
    def note() -> Any:
        form = Note()
        if form.validate_on_submit():
            time.sleep(0.05)
            session[f"note {form.text.data}"] = form.text.data
            return "stored"
        return str(form.csrf_token)

    @app.route("/rotate")
    def rotate() -> str:
        session.regenerate()  # type: ignore[attr-defined]
        return "ok"

    with serving(app) as web:
        yield web


def token(browser: WebBrowser) -> str:
    found = re.search(rb'value="([^"]+)"', browser.request("/note")[1])
    assert found is not None
    return found[1].decode()


def test_a_form_is_posted(notes: Web) -> None:
    """With its token a form is taken; without one, with another browser's or with none's session it is refused."""
    browser, other = notes.browser(), notes.browser()
    given = token(browser)
    assert browser.request("/note", form={"csrf_token": given, "text": "a"})[:2] == (200, b"stored")
    assert browser.request("/note", form={"text": "b"})[0] == 400
    assert browser.request("/note", form={"csrf_token": token(other), "text": "b"})[0] == 400
    assert notes.browser().request("/note", form={"csrf_token": given, "text": "b"})[0] == 400
    assert shown(browser)["note a"] == "a"


def test_tokens_survive_a_rotation(notes: Web) -> None:
    """A form that was opened before the id was rotated can be sent after it."""
    browser = notes.browser()
    given, before = token(browser), browser.cookies["session"]
    browser.request("/rotate")
    assert browser.cookies["session"] != before
    assert browser.request("/note", form={"csrf_token": given, "text": "a"})[:2] == (200, b"stored")


def test_forms_of_parallel_tabs(notes: Web) -> None:
    """Forms in several tabs, opened and sent at the same time beside other requests, are all taken and stored."""
    browser = notes.browser()
    token(browser)
    tabs = [notes.browser(browser.cookies) for _ in range(4)]
    begun = Barrier(len(tabs) + 2)

    def fill_in(number: int) -> tuple[int, bytes]:
        given = token(tabs[number])
        begun.wait(30)
        return tabs[number].request("/note", form={"csrf_token": given, "text": str(number)})[:2]

    def read() -> tuple[int, bytes]:
        begun.wait(30)
        return notes.browser(browser.cookies).request("/set/other")[:2]

    with ThreadPoolExecutor(len(tabs) + 2) as pool:
        answers = [pool.submit(fill_in, number) for number in range(len(tabs))]
        answers += [pool.submit(read) for _ in range(2)]
        assert sorted(each.result() for each in answers) == [(200, b"ok")] * 2 + [(200, b"stored")] * len(
            tabs
        )
    found = shown(notes.browser({"session": browser.cookies["session"]}))
    assert {key for key in found if key.startswith("note ")} == {f"note {number}" for number in range(4)}
    assert found["other"] == "other"


# -- Flask-Security ---------------------------------------------------------------------------------


class Role(RoleMixin):
    name = "none"


class User(UserMixin):
    fs_uniquifier = email = password = ""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Users(Datastore, UserDatastore):
    """Users in a list."""

    def __init__(self) -> None:
        Datastore.__init__(self, None)
        UserDatastore.__init__(self, User, Role)
        self.all: list[User] = []

    def put(self, model: User) -> User:
        if model not in self.all:
            self.all.append(model)
        return model

    def find_user(self, case_insensitive: bool = False, **wanted: Any) -> User | None:
        for user in self.all:
            if all(getattr(user, name, None) == value for name, value in wanted.items()):
                return user
        return None


@pytest.fixture
def secured(valkey: Server) -> Iterator[tuple[Flask, Web]]:
    """An app in which people register, log in and out, with a view that asks for a fresh log-in."""
    app = make_app(valkey)
    app.config.update(
        SECURITY_PASSWORD_SALT="salt",
        SECURITY_PASSWORD_HASH="plaintext",
        SECURITY_PASSWORD_SCHEMES=["plaintext"],
        SECURITY_PASSWORD_SINGLE_HASH={"plaintext"},
        SECURITY_DEPRECATED_PASSWORD_SCHEMES=[],
        SECURITY_REGISTERABLE=True,
        SECURITY_LOGOUT_METHODS=["GET", "POST"],
        SECURITY_SEND_REGISTER_EMAIL=False,
        SECURITY_USE_REGISTER_V2=True,
        SECURITY_EMAIL_VALIDATOR_ARGS={"check_deliverability": False, "test_environment": True},
        WTF_CSRF_ENABLED=False,
    )
    Security(app, Users())

    @app.route("/me")
    @auth_required("session")
    def me() -> str:
        return str(current_user.email)

    @app.route("/fresh/<key>")
    @auth_required("session", within=60, grace=10)
    def fresh(key: str) -> str:
        return set_key(key)

    with serving(app) as web:
        yield app, web


ADA = {"email": "ada@example.org", "password": "correct horse", "password_confirm": "correct horse"}


def register(web: Web) -> WebBrowser:
    browser = web.browser()
    assert browser.request("/set/cart")[0] == 200
    status, body, _ = browser.request("/register", body=ADA)
    assert status == 200, body
    return browser


def test_register_log_in_and_out(secured: tuple[Flask, Web]) -> None:
    """Each of them works, log-in and log-out rotate the id, and the user's sessions are listed as his."""
    app, web = secured
    browser = register(web)
    assert browser.request("/logout", body={})[0] == 200
    assert browser.request("/me")[0] != 200
    first = browser.cookies["session"]
    assert browser.request("/login", body=ADA)[0] == 200
    second = browser.cookies["session"]
    assert browser.request("/me")[:2] == (200, b"ada@example.org")
    found = shown(browser)
    assert found["cart"] == "cart"
    sessions = app.extensions["luasession"]
    handle = first.partition(".")[0]
    assert [info.handle for info in sessions.sessions_of(found["_user_id"])] == [handle]
    assert browser.request("/logout", body={})[0] == 200
    assert len({first, second, browser.cookies["session"]}) == 3
    assert browser.request("/me")[0] != 200
    assert sessions.sessions_of(found["_user_id"]) == []


def test_log_out_everywhere(secured: tuple[Flask, Web]) -> None:
    """revoke_all ends what Flask-Security has logged in."""
    app, web = secured
    browser = register(web)
    phone = web.browser()
    assert phone.request("/login", body=ADA)[0] == 200
    user_id = shown(browser)["_user_id"]
    assert app.extensions["luasession"].revoke_all(user_id) == 2
    assert [each.request("/me")[0] == 200 for each in (browser, phone)] == [False, False]


def test_fresh_views_in_parallel(secured: tuple[Flask, Web]) -> None:
    """Each of them rewrites the end of the grace in the session; none fails over it, and what each sets is kept."""
    app, web = secured
    browser = register(web)
    conflicts: list[str] = []

    def receive(_sender: Any, key: str, **_about: Any) -> None:
        conflicts.append(key)

    names = [f"k{number}" for number in range(8)]
    with session_conflict.connected_to(receive, app):
        assert browser.parallel([f"/fresh/{name}" for name in names]) == [200] * 8
    found = shown(browser)
    assert set(names) <= found.keys()
    assert found["fs_gexp"] > time.time()
    assert set(conflicts) == {"fs_gexp"}


def test_a_log_out_beside_fresh_views(secured: tuple[Flask, Web]) -> None:
    """A log-out that overlaps them logs out: none of them brings the user back."""
    app, web = secured
    browser = register(web)
    user_id = shown(browser)["_user_id"]
    statuses = browser.parallel(["/fresh/a", "/logout", "/fresh/b", "/fresh/c"])
    assert statuses[1] in {200, 302}
    found = shown(browser)
    assert "_user_id" not in found
    assert browser.request("/me")[0] != 200
    assert app.extensions["luasession"].sessions_of(user_id) == []
