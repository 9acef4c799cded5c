"""A cluster: slots that move and primaries that die while requests run."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
import redis
import valkey.cluster
from flask import session
from redis.crc import key_slot

from luasession import ConfigurationError
from luasession.config import read_config
from luasession.connections import Connections, Recipe
from luasession.failures import Nowhere, code_of
from luasession.location import read_location
from luasession.servers import Cluster

from .conftest import GUARANTEED, Browser, TestApp
from .servers import ClusterTopology, Server, eventually
from .test_topologies import (  # noqa: F401 - one is a fixture
    CLUSTERS,
    at_once,
    close,
    connections,
    remember_reasons,
    sending_to,
)

Clusters = Callable[[str], ClusterTopology]


@pytest.fixture(params=GUARANTEED)
def any_cluster(request: pytest.FixtureRequest, clusters: Clusters) -> ClusterTopology:
    return clusters(request.param)


def app_on(cluster: ClusterTopology, **config: Any) -> TestApp:
    prefix = f"t{uuid4().hex[:8]}:"
    return TestApp(
        cluster,
        {"SESSION_KEY_PREFIX": prefix, "SESSION_REDIS_DEADLINE": 10, "SESSION_CACHE_TTL": 0, **config},
    )


def see() -> dict[str, Any]:
    return dict(session)


def key_of(app: TestApp, browser: Browser) -> bytes:
    return (app.prefix + browser.cookies["session"].partition(".")[0]).encode()


# A primary that hangs.


def slot_port(observer: Server, slot: int) -> int:
    with observer.client() as client:
        client.response_callbacks.clear()
        ranges = client.execute_command("CLUSTER SLOTS")
    return next((int(primary[1]) for first, last, primary, *_ in ranges if first <= slot <= last), 0)


def test_a_primary_that_was_replaced_while_it_hung(any_cluster: ClusterTopology) -> None:
    """What it answers when it goes on, knowing no newer secret, takes no browser out of its session."""
    app = app_on(any_cluster, SESSION_CACHE_TTL=None)
    # A server that is stopped right after its answer may not have sent it to its replica.
    other = app.another(SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=10).browser()
    other.run(lambda: session.update(a=1))
    assert other.twin(app).run(see) == {"a": 1}
    other = other.twin(app.another())
    key = key_of(app, other)
    hung = any_cluster.owner(key)
    hung.pause()
    try:
        observer = next(each for each in any_cluster.servers if each is not hung)
        assert eventually(lambda: slot_port(observer, key_slot(key)) != hung.port, 30)
        other.run(lambda: session.regenerate())
        late = other.twin(app)  # whose process has heard nothing of it
        with ThreadPoolExecutor(1) as pool:
            with sending_to(hung.port) as sending:
                answer = pool.submit(late.run, lambda: session.update(b=2))
                assert sending.wait(10)
            time.sleep(0.3)  # answered any sooner it would not be slow
            hung.resume()
            answer.result(30)
    finally:
        hung.resume()
        any_cluster.settle()
    assert "session" not in late.set_cookies
    assert other.run(see) == {"a": 1, "b": 2}


# URLs.


def test_what_a_url_says() -> None:
    """Addresses, credentials, TLS and options come out as redis-py wants them; ports have a default."""
    where = read_location(
        "rediss+cluster://me:p%40ss%2F@a:1,b,[::1]:3/?ssl_ca_certs=/ca.pem&socket_timeout=0.5", "KEY"
    )
    assert where.addresses == (("a", 1), ("b", 6379), ("::1", 3))
    assert where.service is None
    assert where.tls
    assert where.options == {
        "username": "me",
        "password": "p@ss/",
        "ssl_ca_certs": "/ca.pem",
        "socket_timeout": 0.5,
    }
    plain = read_location("redis+cluster://:secret@a:1", "KEY")
    assert (plain.options, plain.tls) == ({"password": "secret"}, False)


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ("", "host:port"),
        ("a:1,,b:2", "commas"),
        ("a:1 b:2", "commas"),
        ("a:port", "host or host:port"),
        ("a:0", "0 is no port"),
        ("a:65536", "65536 is no port"),
        ("a:1/3", "no database but 0"),
        ("a:1/main", "no service"),
        ("user@a:1", "user:password"),
        ("me:hunter2@x@a:1", "%40"),
        ("me:hun/ter2@a:1", "%2F"),
        ("a:1?nonsense=hunter2", "nonsense"),
        ("a:1?socket_timeout=hunter2", "socket_timeout"),
        ("a:1?sentinel_password=hunter2", "for sentinels"),
    ],
)
def test_a_wrong_url(rest: str, why: str) -> None:
    """A wrong URL stops the app at its start: the setting, what was expected, and no password."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({"SESSION_REDIS_URL": f"redis+cluster://{rest}"})
    message = str(caught.value)
    assert message.startswith("SESSION_REDIS_URL must be redis+cluster://[user:password@]host:port,host:port")
    assert why in message
    assert "hunter2" not in message
    assert "hun/ter2" not in message


