"""Retrying a view: run it again on a fresh snapshot when its session was changed meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from flask import session
from flask.globals import request_ctx

from .errors import SessionConflict, SessionGone
from .session import LuaSession, transaction_of

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Seconds.
_LONGEST_PAUSE = 0.25


def retry_on_conflict(
    attempts: int = 3, backoff: float = 0.01
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a view so that it commits its session, and runs again when that conflicts.

    ``@app.route(...)`` goes above, ``@retry_on_conflict()`` below. The session is committed when
    the view returns. If somebody else meanwhile changed a key that the view read and changed, the
    session is read afresh and the view runs again, each time on a newer snapshot. For plain views
    and for async ones. Inside, ``"overwrite"`` counts as ``"raise"``; a key with a merge function
    is merged, as ever. What was changed before the view, by ``before_request`` say, is committed
    before its first run. Called by another decorated function it is part of that one's attempt.

    A view that is run twice must be fit for it: what it does beside the session (mail, databases,
    files, other services) it does again each time, so that must be harmless or come after. It must
    take what it needs out of the session anew each time, must not commit by itself, and must not
    return a response that changes the session while it is sent. Functions that it hands to
    ``after_this_request`` run once for each attempt.

    A session that ended while the view ran is not brought back: the delta is dropped, the signal
    ``session_discarded`` tells, and the response goes out as it is. A view that raises is not
    committed here.

    :param attempts: how often the view is run at most.
    :param backoff: seconds to wait before the second run, at most; doubled for each further one, up
        to a quarter of a second.
    :raise SessionConflict: from the last attempt; nothing of the request is stored.
    :raise TypeError: if the arguments are not numbers, as in ``@retry_on_conflict`` without ``()``.
    :raise ValueError: if there is not one attempt at least, or ``backoff`` is negative.
    """
    _check(attempts, backoff)

    def decorate(view: Callable[_P, _R]) -> Callable[_P, _R]:
        if iscoroutinefunction(view):

            @wraps(view)
            async def run_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                with _Attempts(attempts, backoff) as tries:
                    while True:
                        result = await cast(Awaitable[Any], view(*args, **kwargs))
                        if tries.committed():
                            return result
                        await asyncio.sleep(tries.pause())
                        tries.begin_anew()

            return cast(Callable[_P, _R], run_async)

        @wraps(view)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with _Attempts(attempts, backoff) as tries:
                while True:
                    result = view(*args, **kwargs)
                    if tries.committed():
                        return result
                    time.sleep(tries.pause())
                    tries.begin_anew()

        return run

    return decorate


def _check(attempts: int, backoff: float) -> None:
    if isinstance(attempts, bool) or not isinstance(attempts, int):
        raise TypeError(f"attempts must be an int, as in @retry_on_conflict(attempts=3), not {attempts!r}")
    if isinstance(backoff, bool) or not isinstance(backoff, (int, float)):
        raise TypeError(f"backoff must be a number of seconds, not {backoff!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be 1 at least, not {attempts}")
    if not 0 <= backoff < float("inf"):
        raise ValueError(f"backoff must be 0 or more seconds, not {backoff}")


class _Attempts:
    """The attempts of one request."""

    def __init__(self, attempts: int, backoff: float) -> None:
        current = session._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001 - Flask's own way
        if not isinstance(current, LuaSession):
            raise TypeError(f"@retry_on_conflict needs a LuaSession, and this is a {type(current).__name__}")
        self._session = current
        self._left = attempts
        self._pause = backoff
        self._flashes = request_ctx.flashes

    def __enter__(self) -> Self:
        # One decorated view may call another: then the outer one commits, and runs again, with all of it.
        self._is_inner = transaction_of(self._session).ledger.strict
        if not self._is_inner:
            with suppress(SessionGone):
                self._session.commit()
            transaction_of(self._session).ledger.strict = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_inner:
            transaction_of(self._session).ledger.strict = False

    def committed(self) -> bool:
        """Commit, and tell whether that was it."""
        if self._is_inner:
            return True
        self._left -= 1
        try:
            self._session.commit()
        except SessionGone:
            return True
        except SessionConflict:
            if self._left <= 0:
                # Without this the end of the request would store it, by the ordinary policy.
                transaction_of(self._session).give_up()
                raise
            return False
        return True

    def begin_anew(self) -> None:
        """Read the session as it is now, after the pause: what it was before is old where many are at it."""
        self._session.reload()
        # Flask keeps what get_flashed_messages() took out, which the new snapshot may hold again.
        request_ctx.flashes = self._flashes

    def pause(self) -> float:
        """Return how many seconds to wait before the next run."""
        longest, self._pause = self._pause, max(self._pause, min(self._pause * 2, _LONGEST_PAUSE))
        return random.uniform(0, longest)  # noqa: S311 - jitter, no secret
