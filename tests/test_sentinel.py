"""Behind Sentinel: failovers while requests run, sentinels that are down or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any
from uuid import uuid4

import pytest
import redis
from flask import session

import luasession.servers
from luasession import ConfigurationError
from luasession.client import _meet_primary
from luasession.config import read_config
from luasession.connections import Connections, Recipe
from luasession.failures import Nowhere, is_passing, is_read_only, unavailable
from luasession.location import read_location
from luasession.servers import Sentinels

from .conftest import TestApp
from .servers import SentinelTopology, Server, eventually, free_port, standalone
from .test_topologies import (  # noqa: F401 - one is a fixture
    SENTINELS,
    at_once,
    close,
    connections,
    remember_reasons,
    sending_to,
)

Topologies = Callable[[str], SentinelTopology]


def app_on(topology: SentinelTopology, **config: Any) -> TestApp:
    prefix = f"t{uuid4().hex[:8]}:"
    return TestApp(
        topology,
        {"SESSION_KEY_PREFIX": prefix, "SESSION_REDIS_DEADLINE": 20, "SESSION_CACHE_TTL": 0, **config},
    )


def test_a_primary_that_was_replaced_while_it_hung(
    sentinels: Topologies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it answers when it goes on, knowing no newer secret, takes no browser out of its session."""
    monkeypatch.setattr(luasession.servers, "_TRUST", 60.0)  # so that nobody asks the sentinels meanwhile
    topology = sentinels("valkey-9.1")
    app = app_on(topology, SESSION_CACHE_TTL=None)
    # Whichever is promoted has the session: a server that is stopped right after its answer may have sent
    # it to none.
    other = app.another(SESSION_WAIT_REPLICAS=2, SESSION_WAIT_TIMEOUT=10).browser()
    other.run(lambda: session.update(a=1))
    assert other.twin(app).run(see) == {"a": 1}
    other = other.twin(app.another())
    hung = topology.primary
    with ThreadPoolExecutor(1) as pool:
        hung.pause()
        try:
            assert eventually(lambda: topology.primary is not hung, 30)
            other.run(lambda: session.regenerate())
            late = other.twin(app)
            with sending_to(hung.port) as sending:
                answer = pool.submit(late.run, lambda: session.update(b=2))
                assert sending.wait(10)
            time.sleep(0.3)  # answered any sooner it would not be slow
            hung.resume()
            answer.result(30)
        finally:
            hung.kill()
            topology.bring_back(hung)
    assert "session" not in late.set_cookies
    assert other.run(lambda: dict(session)) == {"a": 1, "b": 2}


def see() -> dict[str, Any]:
    return dict(session)


@contextmanager
def unfinished_failover(topology: SentinelTopology) -> Iterator[tuple[Server, Server]]:
    """Give the sentinel that leads a failover, held up by a replica that does not get to follow, and the old primary.

    That one runs: it hung for a while.
    """
    topology.settle()
    old = topology.primary
    behind = next(each for each in topology.servers if each is not old)

    def prepare(password: str, priority: int, timeout: int) -> None:
        with behind.client() as client:
            client.config_set("masterauth", password)
            client.config_set("replica-priority", priority)
        for each in topology.sentinels:
            with each.client() as client:
                client.execute_command("SENTINEL", "SET", "main", "failover-timeout", timeout)

    def leaders() -> list[Server]:
        states = [(each, topology.state(each)) for each in topology.sentinels]
        return [
            each
            for each, state in states
            # Others may have begun one too, which they give up.
            if state.get("failover-state") == "reconf_slaves" and "s_down" not in state["flags"]
        ]

    prepare("nobody asks for one", 1000, 60_000)
    try:
        old.pause()
        assert eventually(lambda: topology.primary is not old, 30)
        old.resume()
        leading = eventually(leaders, 10)
        assert leading
        yield leading[0], old
    finally:
        prepare("", 100, 1000)
        old.kill()
        topology.bring_back(old)


def test_a_failover_that_is_not_done(sentinels: Topologies) -> None:
    """The sentinel that leads it shows the old primary until all replicas follow; the new one is taken at once."""
    topology = sentinels("valkey-9.1")
    with unfinished_failover(topology) as (leader, old):
        assert topology.state(leader)["port"] == str(old.port)
        app = app_on(topology, SESSION_REDIS_URL=f"redis+sentinel://127.0.0.1:{leader.port}/main")
        browser = app.browser()
        browser.run(lambda: session.update(a=1))
        assert connections(app, browser).port == topology.primary.port != old.port
    assert browser.run(see) == {"a": 1}