def test_credentials_and_names_of_servers() -> None:
    """Neither an error nor a repr shows the password; the name of a server is its address."""
    url = "redis+cluster://me:hunter2@127.0.0.1:1"
    assert "hunter2" not in repr(read_location(url, "KEY"))
    app = TestApp(None, {"SESSION_REDIS_URL": url, "SESSION_REDIS_DEADLINE": 0})
    reasons: list[str] = []
    remember_reasons(app, reasons)
    app.browser().run(lambda: session.update(a=1), status=503)
    [reason] = reasons
    assert reason.startswith("no node tells the slots of the cluster: 127.0.0.1:1: ConnectionError: ")
    assert "hunter2" not in reason


@pytest.mark.usefixtures("at_once")
def test_a_server_that_is_no_cluster(valkey: Server) -> None:
    """A single server under a cluster's URL is told at once, in its own words."""
    app = TestApp(
        None, {"SESSION_REDIS_URL": f"redis+cluster://127.0.0.1:{valkey.port}", "SESSION_REDIS_DEADLINE": 60}
    )
    reasons: list[str] = []
    remember_reasons(app, reasons)
    app.browser().run(lambda: session.update(a=1), status=503)
    assert "cluster support disabled" in reasons[0]


@pytest.mark.usefixtures("at_once")
def test_a_password(clusters: Clusters) -> None:
    """Credentials of the URL go to every node."""
    cluster = clusters("valkey-9.1")
    url = cluster.url.replace("://", "://shop:s%2Fcret@")
    for each in cluster.servers:
        with each.client() as client:
            client.execute_command("ACL", "SETUSER", "shop", "on", ">s/cret", "~*", "+@all")
    for _ in range(5):
        browser = app_on(cluster, SESSION_REDIS_URL=url).browser()
        browser.run(lambda: session.update(a=1))
        assert browser.run(see) == {"a": 1}
    reasons: list[str] = []
    app = app_on(cluster, SESSION_REDIS_URL=url.replace("cret", "wrong"), SESSION_REDIS_DEADLINE=60)
    remember_reasons(app, reasons)
    app.browser().run(lambda: session.update(a=1), status=503)
    assert "AuthenticationError" in reasons[0]


# The map of slots.


class Fake(Connections):
    """A node that answers CLUSTER SLOTS from a script of answers."""

    def __init__(self, host: str, port: int, answers: dict[str, Any]) -> None:
        super().__init__(Recipe(lambda **_: None, {"host": host, "port": port}, 1), 0.01)
        self._answers = answers

    def ask(self, words: Any, accept: Callable[[Any], bool]) -> tuple[int, Any]:
        answer = self._answers.setdefault("asked", [])
        answer.append(str(self))
        reply = self._answers.get(str(self), redis.ConnectionError("refused"))
        if isinstance(reply, Exception):
            raise reply
        assert accept(reply)
        return 0, reply


