"""What ``commit()`` and ``atomic_update()`` leave behind: outcomes that stay unknown, ends of keys, live values."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import flash, get_flashed_messages, session

from luasession import (
    SessionConflict,
    SessionTooLarge,
    SessionUnavailable,
    merge,
    session_conflict,
    session_discarded,
)
from luasession.delta import KEEP, KEPT, Delta, Put
from luasession.ids import parse_session_id
from luasession.snapshot import Snapshot, read_hash

from .conftest import Browser, MakeApp, TestApp
from .images import deadlines


def started(app: TestApp, **values: Any) -> tuple[Browser, Browser]:
    """Return a browser that has a session, and a twin for parallel requests."""
    browser = app.browser()
    browser.run(lambda: session.update({"start": 0} | values))
    return browser, browser.twin()


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


def reasons(app: TestApp) -> list[str]:
    """Note why deltas are dropped."""
    noted: list[str] = []
    session_discarded.connect(lambda _app, reason, **_: noted.append(reason), app.flask, weak=False)
    return noted


# -- an outcome that stays unknown -------------------------------------------------


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("how", ["commit", "atomic_update"])
def test_a_commit_whose_outcome_is_unknown_is_not_made_again(
    make_app: MakeApp, how: str, caught: bool
) -> None:
    """A delta that may have been applied, as too few replicas acknowledged, is not sent as another commit (G6)."""
    app = make_app(SESSION_MERGE={"n": merge.add})
    browser, _ = started(app, n=0)
    waiting = app.another(SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=0.02, SESSION_REDIS_DEADLINE=0.1)
    noted = reasons(waiting)

    def view() -> None:
        def change() -> None:
            if how == "commit":
                session["n"] += 1
                session.commit()
            else:
                session.atomic_update("n", lambda n: n + 1)

        if not caught:
            change()
            return
        with pytest.raises(SessionUnavailable):
            change()

    browser.twin(waiting).run(view, status=200 if caught else 503)
    assert browser.twin(app.another()).run(lambda: (session["n"], session.version)) == (1, 2)
    assert noted == (["unavailable"] if how == "commit" else [])


def test_what_is_set_after_a_caught_failure_is_told(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading failed and the view went on, what it set is dropped, and the signal and the count tell."""
    app = make_app(SESSION_CACHE_TTL=None)
    browser, _ = started(app)
    noted = reasons(app)
    store = app.flask.session_interface.store  # type: ignore[attr-defined]

    def down(*_: Any) -> Any:
        raise SessionUnavailable("down")

    def view() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(store, "load", down)
            with pytest.raises(SessionUnavailable):
                session.get("a")
        session["b"] = 2

    browser.run(view)
    assert noted == ["unavailable"]
    assert app.stats()["discards"] == 1
    assert browser.run(lambda: dict(session)) == {"start": 0}

    def again() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(store, "load", down)
            with pytest.raises(SessionUnavailable):
                session.get("a")
        session.reload()
        session["b"] = 2

    browser.run(again)
    assert browser.run(lambda: dict(session)) == {"start": 0, "b": 2}


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_a_refused_commit_is_told_once(make_app: MakeApp, caught: bool, later: bool) -> None:
    """What ``commit()`` has refused is not sent again at the end; what the view changes afterwards is."""
    app = make_app(SESSION_CONFLICT="raise")
    told: list[str] = []
    answered: list[int] = []
    session_conflict.connect(lambda _app, key, **_: told.append(key), app.flask, weak=False)
    app.flask.register_error_handler(409, lambda error: (answered.append(error.code), ("no", 409))[1])
    browser, twin = started(app, n=1)

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=10))
        try:
            session.commit()
        except SessionConflict:
            if later:
                session["more"] = 1
            if not caught:
                raise

    browser.run(view, status=200 if caught else 409)
    assert told == ["n"]
    assert len(answered) == 1 - caught
    assert browser.run(lambda: dict(session)) == {"start": 0, "n": 10} | ({"more": 1} if later else {})


