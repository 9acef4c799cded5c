"""G16: a reply is accepted only if it proves to be the answer to its call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from uuid import uuid4

import gevent
import pytest
import redis
import valkey as valkey_py
from flask import session

import luasession.visit
from luasession.client import Client, Patience, connect
from luasession.config import Config
from luasession.connections import Connections
from luasession.errors import SessionUnavailable
from luasession.ids import new_session_id
from luasession.packing import pack_times
from luasession.scripts import script

from .conftest import Browser, MakeApp, TestApp
from .proxy import Proxy, command
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


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, valkey: Server) -> Iterator[dict[str, Any]]:
    """What an app is configured with to use one of the clients."""
    library = CLIENTS[request.param](valkey)
    yield {} if library is None else {"SESSION_REDIS": library}
    if library is not None:
        library.close()


@pytest.fixture
def proxy(valkey: Server) -> Iterator[Proxy]:
    with Proxy(valkey.socket_path) as proxy:
        yield proxy


def connections(app: TestApp, handle: str) -> Connections:
    """Return the connections to the server that has a session."""
    found: Connections = app.flask.session_interface._store.calls.client._connections.of(
        (app.prefix + handle).encode()
    )
    return found


def next_connection(app: TestApp, handle: str) -> Any:
    """Return the connection that the app's next call about a session will be made on."""
    there = connections(app, handle)
    connection = there.take()
    there.give(connection)
    return connection


def is_beside(app: TestApp, handle: str, other: str) -> bool:
    """Whether two sessions are on the same server, as all are unless there is more than one."""
    return connections(app, handle) is connections(app, other)


def neighbour(app: TestApp, seeder: TestApp, handle: str, view: Callable[[], Any]) -> Browser:
    """Return a browser of another session on the same server, begun by a view."""
    while True:
        browser = seeder.browser()
        browser.run(view)
        if is_beside(app, handle, handle_of(browser)):
            return browser


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
        *("", bytes(7) + pack_times(3_600_000, 60_000, 60_000)),
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


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("call", CALLS)
def test_a_connection_that_lost_step(make_valkey_app: MakeApp, client: dict[str, Any], call: str) -> None:
    """On a connection with somebody else's reply in it every call is answered right or with 503."""
    seeder = make_valkey_app(SESSION_CACHE_TTL=None)
    app = seeder.another(SESSION_CACHE_TTL=0, **client)
    app.browser().run(lambda: session.update(warm=1))
    answers = {foreign: one_foreign_reply(seeder, app, foreign, call) for foreign in FOREIGN}
    # Errors are taken for the server's answer to the call; all other replies are recognised.
    assert {foreign for foreign, status in answers.items() if status == 503} <= {"an error", "no script"}


def one_foreign_reply(seeder: TestApp, app: TestApp, foreign: str, call: str) -> int:
    """Make a call on a connection with a foreign reply in it; return the status of the answer."""
    victim = seeder.browser()
    victim.run(lambda: session.update(n=1))
    handle = handle_of(victim)
    other = neighbour(app, seeder, handle, lambda: session.update(secret="other's", n=7))
    theirs = seeder.stored(handle_of(other))
    mine = app.browser() if call == "create" else victim.twin(app)
    if call in {"confirm", "commit"}:
        assert mine.run(see) == {"n": 1}

    lost = next_connection(app, handle)
    lost.send_command(*FOREIGN[foreign](app, handle, handle_of(other)))
    token = uuid4().hex
    app.views[token] = CALLS[call]
    with pytest.MonkeyPatch.context() as patch:
        # What is begun is begun on the server that the connection leads to.
        begun = next(each for _ in count() if is_beside(app, handle, (each := new_session_id(32)).handle))
        patch.setattr(luasession.visit, "new_session_id", lambda _length: begun)
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


def test_a_foreign_reply_costs_the_connection(make_valkey_app: MakeApp, client: dict[str, Any]) -> None:
    """A reply that is not accepted is an error, and the connection that it came from is closed."""
    app = make_valkey_app(**client)
    way = app.flask.session_interface._store.calls.client  # type: ignore[attr-defined]
    assert _echo(way, b"a") == b"a"
    there = way._connections.of(b"")
    connection = there.take()
    there.give(connection)
    assert connection._sock is not None
    with pytest.raises(SessionUnavailable, match="Unproven: the reply answers another call"):
        way.call(lambda *_: (b"ECHO", b"b"), lambda reply: False, Patience(0))
    assert connection._sock is None
    assert _echo(way, b"c") == b"c"


