"""The store: scripts come back by themselves, any client will do, and processes and greenlets share nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any
from uuid import uuid4

import pytest
import redis
import valkey as valkey_py
import valkey.backoff
import valkey.retry
from flask import session
from redis.backoff import NoBackoff
from redis.retry import Retry

import luasession.calls
import luasession.store
from luasession import ConfigurationError, SessionUnavailable

from .conftest import Browser, MakeApp, TestApp
from .proxy import Proxy, command
from .servers import Server, eventually
from .web import serving


def see() -> dict[str, Any]:
    return dict(session)


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


# Scripts that the server does not know.


def test_the_first_use_loads_the_scripts(make_app: MakeApp) -> None:
    """The first call of a process loads all scripts and asks the time once; no later call is an EVAL."""
    app = make_app()
    assert app.server is not None
    browser = app.browser()
    with app.server.counting() as commands:
        browser.run(lambda: session.update(a=1))
        browser.run(lambda: session.update(b=1))
    assert commands.names == ["SCRIPT LOAD"] * 4 + ["TIME"] + ["EVALSHA"] * 2
    assert app.stats()["script_reloads"] == 0


@pytest.mark.usefixtures("nothing_is_small")
def test_each_script_comes_back_by_itself(own_server: Server) -> None:
    """A script that the server has forgotten is sent as text, once, and counted; the answer is right."""
    app = TestApp(own_server, {"SESSION_CACHE_TTL": 0})
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(see)
    calls: list[Callable[[], Any]] = [see, lambda: session.update(b=2), lambda: session.destroy()]
    with own_server.client() as client:
        for done, view in enumerate(calls, 1):
            client.script_flush()
            with own_server.counting() as commands:
                browser.run(view)
            assert commands.names == ["EVALSHA", "EVAL"]
            assert app.stats()["script_reloads"] == done
            if done < 3:
                # From then on it is known again.
                with own_server.counting() as commands:
                    browser.run(view)
                assert commands.names == ["EVALSHA"]
        assert browser.cookies == {}


def test_a_server_that_never_loads_scripts(own_server: Server) -> None:
    """Where SCRIPT LOAD is refused the scripts go as text at first, and sessions work."""
    with own_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-script")
        app = TestApp(own_server, {})
        browser = app.browser()
        browser.run(lambda: session.update(a=1))
        browser.run(lambda: session.update(b=1))
        assert browser.run(see) == {"a": 1, "b": 1}
        assert app.stats()["script_reloads"] == 1


# Ready clients.

READY: dict[str, Callable[[Server], Any]] = {
    "redis-py": lambda server: redis.Redis(port=server.port),
    "redis-py unix": lambda server: redis.Redis(unix_socket_path=server.socket_path),
    "redis-py decoding": lambda server: redis.Redis(port=server.port, decode_responses=True),
    "redis-py resp2": lambda server: redis.Redis(port=server.port, protocol=2),
    "redis-py resp3": lambda server: redis.Redis(port=server.port, protocol=3),
    "redis-py resp3 decoding": lambda server: redis.Redis(
        port=server.port, protocol=3, decode_responses=True, encoding="latin-1"
    ),
    "redis-py from_url": lambda server: redis.Redis.from_url(server.tcp_url),
    "redis-py blocking pool": lambda server: redis.Redis(
        connection_pool=redis.BlockingConnectionPool.from_url(server.url, max_connections=2, timeout=10)
    ),
    "redis-py health checks": lambda server: redis.Redis(port=server.port, health_check_interval=1),
    "valkey-py": lambda server: valkey_py.Valkey(port=server.port),
    "valkey-py unix": lambda server: valkey_py.Valkey(unix_socket_path=server.socket_path),
    "valkey-py decoding": lambda server: valkey_py.Valkey(port=server.port, decode_responses=True),
    "valkey-py resp3": lambda server: valkey_py.Valkey(port=server.port, protocol=3),
    "valkey-py blocking pool": lambda server: valkey_py.Valkey(
        connection_pool=valkey_py.BlockingConnectionPool.from_url(
            f"unix://{server.socket_path}", max_connections=2, timeout=10
        )
    ),
}

AWKWARD = {"bytes": bytes(range(256)), "text": "snø \U0001f9ca \0 \r\n", "ключ": [1, {"deep": ("a", None)}]}


@pytest.mark.parametrize("client", READY)
def test_a_ready_client(server: Server, make_app: MakeApp, client: str) -> None:
    """Every call works with every sort of client, and none of its connections is kept."""
    library = READY[client](server)
    app = make_app(SESSION_REDIS=library, SESSION_CACHE_TTL=0, SESSION_REDIS_URL="redis://nowhere.invalid")
    browser = app.browser()
    browser.run(lambda: session.update(AWKWARD))
    for reader in (browser, browser.twin(app.another())):
        assert reader.run(see) == AWKWARD
    browser.twin(app.another()).run(lambda: session.update(n=1))
    assert browser.run(see) == {**AWKWARD, "n": 1}
    browser.run(lambda: session.regenerate())
    assert browser.run(see) == {**AWKWARD, "n": 1}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: browser.twin().run(lambda: session.update({f"k{n}": n})), range(16)))
    assert len(browser.run(see)) == len(AWKWARD) + 17
    browser.run(lambda: session.destroy())
    assert app.stored(handle_of(browser.twin()) if browser.cookies else "none") == {}
    # The app's own use of its client is what it was.
    library.set(app.prefix + "own", "text")
    decodes = library.get_encoder().decode_responses
    assert library.get(app.prefix + "own") == ("text" if decodes else b"text")
    assert not getattr(library.connection_pool, "_in_use_connections", None)
    library.close()


class Credentials(redis.CredentialProvider):
    """A service that hands out credentials, and fails so many times."""

    def __init__(self) -> None:
        self.fails = 0

    def get_credentials(self) -> tuple[()]:
        if self.fails:
            self.fails -= 1
            raise LookupError("s3cret is no longer valid")
        return ()


@pytest.mark.parametrize("fails", [2, 1000])
def test_credentials_that_cannot_be_had(valkey: Server, make_valkey_app: MakeApp, fails: int) -> None:
    """Where a ready client's credentials come from is a part of the way to Redis: waited for, then a 503."""
    provider = Credentials()
    ready = redis.Redis(unix_socket_path=valkey.socket_path, credential_provider=provider)
    app = make_valkey_app(SESSION_REDIS=ready, SESSION_REDIS_DEADLINE=0.3, SESSION_CACHE_TTL=0)
    browser = app.browser()
    app.flask.register_error_handler(SessionUnavailable, lambda error: (str(error), 503))
    provider.fails = fails
    browser.run(lambda: session.update(a=1), status=200 if fails == 2 else 503)
    if fails > 2:
        assert browser.response is not None
        words = f"{valkey.socket_path}: ConnectionError: connecting ended in LookupError"
        assert browser.response.text == words
        provider.fails = 0
        browser.run(lambda: session.update(a=1))
    assert browser.run(lambda: dict(session)) == {"a": 1}
    ready.close()