def test_the_same_change_made_anew_after_a_reload_counts(make_app: MakeApp) -> None:
    """A delta that is what was refused before, to the byte, is another one once the session was read again."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, twin = started(app, status="cart")

    def view(commits: bool) -> None:
        assert session["status"] == "cart"
        twin.run(lambda: session.update(status="checkout"))
        session["status"] = "paid"
        with pytest.raises(SessionConflict):
            session.commit()
        session.reload()
        assert session["status"] == "checkout"
        session["status"] = "paid"
        if commits:
            session.commit()

    for commits in (True, False):
        browser.run(lambda commits=commits: view(commits))
        assert browser.run(lambda: session["status"]) == "paid"
        browser.run(lambda: session.update(status="cart"))


@pytest.mark.parametrize("commits", [False, True])
def test_the_same_change_in_place_made_anew_after_a_reload_counts(make_app: MakeApp, commits: bool) -> None:
    """The same holds for values that are changed in place, of which nobody is told."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, twin = started(app, cart=["a"])

    def view() -> None:
        session["cart"].append("x")
        twin.run(lambda: session.update(cart=["a"]))
        with pytest.raises(SessionConflict):
            session.commit()
        session.reload()
        session["cart"].append("x")
        if commits:
            session.commit()

    browser.run(view)
    assert browser.run(lambda: session["cart"]) == ["a", "x"]


def test_a_clear_after_a_refused_clear_ends_the_session(make_app: MakeApp) -> None:
    """A log-out in place of new data that was too large is a log-out."""
    app = make_app(SESSION_MAX_BYTES=3000)
    browser, _ = started(app)
    handle = handle_of(browser)

    def view() -> None:
        session.clear()
        session["b"] = "y" * 4000
        with pytest.raises(SessionTooLarge):
            session.commit()
        session.clear()

    browser.run(view)
    assert list(app.stored(handle)) == [b"@t"]


#: What a view may do once more after a refusal, and what its request is then answered with.
AGAIN: dict[str, tuple[Callable[[], Any], int]] = {
    "set": (lambda: session.update(n=2), 409),
    "delete": (lambda: session.pop("n"), 409),
    "commit": (lambda: session.commit(), 409),
    "clear": (lambda: session.clear(), 200),
    "destroy": (lambda: session.destroy(), 200),
    "label": (lambda: setattr(session, "label", "refused"), 200),
    "rotate": (lambda: session.regenerate(), 200),
}


