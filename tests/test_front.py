"""Proxies before a cluster or sentinels lead every client through them, under one set of rules."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import redis
import valkey.cluster
import valkey.sentinel

from .front import Front
from .proxy import command
from .servers import ClusterTopology, SentinelTopology


@pytest.fixture
def cluster(clusters: Callable[[str], ClusterTopology]) -> ClusterTopology:
    return clusters("valkey-9.1")


@pytest.fixture
def sentinel(sentinels: Callable[[str], SentinelTopology]) -> SentinelTopology:
    return sentinels("valkey-9.1")


@pytest.fixture(params=["cluster", "sentinel"])
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    before = threading.active_count()
    with Front(request.getfixturevalue(request.param)) as front:
        yield front
    assert threading.active_count() == before


def addresses(front: Front) -> list[tuple[str, int]]:
    """Return where its URL says that nodes or sentinels are."""
    hosts = front.url.partition("://")[2].partition("/")[0].split(",")
    return [(host, int(port)) for host, port in (each.split(":") for each in hosts)]


@pytest.mark.parametrize("kind", [redis.RedisCluster, valkey.cluster.ValkeyCluster])
def test_nodes_tell_the_proxies(cluster: ClusterTopology, kind: type[redis.RedisCluster]) -> None:
    """A cluster's client that is given one proxy finds the proxies of all nodes, and no node."""
    with Front(cluster) as front, kind(*addresses(front)[0]) as client:
        known = {node.port for node in client.get_nodes()}
        assert known <= set(front.ports.values())
        assert len(known) >= 6
        for n in range(20):
            client.set(f"front:{n}", n)
            assert client.get(f"front:{n}") == b"%d" % n
        assert {client.get_node_from_key(f"front:{n}").port for n in range(20)} <= known
        client.delete(*(f"front:{n}" for n in range(20)))


def test_a_redirection_tells_the_proxy(cluster: ClusterTopology) -> None:
    """A node that sends a request elsewhere sends it to the other node's proxy."""
    here, there = cluster.primaries[:2]
    key = next(key for key in map(str, range(100)) if cluster.owner(key) is there)
    with Front(cluster) as front, redis.Redis(port=front.ports[here.port]) as client:
        proxied = f"127.0.0.1:{front.ports[there.port]}"
        with pytest.raises(redis.ResponseError) as caught:
            client.get(key)
    assert str(caught.value).endswith(proxied)


@pytest.mark.parametrize("kind", [redis.Sentinel, valkey.sentinel.Sentinel])
def test_sentinels_tell_the_proxy(sentinel: SentinelTopology, kind: type[redis.Sentinel]) -> None:
    """Sentinels that are asked by their proxies name the proxy of the primary, and of the replicas."""
    with Front(sentinel) as front:
        found = kind(addresses(front))
        mine = front.ports[sentinel.primary.port]
        assert found.discover_master("main") == ("127.0.0.1", mine)
        others = {front.ports[each.port] for each in sentinel.servers} - {mine}
        assert {port for _, port in found.discover_slaves("main")} == others
        with found.master_for("main") as client:
            assert client.role()[0] == b"master"
        for each in found.sentinels:
            each.close()


def test_values_are_left_alone(cluster: ClusterTopology) -> None:
    """What only looks like the port of a server passes as it is."""
    port = cluster.primaries[0].port
    text = f":{port}\r\n$5\r\n{port}\r\n".encode()
    with Front(cluster) as front, redis.RedisCluster(*addresses(front)[0]) as client:
        client.set("front:text", text)
        assert client.get("front:text") == text
        client.delete("front:text")


def ping(port: int) -> bool:
    """Send one PING to a proxy, on a connection of its own."""
    with redis.Redis.from_url(f"redis://127.0.0.1:{port}") as client:
        return bool(client.ping())


def test_a_rule_is_for_all_servers_together(front: Front) -> None:
    """A rule for three requests takes three, whichever server they are for, and is forgotten by all."""
    ports = list(front.ports.values())
    rule = front.drop_reply(command("PING"), times=3)
    for port in ports[-3:]:
        with pytest.raises(redis.ConnectionError):
            ping(port)
    assert rule.done == front.counts["dropped"] == 3
    assert all(map(ping, ports))
    rule = front.cut_request(command("PING"))
    front.clear()
    assert ping(ports[-1])
    assert rule.done == 0


def test_all_are_down_and_up_together(front: Front) -> None:
    """Refused, accepted, cut off: it happens before every server."""
    ports = list(front.ports.values())
    assert all(map(ping, ports))
    front.refuse()
    for port in ports:
        with pytest.raises(redis.ConnectionError):
            ping(port)
    front.accept()
    assert all(map(ping, ports))
    connections = [socket.create_connection(("127.0.0.1", port), timeout=5) for port in ports]
    for connection in connections:
        connection.sendall(b"PING\r\n")
        assert connection.recv(64) == b"+PONG\r\n"
    front.disconnect()
    for connection in connections:
        with connection:
            assert connection.recv(64) == b""


def test_errors_before_any_server_fail_the_test(cluster: ClusterTopology) -> None:
    """What a predicate raises, at the last of the proxies too, is raised again at the end."""

    def broken(words: list[bytes]) -> bool:
        raise ZeroDivisionError

    front = Front(cluster)
    front.accept()
    front.cut_request(broken)
    with pytest.raises(redis.ConnectionError):
        ping(list(front.ports.values())[-1])
    with pytest.raises(ZeroDivisionError):
        front.close()
