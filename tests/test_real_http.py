"""The main job: a real server, real HTTP, really parallel requests; every key is kept."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from .servers import Server
from .web import Web, serving

KEYS = [f"key{n}" for n in range(60)]


@pytest.fixture(scope="module")
def web(server: Server) -> Iterator[Web]:
    with serving(server, SESSION_KEY_PREFIX=f"web{uuid4().hex[:8]}:") as web:
        yield web


def test_sixty_parallel_sets(web: Web) -> None:
    """Sixty parallel requests that each set their own key, over three processes: sixty keys."""
    browser = web.browser()
    browser.request("/start", {"first": "first"})
    assert browser.parallel([f"/set/{key}" for key in KEYS]) == [200] * 60
    shown = browser.show()
    assert shown["session"] == {"first": "first", **{key: key for key in KEYS}}
    assert shown["version"] == 61


def test_sixty_parallel_nested_changes(web: Web) -> None:
    """Sixty parallel in-place changes of sixty nested values: all are there."""
    browser = web.browser()
    browser.request("/start", {key: {"was": 1} for key in KEYS})
    assert browser.parallel([f"/nest/{key}" for key in KEYS]) == [200] * 60
    assert browser.show()["session"] == {key: {"was": 1, "added": key} for key in KEYS}


def test_sixty_parallel_deletes(web: Web) -> None:
    """Sixty parallel deletes of sixty keys: what nobody deleted is left, nothing else."""
    browser = web.browser()
    browser.request("/start", {"kept": 1, **dict.fromkeys(KEYS, 1)})
    assert browser.parallel([f"/delete/{key}" for key in KEYS]) == [200] * 60
    assert browser.show()["session"] == {"kept": 1}


def test_parallel_increments_are_exact(web: Web) -> None:
    """A hundred parallel atomic increments of one key, over three processes: a hundred."""
    browser = web.browser()
    browser.request("/start", {"hits": 0})
    for _ in range(2):
        assert browser.parallel(["/increment/atomic"] * 50) == [200] * 50
    assert browser.show()["session"] == {"hits": 100}


def test_reads_see_the_last_write_whatever_process_serves_them(web: Web) -> None:
    """One browser that writes and reads by turns over three processes with warm caches reads its writes."""
    browser = web.browser()
    browser.request("/start", {"first": "first"})
    processes = set()
    for n in range(40):
        browser.request(f"/set/k{n % 4}")
        shown = browser.show()
        processes.add(shown["pid"])
        assert shown["version"] == n + 2
    assert len(processes) > 1, "one process served all: nothing was shown"


def test_a_logout_among_writers_logs_out(web: Web) -> None:
    """A log-out among forty parallel writers: afterwards the session is empty, and stays so."""
    browser = web.browser()
    browser.request("/start", {"user": "ada"})
    twin = web.browser(browser.cookies)
    assert browser.parallel(
        [f"/set/{key}" for key in KEYS[:20]] + ["/logout"] + [f"/set/{key}" for key in KEYS[20:40]]
    )
    assert "user" not in twin.show()["session"]
    assert "user" not in browser.show()["session"]


def test_preloaded_app_survives_the_fork(server: Server) -> None:
    """Gunicorn --preload makes the app before it forks: the workers' sessions work all the same."""
    with serving(server, "--preload", workers=2, threads=4, SESSION_KEY_PREFIX="pre:") as web:
        browser = web.browser()
        browser.request("/start", {"first": "first"})
        assert browser.parallel([f"/set/{key}" for key in KEYS[:16]]) == [200] * 16
        assert len(browser.show()["session"]) == 17
