"""The client: what is sent again and what is not, and what becomes of the connection; without a server."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
import valkey
from hypothesis import given
from hypothesis import strategies as st
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

import luasession.client
from luasession import ConfigurationError, SessionUnavailable
from luasession.client import Client, Patience, connect
from luasession.config import Config
from luasession.connections import Connections, Recipe, pack_command
from luasession.failures import Unproven

from .servers import Server

OK = b"the answer"


class Connection:
    """A connection whose answers its pool has written down; an exception among them is raised."""

    def __init__(self, pool: Pool, **settings: Any) -> None:
        self.pool = pool
        self.settings = settings
        self.open = False

    def connect(self) -> None:
        if self.pool.refusals:
            raise self.pool.refusals.popleft()
        self.open = True

    def disconnect(self) -> None:
        self.open = False

    def send_packed_command(self, packed: list[bytes]) -> None:
        assert self.open
        self.pool.sent.append((self, b"".join(packed)))

    def read_response(self, *, disable_decoding: bool) -> Any:
        assert disable_decoding, "values are opaque bytes"
        answer = self.pool.answers.popleft()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Pool:
    """What luasession takes from a client's pool, and the script of all its connections."""

    def __init__(self, *answers: Any, max_connections: int = 1000, **settings: Any) -> None:
        self.answers = deque(answers)
        self.refusals: deque[Exception] = deque()
        self.made: list[Connection] = []
        self.sent: list[tuple[Connection, bytes]] = []
        self.max_connections = max_connections
        self.connection_kwargs = settings

    def connection_class(self, **settings: Any) -> Connection:
        self.made.append(Connection(self, **settings))
        return self.made[-1]


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.pauses: list[float] = []

    def monotonic(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_ns += int(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No test here waits for a pause; the jitter is left out."""
    clock = Clock()
    monkeypatch.setattr(luasession.client, "time", clock)
    monkeypatch.setattr(luasession.client, "now_ns", clock.monotonic)
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    return clock


class Caller:
    """Makes one call after the other, and keeps what it was asked for."""

    def __init__(self, pool: Pool, seconds: float = 1.0) -> None:
        self.connections = Connections(Recipe.of(pool), 0.01)
        self.client = Client(self.connections)
        self.patience = Patience(seconds)
        self.asked: list[tuple[int, int, bool]] = []

    def words(self, sent: int, first: int, known: bool) -> Sequence[bytes]:
        self.asked.append((sent, first, known))
        return (b"EVALSHA" if known else b"EVAL", b"x")

    def call(self, wait: tuple[int, int] | None = None) -> tuple[int, Any]:
        return self.client.call(self.words, lambda reply: reply == OK, self.patience, wait)[:2]

    @property
    def free(self) -> int:
        """How many connections could be taken now."""
        return self.connections._slots.qsize()


# Patience.


def test_pauses_grow_and_stay_bounded(clock: Clock) -> None:
    """Each pause is twice the last one, from 5 ms to a quarter of a second."""
    patience = Patience(10)
    for _ in range(9):
        patience.wait(OSError(), 0)
    assert clock.pauses == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.25, 0.25]


def test_pauses_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that failed together do not come back together: a pause is half to one and a half times its length."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for _ in range(200):
        Patience(1).wait(OSError(), 0)
    assert 0.0025 <= min(pauses) < 0.004
    assert 0.006 < max(pauses) <= 0.0075


@given(seconds=st.floats(0, 5), failures=st.lists(st.floats(0, 1), min_size=1), chance=st.floats(0.5, 1.5))
def test_all_pauses_and_failures_fit_the_deadline(
    seconds: float, failures: list[float], chance: float
) -> None:
    """Whatever single tries take, no pause begins that the deadline would not cover."""
    pauses: list[float] = []
    failed = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", pauses.append)
        patch.setattr("random.uniform", lambda low, high: low + (high - low) * (chance - 0.5))
        patience = Patience(seconds)
        for failed_after in failures:
            failed += failed_after
            try:
                patience.wait(OSError(), failed_after)
            except SessionUnavailable:
                break
            assert sum(pauses) + failed <= seconds + 1e-9


def test_the_end_of_patience_says_why(clock: Clock) -> None:
    """The deadline over, the error names the last failure and carries it as its cause."""
    error = redis.ConnectionError("nobody there")
    with pytest.raises(SessionUnavailable, match=r"^ConnectionError: nobody there$") as raised:
        Patience(0).wait(error, 0)
    assert raised.value.__cause__ is error
    assert clock.pauses == []


def test_one_patience_for_all_calls(clock: Clock) -> None:
    """What one call waited the next one of the request no longer has."""
    caller = Caller(Pool(*[OSError()] * 100), seconds=0.1)
    with pytest.raises(SessionUnavailable):
        caller.call()
    sent = len(caller.asked)
    assert sent > 3
    with pytest.raises(SessionUnavailable):
        caller.call()
    assert len(caller.asked) == sent + 1
    assert sum(clock.pauses) <= 0.1


# One call.


def test_a_call_is_sent_once(clock: Clock) -> None:
    """An answer that is one ends the call: one sending, no pause, the connection kept for the next."""
    pool = Pool(OK, OK)
    caller = Caller(pool)
    sent, reply = caller.call()
    assert reply == OK
    assert caller.asked == [(sent, sent, True)]
    caller.call()
    assert len(pool.made) == 1
    assert [packed for _, packed in pool.sent] == [b"*2\r\n$7\r\nEVALSHA\r\n$1\r\nx\r\n"] * 2
    assert clock.pauses == []


def test_what_is_sent_again_says_so(clock: Clock) -> None:
    """Each sending gets its own moment and that of the first; the moment returned is the last one's."""
    caller = Caller(Pool(OSError(), redis.TimeoutError(), OK))
    sent, _ = caller.call()
    moments = [moment for moment, _, _ in caller.asked]
    assert moments == sorted(set(moments))
    assert sent == moments[-1]
    assert {first for _, first, _ in caller.asked} == {moments[0]}


PASSING = [
    *(OSError("reset"), ConnectionResetError(), TimeoutError(), BrokenPipeError()),
    *(redis.ConnectionError("closed"), redis.TimeoutError("slow"), redis.BusyLoadingError("loading")),
    *(valkey.ConnectionError("closed"), valkey.TimeoutError("slow"), valkey.BusyLoadingError("loading")),
    redis.ResponseError("LOADING Redis is loading the dataset in memory"),
    redis.ResponseError("BUSY Redis is busy running a script."),
    redis.ResponseError("TRYAGAIN Multiple keys request during rehashing of slot"),
    redis.ResponseError("CLUSTERDOWN Hash slot not served"),
    redis.ResponseError("MASTERDOWN Link with MASTER is down"),
    redis.ReadOnlyError("You can't write against a read only replica."),
    redis.ResponseError(
        "READONLY You can't write against a read only replica. script: 12, on @user_script:1."
    ),
    redis.ResponseError("Error running script: -READONLY You can't write against a read only replica."),
    valkey.ResponseError("UNBLOCKED force unblock from blocking operation"),
    Unproven("another's"),
]
LASTING = [
    redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'."),
    redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
    redis.ResponseError("ERR unknown command 'EVALSHA'"),
    redis.exceptions.NoPermissionError("this user has no permissions to run the 'evalsha' command"),
    redis.AuthenticationError("invalid username-password pair"),
    redis.exceptions.AuthorizationError("no"),
    redis.exceptions.AuthenticationWrongNumberOfArgsError("AUTH"),
    redis.DataError("cannot encode"),
    valkey.AuthenticationError("invalid username-password pair"),
    valkey.ResponseError("OOM command not allowed"),
]


def named(error: Exception) -> str:
    return f"{type(error).__module__.partition('.')[0]} {type(error).__name__} {error}"[:60]


@pytest.mark.parametrize("error", PASSING, ids=named)
def test_what_passes_by_itself_is_waited_for(clock: Clock, error: Exception) -> None:
    """A server that starts, fails over or was cut off is asked again, after a pause."""
    caller = Caller(Pool(error, error, OK))
    assert caller.call()[1] == OK
    assert len(clock.pauses) == 2
    assert caller.free == 64


@pytest.mark.parametrize("error", LASTING, ids=named)
def test_what_lasts_is_told_at_once(clock: Clock, error: Exception) -> None:
    """A refusal is not asked for twice: the server's words are in the reason, without any pause."""
    caller = Caller(Pool(error, OK))
    with pytest.raises(SessionUnavailable) as raised:
        caller.call()
    assert raised.value.reason == f"localhost:6379: {type(error).__name__}: {error}"
    assert raised.value.__cause__ is error
    assert (len(caller.asked), clock.pauses) == (1, [])
    assert caller.free == 64


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), KeyboardInterrupt(), SystemExit(), GeneratorExit()]
)
def test_what_is_none_of_the_library_goes_through(clock: Clock, error: BaseException) -> None:
    """A bug, Ctrl-C, a killed greenlet: raised as it is, and the connection, with its reply unread, is dropped."""
    pool = Pool(error, OK)
    caller = Caller(pool)
    with pytest.raises(type(error)) as raised:
        caller.call()
    assert raised.value is error
    assert not pool.made[0].open
    assert caller.free == 64
    assert caller.call()[1] == OK
    assert len(pool.made) == 2


