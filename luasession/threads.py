"""Threads: those that share a request, by ``copy_current_request_context()``, commit one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import SessionUnavailable

if TYPE_CHECKING:
    from blinker import NamedSignal

    from .visit import Visit

    _Told = tuple[NamedSignal, dict[str, Any]]

_log = logging.getLogger("luasession")

# Seconds beyond the deadline after which another thread is waited for no longer.
_LONGEST_COMMIT = 5.0


class OneAtATime:
    """Lets the threads of one request commit one after the other, and tells when each is through.

    What one of them has sent and not settled yet would be sent by another one as well (G6). A context
    manager; a thread that is in it may enter it again.

    :param visit: the request's; says how long it may take, and sends signals.
    """

    # How often the thread whose turn it is has entered; what is to be told when it is through.
    _depth = 0
    _untold: tuple[_Told, ...] = ()

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Wait for the others.

        :raise SessionUnavailable: if that takes too long: they may be waiting for this thread, in a merge
            function say.
        """
        if not self._lock.acquire(blocking=False) and not self._lock.acquire(
            timeout=self._visit.config.redis_deadline + _LONGEST_COMMIT
        ):
            raise SessionUnavailable("another thread of this request has been committing for too long")
        self._depth += 1

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Let the next one go on, and tell what has happened."""
        self._depth -= 1
        untold: tuple[_Told, ...] = ()
        if self._untold and self._depth == 0:
            untold, self._untold = self._untold, ()
        self._lock.release()
        if untold:
            self._tell_all(untold, error)

    def tell(self, signal: NamedSignal, **about: Any) -> None:
        """Have a signal sent when this is over: async receivers run in another thread, and may commit."""
        if signal.receivers:
            self._untold = (*self._untold, (signal, about))

    def _tell_all(self, untold: Iterable[_Told], error: BaseException | None) -> None:
        # What has happened is told whatever a receiver of something else raises. That takes the place of no
        # error that is on its way already.
        failures: list[BaseException] = []
        for signal, about in untold:
            try:
                self._visit.notify(signal, **about)
            except BaseException as failure:  # noqa: BLE001 - it is raised below, or logged
                failures.append(failure)
        if not failures:
            return
        try:
            # A killed greenlet's before all others.
            first = min(failures, key=lambda failure: isinstance(failure, Exception))
            if error is None or not isinstance(first, Exception):
                raise first
            _log.error("a receiver of a signal failed", exc_info=first)
        finally:
            failures.clear()  # an error that is held by its own frame keeps all of the request
            del first
