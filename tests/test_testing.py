"""luasession.testing: a server, test clients that have a session, sessions that end; and clocks that are moved."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta, timezone
from datetime import date as day
from pathlib import Path
from typing import Any

import pytest
import redis
import time_machine
from flask import Flask, session
from freezegun import freeze_time

import luasession
from luasession import Session, SessionGone, SessionUnavailable, session_destroyed, testing

from .conftest import MakeApp, TestApp
from .readme import readme
from .servers import Server, eventually

# The app that the README's tests are for.
SHOP = """
from flask import Flask, abort, session
from luasession import Session

def create_app(settings):
    app = Flask(__name__)
    app.config.update(settings)
    Session(app)

    @app.route("/cart")
    def cart():
        return session["cart"]

    @app.route("/account")
    def account():
        return session.get("user") or abort(401)

    @app.post("/log-out-everywhere")
    def log_out_everywhere():
        app.extensions["luasession"].revoke_all(session.principal)
        return "bye"

    return app
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def app(make_valkey_app: MakeApp) -> TestApp:
    app = make_valkey_app()
    app.flask.add_url_rule("/", "show", lambda: dict(session))
    return app


# -- the server -------------------------------------------------------------------------------------


def test_the_readme(tmp_path: Path) -> None:
    """The example in the README is a test suite that passes, and nothing of it stays."""
    text = readme().partition("## Testing your app")[2]
    (tmp_path / "shop.py").write_text(SHOP)
    for name in ("conftest.py", "test_shop.py"):
        block = re.search(rf"```python\n(# {re.escape(name)}\n.*?)```", text, re.DOTALL)
        assert block is not None
        (tmp_path / name).write_text(block[1])
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"TMPDIR": str(tmp_path / "tmp"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_server() -> None:
    """It answers for the block, as often as one likes, each one with data of its own; then it is gone."""
    paths = []
    for _ in range(2):
        with testing.server() as url, testing.server() as other:
            assert url != other
            for each in (url, other):
                app = Flask("app")
                app.config["SESSION_REDIS_URL"] = each
                Session(app)
                client = testing.open_session(app, {"a": 1}, principal="ada")
                app.add_url_rule("/", view_func=lambda: dict(session))
                assert client.get("/").json == {"a": 1}
                assert len(app.extensions["luasession"].sessions_of("ada")) == 1
                paths.append(Path(each.removeprefix("unix://")))
                assert paths[-1].exists()
    assert len(set(paths)) == 4
    assert [path.parent.exists() for path in paths] == [False] * 4


def test_the_server_ends_if_the_block_raises() -> None:
    """A test that fails leaves no server behind."""
    with pytest.raises(KeyError), testing.server() as url:  # noqa: PT012
        client = redis.Redis.from_url(url)
        pid = client.info("server")["process_id"]
        client.close()
        raise KeyError("x")
    assert eventually(lambda: not Path(f"/proc/{pid}/stat").exists())


def test_the_server_ends_with_its_process(tmp_path: Path) -> None:
    """A test run that is killed leaves no server behind."""
    program = (
        "import os, signal, redis\nfrom luasession.testing import server\nwith server() as url:\n"
        " print(redis.Redis.from_url(url).info('server')['process_id'], flush=True)\n"
        " os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"TMPDIR": str(tmp_path)},
        check=False,
    )
    pid = int(done.stdout)
    assert eventually(lambda: not Path(f"/proc/{pid}/stat").exists(), 20)


def test_without_pytest() -> None:
    """Apps never import it, and luasession.testing does without it: then it has no fixture."""
    assert run(
        "import sys, luasession; print('luasession.testing' in sys.modules, 'pytest' in sys.modules)"
    ) == ("False False\n")
    blocked = "import sys; sys.modules['pytest'] = None; from luasession import testing;"
    assert run(f"{blocked} print(testing.__all__)") == "['expire', 'open_session', 'server']\n"


# -- sessions ---------------------------------------------------------------------------------------


def test_open_session(app: TestApp) -> None:
    """The client's requests find the keys, and the session is whose it was said to be."""
    client = testing.open_session(app.flask, {"a": [1]}, principal="ada", label="Phone")
    assert client.get("/").json == {"a": [1]}
    assert [info.label for info in app.flask.extensions["luasession"].sessions_of("ada")] == ["Phone"]
    with client.session_transaction() as opened:
        assert opened["a"] == [1]


def test_two_devices(app: TestApp) -> None:
    """Each call is another browser, unless it is given one, whose session is then added to."""
    laptop, phone = [testing.open_session(app.flask, {"n": n}, principal="ada") for n in range(2)]
    assert (laptop.get("/").json, phone.get("/").json) == ({"n": 0}, {"n": 1})
    assert testing.open_session(app.flask, {"more": 1}, client=phone) is phone
    assert phone.get("/").json == {"n": 1, "more": 1}
    assert app.flask.extensions["luasession"].revoke_all("ada") == 2
    assert (laptop.get("/").json, phone.get("/").json) == ({}, {})


def test_nothing_to_open(app: TestApp) -> None:
    """Without keys and principal there is no session, and no cookie."""
    client = testing.open_session(app.flask, label="Phone")
    assert app.keys() == []
    assert client.get_cookie("session") is None


def test_a_session_that_cannot_be_stored(app: TestApp, own_server: Server) -> None:
    """The error is the test's, not a response that nobody sees."""
    with pytest.raises(TypeError, match=r"session\['a'\]"):
        testing.open_session(app.flask, {"a": object()})
    broken = TestApp(own_server, {"SESSION_REDIS_DEADLINE": 0})
    own_server.stop()
    with pytest.raises(SessionUnavailable):
        testing.open_session(broken.flask, {"a": 1})


def test_sessions_of_somebody_else() -> None:
    """An app without luasession is told so."""
    app = Flask("other")
    app.secret_key = "key"
    for call in (lambda: testing.open_session(app, {"a": 1}), lambda: testing.expire(app.test_client())):
        with pytest.raises(TypeError, match=r"not luasession's.*SecureCookieSessionInterface"):
            call()


def test_expire(app: TestApp) -> None:
    """The session is no more, without a log-out having been told of or a tombstone; its id starts none."""
    told: list[str] = []

    def receive(_sender: Any, handle: str, **_about: Any) -> None:
        told.append(handle)

    client = testing.open_session(app.flask, {"a": 1}, principal="ada")
    before = client.get_cookie("session")
    assert before is not None
    assert client.get("/").json == {"a": 1}
    with session_destroyed.connected_to(receive, app.flask):
        testing.expire(client)
    assert client.get_cookie("session") == before
    assert app.stored(before.value.partition(".")[0]) == {}
    assert client.get("/").json == {}
    assert app.flask.extensions["luasession"].sessions_of("ada") == []
    assert told == []
    testing.open_session(app.flask, {"b": 2}, client=client)
    after = client.get_cookie("session")
    assert after is not None
    assert after.value != before.value
    assert client.get("/").json == {"b": 2}


def test_expire_what_is_not_there(app: TestApp) -> None:
    """A client without a session has none that could end, nor one whose session has ended."""
    with pytest.raises(SessionGone, match="has no session"):
        testing.expire(app.flask.test_client())
    client = testing.open_session(app.flask, {"a": 1})
    testing.expire(client)
    with pytest.raises(SessionGone):
        testing.expire(client)


# -- clocks that are frozen, moved or set back ------------------------------------------------------

Move = Callable[[datetime], AbstractContextManager[Any]]


@pytest.fixture(params=["freezegun", "freezegun ticking", "time-machine", "time-machine frozen"])
def move(request: pytest.FixtureRequest) -> Move:
    """Move Python's clocks to a date."""
    moves: dict[str, Move] = {
        "freezegun": lambda date: freeze_time(date),
        "freezegun ticking": lambda date: freeze_time(date, tick=True),
        "time-machine": lambda date: time_machine.travel(date),
        "time-machine frozen": lambda date: time_machine.travel(date, tick=False),
    }
    return moves[request.param]


@pytest.fixture(params=[-20_000, -365, 365, 20_000], ids=lambda days: f"{days} days")
def date(request: pytest.FixtureRequest) -> datetime:
    return datetime.now(UTC) + timedelta(days=request.param)


def test_requests_while_the_clock_is_moved(app: TestApp, move: Move, date: datetime) -> None:
    """Sessions from before, inside and after it all work, with keys that end, rotation and overlap."""
    before, inside = app.browser(), app.browser()

    def start() -> None:
        session["cart"] = ["book"]
        session.set("offer", 5, ttl=3600)
        session.permanent = True

    def overlap() -> None:
        session["cart"].append("pen")
        other.run(lambda: session.update(seen=session["cart"]))
        session.regenerate()

    before.run(start)
    with move(date):
        inside.run(start)
        for browser in (before, inside):
            other = browser.twin()
            browser.run(overlap)
            assert browser.run(lambda: session["cart"]) == ["book", "pen"]
            assert browser.run(lambda: (session["offer"], session["seen"])) == (5, ["book"])
    for browser in (before.twin(), inside.twin()):  # the jars have dropped what was over by the date
        assert browser.run(lambda: (session["cart"], session["offer"])) == (["book", "pen"], 5)
        browser.run(lambda: session.destroy())
        assert browser.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_moments_while_the_clock_is_moved(
    make_valkey_app: MakeApp, move: Move, date: datetime, serializer: str
) -> None:
    """Dates and datetimes of a moved clock are stored, those from before it are read, and each is a plain one."""
    app = make_valkey_app(SESSION_SERIALIZER=serializer)
    browser = app.browser()
    zone = timezone(timedelta(hours=2))

    def moments() -> list[Any]:
        now = datetime.now(zone).replace(microsecond=5)
        return [now, now.replace(tzinfo=None), now.date(), {"nested": (now,)}]

    before = moments()
    browser.run(lambda: session.update(before=before))
    with move(date):
        assert browser.run(lambda: session["before"]) == before
        inside = moments()
        browser.run(lambda: session.update(inside=inside, one=inside[0], day=inside[2]))
        browser.run(lambda: session["before"].append(datetime.now(zone)))
        assert browser.run(lambda: (session["inside"], session["day"])) == (inside, inside[2])
    found = browser.twin().run(lambda: dict(session))
    assert found["before"][:4] == before
    assert len(found["before"]) == 5
    assert (found["inside"], found["one"], found["day"]) == (inside, inside[0], inside[2])
    assert [type(value) for value in found["inside"][:3]] == [datetime, datetime, day]
    assert type(found["one"]) is type(found["before"][4]) is type(found["inside"][3]["nested"][0]) is datetime


def test_what_freezegun_has_beside_dates_is_refused(app: TestApp) -> None:
    """A class of freezegun's that stands for no date is a TypeError as any other (G12)."""
    factory = type("FrozenDateTimeFactory", (), {"__module__": "freezegun.api"})

    def view() -> None:
        session["x"] = factory()
        with pytest.raises(TypeError, match="FrozenDateTimeFactory"):
            session.commit()  # type: ignore[attr-defined]
        del session["x"]

    app.browser().run(view)


def test_a_clock_that_moves_in_a_request(app: TestApp, move: Move, date: datetime) -> None:
    """Moved to and fro while a request is open, it is open all the same: it commits over a rotation, not over an end."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    first, second = browser.twin(), browser.twin()

    def rotate() -> None:
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        moved.close()
        first.run(lambda: session.regenerate())
        session["b"] = session["a"] + 1
        session.commit()  # type: ignore[attr-defined]
        moved.enter_context(move(date))
        session["c"] = 3

    def end() -> None:
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        first.run(lambda: session.destroy())
        moved.enter_context(move(date))
        session["d"] = 4
        with pytest.raises(SessionGone):
            session.commit()  # type: ignore[attr-defined]

    with ExitStack() as moved:
        moved.enter_context(move(date))
        second.run(rotate)
    assert first.run(lambda: dict(session)) == {"a": 1, "b": 2, "c": 3}
    with ExitStack() as moved:
        first.twin().run(end)
    assert first.run(lambda: dict(session)) == {}


def test_trust_ends_all_the_same(make_valkey_app: MakeApp, move: Move, date: datetime) -> None:
    """What was cached while the clock was moved is not trusted for longer, then or afterwards."""
    app = make_valkey_app(SESSION_CACHE_TTL=0.05)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    elsewhere = browser.twin(app.another())
    for n in (2, 3):
        with move(date):
            assert browser.twin().run(lambda: session["n"]) == n - 1
            elsewhere.run(lambda n=n: session.update(n=n))
            time.sleep(0.1)
            if n == 2:
                assert browser.twin().run(lambda: session["n"]) == n
        if n == 3:
            # Not by its hints, which say that there is something newer.
            plain = app.browser()
            plain.client.set_cookie("session", browser.cookies["session"])
            assert plain.run(lambda: session["n"]) == n


def test_sessions_that_are_opened_and_expire_while_the_clock_is_moved(
    app: TestApp, move: Move, date: datetime
) -> None:
    """open_session and expire do what they say, whatever the date."""
    with move(date):
        client = testing.open_session(app.flask, {"a": 1}, principal="ada")
        assert client.get("/").json == {"a": 1}
        testing.expire(client)
        assert client.get("/").json == {}


def test_a_server_that_starts_while_the_clock_is_moved(move: Move) -> None:
    """It starts, serves and ends."""
    with move(datetime(2001, 1, 1, tzinfo=UTC)), testing.server() as url:
        app = Flask("app")
        app.config["SESSION_REDIS_URL"] = url
        Session(app)
        app.add_url_rule("/", view_func=lambda: dict(session))
        assert testing.open_session(app, {"a": 1}).get("/").json == {"a": 1}


@pytest.mark.parametrize("ahead", [10**9, 10**15, 10**20, -(10**20)])
def test_a_clock_that_is_set_back(app: TestApp, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """A request that seems to have opened later than now, or ages ago, reads, writes, rotates and ends its session."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    real = luasession.interface.now_ns
    monkeypatch.setattr(luasession.interface, "now_ns", lambda: real() + ahead)
    other = browser.twin(app.another())
    assert other.run(lambda: session["a"]) == 1
    browser.run(lambda: (session.update(b=2), session.regenerate()))
    assert browser.run(lambda: dict(session)) == {"a": 1, "b": 2}
    browser.run(lambda: session.destroy())
    assert browser.run(lambda: dict(session)) == {}


def test_a_clock_that_is_set_back_ends_trust(
    make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cached at a moment that is still to come is not trusted."""
    app = make_valkey_app(SESSION_CACHE_TTL=60)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    plain = browser.twin()
    plain.client.delete_cookie("session_v")
    browser.twin(app.another()).run(lambda: session.update(n=2))
    assert plain.run(lambda: session["n"]) == 1
    real = luasession.store.now_ns
    monkeypatch.setattr(luasession.store, "now_ns", lambda: real() - 10**12)
    assert plain.run(lambda: session["n"]) == 2


def test_a_cookie_with_a_path_of_its_own(make_app: MakeApp) -> None:
    """Both find a session whose cookie is sent to one part of the site only."""
    app = make_app(SESSION_COOKIE_PATH="/app")
    client = testing.open_session(app.flask, {"a": 1})
    testing.open_session(app.flask, {"b": 2}, client=client)
    assert len(app.keys()) == 1
    testing.expire(client)
    assert app.keys() == []