def test_a_command_that_cannot_be_made_loses_no_slot(clock: Clock) -> None:
    """An error in what makes the words goes through, and leaves as many connections as before."""
    caller = Caller(Pool(OK))
    with pytest.raises(OverflowError):
        caller.client.call(lambda *_: [(1 << 64).to_bytes(4)], lambda _: True, caller.patience)
    assert caller.free == 64


def test_what_is_done_meanwhile(clock: Clock) -> None:
    """It is done between sending and reading, at each sending, whatever the answer then is."""
    pool = Pool(redis.ResponseError("NOSCRIPT"), OSError(), OK)
    caller = Caller(pool)
    seen: list[tuple[int, int]] = []

    def meanwhile() -> None:
        seen.append((len(pool.sent), len(pool.answers)))

    _, reply, _ = caller.client.call(
        caller.words, lambda reply: reply == OK, caller.patience, meanwhile=meanwhile
    )
    assert reply == OK
    assert seen == [(1, 3), (2, 2), (3, 1)]


@pytest.mark.parametrize("wait", [None, (1, 100)])
def test_what_is_done_meanwhile_must_not_fail(clock: Clock, wait: tuple[int, int] | None) -> None:
    """If it does all the same, the connection goes, with the reply that nobody has read (G16)."""
    pool = Pool(OK, OK)
    caller = Caller(pool)
    with pytest.raises(ZeroDivisionError):
        caller.client.call(
            caller.words, lambda _: True, caller.patience, wait, meanwhile=lambda: print(1 // 0)
        )
    assert not pool.made[0].open
    assert caller.free == 64


def test_an_error_reply_keeps_the_connection(clock: Clock) -> None:
    """An error that the server answered is a reply that was read: the connection goes on."""
    pool = Pool(redis.ResponseError("LOADING"), OK)
    caller = Caller(pool)
    caller.call()
    assert len(pool.made) == 1
    assert pool.made[0].open


@pytest.mark.parametrize("answer", [OSError(), redis.TimeoutError(), b"another's", None, 7, [OK]])
def test_what_breaks_off_drops_the_connection(clock: Clock, answer: Any) -> None:
    """After a broken read, or a reply that answers another call, the connection is never used again (G16)."""
    pool = Pool(answer, OK)
    caller = Caller(pool)
    assert caller.call()[1] == OK
    assert [connection.open for connection in pool.made] == [False, True]


REFUSED = redis.ResponseError("MOVED 7 127.0.0.1:7")
BROKEN = redis.ConnectionError("gone")


@pytest.mark.parametrize(
    ("answers", "again"),
    [
        ([REFUSED, OK], [False, False]),
        ([redis.ResponseError("LOADING"), redis.exceptions.NoScriptError("No"), OK], [False] * 3),
        ([BROKEN, OK], [False, True]),
        ([redis.ResponseError("READONLY"), OK], [False, True]),
        ([REFUSED, BROKEN, OK], [False, False, True]),
        ([BROKEN, REFUSED, OK], [False, True, True]),
    ],
)
def test_what_was_refused_was_not_sent_before(clock: Clock, answers: list[Any], again: list[bool]) -> None:
    """A sending is one more of the same only if an earlier one may have been applied."""
    caller = Caller(Pool(*answers))
    assert caller.call()[1] == OK
    assert [sent != first for sent, first, _ in caller.asked] == again


def test_another_calls_reply_is_never_returned(clock: Clock) -> None:
    """Where only foreign replies come the call ends in an error that says so, within its deadline."""
    with pytest.raises(
        SessionUnavailable, match=r"^localhost:6379: Unproven: the reply answers another call$"
    ):
        Caller(Pool(*[b"another's"] * 100), seconds=0.2).call()


# Scripts that the server does not know.


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.NoScriptError("No matching script. Please use EVAL."),
        valkey.exceptions.NoScriptError("No matching script. Please use EVAL."),
        redis.ResponseError("NOSCRIPT No matching script."),
    ],
    ids=named,
)
def test_an_unknown_script_is_sent_as_text(clock: Clock, error: Exception) -> None:
    """NOSCRIPT is answered by the text, at once and on the same connection; no patience is spent."""
    pool = Pool(error, OK)
    caller = Caller(pool, seconds=0)
    assert caller.call()[1] == OK
    assert [known for _, _, known in caller.asked] == [True, False]
    assert len(pool.made) == 1
    assert clock.pauses == []


