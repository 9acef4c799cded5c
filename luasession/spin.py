"""Spinning: looking for a reply for a moment, rather than sleeping until it is there.

A server close by answers within 30 to 100 microseconds. A process that sleeps
meanwhile needs about as much again: its core halts, is woken up, and the
interpreter comes back to cold caches. So it looks first, as adaptive mutexes do,
as long as nobody else wants the core, nor the interpreter, and as long as this
server's replies come in time.
"""

from __future__ import annotations

import _socket
import os
import select
from typing import Any

from .clock import now_ns

# Nanoseconds after which it goes to sleep: what one command may cost in CPU beyond its work.
_LONGEST = 200_000
# Nanoseconds that a look takes only if another process had the core meanwhile, or a thread the interpreter.
_SHARED = 20_000
# Commands that are slept for at most, before it is worth looking again.
_LEFT_OUT = 63
# Where these are missing (Windows), nobody spins.
_POSSIBLE = hasattr(select, "poll") and hasattr(os, "sched_yield")


class Spin:
    """Spins for the replies of one server.

    Threads share it without a lock: what they may get wrong is whether one command is looked for.
    """

    def __init__(self) -> None:
        self._left_out = 0
        # How many were left out after the last reply that was looked for in vain.
        self._penalty = 0

    def watch(self, connection: Any) -> None:
        """Return when a connection has something to read, or when to sleep for it is better.

        Whoever calls reads next, and sleeps there as long as it takes.

        :param connection: a client library's. Sockets of gevent's and eventlet's are left alone: to look
            would stop everybody else.
        """
        if self._left_out > 0:  # two threads at once may count it below
            self._left_out -= 1
            return
        sock = getattr(connection, "_sock", None)
        if not _POSSIBLE or not isinstance(sock, _socket.socket):
            return
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        began = last = now_ns()
        while not poll.poll(0):
            os.sched_yield()
            now = now_ns()
            # Where others want the core it is theirs: whoever sleeps is woken as soon as the reply is there,
            # but one that has yielded waits for its turn.
            if now - last > _SHARED or now - began > _LONGEST:
                self._left_out = self._penalty = min(2 * self._penalty + 1, _LEFT_OUT)
                return
            last = now
        self._penalty = 0