def test_a_foreign_reply_before_wait(valkey: Server, make_valkey_app: MakeApp) -> None:
    """With ``SESSION_WAIT_REPLICAS`` too a connection that lost step ends in 503, and is dropped."""
    seeder = make_valkey_app()
    browser = seeder.browser()
    browser.run(lambda: session.update(n=1))
    app = seeder.another(SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=0.001)
    mine = browser.twin(app)
    assert mine.run(see) == {"n": 1}
    next_connection(app, handle_of(browser)).send_command("HGETALL", app.prefix + "nobody")
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


@pytest.mark.parametrize("moment", ["read_response", "send_packed_command"])
def test_an_interruption_costs_the_connection(
    make_valkey_app: MakeApp, client: dict[str, Any], moment: str
) -> None:
    """Whatever breaks off between sending and reading: the reply is never the next request's."""
    app = make_valkey_app(SESSION_CACHE_TTL=None, **client)
    app.flask.testing = True  # what a view raises arrives here
    first = app.browser()
    first.run(lambda: session.update(who="first"))
    handle = handle_of(first)
    second = neighbour(app, app, handle, lambda: session.update(who="second"))
    for interruption in INTERRUPTIONS:
        connection = next_connection(app, handle)
        with pytest.MonkeyPatch.context() as patch:
            break_off(patch, connection, moment, interruption)
            with pytest.raises(interruption):
                first.run(see)
        assert connection._sock is None, interruption
        for _ in range(2):
            assert second.run(see) == {"who": "second"}, interruption
            assert first.run(see) == {"who": "first"}, interruption


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


def test_a_signal_in_the_middle_of_a_read(proxy: Proxy, make_valkey_app: MakeApp) -> None:
    """A signal handler that raises while a reply is awaited: nobody else gets that reply."""

    def stop(*_: object) -> None:
        raise Stop

    app = make_valkey_app(SESSION_REDIS_URL=proxy.url, SESSION_CACHE_TTL=None, SESSION_REDIS_TIMEOUT=10)
    first = app.browser()
    first.run(lambda: session.update(who="first"))
    second = neighbour(app, app, handle_of(first), lambda: session.update(who="second"))
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


def is_script(name: str) -> Callable[[list[bytes]], bool]:
    return lambda words: words[0] == b"EVALSHA" and words[1] == script(name).sha


#: What is sent, and what then is stored of n and at which version.
CROSSED = {
    "cold load": (command("HGETALL"), 5, 1),
    "confirm": (is_script("load"), 5, 1),
    "blind": (is_script("commit"), 2, 2),
    "commit": (is_script("commit"), 6, 2),
}


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("deadline", [0, 10])
@pytest.mark.parametrize("call", CROSSED)
def test_a_crossed_reply(proxy: Proxy, make_valkey_app: MakeApp, call: str, deadline: int) -> None:
    """The reply to somebody else's call of the same kind is nobody's answer; a script's costs the connection."""
    app = make_valkey_app(
        SESSION_REDIS_URL=proxy.url,
        SESSION_REDIS_DEADLINE=deadline,
        SESSION_CACHE_TTL=None if call == "cold load" else 0,
    )
    is_call, n, version = CROSSED[call]
    first = app.browser()
    first.run(lambda: session.update(n=1, who="first"))
    handle = handle_of(first)
    second = neighbour(app, app, handle, lambda: session.update(n=5, who="second"))
    assert second.run(see) == {"n": 5, "who": "second"}
    first.run(CALLS[call])
    theirs = app.stored(handle)
    # The first one's reply came on the one, and the other one is used next.
    there = connections(app, handle)
    kept, crossed = there.take(), there.take()
    there.give(kept)
    there.give(crossed)
    rule = proxy.cross_reply(is_call)
    # A hash that proves nothing is asked for once more, by load.lua.
    refused = call != "cold load"
    result = second.run(CALLS[call], status=503 if refused and not deadline else 200)
    assert rule.done == 1
    assert (crossed._sock is None) is refused
    if refused and not deadline:
        assert second.set_cookies == {}
    elif CALLS[call] is see:
        assert result == {"n": 5, "who": "second"}
    expected = ({"n": n, "who": "second"}, version)
    assert second.run(lambda: (dict(session), session.version)) == expected
    assert app.stored(handle) == theirs


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