@pytest.mark.parametrize("what", AGAIN)
def test_what_is_done_again_after_a_refusal(make_app: MakeApp, what: str) -> None:
    """Whatever the view does once more, equal to what was refused or not, is decided about anew and told."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, twin = started(app, n=1)
    handle, id_before = handle_of(browser), browser.cookies["session"]
    again, status = AGAIN[what]

    def view() -> None:
        session["n"] += 1
        session.label = "refused"
        session.regenerate()
        twin.run(lambda: session.update(n=10))
        with pytest.raises(SessionConflict):
            session.commit()
        again()

    browser.run(view, status=status)
    if what in ("clear", "destroy"):
        assert "session" not in browser.cookies
        assert list(app.stored(handle)) == [b"@t"]
        return
    assert browser.run(lambda: (dict(session), session.label)) == (
        {"start": 0, "n": 10},
        "refused" if what == "label" else None,
    )
    assert (browser.cookies["session"] != id_before) is (what == "rotate")


@pytest.mark.parametrize("more", [lambda x: session.update(z=x), lambda x: setattr(session, "label", str(x))])
def test_what_was_read_counts_after_a_refusal(make_app: MakeApp, more: Callable[[int], None]) -> None:
    """Under serializable what a view goes on with is refused as well, if what it has read was changed."""
    app = make_app(SESSION_CONFLICT="serializable")
    browser, twin = started(app, x=1)

    def view() -> None:
        x = session["x"]
        session["x"] = x + 1
        twin.run(lambda: session.update(x=100))
        with pytest.raises(SessionConflict):
            session.commit()
        more(x)

    browser.run(view, status=409)
    assert browser.run(lambda: (dict(session), session.label)) == ({"start": 0, "x": 100}, None)


#: What was refused of a key, an update of it after that, and what is to be stored: the update alone.
UPDATED: dict[str, tuple[Callable[[], Any], Callable[[int], int], int]] = {
    "set": (lambda: session.update(hits=100), lambda n: n + 1, 6),
    "set to the same": (lambda: session.update(hits=100), lambda _: 100, 100),
    "deleted": (lambda: session.pop("hits"), lambda n: n + 1, 6),
}


@pytest.mark.parametrize("what", UPDATED)
def test_an_update_of_what_was_refused(make_app: MakeApp, what: str) -> None:
    """``atomic_update`` of a key is one of what is stored, whatever a refused commit was to make of it."""
    app = make_app(SESSION_MERGE={"n": "raise"})
    browser, twin = started(app, hits=5, n=0)
    change, function, expected = UPDATED[what]

    def view() -> int:
        change()
        session["n"] += 1
        twin.run(lambda: session.update(n=50))
        with pytest.raises(SessionConflict):
            session.commit()
        updated: int = session.atomic_update("hits", function, 0)
        return updated

    assert browser.run(view) == expected
    assert browser.run(lambda: dict(session)) == {"start": 0, "hits": expected, "n": 50}


def test_a_change_in_place_after_an_update_of_what_was_refused(make_app: MakeApp) -> None:
    """What a view appends anew to what an update gave it is stored, though the same was refused before."""
    app = make_app(SESSION_MAX_BYTES=1000)
    browser, _ = started(app, cart=[1])

    def view() -> None:
        session["cart"].append(2)
        session["big"] = "x" * 2000
        with pytest.raises(SessionTooLarge):
            session.commit()
        session.atomic_update("cart", lambda _: [1])
        session["cart"].append(2)

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"start": 0, "cart": [1, 2]}


def test_a_commit_that_cannot_be_made_forgets_no_refusal(make_app: MakeApp) -> None:
    """What was refused stays so when the next commit fails over a value of its own."""
    app = make_app(SESSION_MAX_BYTES=1000)
    browser, _ = started(app)

    def view() -> None:
        session["a"] = 1
        session["big"] = "x" * 2000
        with pytest.raises(SessionTooLarge):
            session.commit()
        del session["big"]
        session["c"] = object()
        with pytest.raises(TypeError):
            session.commit()
        del session["c"]

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"start": 0}


@pytest.mark.parametrize("between", ["commit", "atomic_update"])
def test_a_key_that_ended_in_the_request_stays_ended(make_valkey_app: MakeApp, between: str) -> None:
    """Changed in place after its end, with a commit of something else between, a key does not come to stay."""
    app = make_valkey_app()
    browser, _ = started(app, n=0)
    browser.run(lambda: session.set("offer", [1], ttl=0.3))

    def view() -> None:
        offer = session["offer"]
        time.sleep(0.5)
        if between == "commit":
            session["n"] = 1
            session.commit()
        else:
            session.atomic_update("n", lambda n: n + 1)
        offer.append(2)

    browser.run(view)
    assert b"offer" not in app.stored(handle_of(browser))
    assert browser.run(lambda: dict(session)) == {"start": 0, "n": 1}


def test_a_flash_after_a_refused_commit(make_app: MakeApp) -> None:
    """The usual way to tell a visitor of a conflict, a flash and a redirect, is not answered 409 itself."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, twin = started(app, n=1)

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=10))
        try:
            session.commit()
        except SessionConflict:
            flash("somebody was faster")

    browser.run(view)
    assert browser.run(get_flashed_messages) == ["somebody was faster"]
    assert browser.run(lambda: dict(session)) == {"start": 0, "n": 10}