def test_addresses_of_nodes() -> None:
    """A node that does not know its address is where it was reached; addresses are remapped; IPv6 works."""
    answers: dict[str, Any] = {"seed:1": [[0, 16383, [b"", 7, b"id"]]]}

    def remap(host: str, port: int) -> tuple[str, int]:
        return (host, port + 1000 if port == 9 else port)

    cluster = Cluster([("seed", 1)], lambda host, port: Fake(host, port, answers), remap, 1)
    owner = cluster.of(b"key")
    assert str(owner) == "seed:7"
    slot = key_slot(b"key")
    for words, expected in [
        (f"MOVED {slot} other:9", "other:1009"),
        (f"MOVED {slot} :8", "other:8"),
        (f"MOVED {slot} ::1:8", "::1:8"),
    ]:
        cluster.heard(redis.ResponseError(words), cluster.of(b"key"), b"key")
        assert str(cluster.of(b"key")) == expected
    assert str(cluster.heard(redis.ResponseError(f"ASK {slot} new:5"), owner, b"key")) == "new:5"
    assert str(cluster.of(b"key")) == "::1:8"


def test_whom_the_map_is_asked_of() -> None:
    """After a failure the node that failed is asked last, and its slots' new owner is learnt; else nobody asks."""
    answers: dict[str, Any] = {f"n:{port}": [[0, 16383, [b"n", 1], [b"n", 2]]] for port in (1, 2, 3)}
    cluster = Cluster(
        [("n", 1), ("n", 2), ("n", 3)],
        lambda host, port: Fake(host, port, answers),
        lambda host, port: (host, port),
        1,
    )
    failed = cluster.of(b"key")
    assert len(answers["asked"]) == 1
    answers["asked"].clear()
    assert cluster.of(b"other") is failed
    cluster.heard(redis.ResponseError("WRONGTYPE"), failed, b"key")
    assert answers["asked"] == []
    for port in (2, 3):
        answers[f"n:{port}"] = [[0, 16383, [b"n", 2]]]
    cluster.heard(redis.ConnectionError("gone"), failed, b"key")
    assert len(answers["asked"]) == 1
    assert answers["asked"] != ["n:1"]
    assert str(cluster.of(b"key")) == "n:2"


def test_nobody_tells_the_map() -> None:
    """With no node there the error names each; a slot that nobody has is waited for."""
    answers: dict[str, Any] = {}
    cluster = Cluster(
        [("n", 1), ("n", 2)], lambda host, port: Fake(host, port, answers), lambda host, port: (host, port), 1
    )
    with pytest.raises(Nowhere, match="n:1: ConnectionError: refused") as caught:
        cluster.of(b"key")
    assert "n:2" in str(caught.value)
    assert caught.value.passing
    answers["n:1"] = answers["n:2"] = [[0, 1, [b"n", 1]]]
    with pytest.raises(Nowhere, match="not covered") as caught:
        cluster.of(b"key")
    assert caught.value.passing


# Slots that move.


def codes_heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the codes of errors that calls end in."""
    codes: list[str] = []
    original = Cluster.heard

    def heard(self: Cluster, error: Exception, server: Connections, key: bytes) -> Connections | None:
        codes.append(code_of(error))
        return original(self, error, server, key)

    monkeypatch.setattr(Cluster, "heard", heard)
    return codes


def test_a_slot_moves_under_a_session(any_cluster: ClusterTopology, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of a slot's move a session is read, written once, and its id rotated; ASK and MOVED are met."""
    codes = codes_heard(monkeypatch)
    app = app_on(any_cluster)
    browser = app.browser()
    browser.run(lambda: session.update(log=[]))
    key = key_of(app, browser)
    source, target = any_cluster.owner(key), any_cluster.spare
    met: dict[str, list[str]] = {}
    version = 1
    for step in any_cluster.move(key_slot(key), target):
        with target.client() as client:
            client.execute_command("SCRIPT", "FLUSH")
        codes.clear()
        browser.run(lambda step=step: session["log"].append(step))
        browser.run(lambda: session.regenerate())
        version += 2
        assert browser.run(lambda: session.version) == version
        met[step] = list(codes)
    assert browser.run(see) == {"log": ["importing", "migrating", "migrate", "node", "done"]}
    assert set(met["node"]) == {"ASK"}  # the key has moved, its slot not yet
    assert met["done"][:1] == ["MOVED"]
    assert met["importing"] == met["migrating"] == met["migrate"] == []
    assert any_cluster.owner(key).port == target.port != source.port
    # Seen from anew, by a process that knows nothing of the move.
    codes.clear()
    assert browser.twin(app.another()).run(lambda: session.version) == version


