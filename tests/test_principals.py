"""Principals: whose a session is, the index of them, and log out everywhere."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch

import pytest
from flask import session
from greenlet import getcurrent, greenlet

from luasession import (
    SessionGone,
    SessionInfo,
    Sessions,
    SessionUnavailable,
    merge,
    session_destroyed,
    session_discarded,
)
from luasession.client import Client
from luasession.store import Store

from .conftest import Browser, MakeApp, TestApp


def sessions(app: TestApp) -> Sessions:
    found: Sessions = app.flask.extensions["luasession"]
    return found


def log_in(browser: Browser, user: str = "ada", **values: Any) -> str:
    """Log in as an app does, and return the handle."""

    def view() -> None:
        session.update(user=user, **values)
        session.regenerate()
        session.principal = user

    browser.run(view)
    handle: str = browser.run(lambda: session.handle)
    return handle


def index_key(app: TestApp, principal: str = "ada") -> str:
    return f"{app.prefix}principal:{hashlib.sha256(principal.encode()).hexdigest()}"


def index(app: TestApp, principal: str = "ada") -> dict[str, float]:
    """Return the index as it is stored."""
    assert app.server is not None
    with app.server.client(decode_responses=True) as client:
        return dict(client.zrange(index_key(app, principal), 0, -1, withscores=True))


def grow_old(app: TestApp, principal: str = "ada", by_ms: int = 3_600_000) -> None:
    """Make all entries of an index an hour older."""
    assert app.server is not None
    with app.server.client() as client:
        for handle in index(app, principal):
            client.zincrby(index_key(app, principal), -by_ms * 1000, handle)


def handles(app: TestApp, principal: str = "ada") -> list[str]:
    return [info.handle for info in sessions(app).sessions_of(principal)]


def test_where_somebody_is_logged_in(app: TestApp) -> None:
    """sessions_of tells of each live session its handle, label and moments, and of nobody else's."""
    laptop, phone, other = app.browser(), app.browser(), app.browser()
    before = datetime.now(UTC)
    first = log_in(laptop)
    laptop.run(lambda: setattr(session, "label", "Laptop"))
    second = log_in(phone)
    log_in(other, "bob")
    found = sessions(app).sessions_of("ada")
    assert [info.handle for info in found] == [first, second]
    assert [info.label for info in found] == ["Laptop", None]
    for info in found:
        assert isinstance(info, SessionInfo)
        assert abs(info.created_at - before) < timedelta(minutes=1)
        assert info.created_at <= info.last_seen < info.expires_at
        assert abs(info.expires_at - info.last_seen - timedelta(days=31)) < timedelta(seconds=1)
    assert sessions(app).sessions_of("nobody") == []


def test_log_ins_of_one_millisecond_keep_their_order(app: TestApp) -> None:
    """Sessions are told in the order of their log-ins, however quickly these follow one another."""
    handles = [log_in(app.browser()) for _ in range(30)]
    assert [info.handle for info in sessions(app).sessions_of("ada")] == handles


def test_the_index_names_no_user(app: TestApp) -> None:
    """The index is a sorted set under the digest of the principal, of handles and nothing else."""
    handle = log_in(app.browser(), "ada@example.org")
    assert app.keys() == sorted(
        [app.prefix.encode() + handle.encode(), index_key(app, "ada@example.org").encode()]
    )
    assert list(index(app, "ada@example.org")) == [handle]


def test_log_out_everywhere(app: TestApp) -> None:
    """revoke_all ends all sessions of a principal but the one to keep, and says how many."""
    browsers = [app.browser() for _ in range(4)]
    mine, *others = [log_in(browser) for browser in browsers]
    bob = app.browser()
    log_in(bob, "bob")
    assert sessions(app).revoke_all("ada", keep=mine) == 3
    assert handles(app) == [mine]
    for handle in others:
        assert set(app.stored(handle)) == {b"@t"}
    assert browsers[0].run(lambda: session["user"]) == "ada"
    assert bob.run(lambda: session["user"]) == "bob"
    assert sessions(app).revoke_all("ada") == 1
    assert sessions(app).revoke_all("ada") == 0
    assert handles(app) == []


def test_log_out_everywhere_against_warm_caches(make_app: MakeApp) -> None:
    """Three processes hold the session: after revoke_all none of them can write it, and none reads it once it asks."""
    app = make_app(SESSION_CACHE_TTL=60.0)
    browser = app.browser()
    handle = log_in(browser)
    processes = [app.another(), app.another(), app.another()]
    twins = [browser.twin(process) for process in processes]
    for twin in twins:
        assert twin.run(lambda: session["user"]) == "ada"
    sessions(app.another()).revoke_all("ada")

    def write() -> None:
        session["late"] = session["user"]

    for twin in twins:
        twin.run(write)
        assert twin.run(lambda: dict(session)) == {}
    assert set(app.stored(handle)) == {b"@t"}