# URLs.


def test_what_a_url_says() -> None:
    """Service, database, credentials, TLS: for the servers, and what the sentinels want apart."""
    where = read_location(
        "rediss+sentinel://me:p%40ss@a:1,b/main/3?ssl_ca_certs=/ca.pem&sentinel_password=s%26s", "KEY"
    )
    assert where.addresses == (("a", 1), ("b", 26379))
    assert (where.service, where.tls) == ("main", True)
    assert where.options == {"username": "me", "password": "p@ss", "ssl_ca_certs": "/ca.pem", "db": 3}
    assert where.sentinel_options == {"ssl_ca_certs": "/ca.pem", "password": "s&s"}
    plain = read_location("redis+sentinel://a/my%20main", "KEY")
    assert (plain.service, plain.options, plain.sentinel_options, plain.tls) == (
        "my main",
        {"db": 0},
        {},
        False,
    )


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ("a:1", "service is missing"),
        ("a:1/", "service is missing"),
        ("a:1//0", "service is missing"),
        ("a:1/main/x", "must be a number"),
        ("a:1/main/0/1", "must be a number"),
        (",a:1/main", "commas"),
        ("a:99999/main", "99999 is no port"),
        ("me:hunter2/@a:1/main", "%2F"),
        ("a:1/main?nonsense=hunter2", "nonsense"),
        ("a:1/main?sentinel_nonsense=hunter2", "nonsense"),
    ],
)
def test_a_wrong_url(rest: str, why: str) -> None:
    """A wrong URL stops the app at its start: the setting, what was expected, and no password."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({"SESSION_REDIS_URL": f"redis+sentinel://{rest}"})
    message = str(caught.value)
    expected = "SESSION_REDIS_URL must be redis+sentinel://[user:password@]host:port,host:port/service[/db]"
    assert message.startswith(expected)
    assert why in message
    assert "hunter2" not in message


@pytest.mark.usefixtures("at_once")
def test_a_database_and_passwords(sentinels: Topologies) -> None:
    """The URL's database is used, its credentials go to the servers, the sentinels' own to the sentinels."""
    topology = sentinels("valkey-9.1")
    for each in (*topology.servers, *topology.sentinels):
        with each.client() as client:
            if each in topology.servers:
                rights = [">server", "~*", "+@all"]
            else:  # what the README says
                rights = [">sentinel", "+sentinel|master", "+sentinel|get-master-addr-by-name"]
            client.execute_command("ACL", "SETUSER", "shop", "on", *rights)
    url = topology.url.replace("://", "://shop:server@").replace("/main/0", "/main/5")
    app = app_on(topology, SESSION_REDIS_URL=f"{url}?sentinel_username=shop&sentinel_password=sentinel")
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    assert browser.run(see) == {"a": 1}
    handle = browser.run(lambda: session.handle)
    with topology.primary.client(db=5) as client:
        assert client.exists(app.prefix + handle)
    reasons: list[str] = []
    wrong = app_on(topology, SESSION_REDIS_URL=f"{url}?sentinel_username=shop&sentinel_password=hunter2")
    remember_reasons(wrong, reasons)
    wrong.browser().run(lambda: session.update(a=1), status=503)
    assert reasons[0].count("AuthenticationError") == 3
    assert "hunter2" not in reasons[0]


# Sentinels that are down, or say other things.


def test_sentinels_that_are_down(sentinels: Topologies) -> None:
    """Of several sentinels one that answers is enough, and is asked first from then on."""
    topology = sentinels("valkey-9.1")
    dead = ",".join(f"127.0.0.1:{free_port()}" for _ in range(2))
    url = f"redis+sentinel://{dead},127.0.0.1:{topology.sentinels[0].port}/main"
    browser = app_on(topology, SESSION_REDIS_URL=url).browser()
    browser.run(lambda: session.update(a=1))
    assert browser.run(see) == {"a": 1}
    reasons: list[str] = []
    app = app_on(topology, SESSION_REDIS_URL=f"redis+sentinel://{dead}/main", SESSION_REDIS_DEADLINE=0.1)
    remember_reasons(app, reasons)
    app.browser().run(lambda: session.update(a=1), status=503)
    assert reasons[0].startswith("no sentinel names a primary of main: ")
    assert all(f"{address}: ConnectionError" in reasons[0] for address in dead.split(","))


@pytest.mark.usefixtures("at_once")
def test_an_unknown_service(sentinels: Topologies) -> None:
    """A service that no sentinel knows is told at once, in the sentinels' words."""
    topology = sentinels("valkey-9.1")
    app = app_on(
        topology, SESSION_REDIS_URL=topology.url.replace("/main", "/nobody"), SESSION_REDIS_DEADLINE=60
    )
    reasons: list[str] = []
    remember_reasons(app, reasons)
    app.browser().run(lambda: session.update(a=1), status=503)
    assert reasons[0].count("No such master with that name") == 3


