"""G7: what was open when a session ended or was cleared cannot bring it, or its data, back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Timer
from typing import Any

import pytest
from flask import session

from luasession.delta import Delta, Put
from luasession.ids import SessionId, new_session_id
from luasession.outcome import Refused, Standing
from luasession.signals import session_discarded

from .conftest import MakeApp, TestApp
from .servers import Server


@pytest.mark.parametrize("how", ["clear", "destroy"])
def test_twenty_writers_cannot_undo_a_logout(app: TestApp, how: str) -> None:
    """Twenty writers open over a logout, half of them blind: a tombstone is all that is left."""
    discarded: list[Any] = []

    def receive(_sender: Any, **about: Any) -> None:
        discarded.append(about["handle"])

    session_discarded.connect(receive, app.flask, weak=False)
    browser = app.browser()
    browser.run(lambda: session.update(user="ada"))
    handle = browser.run(lambda: session.handle)
    begun, ended = Barrier(21), Event()

    def write(n: int) -> dict[str, str]:
        twin = browser.twin()

        def view() -> None:
            if n % 2:
                assert session["user"] == "ada"
            begun.wait(20)
            assert ended.wait(20)
            session[f"key{n}"] = n

        twin.run(view)
        return twin.set_cookies

    with ThreadPoolExecutor(20) as pool:
        writers = [pool.submit(write, n) for n in range(20)]
        begun.wait(20)
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        browser.run(lambda: session.clear() if how == "clear" else session.destroy())
        ended.set()
        assert [writer.result() for writer in writers] == [{}] * 20
    assert set(app.stored(handle)) == {b"@t"}
    assert app.keys() == [(app.prefix + handle).encode()]
    assert discarded == [handle] * 20
    assert browser.cookies == {}


def test_age_counts_up_to_the_sending(app: TestApp) -> None:
    """A blind writer that waits for a connection while the session ends was open before the end."""
    elsewhere = app.another()
    browser = app.browser()
    browser.run(lambda: session.update(user="ada"))
    handle = browser.run(lambda: session.handle)
    late = browser.twin()
    store = app.flask.session_interface._store  # type: ignore[attr-defined]
    connections = store.calls.client._connections.of((app.prefix + handle).encode())
    taken = [connections.take() for _ in range(connections._slots.qsize())]
    with ThreadPoolExecutor(1) as pool:
        begun = Event()

        def write() -> None:
            begun.set()
            session["late"] = 1

        writer = pool.submit(late.run, write)
        assert begun.wait(20)
        time.sleep(0.05)
        browser.twin(elsewhere).run(lambda: session.destroy())
        time.sleep(0.05)  # an age that is counted too early falls short by this
        for connection in taken:
            connections.give(connection)
        writer.result()
    assert late.set_cookies == {}
    assert set(app.stored(handle)) == {b"@t"}
    assert app.keys() == [(app.prefix + handle).encode()]


@pytest.mark.parametrize("end", ["log-out", "five rotations"])
def test_a_server_that_hangs_makes_nobody_younger(own_server: Server, end: str) -> None:
    """A blind write that reaches a hung server is of before the end, although by its age it would be of after it."""
    app = TestApp(own_server, {"SESSION_REDIS_TIMEOUT": 5, "SESSION_REDIS_DEADLINE": 5})
    browser = app.browser()
    browser.run(lambda: session.update(user="ada"))
    late = browser.twin()
    keys = app.keys()

    def view() -> None:
        session["late"] = 1
        # By more than a call takes on a machine that has much to do, and by less than the hang.
        time.sleep(0.1)
        if end == "log-out":
            browser.run(lambda: session.destroy())
        else:
            for _ in range(5):
                browser.run(lambda: session.regenerate())
        own_server.pause()
        Timer(0.6, own_server.resume).start()

    late.run(view)
    assert late.set_cookies == {}
    assert app.keys() == keys
    assert browser.run(lambda: dict(session)) == ({} if end == "log-out" else {"user": "ada"})


def test_a_blind_write_after_the_end_starts_anew(app: TestApp) -> None:
    """A request that begins after the end, with the dead id, gets a new session."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    late, dead = browser.twin(), browser.run(lambda: session.handle)
    browser.run(lambda: session.destroy())
    late.run(lambda: session.update(b=1))
    assert late.run(lambda: dict(session)) == {"b": 1}
    assert late.run(lambda: session.handle) != dead


