"""Clusters and Sentinel: every way to get there, and what is the same for both; the guarantees have their own file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import pytest
import redis
import valkey.cluster
import valkey.sentinel
from flask import session
from redis.cluster import LoadBalancingStrategy

from luasession import ConfigurationError
from luasession.client import Patience, connect
from luasession.config import Config
from luasession.connections import Connections

from .conftest import GUARANTEED, Browser, MakeApp, TestApp
from .servers import ClusterTopology, SentinelTopology
from .test_store import FORK_BOTH, PRELUDE, VIEWS

Topology = Any


@pytest.fixture(scope="session", params=["cluster", "sentinel"])
def topology(request: pytest.FixtureRequest, clusters: Any, sentinels: Any) -> Topology:
    """A cluster, and a primary behind sentinels, of the embedded default."""
    return {"cluster": clusters, "sentinel": sentinels}[request.param]("valkey-9.1")


@pytest.fixture(params=GUARANTEED)
def any_cluster(request: pytest.FixtureRequest, clusters: Any) -> ClusterTopology:
    return clusters(request.param)


@pytest.fixture(params=GUARANTEED)
def any_sentinels(request: pytest.FixtureRequest, sentinels: Any) -> SentinelTopology:
    return sentinels(request.param)


@pytest.fixture
def make_app(topology: Topology) -> MakeApp:
    """Make an app on the topology, under a key prefix of its own."""

    def make(**config: Any) -> TestApp:
        # A loaded machine may stall a node for a while; what is tested here is no deadline.
        prefix = f"t{uuid4().hex[:8]}:"
        return TestApp(topology, {"SESSION_KEY_PREFIX": prefix, "SESSION_REDIS_DEADLINE": 10, **config})

    return make


def see() -> dict[str, Any]:
    return dict(session)


@contextmanager
def sending_to(port: int) -> Iterator[Event]:
    """Give what is set when a script is being sent to the server of a port."""
    original, sending = Connections._exchange, Event()

    def exchange(connection: Any, words: Any, *about: Any) -> Any:
        if words[0] == b"EVALSHA" and connection.port == port:
            sending.set()
        return original(connection, words, *about)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connections, "_exchange", staticmethod(exchange))
        yield sending


# Every way to get there.


CLUSTERS: dict[str, Callable[[ClusterTopology], dict[str, Any]]] = {
    "url": lambda cluster: {"SESSION_REDIS_URL": cluster.url},
    "redis-py": lambda cluster: {"SESSION_REDIS": cluster.client()},
    "redis-py from_url": lambda cluster: {
        "SESSION_REDIS": redis.RedisCluster.from_url(cluster.servers[1].tcp_url)
    },
    "redis-py decoding, from replicas": lambda cluster: {
        "SESSION_REDIS": redis.RedisCluster(
            "127.0.0.1",
            cluster.servers[0].port,
            protocol=3,
            decode_responses=True,
            load_balancing_strategy=LoadBalancingStrategy.ROUND_ROBIN,
        )
    },
    "valkey-py": lambda cluster: {
        "SESSION_REDIS": valkey.cluster.ValkeyCluster("127.0.0.1", cluster.servers[0].port)
    },
    "valkey-py decoding, from replicas": lambda cluster: {
        "SESSION_REDIS": valkey.cluster.ValkeyCluster(
            "127.0.0.1", cluster.servers[0].port, decode_responses=True, read_from_replicas=True
        )
    },
}

SENTINELS: dict[str, Callable[[SentinelTopology], dict[str, Any]]] = {
    "url": lambda sentinels: {"SESSION_REDIS_URL": sentinels.url},
    "redis-py": lambda sentinels: {"SESSION_REDIS": redis.Sentinel(sentinels.addresses).master_for("main")},
    "redis-py decoding": lambda sentinels: {
        "SESSION_REDIS": redis.Sentinel(
            sentinels.addresses, sentinel_kwargs={"decode_responses": True, "protocol": 3}
        ).master_for("main", decode_responses=True, protocol=3)
    },
    "valkey-py": lambda sentinels: {
        "SESSION_REDIS": valkey.sentinel.Sentinel(sentinels.addresses).master_for("main")
    },
}


@pytest.mark.parametrize("way", CLUSTERS)
def test_every_way_to_a_cluster(any_cluster: ClusterTopology, way: str) -> None:
    """Each URL and client of a cluster serves a session's whole life, on all of its primaries."""
    config = CLUSTERS[way](any_cluster)
    app = TestApp(
        any_cluster, {"SESSION_KEY_PREFIX": f"t{uuid4().hex[:8]}:", "SESSION_CACHE_TTL": 0, **config}
    )
    owners = set()
    while len(owners) < 3:
        owners.add(any_cluster.owner(app.prefix + whole_life(app)).port)
    close(config)


