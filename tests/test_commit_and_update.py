"""What ``commit()`` and ``atomic_update()`` leave behind: outcomes that stay unknown, ends of keys, live values."""

from __future__ import annotations

from typing import Any

import pytest
from flask import session

from luasession import SessionConflict, SessionUnavailable, merge, session_conflict, session_discarded

from .conftest import Browser, MakeApp, TestApp


def started(app: TestApp, **values: Any) -> tuple[Browser, Browser]:
    """Return a browser that has a session, and a twin for parallel requests."""
    browser = app.browser()
    browser.run(lambda: session.update({"start": 0} | values))
    return browser, browser.twin()


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
    """What ``commit()`` has refused is not sent again at the end, unless the view has added to it."""
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

    browser.run(view, status=200 if caught and not later else 409)
    times = 2 if later else 1
    assert told == ["n"] * times
    assert len(answered) == times - caught
    assert browser.run(lambda: dict(session)) == {"start": 0, "n": 10}


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


def test_a_key_that_ends_meanwhile_stays_ended(make_app: MakeApp) -> None:
    """Changed in place, a key whose end comes before the commit does not come back."""
    import time

    app = make_app()
    browser, _ = started(app)
    browser.run(lambda: session.set("k", [1], ttl=0.15))

    def view() -> None:
        session["k"].append(2)
        session["other"] = 1
        time.sleep(0.2)

    browser.run(view)
    handle = browser.cookies["session"].partition(".")[0]
    assert b"k" not in app.stored(handle)
    assert browser.run(lambda: dict(session)) == {"start": 0, "other": 1}
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"start": 0, "other": 1}


# -- what a commit leaves of what was handed out --------------------------------------


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
    make_app: MakeApp, function: Any, start: Any, ours: Any, theirs: Any, later: Any, expected: Any
) -> None:
    """After a commit that merged, changes of a value handed out before it still count (G1)."""
    app = make_app(SESSION_MERGE={"value": function})
    browser, twin = started(app, value=start)

    def view() -> None:
        value = session["value"]
        ours(value)
        twin.run(lambda: theirs(session["value"]))
        session.commit()
        assert session["value"] is value
        later(value)

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["value"]) == expected


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
