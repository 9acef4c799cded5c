"""Rights: a user with the rights of the README and no more has sessions; without one of them a 503 says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import redis
import valkey
from flask import session
from redis.crc import key_slot

from luasession import SessionConflict, SessionGone, SessionUnavailable, merge, retry_on_conflict
from luasession.client import Patience
from luasession.config import Config
from luasession.scripts import script

from .conftest import GUARANTEED, TestApp
from .readme import readme
from .servers import ClusterTopology, Server, standalone

Clusters = Callable[[str], ClusterTopology]

[LINE] = re.findall(r"^ACL SETUSER .*$", readme(), re.MULTILINE)
USER, PASSWORD = re.findall(r"SETUSER (\S+) .*>(\S+)", LINE)[0]
RIGHTS = re.findall(r" \+(\S+)", LINE)
# What a cluster needs as well.
[ON_A_CLUSTER] = re.findall(r"a cluster `(\+[^`]*)`", readme())
#: What the client library sends by itself is none of luasession's; this is all that luasession sends.
SENT = {"eval", "evalsha", "script|load", "time", "hgetall"}


@pytest.fixture(scope="module")
def guarded(kind: str) -> Iterator[Server]:
    """A server of each kind, for the users of this file."""
    with standalone(kind) as server:
        yield server


def grant(server: Server, *changes: str) -> None:
    """Make the user of the README anew, with these changes to its rights."""
    with server.client() as client:
        client.execute_command(*LINE.split(), *changes)
        client.script_flush()
        client.acl_log_reset()


def url_of(server: Server) -> str:
    return f"redis://{USER}:{PASSWORD}@127.0.0.1:{server.port}/0"


def app_on(server: Server, **config: Any) -> TestApp:
    return TestApp(server, {"SESSION_REDIS_URL": url_of(server), "SESSION_REDIS_DEADLINE": 30, **config})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the test is worth a second try."""

    def wait(_self: Patience, error: Exception, _failed_after: float) -> None:
        pytest.fail(f"tried again after {error!r}")

    monkeypatch.setattr(Patience, "wait", wait)


