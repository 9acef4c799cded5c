"""Log out everywhere over real HTTP: several processes with warm caches, readers and writers all the time."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any
from uuid import uuid4

import pytest

from .servers import Server, eventually
from .web import Web, WebBrowser, serving

TTL = 0.5


@dataclass
class Seen:
    """One answer, with the moments of its sending and its arrival."""

    path: str
    sent: float
    arrived: float
    status: int
    body: bytes
    new_handle: str | None

    @property
    def shows_the_user(self) -> bool:
        return self.path == "/" and json.loads(self.body)["session"].get("user") == "ada"


def hammer(web: Web, cookies: dict[str, str], path: str, until: Event, seen: list[Seen], lock: Lock) -> None:
    while not until.is_set():
        browser = web.browser(cookies)  # the same cookies each time, whatever came back
        sent = time.monotonic()
        status, body, lines = browser.request(path)
        handles = [line.partition("=")[2].partition(".")[0] for line in lines if line.startswith("session=")]
        with lock:
            seen.append(
                Seen(
                    path, sent, time.monotonic(), status, body, handles[0] if handles and handles[0] else None
                )
            )


def warm(browser: WebBrowser, processes: int) -> None:
    """Ask until each process has shown the session."""
    pids: set[int] = set()

    def ask() -> bool:
        shown = browser.show()
        assert shown["session"]["user"] == "ada"
        pids.add(shown["pid"])
        return len(pids) == processes

    assert eventually(ask, 20), pids


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(("/", "/", "/", "/nest/k", "/nest/k", "/set/late"), id="readers and writers"),
        # A write that is refused has its process forget the session, which hides a window that is too long.
        pytest.param(("/", "/", "/", "/"), id="readers"),
    ],
)
def test_log_out_everywhere_over_three_processes(valkey: Server, paths: tuple[str, ...]) -> None:
    """After revoke_all has returned nothing is written; after the trust window nothing is read, in any process.

    What is read within the window is counted apart: it is what the contract allows (G10).
    """
    prefix = f"web{uuid4().hex[:8]}:"
    with serving(valkey, workers=3, threads=6, SESSION_KEY_PREFIX=prefix, SESSION_CACHE_TTL=TTL) as web:
        browser = web.browser()
        browser.request("/start", {"k": {"was": 1}})
        browser.request("/login/ada")
        handle = browser.cookies["session"].partition(".")[0]
        warm(browser, 3)
        seen: list[Seen] = []
        lock, until = Lock(), Event()
        with ThreadPoolExecutor(10) as pool, valkey.client() as client:
            for path in paths:
                pool.submit(hammer, web, dict(browser.cookies), path, until, seen, lock)
            time.sleep(0.3)
            status, body, _ = web.browser().request("/revoke/ada")
            returned = time.monotonic()
            at_return = client.hgetall(prefix + handle)
            time.sleep(TTL + 0.6)
            until.set()
        with valkey.client() as client:
            at_the_end = client.hgetall(prefix + handle)
            strangers: list[Any] = [
                client.hgetall(key) for key in client.keys(prefix + "*") if client.type(key) == b"hash"
            ]
    assert (status, body) == (200, b"1")
    assert set(at_return) == {b"@t"}
    assert at_the_end == at_return, "written after revoke_all had returned"
    before = [one for one in seen if one.arrived < returned]
    within = [one for one in seen if returned <= one.sent < returned + TTL]
    after = [one for one in seen if one.sent >= returned + TTL]
    assert any(one.shows_the_user for one in before)
    assert [one for one in after if one.path == "/"]
    assert [one for one in after if one.shows_the_user] == []
    # A write without a base that was sent afterwards starts a session of its own: nobody's.
    assert all(b"@p" not in fields and b"user" not in fields for fields in strangers)
    assert all(one.new_handle != handle for one in seen)
    print(
        f"\n{len(before)} answers before, {len(within)} within the window, of which"
        f" {sum(one.shows_the_user for one in within)} showed the session, {len(after)} after it, of which 0"
    )
