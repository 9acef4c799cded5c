"""G16: a reply is accepted only if it proves to be the answer to its call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import gevent
import pytest
import redis
import valkey as valkey_py
from flask import session

from luasession.client import Client, Patience, connect
from luasession.config import Config
from luasession.connections import Connections
from luasession.errors import SessionUnavailable
from luasession.scripts import script

from .conftest import Browser, MakeApp, TestApp
from .proxy import Proxy
from .servers import Server

#: What a connection may be taken from: luasession's own, or the pool of a client that others use too.
CLIENTS: dict[str, Callable[[Server], Any]] = {
    "own": lambda server: None,
    "redis-py": lambda server: server.client(protocol=2),
    "redis-py resp3": lambda server: server.client(protocol=3),
    "redis-py decoding": lambda server: server.client(protocol=3, decode_responses=True),
    "blocking pool": lambda server: redis.Redis(
        connection_pool=redis.BlockingConnectionPool.from_url(server.url, protocol=3, max_connections=4)
    ),
    "valkey-py": lambda server: valkey_py.Valkey(unix_socket_path=server.socket_path),
}


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


def take(app: TestApp) -> Any:
    """Take the connection that the app's next call would get; it has to be given back."""
    return app.flask.session_interface._store.calls.client._connections.take()


def give(app: TestApp, connection: Any) -> None:
    app.flask.session_interface._store.calls.client._connections.give(connection)


def leave_unread(app: TestApp, *command: Any) -> Any:
    """Have the app's connection lose step: send a command on it and do not read the reply."""
    connection = take(app)
    connection.send_command(*command)
    give(app, connection)
    return connection


# The foreign replies; each makes the command from the app and the two handles, the reader's and the other's.

FOREIGN: dict[str, Callable[[TestApp, str, str], tuple[Any, ...]]] = {
    "another session": lambda app, mine, other: ("HGETALL", app.prefix + other),
    "no session": lambda app, mine, other: ("HGETALL", app.prefix + "nobody"),
    "text": lambda app, mine, other: ("ECHO", "a"),
    "status": lambda app, mine, other: ("PING",),
    "number": lambda app, mine, other: ("EXISTS", app.prefix + other),
    "nothing": lambda app, mine, other: ("GET", app.prefix + "nobody"),
    "two texts": lambda app, mine, other: ("TIME",),
    "numbers": lambda app, mine, other: ("EVAL", "return {1, 2, 3, 4}", 0),
    "lists": lambda app, mine, other: ("EVAL", "return {{1}, {2}, {3}, {4}}", 0),
    "a number for the identity": lambda app, mine, other: ("EVAL", "return {'@i', 7}", 0),
    "a short identity": lambda app, mine, other: ("EVAL", "return {'@i', 'x'}", 0),
    "an odd list": lambda app, mine, other: ("HMGET", app.prefix + other, "@i", "@v", "secret"),
    "a script's reply": lambda app, mine, other: (
        *("EVALSHA", script("load").sha, 1, app.prefix + other, b"call-id!"),
        *("", 0, "", 3_600_000, 60_000, 60_000),
    ),
    "an error": lambda app, mine, other: ("LPUSH", app.prefix + other, "x"),
    "no script": lambda app, mine, other: ("EVALSHA", "0" * 40, 0),
}


def see() -> Any:
    return dict(session)


def blind_set() -> None:
    session["n"] = 2


def read_and_set() -> None:
    session["n"] += 1


def log_out() -> None:
    session.destroy()