STATE = {b"name": b"main", b"ip": b"p", b"port": b"1", b"flags": b"master", b"num-other-sentinels": b"2"}


class Fake(Connections):
    """A sentinel, or a server, that answers with what it was given."""

    def __init__(self, host: str, state: Any = None, promoted: bytes = b"") -> None:
        super().__init__(Recipe(lambda **_: None, {"host": host, "port": 1}, 1), 0.01)
        self.state = state
        self.promoted = promoted
        self.asked = 0
        self.dropped = 0

    def ask(self, words: Any, accept: Callable[[Any], bool]) -> tuple[int, Any]:
        self.asked += 1
        if isinstance(self.state, Exception):
            raise self.state
        if words[1] == b"GET-MASTER-ADDR-BY-NAME":
            address = [self.promoted or self.state[b"ip"], self.state[b"port"]]
            assert [accept(reply) for reply in (address, None, [1, b"1"], [b"p"])] == [
                True,
                False,
                False,
                False,
            ]
            return 0, address
        flat = [item for pair in self.state.items() for item in pair]
        foreign = [{**self.state, b"name": b"other"}, [b"name", b"main"], b"OK"]
        assert [accept(reply) for reply in (self.state, flat, *foreign)] == [True, True, False, False, False]
        return 0, flat

    def drop(self) -> None:
        self.dropped += 1


def test_whom_a_primary_is_asked_of() -> None:
    """A sentinel that sees the primary down, or too few others, is not believed; the one that was, is asked first."""
    down = Fake("a", {**STATE, b"flags": b"master,s_down"})
    alone = Fake("b", {**STATE, b"num-other-sentinels": b"0"})
    gone = Fake("c", redis.ConnectionError("refused"))
    good = Fake("d", STATE)
    found = Sentinels([down, alone, gone, good], "main", lambda host, port: Fake(host), 1, 1)
    primary = found.of(b"key")
    assert str(primary) == "p:1"
    assert found.of(b"other") is primary
    assert [each.asked for each in (down, alone, gone, good)] == [1, 1, 1, 1]
    # What has nothing to do with a failover asks nobody; what may, asks again and keeps the connections.
    found.heard(redis.ResponseError("WRONGTYPE"), primary, b"key")
    assert found.of(b"key") is primary
    assert good.asked == 1
    found.heard(redis.ConnectionError("gone"), primary, b"key")
    assert found.of(b"key") is primary
    assert [each.asked for each in (down, alone, gone, good)] == [1, 1, 1, 2]
    # From time to time they are asked unasked: the old primary of a failover may take writes for a while yet.
    found._due = 0
    assert found.of(b"key") is primary
    assert good.asked == 3
    assert found.of(b"key") is primary
    assert good.asked == 3
    good.state = redis.ConnectionError("refused")
    found._due = 0
    assert found.of(b"key") is primary
    good.state = STATE
    # Another primary: the idle connections to the old one go.
    good.state = {**STATE, b"ip": b"q"}
    found.heard(redis.ReadOnlyError("You can't write against a read only replica."), primary, b"key")
    before = primary.dropped  # type: ignore[attr-defined]
    assert str(found.of(b"key")) == "q:1"
    assert primary.dropped > before > 0  # type: ignore[attr-defined]
    good.state = redis.ConnectionError("refused")
    found.heard(redis.ConnectionError("gone"), found.of(b"key"), b"key")
    with pytest.raises(Nowhere) as caught:
        found.of(b"key")
    assert caught.value.passing
    for words in (
        "a:1: the primary is master,s_down",
        "b:1: it sees too few",
        "d:1: ConnectionError: refused",
    ):
        assert words in str(caught.value)


