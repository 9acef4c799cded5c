"""Browsers: a client that keeps many sessions' cookies and sends the mix over a few connections."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .peers import FLOOR
from .population import Population
from .web import WORKER

CONNECTIONS = 8
_PATIENCE = 30.0
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_COOKIE = re.compile(r"\r\nset-cookie: ([^=;]+)=([^;\r]*)([^\r]*)", re.IGNORECASE)
_MAX_AGE = re.compile(r"max-age=(\d+)", re.IGNORECASE)


class Browsers:
    """One browser for each session of a peer; whichever web server they ask, they keep their cookies."""

    def __init__(self, population: Population, name: str, place: int) -> None:
        self._jar: Callable[[int], dict[str, str]] = lambda who: population.jar(name, place, who)
        self._population = population
        # What a session that is known, and what a change, is answered with.
        self._right = {"/read": b"N" if name == FLOOR else b"v", "/change": b"x"}
        self._jars: dict[int, dict[str, str]] = {}
        # Cookies that end by themselves within seconds: until when, by browser.
        self._ends: dict[int, dict[str, float]] = {}

    def run(self, lines: list[socket.socket], seconds: float, seed: int) -> list[float]:
        """Send clicks for so long, each when a connection has its answer; return the seconds that each took.

        :raise RuntimeError: if an answer is not what the session holds.
        """
        click = self._population.clicks(seed)
        taken: list[float] = []
        with selectors.DefaultSelector() as waiting:
            for each in lines:
                waiting.register(each, selectors.EVENT_READ, self._click(each, click))
            end = time.perf_counter() + seconds
            while waiting.get_map():
                for key, _ in waiting.select(_PATIENCE):
                    connection: Any = key.fileobj
                    who, page, started = key.data
                    head, body = _answer(connection)
                    now = time.perf_counter()
                    taken.append(now - started)
                    if body != self._right[page]:
                        raise RuntimeError(f"{page} of session {who}: {body!r}")
                    self._keep(who, head)
                    if now < end:
                        waiting.modify(connection, selectors.EVENT_READ, self._click(connection, click))
                    else:
                        waiting.unregister(connection)
        return taken

    def _click(
        self, connection: socket.socket, click: Callable[[], tuple[int, str]]
    ) -> tuple[int, str, float]:
        who, page = click()
        jar = self._jars.get(who) or self._jars.setdefault(who, self._jar(who))
        ends = self._ends.get(who)
        if ends is not None:
            now = time.monotonic()
            for name in [name for name, end in ends.items() if end <= now]:
                del ends[name], jar[name]
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        started = time.perf_counter()
        _send(connection, page, cookies)
        return who, page, started

    def _keep(self, who: int, head: str) -> None:
        for name, value, rest in _COOKIE.findall(head):
            self._jars[who][name] = value
            age = _MAX_AGE.search(rest)
            if age is not None and int(age[1]) < 60:
                self._ends.setdefault(who, {})[name] = time.monotonic() + int(age[1])


@contextmanager
def connected(path: str, workers: int) -> Iterator[list[socket.socket]]:
    """Wait for a web server at a unix socket; give connections to it, to each of its workers as many.

    Who accepts is chance, and with threads it may be one worker for all: what was measured then would be
    the chance.
    """
    deadline = time.monotonic() + _PATIENCE
    lines: dict[bytes, list[socket.socket]] = {}
    with ExitStack() as stack:
        while sum(map(len, lines.values())) < CONNECTIONS:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: {len(lines)} of {workers} workers answer")
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(_PATIENCE)
            try:
                connection.connect(path)
                its = lines.setdefault(ask(connection, WORKER)[1], [])
            except OSError:
                connection.close()
                time.sleep(0.05)
                continue
            if len(its) == CONNECTIONS // workers:
                connection.close()
                continue
            its.append(stack.enter_context(connection))
        yield [each for its in lines.values() for each in its]


def ask(connection: socket.socket, page: str) -> tuple[str, bytes]:
    """Ask for a page without cookies; return the head and the body of the answer."""
    _send(connection, page, "")
    return _answer(connection)


def _send(connection: socket.socket, page: str, cookies: str) -> None:
    connection.sendall(f"GET {page} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookies}\r\n\r\n".encode())


def _answer(connection: socket.socket) -> tuple[str, bytes]:
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
            return head.decode("latin-1"), body