def test_the_text_stays_text(clock: Clock) -> None:
    """A connection that breaks after NOSCRIPT does not make the call guess again; another call does."""
    caller = Caller(Pool(redis.exceptions.NoScriptError(), OSError(), OK, OK))
    caller.call()
    caller.call()
    assert [known for _, _, known in caller.asked] == [True, False, False, True]


def test_a_server_that_never_knows_ends(clock: Clock) -> None:
    """NOSCRIPT in answer to the text itself is an error like any other, not a loop."""
    caller = Caller(Pool(*[redis.exceptions.NoScriptError("none")] * 3))
    with pytest.raises(SessionUnavailable, match="NoScriptError: none"):
        caller.call()
    assert len(caller.asked) == 2


# WAIT.


def test_wait_shares_the_connection(clock: Clock) -> None:
    """The command and WAIT travel together, and the reply is the command's."""
    pool = Pool(OK, 2)
    assert Caller(pool).call(wait=(2, 100))[1] == OK
    assert pool.sent[0][1] == pack_command((b"EVALSHA", b"x")) + pack_command((b"WAIT", b"2", b"100"))


def test_too_few_replicas(clock: Clock) -> None:
    """Too few acknowledgements are an error with the numbers, and nothing is sent again."""
    caller = Caller(Pool(OK, 1, OK, 2))
    with pytest.raises(SessionUnavailable, match=r"^1 of 2 replicas acknowledged within 100 ms$"):
        caller.call(wait=(2, 100))
    assert len(caller.asked) == 1
    assert caller.free == 64
    assert caller.call(wait=(2, 100))[1] == OK


