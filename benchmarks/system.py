"""The whole system: the peers under gunicorn, a client that keeps cookies, the mix over many sessions."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import redis
from flask import Flask

from .peers import DEFAULTS, FLOOR, LOADED, SERVED, make_app
from .population import TEN, Population
from .samples import Row, median, summary

_ROOT = Path(__file__).parents[1]
PROCESSES, THREADS, CONNECTIONS = 2, 4, 8
_PATIENCE = 30.0
_WARM_UP = 0.5
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_COOKIE = re.compile(r"\r\nset-cookie: ([^=;]+)=([^;\r]*)([^\r]*)", re.IGNORECASE)
_MAX_AGE = re.compile(r"max-age=(\d+)", re.IGNORECASE)


def serve(name: str, redis_socket: str) -> Flask:
    """Make the app of a peer, for gunicorn."""
    return make_app(name, redis_socket, TEN)


class _Gunicorns:
    """Web servers that run for a block, each on a unix socket in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait(_PATIENCE)

    def start(self, name: str, redis_socket: str) -> tuple[int, str]:
        """Serve a peer; return the process id and the socket, which soon answers."""
        path = f"{self._folder}/{len(self._processes)}.sock"
        command = [sys.executable, "-m", "gunicorn", f"benchmarks.system:serve({name!r}, {redis_socket!r})"]
        command += ["--bind", f"unix:{path}", "--workers", str(PROCESSES), "--threads", str(THREADS)]
        command += ["--preload", "--keep-alive", "60", "--log-level", "error"]
        # gunicorn keeps a socket for its own control; it goes with the rest.
        environment = {**os.environ, "XDG_RUNTIME_DIR": self._folder}
        self._processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, start_new_session=True))
        return self._processes[-1].pid, path


class _Client:
    """Browsers behind a few connections that are kept open: each sends when it has its answer."""

    def __init__(self, path: str, population: Population, name: str, place: int) -> None:
        self._path = path
        self._jar: Callable[[int], dict[str, str]] = lambda who: population.jar(name, place, who)
        self._population = population
        self._jars: dict[int, dict[str, str]] = {}
        # Cookies that end by themselves within seconds: until when, by browser.
        self._ends: dict[int, dict[str, float]] = {}

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.run(0.0, 0)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def run(self, seconds: float, seed: int) -> list[float]:
        """Send clicks for so long; return the seconds that each took."""
        click = self._population.clicks(seed)
        taken: list[float] = []
        with selectors.DefaultSelector() as waiting, ExitStack() as stack:
            for _ in range(CONNECTIONS if seconds else 1):
                connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                connection.settimeout(_PATIENCE)
                connection.connect(self._path)
                waiting.register(connection, selectors.EVENT_READ, self._send(connection, click))
            end = time.perf_counter() + seconds
            while waiting.get_map():
                for key, _ in waiting.select(_PATIENCE):
                    connection: Any = key.fileobj
                    who, started = key.data
                    answer = _answer(connection)
                    now = time.perf_counter()
                    taken.append(now - started)
                    self._keep(who, answer)
                    if now < end:
                        waiting.modify(connection, selectors.EVENT_READ, self._send(connection, click))
                    else:
                        waiting.unregister(connection)
        return taken

    def _send(self, connection: socket.socket, click: Callable[[], tuple[int, str]]) -> tuple[int, float]:
        who, path = click()
        jar = self._jars.get(who) or self._jars.setdefault(who, self._jar(who))
        ends = self._ends.get(who)
        if ends is not None:
            now = time.monotonic()
            for name in [name for name, end in ends.items() if end <= now]:
                del ends[name], jar[name]
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        started = time.perf_counter()
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookies}\r\n\r\n".encode())
        return who, started

    def _keep(self, who: int, head: str) -> None:
        for name, value, rest in _COOKIE.findall(head):
            self._jars[who][name] = value
            age = _MAX_AGE.search(rest)
            if age is not None and int(age[1]) < 60:
                self._ends.setdefault(who, {})[name] = time.monotonic() + int(age[1])


def _answer(connection: socket.socket) -> str:
    data = b""
    while True:
        more = connection.recv(65536)
        if not more:
            raise ConnectionResetError("the web server hung up")
        data += more
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            continue
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode("latin-1"))
        if len(body) >= int(length[1]):
            return head.decode("latin-1")


def _cpu_of_children(pid: int) -> float | None:
    """Return the CPU seconds of a process's children so far, None where the system does not tell."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ticks = 0
        for child in children:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    except OSError:
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def _server_state(client: redis.Redis) -> tuple[float, int]:
    cpu, stats = client.info("cpu"), client.info("stats")
    wire = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"], wire


def measure(
    redis_socket: str,
    population: Population,
    effort: tuple[int, float],
    everyone: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Serve all peers at once and ask them in turn, round by round."""
    rounds, seconds = effort
    names = list(SERVED) if everyone else [FLOOR, LOADED, DEFAULTS]
    client = redis.Redis(unix_socket_path=redis_socket, protocol=2)
    series: dict[str, list[Row]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="luasession-web-") as folder, _Gunicorns(folder) as web:
        say("starting gunicorn")
        started = {name: web.start(name, redis_socket) for name in names}
        served = {
            name: (pid, _Client(path, population, name, place))
            for place, (name, (pid, path)) in enumerate(started.items())
        }
        for _, browsers in served.values():
            browsers.wait()
        for number in range(rounds):
            for name, (pid, browsers) in served.items():
                say(f"gunicorn, round {number + 1} of {rounds}: {name}")
                browsers.run(min(_WARM_UP, seconds), 1000 + number)
                cpu = _cpu_of_children(pid)
                server_cpu, wire = _server_state(client)
                begun = time.perf_counter()
                taken = browsers.run(seconds, number)
                elapsed = time.perf_counter() - begun
                count = len(taken)
                after = _cpu_of_children(pid)
                server_cpu_after, wire_after = _server_state(client)
                times[name] += taken
                series[name].append(
                    {
                        "requests_per_second": count / elapsed,
                        "worker_us": None if cpu is None or after is None else (after - cpu) / count * 1e6,
                        "redis_us": (server_cpu_after - server_cpu) / count * 1e6,
                        "redis_bytes": (wire_after - wire) / count,
                    }
                )
    client.close()
    for name in names:
        # Of the same round, so that what else the machine does meets both.
        for here, there in zip(series[name], series[LOADED], strict=True):
            here["rate_to_flask_session"] = here["requests_per_second"] / there["requests_per_second"]
    return [{"peer": name, **_middle(series[name]), **summary(times[name])} for name in names]


def _middle(rounds: list[Row]) -> Row:
    middle: Row = {}
    for name in rounds[0]:
        values = [each[name] for each in rounds if each[name] is not None]
        middle[name] = round(median(values), 3) if values else None
    return middle
