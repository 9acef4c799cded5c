"""Turns: of one process's requests that met a conflict one goes on at a time, and nobody waits for long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier, Event, Thread
from types import SimpleNamespace

import pytest
from flask import session

import luasession.rounds
import luasession.turns
from luasession import merge
from luasession.turns import Turns

from .conftest import MakeApp

REQUESTS = 24


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up waiting, however slow the machine."""
    monkeypatch.setattr(luasession.turns, "_LONGEST_WAIT", 60.0)


def neighbour_of(turns: Turns, handle: str, inside: Callable[[], None]) -> Thread:
    """Return a thread that wants a turn at the same session."""

    def run() -> None:
        with turns.one(handle):
            inside()

    thread = Thread(target=run)
    thread.start()
    return thread


@pytest.mark.usefixtures("patient")
def test_one_after_the_other() -> None:
    """A second one has no turn until the first one is through, and is told that it waited."""
    turns, entered = Turns(), Event()
    with turns.one("handle") as waited:
        assert not waited
        second = neighbour_of(turns, "handle", entered.set)
        assert not entered.wait(0.2)
    second.join(60)
    assert entered.is_set()


@pytest.mark.usefixtures("patient")
def test_who_waited_is_told() -> None:
    """Whoever had a neighbour to wait for hears so, whoever had none too."""
    turns, told = Turns(), []
    started, goes_on = Event(), Event()

    def first() -> None:
        started.set()
        goes_on.wait(60)

    def second() -> None:
        with turns.one("handle") as waited:
            told.append(waited)

    holder = neighbour_of(turns, "handle", first)
    assert started.wait(60)
    waiting = Thread(target=second)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    goes_on.set()
    for thread in (holder, waiting):
        thread.join(60)
    second()
    assert told == [True, False]


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the longest wait one goes on without, and does not end the turn of the one that has it."""
    monkeypatch.setattr(luasession.turns, "_LONGEST_WAIT", 0.01)
    turns, seen = Turns(), []
    with turns.one("handle"):
        for _ in range(2):
            neighbour_of(turns, "handle", lambda: seen.append("without")).join(60)
        with turns.one("handle") as waited:
            assert not waited  # nor for himself
    with turns.one("handle") as waited:
        assert not waited
    assert seen == ["without"] * 2


@pytest.mark.usefixtures("patient")
def test_other_sessions_are_not_waited_for() -> None:
    """Sessions that share no turn go on beside each other."""
    turns, entered = Turns(), Event()
    shared = hash("handle") % luasession.turns._TURNS
    other = next(name for n in count() if hash(name := f"handle{n}") % luasession.turns._TURNS != shared)
    with turns.one("handle"):
        neighbour_of(turns, other, entered.set).join(60)
        assert entered.is_set()


@pytest.mark.usefixtures("patient")
def test_an_error_ends_a_turn() -> None:
    """Whatever is raised in a turn, the next one has its own."""
    turns = Turns()
    with pytest.raises(KeyError), turns.one("handle"):
        raise KeyError
    with turns.one("handle") as waited:
        assert not waited


@pytest.mark.usefixtures("patient")
def test_merges_of_one_process_hinder_each_other_once(make_valkey_app: MakeApp) -> None:
    """Of requests that count one number up from the same version, each merges twice at most."""
    app = make_valkey_app(SESSION_MERGE={"n": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    all_have_read = Barrier(REQUESTS)

    def view() -> None:
        session["n"] += 1
        all_have_read.wait(60)

    with ThreadPoolExecutor(REQUESTS) as pool:
        for each in [pool.submit(browser.twin().run, view) for _ in range(REQUESTS)]:
            each.result()
    assert browser.run(lambda: session["n"]) == REQUESTS
    # One is first, the others find what it has made; then each but the first of them what its neighbours have.
    assert REQUESTS - 1 <= app.stats()["merges"] <= 2 * (REQUESTS - 1)


@pytest.mark.usefixtures("patient")
def test_updates_of_one_process_hinder_each_other_once(make_valkey_app: MakeApp) -> None:
    """Of ``atomic_update`` calls that begin on the same version, each calls its function three times at most."""
    app = make_valkey_app()
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    all_have_read = Barrier(REQUESTS)
    calls = []

    def view() -> None:
        mine = []

        def add(n: int) -> int:
            mine.append(n)
            calls.append(n)
            if len(mine) == 1:
                all_have_read.wait(60)
            return n + 1

        session.atomic_update("n", add)

    with ThreadPoolExecutor(REQUESTS) as pool:
        for each in [pool.submit(browser.twin().run, view) for _ in range(REQUESTS)]:
            each.result()
    assert browser.run(lambda: session["n"]) == REQUESTS
    assert len(calls) <= 3 * REQUESTS


def test_what_has_just_been_told_is_built_on_at_once(
    make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge pauses only when it has lost a race, and not again before it has built on what it learns after that."""
    story: list[str] = []

    def add(base: int, theirs: int, ours: int) -> int:
        story.append("merges")
        if interferes.pop(0):
            browser.twin().run(count_up)
        return merge.add(base, theirs, ours)

    def count_up() -> None:
        session.atomic_update("n", lambda n: n + 1)

    def pause(_seconds: float) -> None:
        story.append("pauses")
        browser.twin().run(count_up)

    app = make_valkey_app(SESSION_MERGE={"n": add})
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    monkeypatch.setattr(luasession.rounds, "time", SimpleNamespace(sleep=pause))

    def view() -> None:
        session["n"] += 1
        browser.twin().run(count_up)

    interferes = [False]
    browser.run(view)
    assert story == ["merges"]
    story.clear()
    interferes = [True, False, False]
    browser.run(view)
    assert story == ["merges", "pauses", "merges", "merges"]
    assert browser.run(lambda: session["n"]) == 2 + 1 + 1 + 1 + 1


GEVENT = """
import luasession.turns

# Made before gevent comes, as where gunicorn loads the app before it forks.
turns = luasession.turns.Turns()
luasession.turns._LONGEST_WAIT = 5.0

from gevent import monkey
monkey.patch_all()
import gevent
from gevent.event import Event

told, second_waits, others_ran = [], Event(), Event()

def first():
    with turns.one("handle"):
        others_ran.wait()
        told.append("first")

def second():
    second_waits.set()
    with turns.one("handle") as waited:
        told.append("second" if waited else "too early")

def other():
    second_waits.wait()
    gevent.sleep(0)
    told.append("other")
    others_ran.set()

gevent.joinall([gevent.spawn(each) for each in (first, second, other)], timeout=30, raise_error=True)
print(*told)
"""


def test_other_greenlets_go_on() -> None:
    """Under gevent whoever waits for a turn holds up nobody but himself."""
    done = subprocess.run(
        [sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "other first second\n", done.stderr