def test_both_replies_are_read(clock: Clock) -> None:
    """A refused command leaves no reply to WAIT behind: the connection stays in step, and is kept."""
    pool = Pool(redis.exceptions.NoScriptError(), 0, OK, 1)
    assert Caller(pool).call(wait=(1, 100))[1] == OK
    assert len(pool.made) == 1
    assert pool.answers == deque()


@pytest.mark.parametrize("answer", [b"another's", None, [1]])
def test_a_reply_that_is_none_to_wait(clock: Clock, answer: Any) -> None:
    """What WAIT cannot have answered drops the connection."""
    pool = Pool(OK, answer, OK, 1)
    caller = Caller(pool)
    assert caller.call(wait=(1, 100))[1] == OK
    assert [connection.open for connection in pool.made] == [False, True]


# Connections.


@pytest.mark.parametrize(("bound", "free"), [(3, 3), (64, 64), (1000, 64)])
def test_as_many_as_the_pool_allows(bound: int, free: int) -> None:
    """The client's own bound is kept to, and 64 at most."""
    connections = Connections(Recipe.of(Pool(max_connections=bound)), 0.01)
    taken = [connections.take() for _ in range(free)]
    assert len(set(map(id, taken))) == free
    with pytest.raises(redis.ConnectionError, match=r"^no connection became free within 0\.01 s$"):
        connections.take()
    connections.give(taken[0])
    assert connections.take() is taken[0]