@pytest.mark.parametrize("way", SENTINELS)
def test_every_way_to_sentinels(any_sentinels: SentinelTopology, way: str) -> None:
    """Each URL and client of sentinels serves a session's whole life."""
    config = SENTINELS[way](any_sentinels)
    app = TestApp(
        any_sentinels, {"SESSION_KEY_PREFIX": f"t{uuid4().hex[:8]}:", "SESSION_CACHE_TTL": 0, **config}
    )
    whole_life(app)
    close(config)


def close(config: dict[str, Any]) -> None:
    client = config.get("SESSION_REDIS")
    if client is not None:
        client.close()


def whole_life(app: TestApp) -> str:
    """Write, read, write in parallel, rotate, find by principal, revoke, destroy; return the handle."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1, text="snø"))
    handle: str = browser.run(lambda: session.handle)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: browser.twin().run(lambda: session.update({f"k{n}": n})), range(8)))
    expected = {"a": 1, "text": "snø", **{f"k{n}": n for n in range(8)}}
    assert browser.run(see) == browser.twin(app.another()).run(see) == expected

    def log_in() -> None:
        session.regenerate(in_flight=False)
        session.principal = "ada"

    late = browser.twin()
    browser.run(log_in)
    assert (browser.run(see), late.run(see)) == (expected, {})
    others = [app.browser() for _ in range(3)]
    for other in others:
        other.run(log_in)
    sessions = app.flask.extensions["luasession"]
    assert len(sessions.sessions_of("ada")) == 4
    assert sessions.revoke_all("ada", keep=handle) == 3
    assert [other.run(see) for other in others] == [{}] * 3
    before = browser.twin()
    browser.run(lambda: session.destroy())
    before.run(lambda: session.update(late=1))
    assert b"a" not in app.stored(handle)
    return handle


def test_scripts_flushed_on_a_node(topology: Topology, make_app: MakeApp) -> None:
    """SCRIPT FLUSH on one server shows nowhere but in the counter."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    server = owner(topology, app, browser)
    for n in range(1, 4):
        with server.client() as client:
            client.execute_command("SCRIPT", "FLUSH")
        browser.run(lambda n=n: session.update(n=n))
        assert browser.twin(app.another()).run(see) == {"n": n}
        assert app.stats()["script_reloads"] == n


def owner(topology: Topology, app: TestApp, browser: Browser) -> Any:
    """Return the server that has a browser's session."""
    handle = browser.cookies["session"].partition(".")[0]
    return topology.owner(app.prefix + handle)


def connections(app: TestApp, browser: Browser) -> Connections:
    """Return the connections that the next call about a browser's session is made on."""
    handle = browser.cookies["session"].partition(".")[0]
    client = app.flask.session_interface._store.calls.client  # type: ignore[attr-defined]
    found: Connections = client._connections.of((app.prefix + handle).encode())
    return found