def test_what_was_too_large_is_not_stored_later(make_app: MakeApp) -> None:
    """A value that was refused for its size is not stored when there is room for it in the end."""
    app = make_app(SESSION_MAX_BYTES=3000)
    browser, _ = started(app, a="x" * 2000)

    def view() -> None:
        session["b"] = "y" * 2000
        with pytest.raises(SessionTooLarge):
            session.commit()
        session.pop("a")

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"start": 0}


# -- atomic_update on what this request has changed already --------------------------


def test_a_default_set_by_both_loses_no_increment(make_app: MakeApp) -> None:
    """``setdefault`` and an atomic increment, in two requests at once: both count."""
    app = make_app()
    browser, twin = started(app)

    def hit(between: Any = None) -> int:
        session.setdefault("hits", 0)
        if between:
            twin.run(between)
        total: int = session.atomic_update("hits", lambda n: n + 1)
        return total

    assert browser.run(lambda: hit(hit)) == 2
    assert browser.run(lambda: session["hits"]) == 2


@pytest.mark.parametrize("read", [False, True])
def test_an_own_change_comes_first(make_app: MakeApp, read: bool) -> None:
    """The function sees this request's own change, and what came on top of it before it was stored."""
    app = make_app(SESSION_MERGE={"n": merge.add})
    browser, twin = started(app, n=1)

    def view() -> Any:
        session["n"] = session["n"] + 10 if read else 10
        twin.run(lambda: session.atomic_update("n", lambda n: n + 100))
        return session.atomic_update("n", lambda n: n * 2)

    # Read, the two additions merge; set blindly, the last writer's value stands.
    assert browser.run(view) == ((1 + 10 + 100) * 2 if read else 20)


def test_a_default_after_an_own_deletion(make_app: MakeApp) -> None:
    """Deleted in this request, a key is missing to the function: it gets the default."""
    browser, _ = started(make_app(), n=5)

    def view() -> Any:
        del session["n"]
        return session.atomic_update("n", lambda n: n + 1, 0)

    assert browser.run(view) == 1
    assert browser.run(lambda: session["n"]) == 1


@pytest.mark.parametrize("known", [False, True])
def test_a_default_stays_where_the_function_raises(make_app: MakeApp, known: bool) -> None:
    """A function that raises leaves what ``setdefault`` had set, and that is still only a default."""
    app = make_app()
    browser, twin = started(app) if known else (app.browser(), None)

    def view() -> Any:
        session.setdefault("n", 5)
        session["other"] = 1
        with pytest.raises(ZeroDivisionError):
            session.atomic_update("n", lambda n: n / 0)
        kept = session["n"]
        if twin:
            twin.run(lambda: session.atomic_update("n", lambda n: n + 1, 0))
            return kept, session.atomic_update("n", lambda n: n + 1)
        return kept, None

    assert browser.run(view) == (5, 2 if known else None)
    seen = browser.twin(app.another()).run(lambda: (session["n"], session["other"]))
    assert seen == (2 if known else 5, 1)


@pytest.mark.parametrize("how", ["first", "after a key"])
def test_atomic_updates_after_a_clear(make_app: MakeApp, how: str) -> None:
    """A visitor without a session who is cleared all the same keeps what came after it, each update of it."""
    app = make_app()
    browser = app.browser()

    def view() -> Any:
        session.clear()
        if how == "after a key":
            session["user"] = "ada"
        return [session.atomic_update("logins", lambda n: n + 1, 0) for _ in range(3)]

    assert browser.run(view) == [1, 2, 3]
    user = {"user": "ada"} if how == "after a key" else {}
    assert browser.twin(app.another()).run(lambda: dict(session)) == user | {"logins": 3}
    assert len(app.keys()) == 1


