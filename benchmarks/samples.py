"""Samples: many seconds in, percentiles in microseconds out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

#: A line of the result: what was measured, by name, and its percentiles.
Row = dict[str, Any]

#: The percentiles of each row, in microseconds.
PERCENTILES = ("p50", "p90", "p99", "max")


def summary(seconds: Sequence[float]) -> Row:
    """Return how many there are, and their P50, P90, P99 and maximum in microseconds."""
    ordered = sorted(value * 1e6 for value in seconds)
    last = len(ordered) - 1
    values = [ordered[min(int(len(ordered) * q), last)] for q in (0.5, 0.9, 0.99, 1.0)]
    return {"n": len(ordered)} | dict(zip(PERCENTILES, (round(value, 1) for value in values), strict=True))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    """Return the middle one, the upper of two."""
    return sorted(values)[len(values) // 2]