def test_the_last_used_comes_first() -> None:
    """Of idle connections the one used last is taken, so that the rest may be closed by the server."""
    connections = Connections(Recipe.of(Pool()), 0.01)
    first, second = connections.take(), connections.take()
    connections.give(first)
    connections.give(second)
    assert [connections.take(), connections.take()] == [second, first]


def test_a_lost_one_takes_its_idle_neighbours_with_it() -> None:
    """They were connected to the same server; those in use are left to their users."""
    connections = Connections(Recipe.of(Pool()), 0.01)
    lost, idle, busy = connections.take(), connections.take(), connections.take()
    connections.give(idle)
    connections.lose(lost)
    assert (lost.open, idle.open, busy.open) == (False, False, True)
    assert connections._slots.qsize() == 63
    assert connections.take() not in (lost, idle)


def test_a_neighbour_that_cannot_be_closed_loses_no_slot() -> None:
    """Whatever closing ends in, the slot comes back."""
    connections = Connections(Recipe.of(Pool()), 0.01)
    lost = connections.take()
    lost.disconnect = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        connections.lose(lost)
    assert connections._slots.qsize() == 64


@pytest.mark.parametrize(
    "error", [redis.ConnectionError("refused"), redis.AuthenticationError("who")], ids=named
)
def test_a_connection_that_cannot_be_made_loses_no_slot(clock: Clock, error: Exception) -> None:
    """A refused connection counts as a try like any other, and leaves as many slots as before."""
    pool = Pool(OK)
    caller = Caller(pool)
    pool.refusals.append(error)
    if isinstance(error, redis.AuthenticationError):
        with pytest.raises(SessionUnavailable, match="AuthenticationError: who"):
            caller.call()
    else:
        assert caller.call()[1] == OK
        # Nothing was sent the first time, so nothing is sent again.
        assert [sent == first for sent, first, _ in caller.asked] == [True]
    assert caller.free == 64


def test_nobody_else_tries_again() -> None:
    """Connections are made with the client's settings, less all that would have them retry."""
    retry = Retry(ExponentialBackoff(), 10)
    settings = {"host": "there", "retry": retry, "retry_on_timeout": True, "retry_on_error": [OSError]}
    pool = Pool(**settings)
    made = Connections(Recipe.of(pool), 0.01).take().settings
    assert made.pop("retry").get_retries() == 0
    assert made == {"host": "there", "retry_on_timeout": False, "retry_on_error": []}
    # The client's own are left as they were.
    assert pool.connection_kwargs == settings
    assert retry.get_retries() == 10