@pytest.mark.parametrize("library", ["redis-py decoding, from replicas", "valkey-py decoding, from replicas"])
def test_a_replica_is_never_read(clusters: Clusters, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """A client that reads from replicas does not here: a server that has become one sends to the primary."""
    cluster = clusters("valkey-9.1")
    codes = codes_heard(monkeypatch)
    config = CLUSTERS[library](cluster)
    app = app_on(cluster, SESSION_CACHE_TTL=None, **config)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    key = key_of(app, browser)
    primary = cluster.owner(key)
    with primary.client() as client:
        replica = client.info("replication")["slave0"]["port"]
    known = app.flask.session_interface._store.calls.client._connections  # type: ignore[attr-defined]
    known._owners[key_slot(key)] = known._nodes["127.0.0.1", replica]
    assert browser.run(see) == {"n": 1}
    assert codes == ["MOVED"]
    close(config)


@pytest.mark.parametrize("library", ["redis-py", "valkey-py"])
def test_a_hook_of_the_app(clusters: Clusters, library: str) -> None:
    """What an app has done with each new connection of its cluster's client is done with luasession's."""
    cluster = clusters("valkey-9.1")
    seen: list[Any] = []
    port = cluster.servers[0].port
    client: Any = (
        redis.RedisCluster("127.0.0.1", port, redis_connect_func=seen.append)
        if library == "redis-py"
        else valkey.cluster.ValkeyCluster("127.0.0.1", port, valkey_connect_func=seen.append)
    )
    app = app_on(cluster, SESSION_REDIS=client)
    seen.clear()
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    taken_from = connections(app, browser)
    connection = taken_from.take()
    taken_from.give(connection)
    assert connection in seen
    client.close()


def test_a_slot_moves_under_load(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in parallel with a move keep every key that was acknowledged, and none fails."""
    cluster = clusters("valkey-9.1")
    codes = codes_heard(monkeypatch)
    app = app_on(cluster)
    browser = app.browser()
    browser.run(lambda: session.update(start=1))
    key = key_of(app, browser)
    target = next(each for each in cluster.primaries if each is not cluster.owner(key))
    moving, written = True, []

    def write(worker: int) -> None:
        mine, n = browser.twin(), 0
        while moving or n < 5:
            mine.run(lambda n=n: session.update({f"{worker}-{n}": n}))
            written.append(f"{worker}-{n}")
            n += 1

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(write, worker) for worker in range(4)]
        for _ in cluster.move(key_slot(key), target):
            before = len(written)
            eventually(lambda before=before: len(written) > before + 8)
        moving = False
        for each in workers:
            each.result()
    stored = browser.twin(app.another()).run(lambda: (dict(session), session.version))
    assert set(stored[0]) == {"start", *written}
    assert stored[1] == 1 + len(written)
    assert {"ASK", "MOVED"} <= set(codes)


def test_nodes_that_disagree(clusters: Clusters) -> None:
    """A call that is sent to and fro ends within the deadline, in the words of the last one."""
    cluster = clusters("valkey-9.1")
    app = app_on(cluster, SESSION_REDIS_DEADLINE=0.2)
    reasons: list[str] = []
    remember_reasons(app, reasons)
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    key = key_of(app, browser)
    ports = [cluster.servers[0].port, cluster.servers[1].port]
    sent: list[str] = []

    def exchange(self: Connections, _connection: Any, words: Any, *_: Any) -> Any:
        if words[0] == b"CLUSTER":
            raise redis.ConnectionError("no map")
        sent.append(str(self))
        raise redis.ResponseError(f"MOVED {key_slot(key)} 127.0.0.1:{ports[len(sent) % 2]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connections, "_exchange", exchange)
        browser.run(lambda: session.update(n=2), status=503)
    assert "MOVED" in reasons[0]
    assert 6 < len(sent) < 60
    browser.run(lambda: session.update(n=3))


# Primaries that die.


def browsers_on(app: TestApp, cluster: ClusterTopology, victim: Server) -> tuple[Browser, Browser]:
    """Return browsers with a session on a server, and with one on another."""
    found: dict[bool, Browser] = {}
    while len(found) < 2:
        browser = app.browser()
        browser.run(lambda: session.update(acknowledged=1))
        found[cluster.owner(key_of(app, browser)) is victim] = browser
    return found[True], found[False]


def test_a_primary_dies(clusters: Clusters) -> None:
    """Killed: its sessions wait for its replica or get 503 with words, all others go on; nothing acknowledged is lost."""
    cluster = clusters("valkey-9.1")
    # Who is a primary by now: other tests have had some replaced.
    victim = next(each for each in cluster.primaries if each is not cluster.spare)
    safe = app_on(cluster, SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=5, SESSION_REDIS_DEADLINE=20)
    # Whoever is promoted has no replica any more.
    app = safe.another(SESSION_WAIT_REPLICAS=0)
    hasty = app.another(SESSION_REDIS_DEADLINE=0.1)
    reasons: list[str] = []
    remember_reasons(hasty, reasons)
    hit, spared = (each.twin(app) for each in browsers_on(safe, cluster, victim))
    impatient, late = hit.twin(hasty), hit.twin()
    assert [each.run(see) for each in (hit, spared, impatient)] == [{"acknowledged": 1}] * 3
    victim.kill()
    try:
        impatient.run(lambda: session.update(no=1), status=503)
        with ThreadPoolExecutor(1) as pool:
            waiting: Future[Any] = pool.submit(late.run, lambda: session.update(waited=1))
            count = 0
            # Not with a deadline of its own: nodes stall all clients while they vote.
            while not waiting.done():
                spared.run(lambda count=count: session.update(count=count))
                count += 1
                time.sleep(0.02)
            waiting.result()
        assert count > 3
        assert str(victim.port) in reasons[0]
        assert "ConnectionError" in reasons[0]
        assert hit.run(see) == {"acknowledged": 1, "waited": 1}
        assert impatient.run(see) == {"acknowledged": 1, "waited": 1}
        assert spared.run(see) == {"acknowledged": 1, "count": count - 1}
        # A process that starts now, with the dead one among the addresses that it was given.
        assert hit.twin(app.another()).run(see) == {"acknowledged": 1, "waited": 1}
    finally:
        victim.restart()
        cluster.settle()
    # It came back as a replica of the one that was promoted.
    for browser in (hit, spared):
        browser.run(lambda: session.update(after=1))
        assert browser.run(lambda: session["after"]) == 1


def test_a_dead_node_takes_only_its_own_connections(clusters: Clusters) -> None:
    """When a connection to one node breaks, the idle ones to the others stay."""
    cluster = clusters("valkey-9.1")
    app = app_on(cluster)
    first = app.browser()
    first.run(lambda: session.update(a=1))
    _, other = browsers_on(app, cluster, cluster.owner(key_of(app, first)))
    broken, kept = connections(app, first), connections(app, other)
    assert broken is not kept
    connection = kept.take()
    kept.give(connection)
    gone = broken.take()
    broken.give(gone)
    gone._sock.shutdown(2)
    first.run(lambda: session.update(b=1))
    assert gone._sock is None
    assert connection._sock is not None
    assert first.run(see) == {"a": 1, "b": 1}


def test_clocks_that_differ(clusters: Clusters) -> None:
    """A session's moments are counted by the clock of its own node, whatever the other nodes' clocks say."""
    cluster = clusters("valkey-9.1")
    app = app_on(cluster)
    first = app.browser()
    first.run(lambda: session.update(a=1))
    _, second = browsers_on(app, cluster, cluster.owner(key_of(app, first)))
    store = app.flask.session_interface._store  # type: ignore[attr-defined]
    handles = [each.cookies["session"].partition(".")[0] for each in (first, second)]
    offset = connections(app, second).clock_offset
    assert offset is not None
    connections(app, second).clock_offset = offset + 3_600_000_000
    hour = store.now_ms(handles[1]) - store.now_ms(handles[0])
    assert 3_590_000 < hour < 3_610_000
