"""The servers that other tests stand on do what they promise."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from . import servers
from .conftest import GUARANTEED, require
from .servers import KINDS, Kind, Server, available_kinds, eventually, missing, standalone

if TYPE_CHECKING:
    from collections.abc import Iterator


# Those that every guarantee is tested on have to be there, others may be.
@pytest.fixture(params=[kind for kind in KINDS if kind in GUARANTEED or not missing(kind)])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    require(request.param)
    with standalone(request.param) as server:
        yield server


def answers(server: Server) -> bool:
    try:
        with server.client(socket_timeout=0.1, retry=None) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_a_server_is_of_its_kind(server: Server) -> None:
    """A server answers by TCP and by unix socket, and is the version that its kind names."""
    name, version = server.kind.split("-")
    with server.client() as local, redis.Redis.from_url(server.tcp_url) as remote:
        local.set("key", "value")
        assert remote.get("key") == b"value"
        info = local.info("server")
    major = version if name == "valkey" else version.partition(".")[0]
    assert str(info[f"{name}_version"]).startswith(f"{major}.")
    with redis.Redis.from_url(server.url) as by_url:
        assert by_url.get("key") == b"value"


def test_counting_leaves_out_what_scripts_call(server: Server) -> None:
    """Counted are the commands of clients: a script is one, whatever it calls, sent in vain too."""
    script = "redis.call('HSET', KEYS[1], 'a', 1) return redis.call('HGETALL', KEYS[1])"
    with server.client() as client, server.client() as other:
        client.ping()
        with server.counting() as commands:
            client.eval(script, 1, "session")
            with pytest.raises(redis.exceptions.NoScriptError):
                other.evalsha("0" * 40, 1, "session")
            client.script_load(script)
            client.hgetall("session")
            client.zadd("index", {"handle": 1})
    assert commands.names == ["EVAL", "EVALSHA", "SCRIPT LOAD", "HGETALL", "ZADD"]
    assert len(commands) == 5
    assert commands.setup[0] == "HELLO"
    assert ['"EVAL"' in line for line in commands.lines] == [True, False, False, False, False]


def test_counting_begins_and_ends_with_its_block(server: Server) -> None:
    """What was answered before the block or sent after it is not counted, nor its own marks."""
    with server.client() as client:
        for _ in range(20):
            client.set("before", 1)
            with server.counting() as none:
                pass
            with server.counting() as one:
                client.get("within")
            client.set("after", 1)
            assert none.names == []
            assert one.names == ["GET"]


def test_counting_misses_nothing_under_load(server: Server) -> None:
    """Every command of eight threads is counted, whatever bytes it carries."""
    awkward = bytes(range(256)) + b'"] [0 lua] "GET"\r\n'

    def work() -> None:
        with server.client() as client:
            for _ in range(50):
                client.set(awkward, awkward)

    with server.counting() as commands:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert commands.names == ["SET"] * 400


def test_a_failed_block_still_ends_its_counting(server: Server) -> None:
    """An exception passes through the block, which leaves no connection behind."""
    with server.client() as client:
        with pytest.raises(ZeroDivisionError), server.counting() as commands:
            _ = client.get("key") or 1 / 0
        assert commands.names == ["GET"]
        assert eventually(lambda: len(client.client_list()) == 1)


def test_restart_keeps_address_and_drops_data(server: Server) -> None:
    """After a restart the same addresses lead to an empty server, or to the kept data."""
    addresses = server.url, server.tcp_url
    with server.client() as client:
        client.set("key", 1)
        server.restart(keep=True)
        assert client.get("key") == b"1"
        server.restart()
        assert client.get("key") is None
    assert (server.url, server.tcp_url) == addresses


def test_a_killed_server_is_gone_until_restarted(server: Server) -> None:
    """A kill ends the server without any farewell; it can be started again, and is empty."""
    with server.client() as client:
        client.set("key", 1)
    server.kill()
    assert not answers(server)
    assert server.process.returncode == -signal.SIGKILL
    server.restart(keep=True)
    with server.client() as client:
        assert client.get("key") is None


def test_a_paused_server_accepts_and_says_nothing(server: Server) -> None:
    """While it is paused calls time out; afterwards it goes on with its data."""
    with server.client(socket_timeout=0.1, retry=None) as client:
        client.set("key", 1)
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("key")
        server.resume()
        assert client.get("key") == b"1"


def test_a_paused_server_can_be_stopped(server: Server) -> None:
    """A test that fails in the middle of a pause leaves nothing behind."""
    server.pause()
    server.stop()
    assert server.process.returncode == 0
    assert not answers(server)


def test_a_server_outlives_the_thread_that_restarted_it(server: Server) -> None:
    """A server belongs to the test process, not to one of its threads."""
    thread = threading.Thread(target=server.restart)
    thread.start()
    thread.join()
    assert answers(server)
    assert not eventually(lambda: not answers(server), seconds=0.1)


def test_options_reach_the_server() -> None:
    """Options of standalone() are options of the server."""
    options = {"maxmemory": "4mb", "maxmemory_policy": "volatile-lru"}
    with standalone(available_kinds()[0], **options) as server, server.client() as client:
        assert client.config_get("maxmemory") == {"maxmemory": "4194304"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}


def test_a_wrong_option_shows_the_log() -> None:
    """A server that does not start says why."""
    with (
        pytest.raises(RuntimeError, match=r"(?i)bad directive"),
        standalone(available_kinds()[0], no_such_option="1"),
    ):
        pass


def test_a_stopped_server_leaves_nothing() -> None:
    """At the end of the block process and directory are gone."""
    with standalone(available_kinds()[0]) as server:
        assert server.directory.exists()
    assert server.process.returncode == 0
    assert not server.directory.exists()


def test_servers_die_with_the_test_process(tmp_path: Path) -> None:
    """A test process that is killed outright takes its servers along."""
    script = (
        "import servers, sys, pathlib\n"
        "server = servers.Server(servers.available_kinds()[0], pathlib.Path(sys.argv[1]), {})\n"
        "print(server.socket_path, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        cwd=Path(servers.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tests:
        assert tests.stdout is not None
        path = tests.stdout.readline().strip()
        with redis.Redis.from_url(f"unix://{path}") as client:
            assert client.ping()
            tests.kill()
            assert eventually(partial(is_dead, client))


def is_dead(client: redis.Redis) -> bool:
    try:
        return not client.ping()
    except redis.ConnectionError:
        return True


def test_a_missing_kind_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed, does not run, or is another version gives a reason to skip with."""
    kinds = {
        "absent": Kind("absent", "", lambda: None, "pip install absent"),
        "broken": Kind("broken", "", lambda: "/nonexistent/server", "pip install broken"),
        "other": Kind("other", "Server v=9", lambda: sys.executable, "pip install other"),
    }
    for name, kind in kinds.items():
        monkeypatch.setitem(KINDS, name, kind)
    assert missing("absent") == "absent is not installed (pip install absent)"
    assert "does not run" in str(missing("broken"))
    assert "other is wanted" in str(missing("other"))
    assert not set(available_kinds()) & set(kinds)
    with pytest.raises(RuntimeError, match="absent is not installed"), standalone("absent"):
        pass