@pytest.mark.parametrize(
    ("theirs", "made"),
    [
        ({}, {"socket_timeout": 2.0, "socket_connect_timeout": 2.0}),
        ({"path": "/a", "socket_timeout": None}, {"path": "/a", "socket_timeout": 2.0}),
        (
            {"socket_timeout": 9, "socket_connect_timeout": None},
            {"socket_timeout": 2.0, "socket_connect_timeout": 2.0},
        ),
        (
            {"socket_timeout": 0.5, "socket_connect_timeout": 1},
            {"socket_timeout": 0.5, "socket_connect_timeout": 1},
        ),
    ],
)
def test_no_call_takes_longer_than_a_request_waits(theirs: dict[str, Any], made: dict[str, Any]) -> None:
    """A ready client that waits for a hung server for ever, or for long, waits as long as the deadline here."""
    pool = Pool(**theirs)
    assert Connections(Recipe.of(pool, 2.0), 0.01).take().settings == made
    assert pool.connection_kwargs == theirs


def test_a_ready_client_keeps_the_deadline(valkey: Server) -> None:
    """What is made of a client without timeouts of its own has the bound of the settings."""
    ready = redis.Redis.from_url(valkey.url, socket_timeout=None)
    made = connect(Config(redis=ready, redis_deadline=3.0), "test")
    connection = made._connections.of(b"").take()
    assert connection.socket_timeout == 3.0
    connection.disconnect()
    ready.close()


def test_settings_that_are_not_there_are_not_made_up() -> None:
    """A connection class that knows no retries is not handed any."""
    assert Connections(Recipe.of(Pool(path="here")), 0.01).take().settings == {"path": "here"}
    assert Connections(Recipe.of(Pool(retry=None)), 0.01).take().settings == {"retry": None}


def test_freed_they_are_closed() -> None:
    """Idle connections are closed with the last reference to them, without the garbage collector."""
    connections = Connections(Recipe.of(Pool()), 0.01)
    connection = connections.take()
    connections.give(connection)
    gc.disable()
    try:
        del connections
        assert not connection.open
    finally:
        gc.enable()


def test_threads_share_no_connection() -> None:
    """Eight threads on three connections: none is ever in two hands, and all slots come back."""
    pool = Pool(max_connections=3)
    connections = Connections(Recipe.of(pool), 10)
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait(10)
        for n in range(300):
            connection = connections.take()
            assert connection.open
            owner = connection.settings.setdefault("owner", number)
            assert owner == number
            del connection.settings["owner"]
            (connections.lose if n % 10 == 9 else connections.give)(connection)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert connections._slots.qsize() == 3
    assert sum(connection.open for connection in pool.made) <= 3


# The command.


@given(words=st.lists(st.binary(max_size=20), min_size=1, max_size=6))
def test_a_command_is_packed_as_the_protocol_says(words: list[bytes]) -> None:
    """An array of bulk strings, byte for byte what the client library's own packer makes of it."""
    packer = redis.connection.PythonRespSerializer(6000, lambda value: value)
    # The library splits its first word at spaces; ours are names of commands.
    words = [b"EVAL", *words]
    assert pack_command(words) == b"".join(packer.pack(*words))


# The kinds of client.


def test_connecting_opens_nothing() -> None:
    """Building the client asks nobody: the first call does."""
    client = connect(Config(redis_url="redis://127.0.0.1:1/0"), "app")
    with pytest.raises(SessionUnavailable, match="Connection"):
        client.call(lambda *_: [b"PING"], lambda _: True, Patience(0))


def test_a_client_without_a_pool_is_refused() -> None:
    """What has no connection pool of its own is named by its type."""
    with pytest.raises(ConfigurationError, match="SESSION_REDIS is a object; expected a redis-py Redis"):
        connect(Config(redis=object()), "app")