@pytest.mark.parametrize("scheme", ["unix", "redis", "valkey"])
def test_urls(server: Server, make_app: MakeApp, scheme: str) -> None:
    """A URL of a socket, or of a port under either name, is all it takes."""
    url = server.url if scheme == "unix" else server.tcp_url.replace("redis://", f"{scheme}://")
    browser = make_app(SESSION_REDIS_URL=url).browser()
    browser.run(lambda: session.update(AWKWARD))
    assert browser.twin().run(see) == AWKWARD


def test_a_client_of_an_unknown_sort() -> None:
    """What has no connection pool is refused by its name."""

    class Odd:
        def execute_command(self) -> None: ...

    with pytest.raises(ConfigurationError, match="Odd"):
        TestApp(None, {"SESSION_REDIS": Odd(), "TESTING": True}).browser().run(
            lambda: session.update(a=1), status=500
        )


RETRYING: dict[str, Callable[[Proxy], Any]] = {
    "redis-py": lambda proxy: redis.Redis(port=proxy.port, retry=Retry(NoBackoff(), 7)),
    "redis-py resp3": lambda proxy: redis.Redis(port=proxy.port, protocol=3, retry=Retry(NoBackoff(), 7)),
    "valkey-py": lambda proxy: valkey_py.Valkey(
        port=proxy.port,
        retry=valkey_py.retry.Retry(valkey_py.backoff.NoBackoff(), 7),
        retry_on_error=[valkey_py.ConnectionError],
    ),
}


@pytest.mark.parametrize("client", RETRYING)
def test_no_call_is_sent_twice_by_the_client(server: Server, make_app: MakeApp, client: str) -> None:
    """A client that retries by itself does not: with no deadline left a lost reply means one sending."""
    with Proxy(server.socket_path) as proxy, RETRYING[client](proxy) as library:
        seeder = make_app()
        browser = seeder.browser()
        browser.run(lambda: session.update(n=1))
        app = seeder.another(SESSION_REDIS=library, SESSION_REDIS_DEADLINE=0)
        mine = browser.twin(app)
        assert mine.run(see) == {"n": 1}
        for view, name in [
            (lambda: session.update(n=2), "EVALSHA"),
            (lambda: session.reload(), "HGETALL"),
            (lambda: session.destroy(), "EVALSHA"),
        ]:
            rule = proxy.drop_reply(command(name), times=None)
            with server.counting() as commands:
                mine.run(view, status=503)
            rule.stop()
            assert commands.names == [name]