def test_in_doubt_all_sentinels_are_asked() -> None:
    """One that has not heard of the last failover is outvoted by its number; without doubt the first one will do."""
    behind = Fake("a", {**STATE, b"config-epoch": b"3"})
    ahead = Fake("b", {**STATE, b"ip": b"q", b"config-epoch": b"4"})
    gone = Fake("c", redis.ConnectionError("refused"))
    found = Sentinels([behind, gone, ahead], "main", lambda host, port: Fake(host), 1, 1)
    primary = found.of(b"key")
    assert (str(primary), ahead.asked) == ("p:1", 0)
    assert found.doubt(primary)
    assert str(found.of(b"key")) == "q:1"
    # From then on the one that knew better is asked, alone.
    found._due = 0
    assert str(found.of(b"key")) == "q:1"
    assert [each.asked for each in (behind, gone, ahead)] == [2, 1, 2]


def test_a_sentinel_that_leads_a_failover() -> None:
    """It counts the failover, but shows the old primary, well again or down, until it is done: clients go by the other."""
    for flags in (b"master,failover_in_progress", b"s_down,o_down,master,failover_in_progress"):
        done = Fake("b", {**STATE, b"ip": b"q", b"config-epoch": b"4"})
        leading = Fake("a", {**STATE, b"flags": flags, b"config-epoch": b"4"}, promoted=b"q")
        found = Sentinels([leading, done], "main", lambda host, port: Fake(host), 1, 1)
        assert str(found.of(b"key")) == "q:1"
        assert (leading.asked, done.asked) == (2, 0)
    # Before anybody is promoted it is as any other: with a primary that is down, or with one that is well.
    leading = Fake("a", {**STATE, b"flags": b"s_down,master,failover_in_progress"})
    found = Sentinels([leading], "main", lambda host, port: Fake(host), 1, 1)
    with pytest.raises(Nowhere, match="the primary is s_down,master,failover_in_progress"):
        found.of(b"key")
    leading.state = {**STATE, b"flags": b"master,failover_in_progress"}
    assert str(found.of(b"key")) == "p:1"
    # Promoted between its two answers, it has told the number of before; others name the old one by that.
    behind = Fake("b", {**STATE, b"config-epoch": b"3"})
    leading = Fake("a", {**leading.state, b"config-epoch": b"3"}, promoted=b"q")
    found = Sentinels([behind, leading], "main", lambda host, port: Fake(host), 1, 1)
    assert found.doubt(found.of(b"key"))
    assert str(found.of(b"key")) == "q:1"


def test_the_last_failover_counts_though_its_primary_is_down() -> None:
    """Then there is none, for a while; the one before takes writes that will be lost, and is not gone back to."""
    ahead = Fake("a", {**STATE, b"ip": b"q", b"config-epoch": b"4"})
    behind = Fake("b", {**STATE, b"config-epoch": b"3"})
    found = Sentinels([behind, ahead], "main", lambda host, port: Fake(host), 1, 1)
    assert str(found.of(b"key")) == "p:1"
    ahead.state = {**ahead.state, b"flags": b"master,disconnected"}
    found.doubt(found.of(b"key"))
    with pytest.raises(Nowhere) as caught:
        found.of(b"key")
    assert caught.value.passing
    assert "a:1: the primary is master,disconnected" in str(caught.value)
    assert "b:1: it has not heard of a failover" in str(caught.value)
    # Nor where they are asked in passing, by a request that was sure of the one before; the next one asks again.
    found._first, found._sure, found._due = ahead, True, 0
    for _ in range(2):
        with pytest.raises(Nowhere):
            found.of(b"key")
    ahead.state = {**ahead.state, b"flags": b"master"}
    assert str(found.of(b"key")) == "q:1"
    # Where no failover is news, a primary that was well goes on being used.
    ahead.state = {**ahead.state, b"flags": b"master,s_down"}
    found._due = 0
    assert str(found.of(b"key")) == "q:1"


def test_a_request_that_is_broken_off_while_it_asks() -> None:
    """A greenlet that is killed there leaves the asking to the next one, and not for a while to nobody."""

    class Killed(BaseException):
        pass

    sentinel = Fake("a", STATE)
    found = Sentinels([sentinel], "main", lambda host, port: Fake(host), 1, 1)
    primary = found.of(b"key")
    ask = sentinel.ask

    def killed(*_: Any) -> Any:
        raise Killed

    sentinel.ask = killed  # type: ignore[method-assign]
    found._due = 0
    with pytest.raises(Killed):
        found.of(b"key")
    sentinel.ask = ask  # type: ignore[method-assign]
    assert found.of(b"key") is primary
    assert sentinel.asked == 2