CALLS = {
    "cold load": see,
    "confirm": see,
    "blind": blind_set,
    "commit": read_and_set,
    "create": blind_set,
    "destroy": log_out,
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_connection_that_lost_step(
    valkey: Server, make_valkey_app: MakeApp, client: str, call: str
) -> None:
    """On a connection with somebody else's reply in it every call is answered right or with 503."""
    seeder = make_valkey_app(SESSION_CACHE_TTL=None)
    library = CLIENTS[client](valkey)
    app = seeder.another(SESSION_CACHE_TTL=0, **({} if library is None else {"SESSION_REDIS": library}))
    app.browser().run(lambda: session.update(warm=1))
    answers = {foreign: one_foreign_reply(seeder, app, foreign, call) for foreign in FOREIGN}
    # Errors are taken for the server's answer to the call; all other replies are recognised.
    assert {foreign for foreign, status in answers.items() if status == 503} <= {"an error", "no script"}
    if library is not None:
        library.close()


def one_foreign_reply(seeder: TestApp, app: TestApp, foreign: str, call: str) -> int:
    """Make a call on a connection with a foreign reply in it; return the status of the answer."""
    victim, other = seeder.browser(), seeder.browser()
    victim.run(lambda: session.update(n=1))
    other.run(lambda: session.update(secret="other's", n=7))
    theirs = seeder.stored(handle_of(other))
    handle = handle_of(victim)
    mine = app.browser() if call == "create" else victim.twin(app)
    if call in {"confirm", "commit"}:
        assert mine.run(see) == {"n": 1}

    leave_unread(app, *FOREIGN[foreign](app, handle, handle_of(other)))
    token = uuid4().hex
    app.views[token] = CALLS[call]
    response = mine.client.get("/run", headers={"X-Token": token})
    status = response.status_code
    assert status in {200, 503}, (foreign, response.text)
    if status == 503:
        assert "Set-Cookie" not in response.headers
    elif CALLS[call] is see:
        assert app.results[token] == {"n": 1}, foreign

    # Whatever came of it, everybody still has his own, by this process and by others.
    expected = {"blind": {"n": 2}, "commit": {"n": 2}, "destroy": {}}.get(call, {"n": 1})
    found = victim.twin(seeder).run(see)
    assert found == expected or (status == 503 and found == {"n": 1}), foreign
    for _ in range(2):
        assert other.twin(app).run(see) == {"secret": "other's", "n": 7}
        assert victim.twin(app).run(see) == victim.twin(seeder).run(see), foreign
    if call == "create" and status == 200:
        assert mine.run(see) == {"n": 2}
    assert seeder.stored(handle_of(other)) == theirs
    return status


def _echo(client: Client, word: bytes) -> Any:
    return client.call(lambda *_: (b"ECHO", word), lambda _reply: True, Patience(0))[1]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_foreign_reply_costs_the_connection(valkey: Server, client: str) -> None:
    """A reply that is not accepted is an error, and the connection that it came from is closed."""
    library = CLIENTS[client](valkey)
    way = connect(Config(redis_url=valkey.url, redis=library), "test")
    assert _echo(way, b"a") == b"a"
    connection = way._connections.take()
    way._connections.give(connection)
    assert connection._sock is not None
    with pytest.raises(SessionUnavailable, match="Unproven: the reply answers another call"):
        way.call(lambda *_: (b"ECHO", b"b"), lambda reply: False, Patience(0))
    assert connection._sock is None
    assert _echo(way, b"c") == b"c"
    connection.disconnect()
    if library is not None:
        library.close()


def test_a_foreign_reply_before_wait(valkey: Server, make_valkey_app: MakeApp) -> None:
    """With ``SESSION_WAIT_REPLICAS`` too a connection that lost step ends in 503, and is dropped."""
    seeder = make_valkey_app()
    browser = seeder.browser()
    browser.run(lambda: session.update(n=1))
    app = seeder.another(SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=0.001)
    mine = browser.twin(app)
    assert mine.run(see) == {"n": 1}
    leave_unread(app, "HGETALL", app.prefix + "nobody")
    mine.run(blind_set, status=503)
    assert mine.run(see) == {"n": 2}


class Stop(BaseException):
    """What a supervisor of one's own may raise anywhere."""


INTERRUPTIONS = [
    KeyboardInterrupt,
    SystemExit,
    Stop,
    gevent.GreenletExit,
    gevent.Timeout,
    MemoryError,
    RecursionError,
    ValueError,
]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("moment", ["read_response", "send_packed_command"])
def test_an_interruption_costs_the_connection(
    valkey: Server, make_valkey_app: MakeApp, client: str, moment: str
) -> None:
    """Whatever breaks off between sending and reading: the reply is never the next request's."""
    library = CLIENTS[client](valkey)
    app = make_valkey_app(SESSION_CACHE_TTL=None, **({} if library is None else {"SESSION_REDIS": library}))
    app.flask.testing = True  # what a view raises arrives here
    first, second = app.browser(), app.browser()
    first.run(lambda: session.update(who="first"))
    second.run(lambda: session.update(who="second"))
    for interruption in INTERRUPTIONS:
        connection = take(app)
        give(app, connection)
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, connection, moment, interruption)
            with pytest.raises(interruption):
                first.run(see)
        assert connection._sock is None, interruption
        for _ in range(2):
            assert second.run(see) == {"who": "second"}, interruption
            assert first.run(see) == {"who": "first"}, interruption
    if library is not None:
        library.close()