@pytest.mark.usefixtures("nothing_is_small")
def test_a_lost_reply_is_one_commit(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose reply is lost is sent again, on the way of that topology, and applied once."""
    app = make_app(SESSION_CACHE_TTL=0)
    browser = app.browser()
    browser.run(lambda: session.update(log=[]))
    original, sent = Connections._exchange, []

    def lossy(connection: Any, words: Any, *about: Any) -> Any:
        reply = original(connection, words, *about)
        if words[0] != b"EVALSHA":  # by the way it may ask where the key is
            return reply
        sent.append(words)
        if len(sent) == 2:  # the first one reads
            raise redis.ConnectionError("the reply is lost")
        return reply

    monkeypatch.setattr(Connections, "_exchange", staticmethod(lossy))
    browser.run(lambda: session["log"].append("once"))
    assert len(sent) == 3
    # Microseconds since the first sending: by them the script tells a commit that it no longer knows from a new one.
    resends = [int.from_bytes(words[6][7:14]) for words in sent[1:]]
    assert resends[0] == 0 < resends[1]
    assert browser.twin(app.another()).run(lambda: (session["log"], session.version)) == (["once"], 2)


# Replicas that acknowledge.


def replicas_of(topology: Topology, primary: Any) -> list[Any]:
    """Return the servers that replicate a primary, one at least."""
    with primary.client() as client:
        ports = {
            int(fields["port"])
            for name, fields in client.info("replication").items()
            if name.startswith("slave") and isinstance(fields, dict)
        }
    replicas = [each for each in topology.servers if each.port in ports]
    assert replicas
    return replicas


@pytest.mark.parametrize("how", ["commit", "destroy"])
def test_replicas_acknowledge_what_was_sent_again(
    topology: Topology, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A commit or log-out whose reply was lost is not acknowledged by replicas that lack it, on the next connection."""
    app = make_app(SESSION_CACHE_TTL=0, SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=5)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    hasty = app.another(SESSION_WAIT_TIMEOUT=0.05)
    primary = owner(topology, app, browser)
    original, sent = Connections._exchange, []

    def lossy(connection: Any, words: Any, wait: Any, *about: Any) -> Any:
        if wait is None or words[0] != b"EVALSHA":
            return original(connection, words, wait, *about)
        sent.append(words)
        if len(sent) > 1:
            return original(connection, words, wait, *about)
        original(connection, words, None, *about)
        raise redis.ConnectionError("the reply is lost")

    replicas = replicas_of(topology, primary)
    for each in replicas:
        each.pause()
    try:
        monkeypatch.setattr(Connections, "_exchange", staticmethod(lossy))
        view = (lambda: session.update(n=2)) if how == "commit" else (lambda: session.destroy())
        browser.twin(hasty).run(view, status=503)
    finally:
        for each in replicas:
            each.resume()
    assert len(sent) == 2


def test_replicas_acknowledge(topology: Topology, make_app: MakeApp) -> None:
    """With ``SESSION_WAIT_REPLICAS`` commit and destroy need the replicas: of them stopped, 503 with how many."""
    app = make_app(SESSION_CACHE_TTL=0, SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=5)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    hasty = app.another(SESSION_WAIT_TIMEOUT=0.01)
    reasons: list[str] = []
    remember_reasons(hasty, reasons)
    mine = browser.twin(hasty)
    mine.run(see)
    primary = owner(topology, app, browser)
    replicas = replicas_of(topology, primary)
    for each in replicas:
        each.pause()
    try:
        for view in (lambda: session.update(n=2), lambda: session.destroy()):
            mine.run(view, status=503)
    finally:
        for each in replicas:
            each.resume()
    topology.settle()
    assert reasons == ["0 of 1 replicas acknowledged within 10 ms"] * 2
    app.browser().run(lambda: session.update(n=1))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a request that waits for a server fail."""

    def wait(*_: Any) -> None:
        raise AssertionError("this does not pass by itself")

    monkeypatch.setattr(Patience, "wait", wait)


def remember_reasons(app: TestApp, reasons: list[str]) -> None:
    """Keep what each 503 was for."""
    from luasession import SessionUnavailable

    def answer(error: SessionUnavailable) -> tuple[str, int]:
        reasons.append(error.reason)
        return "unavailable", 503

    app.flask.register_error_handler(SessionUnavailable, answer)


# Processes.


FORKED = """
import redis
if sys.argv[3] == "cluster":
    app.config["SESSION_REDIS"] = redis.RedisCluster.from_url("redis://" + url.partition("://")[2].partition(",")[0])
elif sys.argv[3] == "sentinel":
    addresses = [each.split(":") for each in url.partition("://")[2].partition("/")[0].split(",")]
    app.config["SESSION_REDIS"] = redis.Sentinel(addresses).master_for("main")
"""


@pytest.mark.parametrize("ready", [False, True])
def test_parent_and_children(topology: Topology, tmp_path: Path, ready: bool) -> None:
    """A process and its forked children use sessions at the same time, each by connections of its own."""
    program = tmp_path / "forked.py"
    program.write_text(PRELUDE + FORKED + VIEWS + FORK_BOTH)
    kind = ("cluster" if isinstance(topology, ClusterTopology) else "sentinel") if ready else "none"
    done = subprocess.run(
        [sys.executable, str(program), topology.url, f"t{uuid4().hex[:8]}:", kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def test_tls() -> None:
    """``rediss+`` makes TLS connections, with the URL's certificates, to servers and sentinels alike."""
    url = "rediss+{}://me:secret@127.0.0.1:1{}?ssl_ca_certs=/ca.pem&sentinel_ssl_ca_certs=/other.pem"
    cluster: Any = connect(Config(redis_url=url.format("cluster", "").partition("&")[0]), "test")._connections
    sentinels: Any = connect(Config(redis_url=url.format("sentinel", "/main/3")), "test")._connections
    [node] = cluster._nodes.values()
    [sentinel] = sentinels._sentinels
    server = sentinels._make("127.0.0.1", 2)
    for each, user, authority in [
        (node, "me", "/ca.pem"),
        (sentinel, None, "/other.pem"),
        (server, "me", "/ca.pem"),
    ]:
        connection = each._recipe.kind(**each._recipe.settings)
        assert isinstance(connection, redis.connection.SSLConnection)
        assert connection.ca_certs == authority
        assert connection.username == user
        assert connection.retry._retries == 0
        assert connection.socket_timeout == 1
    assert server._recipe.settings["db"] == 3


def test_a_replica_is_refused(sentinels: Callable[[str], SentinelTopology]) -> None:
    """What a Sentinel's ``slave_for`` gives is refused with the name of what is wanted."""
    client = redis.Sentinel(sentinels("valkey-9.1").addresses).slave_for("main")
    app = TestApp(None, {"SESSION_REDIS": client, "TESTING": True})
    with pytest.raises(ConfigurationError, match="master_for"):
        app.browser().run(lambda: session.update(a=1))
    client.close()
