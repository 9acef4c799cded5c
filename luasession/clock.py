"""The clock by which ages and trust are counted: real time that passes, whatever the date is said to be.

The other side of each comparison is Redis, whose clock no test can move. So a
frozen or travelling Python clock must not get in here: freezegun replaces the
functions of :mod:`time` for monotonic clocks, and lets the system's clocks be
asked by number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

#: Returns the monotonic clock in nanoseconds.
now_ns: Callable[[], int]
if hasattr(time, "clock_gettime_ns"):
    now_ns = partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)
else:
    now_ns = time.monotonic_ns
