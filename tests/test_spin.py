"""Spinning: when a reply is looked for, when it is slept for, and that it arrives either way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gevent.socket
import pytest
from flask import session

import luasession.spin
from luasession.spin import Spin

from .conftest import MakeApp

LONGEST = luasession.spin._LONGEST


class Clock:
    """Goes on by a step each time it is looked at; each step is one look at the socket."""

    def __init__(self) -> None:
        self.now = 0
        self.step = 1_000
        self.looks = 0

    def __call__(self) -> int:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(luasession.spin, "now_ns", clock)
    return clock


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give two connected sockets."""
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(10)
        yield here, there


def took(spin: Spin, clock: Clock, sock: Any) -> int:
    """Return how many nanoseconds a reply on a socket was looked for."""
    before = clock.now
    spin.watch(SimpleNamespace(_sock=sock))
    return clock.now - before


def test_what_is_there_is_not_waited_for(clock: Clock, ends: tuple[socket.socket, socket.socket]) -> None:
    """A reply that has come is seen at the first look, and nothing of it is taken."""
    here, there = ends
    there.sendall(b"+OK\r\n")
    assert took(Spin(), clock, here) == clock.step
    assert here.recv(10) == b"+OK\r\n"


def test_a_reply_that_comes_meanwhile(
    clock: Clock, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for, and others may have the core between two looks."""
    here, there = ends
    yields = []

    def others_run() -> None:
        yields.append(1)
        if len(yields) == 20:
            there.sendall(b"+OK\r\n")

    monkeypatch.setattr(luasession.spin.os, "sched_yield", others_run)
    spin = Spin()
    assert took(spin, clock, here) == 21 * clock.step
    here.recv(10)
    yields.clear()
    assert took(spin, clock, here) == 21 * clock.step


def test_a_connection_that_is_closed_is_read(clock: Clock, ends: tuple[socket.socket, socket.socket]) -> None:
    """That it ended is something to read."""
    here, there = ends
    there.close()
    assert took(Spin(), clock, here) == clock.step


def test_in_vain(clock: Clock, ends: tuple[socket.socket, socket.socket]) -> None:
    """It gives up in time, and then leaves out more and more replies, until one comes in time again."""
    here, there = ends
    spin = Spin()
    looked_for = []
    for number in range(300):
        if spent := took(spin, clock, here):
            assert LONGEST < spent <= LONGEST + 3 * clock.step
            looked_for.append(number)
    # After each more are left out, 63 in the end.
    assert looked_for == [0, 2, 6, 14, 30, 62, 126, 190, 254]
    there.sendall(b"+OK\r\n")
    while not took(spin, clock, here):
        pass
    here.recv(10)
    assert [bool(took(spin, clock, here)) for _ in range(3)] == [True, False, True]


def test_two_threads_that_count_at_once(clock: Clock, ends: tuple[socket.socket, socket.socket]) -> None:
    """Who both leave out the last one have not given up looking for good."""
    spin = Spin()
    spin._left_out = -1
    assert took(spin, clock, ends[0])


def test_a_core_that_others_want(clock: Clock, ends: tuple[socket.socket, socket.socket]) -> None:
    """A look that takes so long that others must have run meanwhile is the last one."""
    clock.step = luasession.spin._SHARED + 1
    assert took(Spin(), clock, ends[0]) == 2 * clock.step


def test_what_is_no_socket_of_the_system(clock: Clock) -> None:
    """Where to look would stop other greenlets, or is not possible, the reply is slept for."""
    with gevent.socket.socket() as green:
        assert took(Spin(), clock, green) == 0
    assert took(Spin(), clock, None) == 0


def test_where_it_is_not_possible(
    clock: Clock, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the system's means nothing is looked for."""
    monkeypatch.setattr(luasession.spin, "_POSSIBLE", False)
    assert took(Spin(), clock, ends[0]) == 0


def test_replies_are_looked_for(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command on a connection of luasession's is, on a socket of the system's."""
    watched: list[Any] = []
    original = Spin.watch

    def watch(spin: Spin, connection: Any) -> None:
        watched.append(connection._sock)
        original(spin, connection)

    browser = make_app(SESSION_CACHE_TTL=None).browser()
    browser.run(lambda: session.update(a=1))
    monkeypatch.setattr(Spin, "watch", watch)
    assert browser.run(lambda: session["a"]) == 1
    assert [type(sock) for sock in watched] == [socket.socket]