def test_clear_and_new_keys_keeps_exactly_the_new_keys(app: TestApp) -> None:
    """What was open over a clear that set new keys, blind or not, adds nothing to them."""
    browser = app.browser()
    browser.run(lambda: session.update(old=1))
    blind, reader, other = browser.twin(), browser.twin(), browser.twin()

    def clear() -> None:
        session.clear()
        session["new"] = 1

    def outer_blind() -> None:
        time.sleep(0.05)
        other.run(clear)
        session["blind"] = 1

    def outer_reader() -> None:
        assert session["old"] == 1
        time.sleep(0.05)
        blind.run(outer_blind)
        session["read"] = 1

    reader.run(outer_reader)
    assert browser.twin().run(lambda: dict(session)) == {"new": 1}


def test_a_base_from_before_the_end_is_dropped_whenever_it_began(make_app: MakeApp) -> None:
    """A process with a warm cache that begins after the end reads its snapshot, and cannot write it."""
    app = make_app(SESSION_CACHE_TTL=60.0)
    warm = app.another()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    elsewhere = browser.twin(warm)
    assert elsewhere.run(lambda: session["a"]) == 1
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.destroy())

    def view() -> None:
        session["b"] = session["a"]

    elsewhere.run(view)
    assert set(app.stored(handle)) == {b"@t"}
    assert app.keys() == [(app.prefix + handle).encode()]


def test_the_tombstone_goes_after_the_grace(make_app: MakeApp) -> None:
    """A tombstone has a TTL of the grace time, and holds nothing but the moment of the end."""
    app = make_app(SESSION_ROTATION_GRACE=7)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle = browser.run(lambda: session.handle)
    browser.run(lambda: session.clear())
    assert app.server is not None
    with app.server.client() as client:
        assert 0 < client.pttl(app.prefix + handle) <= 7000


def test_a_read_after_the_end_starts_nothing(make_app: MakeApp) -> None:
    """A request that was open at the end and reads after it finds nothing, and what it writes is dropped."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, other = browser.run(lambda: session.handle), browser.twin()

    def view() -> None:
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        other.run(lambda: session.destroy())
        assert dict(session) == {}
        session["late"] = 1

    browser.run(view)
    assert browser.set_cookies == {}
    assert app.keys() == [(app.prefix + handle).encode()]
    assert set(app.stored(handle)) == {b"@t"}


def test_a_base_of_a_lost_future_is_from_before_the_clear(app: TestApp) -> None:
    """A base that a failover has lost is not taken for one of the same number, made after a clear."""
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    handle, other = browser.run(lambda: session.handle), browser.twin()
    assert app.server is not None
    with app.server.client() as client:
        kept = client.dump(app.prefix + handle)
        browser.run(lambda: session.update(lost=1))

        def clear() -> None:
            session.clear()
            session["new"] = 1

        def view() -> None:
            assert session["lost"] == 1
            client.restore(app.prefix + handle, 0, kept, replace=True)
            other.run(clear)
            session["late"] = 1

        browser.run(view)
    assert {name for name in app.stored(handle) if not name.startswith(b"@")} == {b"new"}


def test_a_creation_finds_nothing_and_a_commit_something(app: TestApp) -> None:
    """A creation does not write over a session that is there, and a commit makes none that is not."""
    store = app.flask.session_interface._store  # type: ignore[attr-defined]
    caller = store.caller(time.monotonic_ns(), 3_600_000)
    there, other = new_session_id(32), new_session_id(32)
    store.commit(there, Delta(sets={b"a": Put(b"1")}), caller, create=True)
    before = app.stored(there.handle)
    again = store.commit(there, Delta(sets={b"b": Put(b"2")}), caller, create=True)
    assert again == Refused(Standing.MISSING)
    assert app.stored(there.handle) == before
    result = store.commit(SessionId.without_secret(other.handle), Delta(sets={b"b": Put(b"2")}), caller)
    assert result == Refused(Standing.MISSING)
    assert app.stored(other.handle) == {}
