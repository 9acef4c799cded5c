"""Each rule of the proxy does what it says, shown against a real server."""

from __future__ import annotations

import io
import random
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
import redis

from .proxy import Proxy, anything, command, read_frame, read_request
from .servers import Server, available_kinds, eventually, standalone

if TYPE_CHECKING:
    from collections.abc import Iterator

INCR = b"*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with standalone(available_kinds()[0]) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    with shared.client() as client:
        client.flushall()
    return shared


@pytest.fixture(params=["unix", "tcp"])
def proxy(request: pytest.FixtureRequest, server: Server) -> Iterator[Proxy]:
    before = threading.active_count()
    with Proxy(server.socket_path if request.param == "unix" else ("127.0.0.1", server.port)) as proxy:
        yield proxy
    assert threading.active_count() == before


@pytest.fixture
def client(proxy: Proxy) -> Iterator[redis.Redis]:
    """A client behind the proxy; from_url makes one that never sends anything twice."""
    with redis.Redis.from_url(proxy.url, socket_timeout=5) as client:
        yield client


def stored(server: Server, key: str = "n") -> int:
    with server.client() as client:
        return int(client.get(key) or 0)


def incr(client: redis.Redis) -> int:
    """Send INCR; the method of that name sends INCRBY."""
    answer: int = client.execute_command("INCR", "n")  # type: ignore[no-untyped-call]
    return answer