@pytest.mark.parametrize("then", ["commit", "atomic_update", "nothing"])
@pytest.mark.parametrize("known", [False, True])
def test_attributes_after_a_clear(make_app: MakeApp, known: bool, then: str) -> None:
    """What is set after a clear, permanence say, is of what comes after it, however that is committed."""
    app = make_app()
    browser = app.browser()
    if known:
        browser.run(lambda: (session.update(a=1), setattr(session, "lifetime", 50)))

    def view() -> None:
        session.clear()
        session.permanent = True
        session.label = "phone"
        if then == "commit":
            session.commit()
        if then == "atomic_update":
            session.atomic_update("logins", lambda n: n + 1, 0)
        session["user"] = "ada"

    browser.run(view)
    assert "Expires=" in browser.set_cookies["session"]
    seen = browser.twin(app.another()).run(
        lambda: (session["user"], session.get("a"), session.permanent, session.label, session.lifetime)
    )
    assert seen == ("ada", None, True, "phone", None)


def test_a_key_must_be_a_str(make_app: MakeApp) -> None:
    """Another key is a TypeError that says so, as at an assignment."""
    browser, _ = started(make_app())

    def view() -> None:
        with pytest.raises(TypeError, match="a session key must be a str, not int"):
            session.atomic_update(1, lambda n: n)  # type: ignore[arg-type]

    browser.run(view)


# -- ends of keys -------------------------------------------------------------------


def ends(app: TestApp, browser: Browser) -> dict[bytes, int]:
    """Return the keys with an end of their own, as they are stored."""
    loaded = browser.twin(app.another()).run(
        lambda: (len(session), session._transaction.ledger.snapshot())[1]
    )  # type: ignore[attr-defined]
    found: dict[bytes, int] = dict(loaded.deadlines)
    return found


@pytest.mark.parametrize("how", ["in place", "in place after a commit", "atomic_update"])
def test_a_change_keeps_the_end_of_a_key(make_app: MakeApp, how: str) -> None:
    """However late it is committed, a change in place, or by atomic_update, moves no end and takes none away."""
    app = make_app()
    browser, _ = started(app)
    browser.run(lambda: session.set("k", [1], ttl=60))
    before = ends(app, browser)
    assert set(before) == {b"k"}

    def view() -> None:
        if how == "atomic_update":
            session.atomic_update("k", lambda k: [*k, 2])
            return
        if how == "in place after a commit":
            session["other"] = 1
            session.commit()
        session["k"].append(2)

    browser.run(view)
    assert ends(app, browser) == before
    assert browser.twin(app.another()).run(lambda: session["k"]) == [1, 2]
    assert browser.run(lambda: session["k"]) == [1, 2]


def test_a_new_session_that_goes_on_keeps_ends(make_app: MakeApp) -> None:
    """A key that was set with an end in this very request has it after a change in place, too."""
    app = make_app()
    browser = app.browser()

    def view() -> None:
        session.set("cart", [], ttl=60)
        session.commit()
        session["cart"].append(1)

    browser.run(view)
    [end] = ends(app, browser).values()
    now_ms = app.flask.session_interface.store.now_ms(browser.cookies["session"].partition(".")[0])  # type: ignore[attr-defined]
    assert now_ms < end <= now_ms + 60_000


@pytest.mark.parametrize("removed", [False, True])
def test_a_key_that_ends_meanwhile_stays_ended(make_app: MakeApp, removed: bool) -> None:
    """Changed in place, a key whose end comes before the commit does not come back, also if others took it out."""
    app = make_app()
    browser, twin = started(app)
    browser.run(lambda: session.set("k", [1], ttl=0.5))

    def view() -> None:
        session["k"].append(2)
        session["other"] = 1
        time.sleep(0.6)
        if removed:
            twin.run(lambda: session.update(start=1))
            assert b"k" not in app.stored(handle_of(browser))

    browser.run(view)
    assert b"k" not in app.stored(handle_of(browser))
    for reader in (browser, browser.twin(app.another())):
        assert reader.run(lambda: dict(session)) == {"start": int(removed), "other": 1}