def test_revoke(app: TestApp) -> None:
    """It ends one session by its handle, and the signal tells; a second time there is none."""
    told: list[str] = []

    def receive(_sender: Any, handle: str, **_about: Any) -> None:
        told.append(handle)

    browser = app.browser()
    handle = log_in(browser)
    with session_destroyed.connected_to(receive, app.flask):
        assert sessions(app).revoke(handle) is True
        assert sessions(app).revoke(handle) is False
    assert told == [handle]
    assert browser.twin(app.another()).run(lambda: dict(session)) == {}


@pytest.mark.parametrize("call", ["revoke", "keep", "edit"])
@pytest.mark.parametrize(
    "wrong", ["", "short", "x" * 22 + "." + "y" * 43, "ä" * 22, "x" * 21 + "\n", None, b"x" * 22]
)
def test_what_is_no_handle(app: TestApp, call: str, wrong: Any) -> None:
    """Anything but a handle, a whole session id above all, is refused in words that do not repeat it."""
    calls: dict[str, Callable[[], Any]] = {
        "revoke": lambda: sessions(app).revoke(wrong),
        "keep": lambda: sessions(app).revoke_all("ada", keep=wrong or ""),
        "edit": lambda: sessions(app).edit(wrong).__enter__(),
    }
    with pytest.raises(ValueError, match="a handle is the 22 characters") as caught:
        calls[call]()
    assert "yyy" not in str(caught.value)


@pytest.mark.parametrize("call", ["sessions_of", "revoke_all"])
def test_what_is_no_principal(app: TestApp, call: str) -> None:
    """A principal that is no str is a TypeError, not a search for another one."""
    with pytest.raises(TypeError, match="a principal must be a str, not int"):
        getattr(sessions(app), call)(5)


def test_a_log_out_leaves_the_index_once_it_is_old(app: TestApp) -> None:
    """A session that ends, is cleared or changes hands leaves the index; a young entry waits for the next look."""
    ends: list[Callable[[], None]] = [
        lambda: session.destroy(),
        lambda: session.clear(),
        lambda: setattr(session, "principal", None),
        lambda: setattr(session, "principal", "bob"),
    ]
    for end in ends:
        browser = app.browser()
        handle = log_in(browser)
        grow_old(app)
        browser.run(lambda end=end: (dict(session), end()))
        assert index(app) == {}
        log_in(browser)
        young = browser.run(lambda: session.handle)
        browser.run(lambda end=end: (dict(session), end()))
        assert list(index(app)) == [young]
        assert handles(app) == []
        grow_old(app)
        assert handles(app) == []
        assert index(app) == {}
        assert handle


def test_a_principal_that_is_set_again_costs_nothing(app: TestApp) -> None:
    """Set to whom it belongs already, the principal is no commit and no entry."""
    browser = app.browser()
    log_in(browser)
    browser.run(lambda: session["user"])
    assert app.server is not None
    with app.server.counting() as commands:
        browser.run(lambda: setattr(session, "principal", "ada"))
    assert commands.names == []


def test_one_more_command_at_log_in_and_log_out(app: TestApp) -> None:
    """A log-in and a log-out of a session that was read cost one command more each."""
    browser = app.browser()
    browser.run(lambda: session.update(visits=1))
    assert app.server is not None
    with app.server.counting() as commands:
        browser.run(lambda: (session["visits"], setattr(session, "principal", "ada")))
    assert commands.names == ["EVALSHA"] * 2
    with app.server.counting() as commands:
        browser.run(lambda: (session["visits"], session.destroy()))
    assert commands.names == ["EVALSHA"] * 2


@pytest.mark.parametrize("caught", [False, True])
def test_a_log_in_that_is_not_in_the_index_is_none(app: TestApp, caught: bool) -> None:
    """Where the index cannot be written nobody is logged in: "log out everywhere" would not find him."""
    browser = app.browser()
    assert app.server is not None
    with app.server.client() as client:
        client.set(index_key(app), "something else")

        def view() -> None:
            session["user"] = "ada"
            session.principal = "ada"
            if caught:
                with pytest.raises(SessionUnavailable):
                    session.commit()
            else:
                session.commit()

        browser.run(view, status=200 if caught else 503)
        client.delete(index_key(app))
    assert browser.set_cookies == {}
    assert app.keys() == []


