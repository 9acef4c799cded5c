"""Rounds: what met a conflict is committed with what is made of that, until it meets none any more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from .clock import now_ns
from .delta import Delta
from .errors import SessionConflict
from .outcome import Applied, Conflicting, Refused
from .snapshot import session_key

if TYPE_CHECKING:
    from .visit import Visit

# They go on until the deadline, but never fewer than that.
_ROUNDS = 64
# Seconds, at most, before another round.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


def commit_again(
    visit: Visit, delta: Delta, conflicting: Conflicting, resolve: Callable[[Delta, Conflicting], Delta]
) -> tuple[Delta, Applied | Refused]:
    """Commit what is made of a conflict, and return what was sent last, and what came of it.

    :param delta: what was sent, and met the conflict.
    :param resolve: makes the next delta of the last one and its conflict.
    :raise SessionConflict: if there are still conflicts after ``SESSION_REDIS_DEADLINE``.
    """
    started = now_ns()
    longest = _FIRST_PAUSE
    with visit.turn() as has_waited:
        # What stood there a pause ago does not where many are at it: sent on top of it, a commit only
        # learns what stands there now, and goes on at once.
        is_fresh = not has_waited
        for rounds in count(1):
            delta = resolve(delta, conflicting)
            visit.count("merges")
            if rounds >= _ROUNDS and now_ns() - started > visit.config.redis_deadline * 1e9:
                raise SessionConflict([key for name in conflicting.current if (key := session_key(name))])
            result = visit.commit(delta)
            if not isinstance(result, Conflicting):
                return delta, result
            conflicting = result
            if is_fresh:
                time.sleep(random.uniform(0, longest))  # noqa: S311 - jitter, no secret
                longest = min(longest * 2, _LONGEST_PAUSE)
            is_fresh = not is_fresh
    raise AssertionError("unreachable")