def lapse(app: TestApp, browser: Browser, key: str) -> Browser:
    """Let a key's end have passed; return the browser before a process that has not seen it earlier."""
    handle = handle_of(browser)
    ends = read_hash(app.stored(handle)).deadlines | {key.encode(): 1}
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, "@x", deadlines(ends))
    return browser.twin(app.another())


def assert_cached_as_stored(browser: Browser) -> None:
    """What the process holds of the session must be what Redis does, ends of keys included."""
    session_id = parse_session_id(browser.cookies["session"], 32)
    assert session_id is not None
    store = browser.app.flask.session_interface.store  # type: ignore[attr-defined]
    entry = store._here.cache.get(session_id)
    assert entry is not None
    assert entry.snapshot == read_hash(browser.app.stored(session_id.handle))


def test_atomic_update_of_a_key_past_its_end(make_app: MakeApp) -> None:
    """It is missing to the function, and the result is stored, with no end."""
    app = make_app()
    browser, _ = started(app)
    browser.run(lambda: session.set("tries", 5, ttl=60))
    late = lapse(app, browser, "tries")
    for tries in (1, 2):
        assert late.run(lambda: session.atomic_update("tries", lambda n: n + 1, 0)) == tries
        assert late.twin(app.another()).run(lambda: session["tries"]) == tries
        assert_cached_as_stored(late)
    assert ends(app, late) == {}


@pytest.mark.parametrize("before", [1, 5])
def test_increments_of_a_key_past_its_end(make_app: MakeApp, before: int) -> None:
    """To two overlapping increments it is missing: they count from nothing, whatever it had been."""
    app = make_app(SESSION_MERGE={"hits": merge.add})
    browser, _ = started(app)
    browser.run(lambda: session.set("hits", before, ttl=60))
    late = lapse(app, browser, "hits")
    told: list[Any] = []
    session_conflict.connect(lambda _app, base, **_: told.append(base), late.app.flask, weak=False)

    def increment(between: Any = None) -> None:
        hits = session.get("hits", 0)
        if between:
            late.twin().run(between)
        session["hits"] = hits + 1

    late.run(lambda: increment(increment))
    assert told == [merge.MISSING]
    assert late.twin(app.another()).run(lambda: session["hits"]) == 2
    assert ends(app, late) == {}
    assert_cached_as_stored(late)


@pytest.mark.parametrize("how", ["deleted", "deleted and written", "set anew", "given another end"])
def test_a_change_of_a_key_that_others_changed(make_app: MakeApp, how: str) -> None:
    """Changed in place, a key that is gone by now has the end that it was given, and any other the one it has."""
    app = make_app()
    browser, twin = started(app)
    browser.run(lambda: session.set("k", [1], ttl=60))
    before = ends(app, browser)
    others: dict[str, Any] = {
        "deleted": lambda: session.pop("k"),
        "deleted and written": lambda: (session.pop("k"), session.update(start=1)),
        "set anew": lambda: session.update(k=[5]),
        "given another end": lambda: session.set("k", [5], ttl=3600),
    }
    meanwhile: list[dict[bytes, int]] = []

    def view() -> None:
        session["k"].append(2)
        twin.run(others[how])
        meanwhile.append(ends(app, browser))

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["k"]) == [1, 2]
    assert ends(app, browser) == (before if how.startswith("deleted") else meanwhile[0])
    assert_cached_as_stored(browser)


@pytest.mark.parametrize("change", ["in place", "atomic_update"])
def test_a_merge_that_brings_back_keeps_the_end(make_app: MakeApp, change: str) -> None:
    """Deleted here and added to elsewhere, what the merge leaves of a key has the end of the stored one."""
    app = make_app(SESSION_MERGE={"cart": merge.append})
    browser, twin = started(app)
    browser.run(lambda: session.set("cart", ["a"], ttl=60))
    before = ends(app, browser)

    def add() -> None:
        if change == "in place":
            session["cart"].append("c")
        else:
            session.atomic_update("cart", lambda cart: [*cart, "c"])

    def view() -> None:
        assert session["cart"] == ["a"]
        twin.run(add)
        del session["cart"]

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["cart"]) == ["c"]
    assert ends(app, browser) == before
    assert_cached_as_stored(browser)