@pytest.fixture
def nothing_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry of an index is too young to be taken out."""
    monkeypatch.setattr(Config, "call_seconds", 0.0)


def live(app: TestApp) -> None:
    """Lead sessions through all that can be done with them."""
    sessions = app.flask.extensions["luasession"]
    other = app.another()
    principal = uuid4().hex
    browser = app.browser()

    def start() -> None:
        session.update(a=1, hits=0, gone="soon")
        session.set("token", "t", ttl=60)
        session.permanent, session.lifetime, session.label = True, 500, "phone"

    browser.run(start)
    for process in (app, other, app):
        twin = browser.twin(process)
        twin.run(lambda: session.update(hits=session["hits"] + 1))
        twin.run(lambda: session.pop("gone", None))
    assert browser.twin(other).run(lambda: session["hits"]) == 3

    def increment() -> None:
        session["hits"] += 1

    def overlapping() -> None:
        assert session["hits"] == 3
        browser.twin(other).run(increment)
        increment()

    browser.run(overlapping)
    assert browser.run(lambda: (session.reload(), session["hits"])[1]) == 5
    assert browser.run(lambda: session.atomic_update("exact", lambda value: value + 1, 0)) == 1
    browser.run(retry_on_conflict()(lambda: session.update(again=session["exact"])))

    def contradict() -> None:
        assert session["strict"] == 0
        browser.twin(other).run(lambda: session.update(strict=1))
        session["strict"] = 2
        with pytest.raises(SessionConflict):
            session.commit()
        session.reload()

    browser.run(lambda: session.update(strict=0))
    browser.run(contradict)

    former = browser.twin()
    browser.run(lambda: session.regenerate())
    assert former.run(lambda: dict(session)) == {}
    assert browser.run(lambda: session["strict"]) == 1

    def log_in() -> None:
        session.principal = principal
        session.regenerate(in_flight=False)

    browser.run(log_in)
    phone = app.browser()
    phone.run(log_in)
    handles = [each.run(lambda: session.handle) for each in (browser, phone)]
    assert {info.handle for info in sessions.sessions_of(principal)} == set(handles)
    with sessions.edit(handles[1]) as edited:
        edited["plan"] = "pro"
    assert phone.twin(other).run(lambda: session["plan"]) == "pro"
    assert sessions.revoke_all(principal, keep=handles[0]) == 1
    assert [info.handle for info in sessions.sessions_of(principal)] == [handles[0]]
    with pytest.raises(SessionGone), sessions.edit(handles[1]):
        pass

    browser.run(lambda: session.clear() or session.update(fresh=1))
    assert browser.run(lambda: dict(session)) == {"fresh": 1}
    browser.run(lambda: session.destroy())
    assert browser.run(lambda: dict(session)) == {}
    assert browser.cookies == {}


LIFE = {
    "SESSION_MERGE": {"hits": merge.add, "strict": "raise"},
    "SESSION_TOUCH_INTERVAL": 0,
    "SESSION_CACHE_TTL": 0,
}


@pytest.mark.usefixtures("impatient", "nothing_is_young")
def test_a_whole_life_with_the_rights_of_the_readme(guarded: Server) -> None:
    """The user of the README leads sessions from their creation to their end, by the URL that stands there."""
    grant(guarded)
    app = app_on(guarded, **LIFE)
    with guarded.counting() as commands:
        live(app)
    assert app.stats()["script_reloads"] == 0
    assert {name.lower().replace(" ", "|") for name in commands.names} == SENT - {"eval"}
    with guarded.client() as client:
        assert client.acl_log() == []
        assert {key.split(b":")[0] for key in client.scan_iter()} <= {b"session"}


@pytest.mark.parametrize("absolute", [None, 3600])
@pytest.mark.usefixtures("impatient", "nothing_is_young")
def test_a_whole_life_without_script_load(guarded: Server, absolute: float | None) -> None:
    """Where SCRIPT LOAD is refused each script goes as text once, and everything works."""
    grant(guarded, "-script|load" if guarded.kind != "redis-6.2" else "-script")
    app = app_on(guarded, **LIFE, SESSION_ABSOLUTE_LIFETIME=absolute)
    live(app)
    assert app.stats()["script_reloads"] == 4


CLIENTS: dict[str, Callable[[Server], Any]] = {
    "redis-py": lambda server: redis.Redis(port=server.port, username=USER, password=PASSWORD),
    "redis-py resp3": lambda server: redis.Redis.from_url(url_of(server), protocol=3),
    "valkey-py": lambda server: valkey.Valkey(port=server.port, username=USER, password=PASSWORD),
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.usefixtures("impatient")
def test_a_ready_client_needs_no_more(guarded: Server, client: str) -> None:
    """What client libraries send when they connect is refused or not, and sessions work."""
    grant(guarded)
    with CLIENTS[client](guarded) as ready:
        app = TestApp(guarded, {"SESSION_REDIS": ready})
        browser = app.browser()
        browser.run(lambda: session.update(a=1))
        assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1}


def test_the_line_grants_what_is_used_and_no_more() -> None:
    """The rights are the commands of the scripts and those that luasession sends, each once."""
    called: set[str] = set()
    for name in ("load", "commit", "destroy", "index"):
        called |= {
            command.lower() for command in re.findall(r"redis\.p?call\('(\w+)'", script(name).text.decode())
        }
    assert sorted(RIGHTS) == sorted(called | SENT)


@pytest.mark.parametrize("kind", GUARANTEED)
def test_a_cluster_with_the_rights_of_the_readme(clusters: Clusters, kind: str) -> None:
    """With what the README grants on top a session is followed through the move of its slot."""
    cluster = clusters(kind)
    for node in cluster.servers:
        with node.client() as client:
            client.execute_command(*LINE.split(), *ON_A_CLUSTER.split())
            client.acl_log_reset()
    try:
        url = cluster.url.replace("://", f"://{USER}:{PASSWORD}@")
        app = TestApp(
            cluster, {"SESSION_REDIS_URL": url, "SESSION_REDIS_DEADLINE": 10, "SESSION_CACHE_TTL": 0}
        )
        browser = app.browser()
        browser.run(lambda: session.update(log=[]))
        key = app.prefix + browser.cookies["session"].partition(".")[0]
        for step in cluster.move(key_slot(key.encode()), cluster.spare):
            browser.run(lambda step=step: session["log"].append(step))
        assert browser.run(lambda: session["log"])[-2:] == ["node", "done"]
        for node in cluster.servers:
            with node.client() as client:
                assert client.acl_log() == []
    finally:
        for node in cluster.servers:
            with node.client() as client:
                client.execute_command("ACL", "DELUSER", USER)


# The rights without which what is done here cannot be, and a request that meets their absence.
NEEDED = {
    "evalsha": lambda: session.update(a=1),
    "eval": lambda: session.update(a=1),
    "hset": lambda: session.update(a=1),
    "hmget": lambda: session.update(a=1),
    "time": lambda: session.update(a=1),
    "hgetall": lambda: dict(session),
    "hdel": lambda: session.pop("start"),
    "del": lambda: session.destroy(),
    "zadd": lambda: setattr(session, "principal", "ada"),
    "zrange": lambda: setattr(session, "principal", "ada"),
}


@pytest.mark.parametrize("right", NEEDED)
@pytest.mark.usefixtures("impatient")
def test_a_missing_right_is_told_at_once(guarded: Server, right: str) -> None:
    """503 with the server's words, no second try, no cookie; what is refused first leaves nothing half-written."""
    grant(guarded)
    browser = app_on(guarded).browser()
    browser.run(lambda: session.update(start=1))
    handle = browser.run(lambda: session.handle)
    app = app_on(guarded)
    reasons: list[str] = []

    def answer(error: SessionUnavailable) -> tuple[str, int]:
        reasons.append(error.reason)
        return error.get_description(), error.code

    app.flask.register_error_handler(SessionUnavailable, answer)
    stored = app.stored(handle)
    # Without EVAL it is an unknown script that shows it: loading them is refused as well.
    grant(guarded, f"-{right}", *(["-script"] if right == "eval" else []))
    twin = browser.twin(app)
    twin.run(NEEDED[right], status=503)
    assert twin.response is not None
    assert right in reasons[0].lower() or "can't run this command" in reasons[0]
    assert "permission" in reasons[0] or "can't run this command" in reasons[0]
    assert right not in twin.response.text
    assert twin.set_cookies == {}
    if right not in ("hdel", "del"):  # which come after the HSET: the README says to grant them all
        assert app.stored(handle) == stored


@pytest.mark.usefixtures("impatient")
def test_keys_of_others_are_out_of_reach(guarded: Server) -> None:
    """Under another prefix than the rights are for nothing can be stored, and the answer is 503."""
    grant(guarded)
    app = app_on(guarded, SESSION_KEY_PREFIX="other:")
    app.browser().run(lambda: session.update(a=1), status=503)
    assert app.keys() == []


@pytest.mark.usefixtures("impatient")
def test_a_wrong_password_is_told_at_once(guarded: Server) -> None:
    """A user whom the server does not let in is not asked for twice."""
    grant(guarded)
    app = app_on(guarded, SESSION_REDIS_URL=url_of(guarded).replace(PASSWORD, "guess"))
    app.browser().run(lambda: session.update(a=1), status=503)
    assert app.browser().get("/untouched").status_code == 200