def raw(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def read_all(connection: socket.socket) -> bytes:
    """Read to the end of the connection, an orderly one or a reset."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("protocol", [2, 3])
def test_without_rules_nothing_changes(proxy: Proxy, protocol: int) -> None:
    """Values of any bytes and size, errors, nested replies and pipelines pass as they are."""
    awkward = bytes(range(256)) * 5000 + b"\r\n+OK\r\n"
    with redis.Redis.from_url(proxy.url, protocol=protocol) as client:
        client.set("big", awkward)
        assert client.get("big") == awkward
        assert client.get("missing") is None
        with pytest.raises(redis.ResponseError, match="wrong number"):
            client.execute_command("HGET", "key")
        assert client.eval("return {1, {'a', {}}, false}", 0) == [1, [b"a", []], None]
        client.hset("hash", mapping={f"f{i}": "v" * i for i in range(300)})
        assert len(client.hgetall("hash")) == 300
        pipeline = client.pipeline()
        for _ in range(100):
            pipeline.incr("n")
        assert pipeline.execute() == list(range(1, 101))
    assert proxy.counts["requests"] == proxy.counts["replies"]


def test_a_dropped_reply_was_executed(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """The server executes the command once, its client sees a broken connection, the next works."""
    rule = proxy.drop_reply(when=command("INCR"))
    with pytest.raises(redis.ConnectionError):
        incr(client)
    assert stored(server) == 1
    assert incr(client) == 2
    assert rule.done == proxy.counts["dropped"] == 1


def test_replies_can_be_dropped_several_times(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """A rule for three requests takes three, then lets them pass."""
    rule = proxy.drop_reply(when=command("INCR"), times=3)
    for _ in range(3):
        with pytest.raises(redis.ConnectionError):
            incr(client)
    assert incr(client) == 4
    assert rule.done == 3


def test_a_crossed_reply_is_that_of_another_connection(proxy: Proxy, server: Server) -> None:
    """What another connection last got to the same command is given; what only the own one got is not."""
    rule = proxy.cross_reply(when=command("GET"), times=None)
    with redis.Redis.from_url(proxy.url) as one, redis.Redis.from_url(proxy.url) as other:
        one.mset({"mine": "1", "theirs": "2"})
        assert one.get("mine") == b"1"
        assert one.get("mine") == b"1"
        assert other.get("theirs") == b"1"
        assert rule.done == proxy.counts["crossed"] == 1
        assert other.mget("theirs") == [b"2"]
        assert one.get("mine") == b"2"


def test_the_hook_runs_between_execution_and_loss(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """Before its client knows anything, the hook sees the effect and others can go on from it."""
    seen: list[object] = []

    def others() -> None:
        seen.append(stored(server))
        with redis.Redis.from_url(proxy.url) as other:
            seen.append(incr(other))
        seen.append(failed.is_set())

    failed = threading.Event()
    proxy.drop_reply(when=command("INCR"), before_drop=others)
    with pytest.raises(redis.ConnectionError):
        incr(client)
    failed.set()
    assert seen == [1, 2, False]


def test_a_hook_may_close_all_connections(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """The hook can close connections, its own included, without waiting for itself."""
    took: list[float] = []

    def disconnect() -> None:
        started = time.monotonic()
        proxy.disconnect()
        took.append(time.monotonic() - started)

    rule = proxy.drop_reply(before_drop=disconnect)
    with pytest.raises(redis.ConnectionError):
        incr(client)
    assert eventually(lambda: rule.done)
    assert took[0] < 2
    assert incr(client) == 2


def test_one_reply_of_a_pipeline_can_be_dropped(proxy: Proxy, server: Server) -> None:
    """Replies before the lost one arrive; requests after it may have been executed, or not."""
    wanted = iter([False, False, True, False, False])
    proxy.drop_reply(when=lambda _: next(wanted))
    with raw(proxy) as connection:
        connection.sendall(INCR * 5)
        assert read_all(connection) == b":1\r\n:2\r\n"
    assert 3 <= stored(server) <= 5


def test_a_delayed_reply_runs_into_the_timeout(proxy: Proxy, server: Server) -> None:
    """The command is executed at once, and its reply comes too late."""
    proxy.delay_reply(3.0, when=command("INCR"))
    with redis.Redis.from_url(proxy.url, socket_timeout=0.1) as client:
        with pytest.raises(redis.TimeoutError):
            incr(client)
        assert stored(server) == 1
        assert incr(client) == 2
    assert proxy.counts["delayed"] == 1


def test_a_delayed_reply_comes(proxy: Proxy, client: redis.Redis) -> None:
    """A client with patience gets the reply after the delay, and not before."""
    client.ping()
    proxy.delay_reply(0.1, when=command("INCR"))
    started = time.monotonic()
    assert incr(client) == 1
    assert time.monotonic() - started >= 0.1


def test_a_truncated_reply_ends_in_its_middle(proxy: Proxy, server: Server) -> None:
    """Exactly the first bytes arrive, then the connection ends."""
    with server.client() as direct:
        direct.set("key", "0123456789")
    proxy.truncate_reply(8, when=command("GET"))
    with raw(proxy) as connection:
        connection.sendall(INCR + b"GET key\r\n" + INCR)
        assert read_all(connection) == b":1\r\n$10\r\n012"
    assert proxy.counts["truncated"] == 1


def test_a_cut_request_is_never_executed(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """The connection closes, the server has seen nothing, the next request works."""
    rule = proxy.cut_request(when=command("INCR"))
    with server.counting() as commands, pytest.raises(redis.ConnectionError):
        incr(client)
    assert commands.names == []
    assert incr(client) == 1
    assert rule.done == proxy.counts["cut"] == 1


def test_every_nth_reply_is_dropped(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """Under load each third matching reply is lost, and all requests are executed."""
    rule = proxy.drop_every(3, when=command("INCR"))
    outcomes = [outcome(client) for _ in range(12)]
    assert outcomes == [True, True, False] * 4
    assert stored(server) == 12
    rule.stop()
    assert all(outcome(client) for _ in range(6))


def test_random_replies_are_dropped(proxy: Proxy, server: Server, client: redis.Redis) -> None:
    """With a generator the losses are random, and the same for the same seed."""
    draw = random.Random(7)
    expected = [draw.randrange(3) != 0 for _ in range(30)]
    proxy.drop_every(3, when=command("INCR"), generator=random.Random(7))
    assert [outcome(client) for _ in range(30)] == expected
    assert stored(server) == 30


def outcome(client: redis.Redis) -> bool:
    try:
        incr(client)
    except redis.ConnectionError:
        return False
    return True


def test_refused_connections_are_refused(proxy: Proxy, client: redis.Redis) -> None:
    """While refusing, open connections break and new ones are refused by the system itself."""
    incr(client)
    with raw(proxy) as connection:
        proxy.refuse()
        assert read_all(connection) == b""
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                raw(proxy)
    with pytest.raises(redis.ConnectionError):
        incr(client)
    proxy.accept()
    assert incr(client) == 2


def test_connections_break_with_the_server(proxy: Proxy, client: redis.Redis, server: Server) -> None:
    """When the server is killed its clients see it, and the proxy finds the restarted one."""
    incr(client)
    server.kill()
    with pytest.raises(redis.ConnectionError):
        incr(client)
    server.restart()
    assert incr(client) == 1


def test_setting_up_a_connection_uses_no_rule_up(proxy: Proxy, client: redis.Redis) -> None:
    """By default rules are for what the client was asked to do, not for its greeting."""
    rule = proxy.drop_reply()
    with pytest.raises(redis.ConnectionError):
        incr(client)
    assert rule.done == 1
    assert not anything([b"hello", b"3"])
    assert not command("evalsha")([b"EVAL"])


def test_the_oldest_matching_rule_counts(proxy: Proxy, client: redis.Redis) -> None:
    """One request meets one rule; stopped and cleared rules are out."""
    stopped = proxy.cut_request()
    stopped.stop()
    first, second = proxy.drop_reply(), proxy.cut_request()
    with pytest.raises(redis.ConnectionError):
        incr(client)
    assert (stopped.done, first.done, second.done) == (0, 1, 0)
    proxy.clear()
    assert incr(client) == 2


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), pytest.fail.Exception("a bug")])
def test_errors_of_a_hook_fail_the_test(server: Server, error: BaseException) -> None:
    """An exception in a hook is raised by close(); the reply is lost all the same."""

    def hook() -> None:
        raise error

    proxy = Proxy(server.socket_path)
    proxy.accept()
    proxy.drop_reply(before_drop=hook)
    with redis.Redis.from_url(proxy.url) as client, pytest.raises(redis.ConnectionError):
        incr(client)
    with pytest.raises(type(error), match="a bug"):
        proxy.close()


def test_errors_of_a_predicate_fail_the_test(server: Server) -> None:
    """An exception in a predicate closes the connection and is raised by close()."""
    proxy = Proxy(server.socket_path)
    proxy.accept()
    proxy.drop_reply(when=lambda words: words[99] == b"")
    with redis.Redis.from_url(proxy.url) as client, pytest.raises(redis.ConnectionError):
        incr(client)
    with pytest.raises(IndexError):
        proxy.close()


def test_many_connections_at_once(proxy: Proxy, server: Server) -> None:
    """Eight clients lose every fifth reply: what each got is consistent with what was executed."""
    rule = proxy.drop_every(5, when=command("INCR"))
    outcomes: list[bool] = []

    def work() -> None:
        with redis.Redis.from_url(proxy.url) as client:
            outcomes.extend([outcome(client) for _ in range(25)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(server) == len(outcomes) == 200
    assert outcomes.count(False) == rule.done == proxy.counts["dropped"] == 40


@pytest.mark.parametrize(
    "reply",
    [
        b"+OK\r\n",
        b"-ERR no\r\n",
        b":-7\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"$0\r\n\r\n",
        b"$4\r\n\r\n\r\n\r\n",
        b"*0\r\n",
        b"*3\r\n:1\r\n*2\r\n$1\r\na\r\n*0\r\n_\r\n",
        b"%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n,1.5\r\n",
        b"~1\r\n#t\r\n",
        b"=5\r\ntxt:a\r\n",
        b"!3\r\nERR\r\n",
        b"(12345678901234567890\r\n",
        b"|1\r\n+ttl\r\n:9\r\n$1\r\na\r\n",
    ],
)
def test_replies_are_framed(reply: bytes) -> None:
    """A whole reply is read and not a byte more; a part of one is an error, not a reply."""
    stream = io.BytesIO(reply + b"+next\r\n")
    assert read_frame(stream) == reply
    assert read_frame(stream) == b"+next\r\n"
    assert read_frame(stream) is None
    for size in range(1, len(reply)):
        with pytest.raises(ConnectionError):
            read_frame(io.BytesIO(reply[:size]))


def test_requests_are_read_as_words() -> None:
    """A request is its bytes and its words, binary ones too; inline commands are understood."""
    binary = b"*2\r\n$3\r\nGET\r\n$4\r\n\r\n$1\r\n"
    stream = io.BytesIO(binary + b"PING now\r\n")
    assert read_request(stream) == (binary, [b"GET", b"\r\n$1"])
    assert read_request(stream) == (b"PING now\r\n", [b"PING", b"now"])
    assert read_request(stream) is None