def test_log_out_everywhere_that_is_cut_off(app: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended is taken out of the index on the way, so that the next attempt begins where this one stopped."""
    monkeypatch.setattr("luasession.sessions._AT_ONCE", 2)
    for _ in range(7):
        log_in(app.browser())
    grow_old(app)
    store = app.flask.session_interface.store  # type: ignore[attr-defined]
    original, ended = store.destroy, []

    def destroy(handle: str, *args: Any, **named: Any) -> bool:
        if len(ended) == 5:
            raise SessionUnavailable("down")
        ended.append(handle)
        done: bool = original(handle, *args, **named)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(store, "destroy", destroy)
        with pytest.raises(SessionUnavailable), app.flask.app_context():
            sessions(app).revoke_all("ada")
    assert len(index(app)) == 3
    with app.flask.app_context():
        assert sessions(app).revoke_all("ada") == 2
    assert index(app) == {}


def test_entries_of_sessions_that_expired_go_at_a_log_in(app: TestApp) -> None:
    """Who never logs out and logs in again and again leaves no pile of entries behind; each log-in takes two."""
    assert app.server is not None
    old = [log_in(app.browser()) for _ in range(8)]
    with app.server.client() as client:
        for handle in old[:5]:
            client.delete(app.prefix + handle)
    grow_old(app, by_ms=32 * 86_400_000)
    fresh = [log_in(app.browser())]
    assert set(index(app)) == {*old[2:], *fresh}
    fresh.append(log_in(app.browser()))
    assert set(index(app)) == {*old[4:], *fresh}
    # By now there are few, which do no harm.
    fresh.append(log_in(app.browser()))
    assert set(index(app)) == {*old[4:], *fresh}
    # Of the oldest two one is alive, and stays.
    fresh.append(log_in(app.browser()))
    assert set(index(app)) == {*old[5:], *fresh}


def test_few_entries_are_not_looked_at(app: TestApp) -> None:
    """A log-in of a user with few sessions costs one command, however old these are."""
    assert app.server is not None
    for _ in range(6):
        log_in(app.browser())
    grow_old(app, by_ms=32 * 86_400_000)
    browser = app.browser()
    with app.server.counting() as commands:
        browser.run(lambda: setattr(session, "principal", "ada"))
    assert commands.names == ["EVALSHA"] * 2


def test_an_index_ends_with_the_last_absolute_lifetime(make_app: MakeApp) -> None:
    """With an absolute lifetime the index outlives its sessions, and not by much; without one it stays."""
    for seconds in (3600, None):
        app = make_app(SESSION_ABSOLUTE_LIFETIME=seconds)
        handle = log_in(app.browser())
        assert app.server is not None
        with app.server.client() as client:
            left = client.pttl(index_key(app))
            assert (left == -1) if seconds is None else client.pttl(app.prefix + handle) < left < 3_610_000


def test_an_index_is_kept_for_the_longest_session(make_app: MakeApp) -> None:
    """An app with an absolute lifetime does not shorten an index that holds sessions without one."""
    app = make_app()
    log_in(app.browser())
    limited = app.another(SESSION_ABSOLUTE_LIFETIME=60)
    log_in(limited.browser())
    assert app.server is not None
    with app.server.client() as client:
        assert client.pttl(index_key(app)) == -1


def test_an_index_that_had_an_end_is_kept_for_sessions_without_one(make_app: MakeApp) -> None:
    """Once an absolute lifetime is no longer set, the index outlives the sessions that are entered since."""
    limited = make_app(SESSION_ABSOLUTE_LIFETIME=60)
    first = log_in(limited.browser())
    app = limited.another(SESSION_ABSOLUTE_LIFETIME=None)
    browser = app.browser()
    second = log_in(browser)
    last = log_in(limited.browser())
    assert app.server is not None
    with app.server.client() as client:
        assert client.pttl(index_key(app)) > timedelta(days=36_500) / timedelta(milliseconds=1)
    assert handles(app) == [first, second, last]
    assert sessions(app).revoke_all("ada") == 3
    assert browser.twin(app.another()).run(lambda: dict(session)) == {}


def test_looking_keeps_no_session_alive(make_app: MakeApp) -> None:
    """sessions_of and edit without a change refresh no TTL, whatever the touch interval."""
    app = make_app(SESSION_TOUCH_INTERVAL=0)
    handle = log_in(app.browser())
    before = app.stored(handle)[b"@v"]
    assert handles(app) == [handle]
    with sessions(app).edit(handle) as edited:
        assert edited["user"] == "ada"
    assert app.stored(handle)[b"@v"] == before
    touched = before[19:25]
    with sessions(app).edit(handle) as edited:
        edited["plan"] = "pro"
    assert app.stored(handle)[b"@v"][19:25] == touched


def test_a_log_in_elsewhere_keeps_no_session_alive(make_app: MakeApp) -> None:
    """The oldest entries that a log-in looks at stay as they are: only its own device uses its session."""
    app = make_app(SESSION_TOUCH_INTERVAL=0)
    devices = [log_in(app.browser()) for _ in range(8)]
    grow_old(app, by_ms=32 * 86_400_000)
    before = [app.stored(handle) for handle in devices]
    log_in(app.browser())
    assert [app.stored(handle) for handle in devices] == before


@pytest.mark.parametrize("about", [{"SESSION_REDIS_DEADLINE": 0}, {"SESSION_REDIS_DEADLINE": 0.1}])
def test_a_slow_log_in_is_revoked_on_its_way(make_app: MakeApp, about: dict[str, float]) -> None:
    """For as long as a call may take an entry counts as that of a log-in under way, however short the deadline."""
    app = make_app(SESSION_REDIS_TIMEOUT=5, **about)
    browser = app.browser()
    browser.run(lambda: session.update(visits=1))
    enter = Store.enter
    revoked = []

    def slowly(store: Store, *about: Any) -> None:
        enter(store, *about)
        time.sleep(0.3)
        revoked.append(sessions(app).revoke_all("ada"))

    with patch.object(Store, "enter", slowly):
        browser.run(lambda: setattr(session, "principal", "ada"))
    assert revoked == [1]
    assert browser.twin(app.another()).run(lambda: dict(session)) == {}


def test_a_corrupt_session_is_passed_over(app: TestApp) -> None:
    """A hash that is no session does not keep others from being listed, or somebody from logging in."""
    broken, fine = log_in(app.browser()), log_in(app.browser())
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + broken, "@i", b"x")
    grow_old(app, by_ms=32 * 86_400_000)
    assert handles(app) == [fine]
    log_in(app.browser())
    assert broken in index(app)


def test_edit(app: TestApp) -> None:
    """It changes a session from outside: its browser sees it, nobody is logged out, and nothing else moves."""
    browser = app.browser()
    handle = log_in(browser, cart=["book"])
    elsewhere = browser.twin(app.another())
    with sessions(app).edit(handle) as edited:
        edited["cart"].append("pen")
        edited["plan"] = "pro"
        edited.label = "seen by support"
    assert elsewhere.run(lambda: dict(session)) == {"user": "ada", "cart": ["book", "pen"], "plan": "pro"}
    assert elsewhere.run(lambda: (session.principal, session.label)) == ("ada", "seen by support")
    assert elsewhere.run(lambda: session.version) == 2


def test_edit_of_what_is_not_there(app: TestApp) -> None:
    """An edit of an unknown or ended session is SessionGone; one that ends meanwhile too, and nothing is stored."""
    with pytest.raises(SessionGone), sessions(app).edit("x" * 22):
        pass
    browser = app.browser()
    handle = log_in(browser)
    with pytest.raises(SessionGone), sessions(app).edit(handle) as edited:  # noqa: PT012
        edited["late"] = edited["user"]
        browser.run(lambda: session.destroy())
    with pytest.raises(SessionGone), sessions(app).edit(handle):
        pass
    assert set(app.stored(handle)) == {b"@t"}


def test_edit_that_raises(app: TestApp) -> None:
    """If the block raises, nothing is stored, and the exception goes on."""
    browser = app.browser()
    handle = log_in(browser)
    with pytest.raises(KeyError), sessions(app).edit(handle) as edited:  # noqa: PT012
        edited["half"] = 1
        raise KeyError("x")
    assert "half" not in browser.run(lambda: dict(session))


def test_edit_merges(make_app: MakeApp) -> None:
    """A request that comes between is merged with, as between two requests."""
    app = make_app(SESSION_MERGE={"credit": merge.add})
    browser = app.browser()
    handle = log_in(browser, credit=10)

    def spend() -> None:
        session["credit"] -= 3

    with sessions(app).edit(handle) as edited:
        edited["credit"] += 100
        browser.run(spend)
    assert browser.twin(app.another()).run(lambda: session["credit"]) == 107


def test_edit_rotates_nothing(app: TestApp) -> None:
    """There is no browser to give a new id to, so regenerate() is an error; destroy() ends the session."""
    browser = app.browser()
    handle = log_in(browser)
    with sessions(app).edit(handle) as edited:
        with pytest.raises(RuntimeError, match="no browser"):
            edited.regenerate()
        edited.destroy()
    assert browser.twin(app.another()).run(lambda: dict(session)) == {}
    assert set(app.stored(handle)) == {b"@t"}


# -- every order of the steps of a log-in, of sessions_of and of revoke_all ------------------------


def every_order(
    make: Callable[[], list[Callable[[], Any]]],
) -> Iterator[tuple[list[Any], list[tuple[int, str]]]]:
    """Run functions side by side in each order of their commands; yield what each returned, and the order."""
    order: list[int] = []
    real = Client.call

    def call(self: Client, words: Any, *rest: Any) -> Any:
        parent = getcurrent().parent
        if parent is not None:
            now = time.monotonic_ns()
            command = words(now, now, True)
            parent.switch((command[3] if command[0] == b"EVALSHA" else command[1]).decode())
        return real(self, words, *rest)

    while True:
        functions = make()
        taken: list[tuple[int, int]] = []
        told: list[tuple[int, str]] = []
        results: list[Any] = [None] * len(functions)
        with patch.object(Client, "call", call):
            waiting: dict[int, tuple[greenlet, str]] = {}
            for number, function in enumerate(functions):
                runner = greenlet(function)
                about_to = runner.switch()
                if runner.dead:
                    results[number] = about_to
                else:
                    waiting[number] = (runner, about_to)
            while waiting:
                choice = order[len(taken)] if len(taken) < len(order) else 0
                taken.append((choice, len(waiting)))
                number = sorted(waiting)[choice]
                runner, about_to = waiting.pop(number)
                told.append((number, about_to))
                about_to = runner.switch()
                if runner.dead:
                    results[number] = about_to
                else:
                    waiting[number] = (runner, about_to)
        yield results, told
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        order = [choice for choice, _ in taken]
        order[-1] += 1


@pytest.mark.parametrize("start", ["new visitor", "anonymous session"])
@pytest.mark.parametrize("looking", [False, True])
def test_log_in_against_log_out_everywhere(make_valkey_app: MakeApp, start: str, looking: bool) -> None:
    """In every order a session that was in the index before revoke_all looked is dead afterwards.

    A log-in is two commands, its entry and its commit; revoke_all looks, ends each session, and takes the
    entries out; sessions_of looks, reads each, and takes out what is stale. A session that lives on is in
    the index, so that the next revoke_all finds it, and its entry came after the look of this one.
    """
    app = make_valkey_app(SESSION_CACHE_TTL=60.0)
    app.browser().run(lambda: session.update(warm=1))
    state: dict[str, Any] = {}
    outcomes = set()
    numbers = itertools.count()
    discarded: list[str] = []

    def receive(_sender: Any, reason: str, **_about: Any) -> None:
        discarded.append(reason)

    def make() -> list[Callable[[], Any]]:
        user = f"user{next(numbers)}"
        browser = app.browser()
        if start == "anonymous session":
            browser.run(lambda: session.update(cart=1))
            browser.run(lambda: session["cart"])
        state.update(browser=browser, user=user)
        discarded.clear()

        def view() -> None:
            session.get("cart")
            session["user"] = user
            session.principal = user

        functions = [lambda: browser.run(view), lambda: sessions(app).revoke_all(user)]
        return [*functions, lambda: sessions(app).sessions_of(user)] if looking else functions

    count = 0
    with session_discarded.connected_to(receive, app.flask):
        for results, told in every_order(make):
            count += 1
            user = state["user"]
            browser, ended = state["browser"], results[1]
            key = index_key(app, user)
            log_in_steps = [at for at, (number, _) in enumerate(told) if number == 0]
            look = next(at for at, (number, _) in enumerate(told) if number == 1)
            assert key in told[log_in_steps[0]][1], told
            entered_before = log_in_steps[0] < look
            seen = browser.twin(app.another()).run(lambda: (session.get("user"), session.handle))
            lives = seen[0] == user
            assert lives is not entered_before, told
            assert ended == entered_before, told
            if lives:
                assert list(index(app, user)) == [seen[1]], told
                assert sessions(app).revoke_all(user) == 1
                assert browser.twin(app.another()).run(lambda: session.get("user")) is None
            else:
                ended_at = [at for at, (number, _) in enumerate(told) if number == 1][1]
                assert discarded == (["gone"] if ended_at < log_in_steps[1] else []), told
            outcomes.add((lives, tuple(discarded)))
    assert len(outcomes) == 3
    assert count >= (60 if looking else 5)