def break_off(
    patch: pytest.MonkeyPatch, connection: Any, moment: str, interruption: type[BaseException]
) -> None:
    """Have the connection's next reading, or the end of its next sending, raise."""
    original = getattr(connection, moment)

    def broken(*args: Any, **options: Any) -> Any:
        patch.undo()
        if moment == "send_packed_command":
            original(*args, **options)
        raise interruption

    patch.setattr(connection, moment, broken)


def test_a_signal_in_the_middle_of_a_read(valkey: Server, make_valkey_app: MakeApp) -> None:
    """A signal handler that raises while a reply is awaited: nobody else gets that reply."""

    def stop(*_: object) -> None:
        raise Stop

    with Proxy(valkey.socket_path) as proxy:
        app = make_valkey_app(SESSION_REDIS_URL=proxy.url, SESSION_CACHE_TTL=None, SESSION_REDIS_TIMEOUT=10)
        first, second = app.browser(), app.browser()
        first.run(lambda: session.update(who="first"))
        second.run(lambda: session.update(who="second"))
        before = signal.signal(signal.SIGUSR1, stop)
        try:
            # The request is at the proxy, so its reply is awaited, or about to be.
            rule = proxy.delay_reply(0.2, lambda words: signal_main())
            with pytest.raises(Stop):
                first.run(see)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert rule.remaining == 0
        for _ in range(2):
            assert second.run(see) == {"who": "second"}
            assert first.run(see) == {"who": "first"}


def signal_main() -> bool:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGUSR1)
    return True


# The connections that luasession makes itself.


@pytest.fixture
def own(valkey: Server) -> Iterator[Client]:
    client = connect(Config(redis_url=valkey.url), "test")
    yield client
    assert isinstance(client._connections, Connections)
    for connection in client._connections._idle:
        connection.disconnect()


def test_a_broken_connection_leaves_those_in_use_alone(own: Client) -> None:
    """While a broken connection's neighbours are closed, one that somebody takes meanwhile is not."""
    connections = own._connections
    taken = [connections.take() for _ in range(3)]
    for connection in taken:
        connection.send_command("ECHO", "warm")
        connection.read_response()
    broken, *rest = taken
    for connection in rest:
        connections.give(connection)
    user: list[Any] = []
    original = broken.disconnect

    def meanwhile(*args: Any) -> None:
        # Another thread takes a connection and sends on it, while this one is being closed.
        original(*args)
        user.append(connections.take())
        user[0].send_command("ECHO", "mine")

    broken.disconnect = meanwhile
    connections.lose(broken)
    del broken.disconnect
    assert user[0].read_response() == b"mine"
    connections.give(user[0])


def test_a_broken_connection_takes_its_neighbours_along(own: Client, valkey: Server) -> None:
    """After a broken connection the idle ones, which went to the same server, connect anew."""
    connections = own._connections
    taken = [connections.take() for _ in range(3)]
    for connection in taken:
        connection.send_command("ECHO", "warm")
        connection.read_response()
    for connection in taken[1:]:
        connections.give(connection)
    connections.lose(taken[0])
    assert [connection._sock for connection in taken] == [None] * 3
    assert _echo(own, b"on") == b"on"