def test_a_session_of_its_own_keeps_ends(make_app: MakeApp) -> None:
    """The second click of a double log-in takes a key along that it has changed in place, and its end (G8)."""
    app = make_app()
    browser, twin = started(app)
    browser.run(lambda: (session.set("sudo", [1], ttl=60), session.set("other", [1], ttl=60)))
    before, handle = ends(app, browser), handle_of(browser)

    def log_in() -> None:
        session.regenerate()
        session["user"] = "ada"

    def view() -> None:
        session["sudo"].append(2)
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        twin.run(log_in)
        log_in()

    browser.run(view)
    assert handle_of(browser) != handle
    assert browser.twin(app.another()).run(lambda: (session["sudo"], session["other"])) == ([1, 2], [1])
    assert ends(app, browser) == before
    assert_cached_as_stored(browser)


HOUR_MS = 3_600_000


ENDS = [
    (there, ttl)
    for there in ("gone", "no end", "past", "later")
    for ttl in ("none", "keep", "kept, past", "kept, later")
]


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize(("there", "ttl"), ENDS)
def test_what_becomes_of_an_end(make_app: MakeApp, there: str, ttl: str, cleared: bool) -> None:
    """A field keeps the end that it has, or where it is gone the one that it is said to have had; past it, it goes."""
    app = make_app()
    browser, _ = started(app)
    if there != "gone":
        browser.run(lambda: session.set("k", 1, None if there == "no end" else HOUR_MS / 1000))
    reader = lapse(app, browser, "k") if there == "past" else browser.twin(app.another())
    stored_then = read_hash(app.stored(handle_of(browser)))
    later = stored_then.ends_ms
    ttls = {"none": 0, "keep": KEEP, "kept, past": KEPT + 1, "kept, later": KEPT + later}

    def view() -> Snapshot | None:
        visit = session._transaction.visit  # type: ignore[attr-defined]
        base = visit.load()
        assert base is not None
        applied = visit.commit(Delta(base.pair, sets={b"k": Put(b"2", ttl_ms=ttls[ttl])}, cleared=cleared))
        snapshot: Snapshot | None = applied.snapshot
        return snapshot

    # None: the field goes; 0: it stays for good.
    end: int | None = {"gone": 0, "no end": 0, "past": None, "later": stored_then.deadlines.get(b"k")}[there]
    if cleared or there == "gone":
        end = {"kept, past": None, "kept, later": later}.get(ttl, 0)
    if ttl == "none":
        end = 0
    cached = reader.run(view)
    stored = read_hash(app.stored(handle_of(browser)))
    assert stored.fields.get(b"k") == (None if end is None else b"2")
    assert stored.deadlines == ({b"k": end} if end else {})
    assert stored.size == sum(len(name) + len(value) for name, value in stored.fields.items())
    assert cached == stored


