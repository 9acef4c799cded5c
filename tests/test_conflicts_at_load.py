"""Increments at load, each way that makes them exact: three processes, 36 threads, one session."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from .servers import Server
from .web import Web, serving

INCREMENTS = 2000
CLIENTS = 36


def merges(web: Web) -> int:
    """Return how many merge rounds the three processes have counted."""
    counts: dict[int, int] = {}
    for _ in range(500):
        stats = json.loads(web.browser().request("/stats")[1])
        counts[stats["pid"]] = stats["merges"]
        if len(counts) == 3:
            return sum(counts.values())
    raise AssertionError(f"only processes {set(counts)} answered")


@pytest.mark.parametrize(("how", "key"), [("atomic", "hits"), ("merge", "merged"), ("retry", "hits")])
def test_two_thousand_increments(
    valkey: Server, capsys: pytest.CaptureFixture[str], how: str, key: str
) -> None:
    """By atomic_update, by merge.add and by retry_on_conflict: exactly 2,000 each, none refused."""
    settings = {"SESSION_KEY_PREFIX": f"load{uuid4().hex[:8]}:", "SESSION_REDIS_DEADLINE": 60}
    with serving(valkey, workers=3, threads=12, **settings) as web:
        browser = web.browser()
        browser.request("/start", {key: 0})

        def increment(_number: int) -> tuple[int, int]:
            status, body = browser.overlapping(f"/increment/{how}")
            return status, int(body) if status == 200 else 0

        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(increment, range(INCREMENTS)))
        taken = time.monotonic() - started
        assert {status for status, _ in answers} == {200}
        assert browser.show()["session"] == {key: INCREMENTS}
        again = merges(web) if how == "merge" else sum(runs for _, runs in answers) - INCREMENTS
    with capsys.disabled():
        print(f"\n{INCREMENTS} increments by {how}: {INCREMENTS / taken:.0f} a second, {again} rounds more")