# Failovers.


def promoted(topology: SentinelTopology, old: Server) -> bool:
    """Ask for a failover, and tell whether it came: on a busy machine sentinels give one up at times."""
    with topology.sentinels[0].client() as client, suppress(redis.ResponseError):  # one is under way
        client.execute_command("SENTINEL", "FAILOVER", "main")
    return eventually(lambda: topology.primary is not old, 15)


@pytest.mark.parametrize("way", ["url", "redis-py", "valkey-py"])
def test_a_planned_failover(sentinels: Topologies, way: str) -> None:
    """While another server is promoted, beside the old one that still takes writes, nothing acknowledged is lost."""
    topology = sentinels("valkey-9.1")
    topology.settle()  # a busy machine may have had another one promoted meanwhile
    config = SENTINELS[way](topology)
    # By both replicas, one of which is promoted: then the old primary has too few left.
    app = app_on(topology, SESSION_WAIT_REPLICAS=2, SESSION_WAIT_TIMEOUT=0.2, **config)
    browser = app.browser()
    browser.run(lambda: session.update(start=1))
    old, written = topology.primary, []
    running = True

    def write(worker: int) -> None:
        mine, n = browser.twin(), 0
        while running:
            try:
                mine.run(lambda n=n: session.update({f"{worker}-{n}": n}))
            except AssertionError:
                assert mine.response is not None
                assert mine.response.status_code == 503
            else:
                written.append(f"{worker}-{n}")
            n += 1
            time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(write, worker) for worker in range(2)]
        try:
            assert any(promoted(topology, old) for _ in range(4))
            assert eventually(lambda: connections(app, browser).port == topology.primary.port)
            # What the sentinels do ten seconds later.
            with old.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", topology.primary.port)
            topology.settle()
            before = len(written)
            assert eventually(lambda: len(written) > before + 8)
        finally:
            running = False
        for each in workers:
            each.result()
    assert {"start", *written} <= set(browser.twin(app.another()).run(see))
    close(config)


def test_the_primary_is_killed(sentinels: Topologies) -> None:
    """Killed: whoever waits is served by the promoted one, whoever does not gets 503; what was acknowledged is there."""
    topology = sentinels("valkey-9.1")
    topology.settle()
    safe = app_on(topology, SESSION_WAIT_REPLICAS=2, SESSION_WAIT_TIMEOUT=5)
    app = safe.another(SESSION_WAIT_REPLICAS=0)
    hasty = app.another(SESSION_REDIS_DEADLINE=0.1)
    reasons: list[str] = []
    remember_reasons(hasty, reasons)
    acknowledged = safe.browser()
    acknowledged.run(lambda: session.update(acknowledged=1))
    browser = acknowledged.twin(app)
    assert browser.run(see) == {"acknowledged": 1}
    impatient = browser.twin(hasty)
    assert impatient.run(see) == {"acknowledged": 1}
    old = topology.primary
    old.kill()
    try:
        impatient.run(lambda: session.update(no=1), status=503)
        assert f"127.0.0.1:{old.port}: ConnectionError" in reasons[0] or "no sentinel names" in reasons[0]
        browser.run(lambda: session.update(waited=1))
        # The app has it of the sentinel that promotes, before the others hear of it.
        assert eventually(lambda: topology.primary is not old, 30)
        assert browser.run(see) == impatient.run(see) == {"acknowledged": 1, "waited": 1}
        assert browser.twin(app.another()).run(see) == {"acknowledged": 1, "waited": 1}
    finally:
        topology.bring_back(old)
    browser.run(lambda: session.update(after=1))


def test_read_only_for_a_while(own_server: Server) -> None:
    """A server that is a replica for a while, in the words of its version, is waited for; then it is done once."""
    app = TestApp(own_server, {"SESSION_REDIS_DEADLINE": 20, "SESSION_CACHE_TTL": 0})
    hasty = app.another(SESSION_REDIS_DEADLINE=0)
    reasons: list[str] = []
    remember_reasons(hasty, reasons)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    with own_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        browser.twin(hasty).run(lambda: session.update(n=0), status=503)
        assert "read only replica" in reasons[0].lower() or "readonly" in reasons[0].lower()
        timer = Timer(0.3, lambda: client.execute_command("REPLICAOF", "NO", "ONE"))
        timer.start()
        browser.run(lambda: session.update(n=2))
        timer.join()
    assert browser.run(lambda: (session["n"], session.version)) == (2, 2)