# -- what a commit leaves of what was handed out --------------------------------------


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize(
    ("function", "start", "ours", "theirs", "later", "expected"),
    [
        (merge.append, ["a"], lambda v: v.append("b"), lambda v: v.append("c"), lambda v: v.append("d"), list("acbd")),
        (merge.union, {1}, lambda v: v.add(2), lambda v: v.add(3), lambda v: v.add(4), {1, 2, 3, 4}),
        (merge.deep, {"a": 1}, lambda v: v.update(b=2), lambda v: v.update(c=3), lambda v: v.update(d=4), {"a": 1, "b": 2, "c": 3, "d": 4}),
    ],
    ids=["list", "set", "dict"],
)  # fmt: skip
def test_a_merged_value_is_the_one_that_was_handed_out(
    make_app: MakeApp,
    function: Any,
    start: Any,
    ours: Any,
    theirs: Any,
    later: Any,
    expected: Any,
    assigned: bool,
) -> None:
    """After a commit that merged, changes of a value handed out before it still count (G1)."""
    app = make_app(SESSION_MERGE={"value": function})
    browser, twin = started(app, value=start)

    def view() -> None:
        value = session["value"]
        ours(value)
        if assigned:  # as one is used to from Flask's own session
            session["value"] = value
        twin.run(lambda: theirs(session["value"]))
        session.commit()
        assert session["value"] is value
        later(value)

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["value"]) == expected


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize(
    ("function", "default", "theirs", "merged"),
    [
        (merge.append, ["welcome"], ["gift"], ["gift", "welcome"]),
        (merge.union, {"welcome"}, {"gift"}, {"gift", "welcome"}),
        (merge.deep, {"welcome": 1}, {"gift": 1}, {"gift": 1, "welcome": 1}),
    ],
    ids=["list", "set", "dict"],
)
def test_an_object_of_the_app_is_not_merged_into(
    make_app: MakeApp, function: Any, default: Any, theirs: Any, merged: Any, found: bool
) -> None:
    """What an app puts into all its sessions stays as it is when one of them is merged: no visitor sees another's."""
    app = make_app(SESSION_MERGE={"value": function})
    browser, twin = started(app, **({"value": type(default)()} if found else {}))
    shown = type(default)(default)

    def view() -> Any:
        assert not session.get("value")
        twin.run(lambda: session.update(value=theirs))
        session["value"] = default
        session.commit()
        return session["value"]

    assert browser.run(view) == merged
    assert default == shown
    assert browser.twin(app.another()).run(lambda: session["value"]) == merged
    stranger = app.browser()
    assert stranger.run(lambda: session.setdefault("value", default)) == shown
    assert stranger.twin(app.another()).run(lambda: session["value"]) == shown


def test_attributes_are_of_the_version_that_was_read(make_app: MakeApp) -> None:
    """After a commit on top of somebody else's, permanence is still what was read, as all else is (G4)."""
    app = make_app()
    browser, twin = started(app)

    def others() -> None:
        session.permanent, session.label, session["b"] = True, "phone", 1

    def view() -> Any:
        before = (session.permanent, session.label, session.get("b"))
        twin.run(others)
        session["c"] = 1
        session.commit()
        return before, (session.permanent, session.label, session.get("b"))

    before, after = browser.run(view)
    assert after == before == (False, None, None)
    assert browser.run(lambda: (session.permanent, session.label, session["b"], session["c"])) == (
        True,
        "phone",
        1,
        1,
    )


@pytest.mark.parametrize("attribute", ["principal", "label", "lifetime", "permanent"])
def test_serializable_counts_attributes(make_app: MakeApp, attribute: str) -> None:
    """Under "serializable" a read counts if anything is changed, an attribute included."""
    app = make_app(SESSION_CONFLICT="serializable")
    browser, twin = started(app, role="user")

    def view() -> None:
        assert session["role"] == "user"
        twin.run(lambda: session.update(role="banned"))
        setattr(session, attribute, {"lifetime": 50, "permanent": True}.get(attribute, "x"))

    browser.run(view, status=409)
    assert browser.run(lambda: getattr(session, attribute)) in (None, False)


def test_a_request_of_many_commits_over_another_one(make_valkey_app: MakeApp) -> None:
    """Of its own commits it tells those that the journal has room for, and the last one is checked as the first."""
    app = make_valkey_app(SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(n=0, k=0))
    other = browser.twin()

    def view() -> int:
        assert session["n"] == 0
        other.run(lambda: session.update(k=1))
        for number in range(300):
            session[f"a{number % 3}"] = number
            session.commit()
        return len(session._transaction.ledger._own)

    assert browser.run(view) == 256
    assert browser.run(lambda: (session["k"], session["a2"])) == (1, 299)