@pytest.mark.parametrize("client", RETRYING)
def test_no_connection_is_tried_twice_by_the_client(server: Server, make_app: MakeApp, client: str) -> None:
    """A client that retries to connect does not: how long a request waits is its deadline's business."""
    with Proxy(server.socket_path) as proxy, RETRYING[client](proxy) as library:
        app = make_app(SESSION_REDIS=library, SESSION_REDIS_DEADLINE=0)
        proxy.cut_request(lambda words: True, times=None)
        app.browser().run(lambda: session.update(n=1), status=503)
        # One for the first use of the scripts, one for the call.
        assert proxy.counts["connections"] <= 2


# Processes, threads and greenlets.


def test_first_use_by_twenty_threads(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty threads that make the first calls of a process together share one client and one cache."""
    app = make_app()
    barrier = threading.Barrier(20)
    original = luasession.calls.connect
    made: list[Any] = []

    def connect(*args: Any) -> Any:
        barrier.wait(10)  # all have found that there is none yet
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(luasession.calls, "connect", connect)
    browsers = [app.browser() for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda n: browsers[n].run(lambda: session.update(n=n)), range(20)))
    assert len(made) == 20
    assert app.stats()["commits"] == 20
    assert sum(len(client._connections._idle) > 0 for client in made) == 1
    for n, browser in enumerate(browsers):
        assert browser.run(see) == {"n": n}
    assert app.stats()["cache_hits"] == 20


def test_more_threads_than_connections(own_server: Server) -> None:
    """A hundred threads at once wait for one of the sixty-four connections; no request fails."""
    app = TestApp(own_server, {"SESSION_CACHE_TTL": None})
    browser = app.browser()
    browser.run(lambda: session.update(start=1))
    barrier = threading.Barrier(100)

    def view(n: int) -> None:
        barrier.wait(20)
        session[f"k{n}"] = session["start"]

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(lambda n: browser.twin().run(lambda: view(n)), range(100)))
    assert len(browser.run(see)) == 101
    with own_server.client() as client:
        assert len(client.client_list()) <= 64 + 1


PRELUDE = """
import os, sys, threading, time
from flask import Flask, session
from luasession import Session

url, prefix = sys.argv[1:3]
app = Flask("forked")
app.config.update(SESSION_REDIS_URL=url, SESSION_KEY_PREFIX=prefix)
"""

VIEWS = """
Session(app)
store = app.session_interface._store

@app.route("/set/<key>")
def set_key(key):
    session[key] = key
    return "ok"

@app.route("/get")
def get():
    return {"session": dict(session), "pid": os.getpid()}

def check(client, *keys):
    found = client.get("/get").get_json()
    assert found == {"session": dict.fromkeys(keys) | {k: k for k in keys}, "pid": os.getpid()}, found
"""


@pytest.fixture
def run_script(valkey: Server, tmp_path: Path) -> Callable[..., str]:
    """Run a Python program with the server's URL, a prefix and the server's pid; return what it printed."""

    def run(text: str) -> str:
        program = tmp_path / f"{uuid4().hex}.py"
        program.write_text(text)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, str(program), valkey.url, f"t{uuid4().hex[:8]}:", str(valkey.process.pid)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


FORK = """
client = app.test_client()
client.get("/set/a")
check(client, "a")
here = store._here
connection = here.calls.client._connections.take()

# What a fork may meet: locks that other threads hold, a connection with a reply under way, all slots taken.
connection.send_command("BLPOP", prefix + "never", "0.3")
for lock in (here.calls._lock, here.cache._lock, here.stats._lock):
    lock.acquire()
while not here.calls.client._connections._slots.empty():
    here.calls.client._connections._slots.get()

child = os.fork()
if child == 0:
    try:
        assert store._here is not here
        check(client, "a")
        client.get("/set/child")
        check(client, "a", "child")
        assert store._here.calls._client is not here.calls.client
        grandchild = os.fork()
        if grandchild == 0:
            check(client, "a", "child")
            os._exit(0)
        assert os.waitpid(grandchild, 0)[1] == 0
        threads = [threading.Thread(target=check, args=(client, "a", "child")) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
deadline = time.monotonic() + 30
while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
    time.sleep(0.01)
if ended == (0, 0):
    os.kill(child, 9)
    sys.exit("the child hangs")
assert ended[1] == 0, ended

# The parent goes on where it was, the reply that was under way included.
assert connection.read_response() is None
for lock in (here.calls._lock, here.cache._lock, here.stats._lock):
    lock.release()
for _ in range(64):
    here.calls.client._connections._slots.put(None)
here.calls.client._connections._idle.append(connection)
assert store._here is here
client.get("/set/parent")
check(client, "a", "child", "parent")
print("done")
"""


def test_a_fork_in_the_middle_of_everything(run_script: Callable[..., str]) -> None:
    """A child forked while locks, slots and a reply are pending has sessions that work, and so has the parent."""
    assert run_script(PRELUDE + VIEWS + FORK) == "done\n"


SHARED_FORK = """
import redis
app.config["SESSION_REDIS"] = redis.Redis.from_url(url)
"""

FORK_BOTH = """
client = app.test_client()
client.get("/set/a")
children = []
for n in range(4):
    child = os.fork()
    if child == 0:
        try:
            for i in range(25):
                mine = app.test_client()
                mine.get(f"/set/{n}-{i}")
                check(mine, f"{n}-{i}")
            client.get(f"/set/child{n}")
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(child)
for i in range(25):
    mine = app.test_client()
    mine.get(f"/set/p-{i}")
    check(mine, f"p-{i}")
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
client.set_cookie("session_o", "1")
check(client, "a", *(f"child{n}" for n in range(4)))
print("done")
"""


@pytest.mark.parametrize("shared", [False, True])
def test_parent_and_children_at_once(run_script: Callable[..., str], shared: bool) -> None:
    """A process that has used sessions and its forked children use them at the same time, each its own."""
    assert run_script(PRELUDE + (SHARED_FORK if shared else "") + VIEWS + FORK_BOTH) == "done\n"


LATE = """
from types import SimpleNamespace

import gevent
from luasession.connections import Connections, Recipe
from luasession.threads import OneAtATime
from gevent import monkey
monkey.patch_all()

class Kind:
    def connect(self):
        pass

    def disconnect(self):
        pass

connections = Connections(Recipe(Kind, {}, 2), 5)
done = []

def use():
    connection = connections.take()
    gevent.sleep(0.02)
    connections.give(connection)
    done.append(True)

# More than there are slots: whoever waits for one lets those go on who have one.
gevent.joinall([gevent.spawn(use) for _ in range(6)], timeout=30, raise_error=True)
assert len(done) == 6, done

# Greenlets that share a request commit one after the other, though they are of one thread.
alone = OneAtATime(SimpleNamespace(config=SimpleNamespace(redis_deadline=1)))
order = []

def commit(name):
    with alone:
        order.append(name)
        gevent.sleep(0.01)
        order.append(name)

gevent.joinall([gevent.spawn(commit, name) for name in "ab"], timeout=30, raise_error=True)
assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"]), order
print("done")
"""


def test_gevent_patches_late(run_script: Callable[..., str]) -> None:
    """Patched after luasession was imported (gunicorn --preload -k gevent), no wait holds up the whole process."""
    assert run_script(LATE) == "done\n"


GEVENT = (
    """
from gevent import monkey
monkey.patch_all()
import gevent
"""
    + PRELUDE
    + VIEWS
    + """
import random
import signal

with app.test_client() as first:
    first.get("/set/start")
    cookie = first.get_cookie("session").value

def visit(n):
    client = app.test_client()
    client.set_cookie("session", cookie)
    assert client.get(f"/set/k{n}").status_code == 200

jobs = [gevent.spawn(visit, n) for n in range(300)]
gevent.joinall(jobs, timeout=50, raise_error=True)
assert all(job.successful() for job in jobs)
client = app.test_client()
client.set_cookie("session", cookie)
check(client, "start", *(f"k{n}" for n in range(300)))

# Greenlets with sessions of their own, killed or timed out wherever they wait: at sending, at reading,
# for a connection. Nobody sees anything but his own, and no slot is lost.
owners = []
for n in range(10):
    mine = app.test_client()
    mine.get(f"/set/own{n}")
    owners.append((f"own{n}", mine.get_cookie("session").value))

def read(name, value, seconds):
    client = app.test_client()
    client.set_cookie("session", value)
    # No cache: each read is a call.
    client.set_cookie("session_o", "1")
    store._here.cache.drop(value.partition(".")[0])
    with gevent.Timeout(seconds, False):
        found = client.get("/get").get_json()["session"]
        assert found == {name: name}, (name, found)
        return "read"
    return "timed out"

connections = store._here.calls._client._connections
lost, lose = [], connections.lose
connections.lose = lambda connection: lost.append(connection) or lose(connection)
random.seed(16)
ends = {"read": 0, "timed out": 0, "killed": 0}
pid = int(sys.argv[3])
for _ in range(6):
    # Whoever has sent waits for his reply, the rest for a connection.
    os.kill(pid, signal.SIGSTOP)
    jobs = [gevent.spawn(read, *random.choice(owners), random.choice([0.01, 20])) for _ in range(100)]
    gevent.sleep(0.05)
    gevent.killall(random.sample(jobs, 30), block=False)
    gevent.sleep(0)
    os.kill(pid, signal.SIGCONT)
    gevent.joinall(jobs, timeout=20)
    for job in jobs:
        assert job.ready()
        if job.exception is not None:
            raise job.exception
        ends["killed" if isinstance(job.value, gevent.GreenletExit) else job.value] += 1
assert min(ends.values()) > 20, ends
assert len(lost) > 20, "hardly anybody was killed in the middle of a call"

assert store._here.calls._client._connections._slots.qsize() == 64
for name, value in owners:
    assert read(name, value, 5) == "read"
print("done")
"""
)


def test_three_hundred_greenlets(valkey: Server, run_script: Callable[..., str]) -> None:
    """Three hundred greenlets on one session keep all keys; killed ones leave no reply behind."""
    try:
        assert run_script(GEVENT) == "done\n"
    finally:
        valkey.resume()


def test_preloaded_workers(valkey: Server) -> None:
    """An app that gunicorn loads before it forks its workers serves one session from all of them."""
    prefix = f"t{uuid4().hex[:8]}:"
    with serving(valkey, "--preload", workers=2, threads=4, SESSION_KEY_PREFIX=prefix) as web:
        browser = web.browser()
        browser.request("/start", {"first": "first"})
        keys = [f"key{n}" for n in range(24)]
        assert browser.parallel([f"/set/{key}" for key in keys]) == [200] * 24
        shown = [browser.show()["session"]]
        processes: set[int] = set()

        def both_served() -> bool:
            found = browser.show()
            shown.append(found["session"])
            processes.add(found["pid"])
            return len(processes) == 2

        assert eventually(both_served)
        assert all(found == {"first": "first", **{key: key for key in keys}} for found in shown)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("cache_ttl", [0, None])
def test_over_a_rotation_a_hung_server_drops_nothing(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, cache_ttl: int | None, reads: bool
) -> None:
    """Who was open before a rotation reads and writes, although a hung server takes him for younger (G8)."""
    monkeypatch.setattr(
        luasession.store, "SMALL", -1
    )  # a snapshot is confirmed, as those of large sessions are
    app = TestApp(
        own_server,
        {"SESSION_REDIS_TIMEOUT": 5, "SESSION_REDIS_DEADLINE": 5, "SESSION_CACHE_TTL": cache_ttl},
    )
    browser = app.browser()
    browser.run(lambda: session.update(user="ada"))
    late = browser.twin()
    seen = []

    def view() -> None:
        time.sleep(0.1)
        browser.run(lambda: session.regenerate())
        own_server.pause()
        Timer(0.6, own_server.resume).start()
        if reads:
            seen.append(dict(session))
        session["late"] = 1

    late.run(view)
    assert seen == ([{"user": "ada"}] if reads else [])
    assert browser.run(lambda: dict(session)) == {"user": "ada", "late": 1}


@pytest.mark.parametrize("first", [True, False])
def test_a_commit_sent_again_moves_no_end_of_a_key(
    own_proxy: Proxy, own_server: Server, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """A key's end counts from when its commit was applied, not from when that was told (G13)."""
    monkeypatch.setattr(luasession.store, "SMALL", -1)  # what is cached is confirmed, not read anew
    app = TestApp(own_server, {"SESSION_REDIS_URL": own_proxy.url, "SESSION_REDIS_DEADLINE": 5})
    browser = app.browser()
    if not first:
        browser.run(lambda: session.update(a=1))
        browser.run(see)
    rule = own_proxy.delay_reply(1.5, lambda words: words[0] in (b"EVALSHA", b"EVAL") and len(words) > 7)
    begun = time.monotonic()
    browser.run(lambda: session.set("code", 1, ttl=1.8))  # type: ignore[attr-defined]
    assert rule.done == 1
    assert browser.run(see)["code"] == 1
    time.sleep(max(0.0, begun + 2.2 - time.monotonic()))
    assert "code" not in browser.twin(app.another()).run(see)
    assert "code" not in browser.run(see)