def test_read_only_with_replicas_to_wait_for(own_server: Server) -> None:
    """A replica refuses WAIT as well: what counts is that it refused the write, which passes."""
    app = TestApp(own_server, {"SESSION_REDIS_DEADLINE": 20, "SESSION_CACHE_TTL": 0})
    waiting = app.another(SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=0.01, SESSION_REDIS_DEADLINE=0)
    reasons: list[str] = []
    remember_reasons(waiting, reasons)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    with own_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        browser.twin(waiting).run(lambda: session.update(n=0), status=503)
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert "read only replica" in reasons[0].lower() or "readonly" in reasons[0].lower()


@pytest.mark.parametrize(
    ("words", "read_only"),
    [
        ("READONLY You can't write against a read only replica.", True),
        ("ERR Error running script (call to f_ab): @user_script:7: -READONLY You can't write", True),
        ("Error running script: @user_script: 7: You can't write against a read only replica", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", False),
        ("CLUSTERDOWN The cluster is down", False),
        ("MASTERDOWN Link with MASTER is down", False),
        ("LOADING Redis is loading the dataset in memory", False),
    ],
)
def test_words_that_pass(words: str, read_only: bool) -> None:
    """What passes by itself is waited for, in any version's words, and is told with the server's name."""
    error = redis.ResponseError(words)
    assert is_passing(error)
    assert is_read_only(error) is read_only
    assert unavailable(error, "host:1").reason == f"host:1: ResponseError: {words}"
    assert not is_passing(redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'."))
    # As the library's own classes, which leave the code out.
    for kind in ("TryAgainError", "ClusterDownError", "MasterDownError", "ReadOnlyError", "BusyLoadingError"):
        assert is_passing(getattr(redis.exceptions, kind)("words"))


@pytest.mark.parametrize("way", SENTINELS)
def test_a_replica_that_is_named_as_the_primary_is_not_read(
    sentinels: Topologies, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An old primary that is back as a replica, and still empty, is not taken for one without the session."""
    topology = sentinels("valkey-9.1")
    config = SENTINELS[way](topology)
    app = app_on(topology, **config)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    paired = luasession.servers._paired
    named: list[int] = []

    def behind(reply: Any) -> Any:
        state = paired(reply)
        return {**state, b"port": named.pop()} if named and b"port" in state else state

    monkeypatch.setattr(luasession.servers, "_paired", behind)
    with standalone("valkey-9.1", replicaof="127.0.0.1 1") as old:
        for view in (see, lambda: session.update(b=2)):
            # Each reply is read twice, to accept it and to follow it.
            named[:] = [old.port] * 4
            twin = browser.twin(app.another())
            seen = twin.run(view)
            assert not named
            assert seen in ({"a": 1}, None)
            assert twin.cookies["session"] == browser.cookies["session"]
    monkeypatch.undo()
    assert browser.run(see) == {"a": 1, "b": 2}
    close(config)


class Greeted:
    """A connection to a server that answers ROLE with what it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.did: list[str] = []

    def on_connect(self) -> None:
        self.did.append("on_connect")

    def send_command(self, *words: str) -> None:
        self.did += words

    def read_response(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ([b"master", 0, []], None),
        (["master", 0, []], None),
        (redis.exceptions.NoPermissionError("this user has no permissions"), None),
        (redis.ResponseError("unknown command"), None),
        ([b"slave", b"127.0.0.1", 1, b"connect", -1], "is a replica"),
        (redis.ConnectionError("closed"), "closed"),
    ],
)
def test_a_primary_is_asked_for_its_role(answer: Any, refused: str | None) -> None:
    """A replica is not taken; who may not be asked is. What the app hooked into connecting comes first."""
    mine = Greeted(answer)
    for theirs, expected in (
        (None, ["on_connect", "ROLE"]),
        (lambda c: c.did.append("theirs"), ["theirs", "ROLE"]),
    ):
        mine.did = []
        if refused is None:
            _meet_primary(theirs, mine)
        else:
            with pytest.raises(redis.ConnectionError, match=refused) as caught:
                _meet_primary(theirs, mine)
            assert is_passing(caught.value)
        assert mine.did == expected
